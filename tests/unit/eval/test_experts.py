"""Expert use: counts are all assignments, dead experts are seen, specialisation is a distance between kinds."""

import json

import pytest
import torch

from twofold.eval.experts import distances, expert_report, routing_counts, specialisation
from twofold.model.config import ModelConfig
from twofold.model.qwen3 import Qwen3


@pytest.fixture
def model() -> Qwen3:
    built = Qwen3(
        ModelConfig(
            vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, rms_norm_eps=1e-6, rope_theta=1e4, max_position_embeddings=64,
            tie_word_embeddings=True, initializer_range=0.3, num_experts=5, num_experts_per_tok=2,
            moe_intermediate_size=8,
        )
    )  # fmt: skip
    built.init_weights(seed=0)
    return built


def test_counts_are_all_assignments_of_each_document(model: Qwen3) -> None:
    documents = [[1, 2, 3], [4, 5, 6, 7, 8]]
    counts = routing_counts(model, documents)
    assert counts.shape == (2, 2, 5)
    assert counts.sum(-1).tolist() == [[6, 6], [10, 10]]
    torch.testing.assert_close(routing_counts(model, documents[1:])[0], counts[1])


def test_specialisation_is_total_variation_between_kinds() -> None:
    one = torch.tensor([[[4.0, 0.0]]])
    other = torch.tensor([[[0.0, 4.0]]])
    half = torch.tensor([[[2.0, 2.0]]])
    assert specialisation({"a": one, "b": other}).tolist() == [1.0]
    assert specialisation({"a": one, "b": half}).tolist() == [0.5]
    assert specialisation({"a": half, "b": half * 3}).tolist() == [0.0]


def test_tasks_are_compared_without_text(model: Qwen3) -> None:
    documents = {
        "a": [[1, 2, 3, 4], [2, 2, 5]],
        "text": [[30, 31, 32], [33, 34, 35, 36], [37, 38]],
        "b": [[9, 8, 7, 6], [8, 8, 8]],
        "c": [[11, 12, 13], [14, 12, 19, 11]],
    }
    report = expert_report(model, documents)
    tasks = {kind: routing_counts(model, rows) for kind, rows in documents.items() if kind != "text"}
    assert report["task_tv"] == specialisation(tasks).tolist() != report["family_tv"]
    assert list(report["pairs"]) == ["a|text", "a|b", "a|c", "text|b", "text|c", "b|c"]
    assert report["pairs"]["a|c"] == float(distances(tasks)["a", "c"].mean())

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    among = [report["pairs"][pair] for pair in ("a|b", "a|c", "b|c")]
    assert mean(report["task_tv"]) == pytest.approx(mean(among))
    assert mean(report["family_tv"]) == pytest.approx(mean(list(report["pairs"].values())))
    samples = report["task_tv_samples"]
    assert len(samples) == 200 and len(set(samples)) > 10 and samples != report["family_tv_samples"]
    assert min(samples) <= mean(report["task_tv"]) <= max(samples)
    assert json.loads(json.dumps(report)) == report


def test_samples_of_both_distances_are_from_the_same_documents(model: Qwen3) -> None:
    documents = {"a": [[1, 2, 3, 4], [2, 2, 5]], "b": [[9, 8, 7, 6], [8, 8, 8]]}
    without_text = expert_report(model, documents)
    assert without_text["task_tv"] == without_text["family_tv"]
    assert without_text["task_tv_samples"] == without_text["family_tv_samples"]
    lone = expert_report(model, {"a": documents["a"], "text": documents["b"]})
    assert lone["task_tv"] == lone["task_tv_samples"] == []
    assert lone["family_tv_samples"] == without_text["family_tv_samples"]


def test_a_dead_expert_is_reported(model: Qwen3) -> None:
    documents = {"a": [[1, 2, 3, 4]] * 3, "b": [[9, 8, 7, 6]] * 3}
    alive = expert_report(model, documents)
    assert len(alive["family_tv"]) == 2 and len(alive["family_tv_samples"]) == 200
    assert all(abs(sum(row) - 1) < 1e-6 for row in alive["load"])
    with torch.no_grad():  # the router of layer 0 cannot choose expert 3 for any token
        model.model.layers[0].mlp.gate.weight.mul_(0)
    tied = expert_report(model, documents)
    assert tied["dead"] >= 3 and sorted(tied["load"][0])[-2:] == [0.5, 0.5]
