"""Training state: whole or refused, by name."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from twofold.base.records import InputError
from twofold.model.qwen3 import Qwen3
from twofold.train.checkpoint import FACTS, load_state, save_state
from twofold.train.loop import OptimConfig, Trainer
from twofold.train.objectives import CrossEntropy, Objective, PolicyGradient

Make = Callable[..., Any]


STEADY = OptimConfig(decay="constant")  # whose rates do not depend on the number of steps


def test_tensors_and_facts_come_back(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6).view(2, 3).T, "b": torch.tensor(1.5)}
    facts = {"step": 3, "source": {"name": "ü", "cursor": [1, 2]}}
    save_state(tmp_path / "state", tensors, facts)
    loaded, loaded_facts = load_state(tmp_path / "state")
    assert loaded_facts == facts and loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_damaged_states_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "state"
    save_state(path, {"a": torch.zeros(100)}, {"step": 1})
    whole = path.read_bytes()
    for damaged in (b"", whole[:5], whole[:-1], b"\xff" * 64):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"is damaged .* delete it"):
            load_state(path)


@pytest.fixture
def trained(tmp_path: Path, make_model: Callable[..., Qwen3], make_source: Callable[..., Any]) -> Path:
    Trainer(make_model(), make_source(), CrossEntropy(), STEADY, 2, tmp_path).fit()
    return tmp_path


@pytest.mark.parametrize(
    ("lost", "words"),
    [
        ("adamw.model.norm.weight.", "no adamw exp_avg that fits 'model.norm.weight'"),
        ("adamw.model.norm.weight.exp_avg_sq", "no adamw exp_avg_sq that fits 'model.norm.weight'"),
        ("muon.model.layers.1.self_attn.qkv_proj.weight.momentum", "no muon momentum that fits 'model.layers.1.self"),
        ("muon.", "no muon moments that fits 'model.layers.0.self_attn.qkv_proj.weight'"),
        ("model.model.norm.weight", "does not fit this model: it has no model.model.norm.weight; delete"),
        ("random.", "no random.cpu, the state of torch's random numbers"),
    ],
)
def test_a_state_that_lacks_something_is_refused_by_name(
    lost: str, words: str, trained: Path, make_model: Callable[..., Qwen3], make_source: Callable[..., Any]
) -> None:
    path = trained / "state.safetensors"
    tensors, facts = load_state(path)
    left = {name: tensor for name, tensor in tensors.items() if not name.startswith(lost)}
    assert len(left) < len(tensors)
    save_state(path, left, facts)
    with pytest.raises(InputError, match=words):
        Trainer(make_model(), make_source(), CrossEntropy(), STEADY, 4, trained).fit()


def test_a_state_of_another_model_is_refused(
    trained: Path, make_model: Callable[..., Qwen3], make_source: Callable[..., Any]
) -> None:
    with pytest.raises(InputError, match="does not fit this model"):
        Trainer(make_model(hidden_size=20), make_source(), CrossEntropy(), STEADY, 4, trained).fit()


@pytest.mark.parametrize("lost", FACTS)
def test_a_missing_fact_is_named(lost: str, trained: Path, make_model: Make, make_source: Make) -> None:
    path = trained / "state.safetensors"
    tensors, facts = load_state(path)
    save_state(path, tensors, {name: value for name, value in facts.items() if name != lost})
    with pytest.raises(InputError, match=rf"has no '{lost}'; it cannot be resumed, delete it"):
        Trainer(make_model(), make_source(), CrossEntropy(), STEADY, 4, trained).fit()


def test_missing_pieces_of_the_data_state_and_of_the_metrics_are_named(
    trained: Path, make_model: Make, make_source: Make
) -> None:
    path = trained / "state.safetensors"
    tensors, facts = load_state(path)
    save_state(path, tensors, facts | {"source": {}})
    with pytest.raises(InputError, match="its state of the data lacks 'taken'"):
        Trainer(make_model(), make_source(), CrossEntropy(), STEADY, 4, trained).fit()
    save_state(path, tensors, facts)
    metrics = trained / "metrics.jsonl"
    metrics.write_text(metrics.read_text().split("\n")[0] + "\n")
    with pytest.raises(InputError, match=r"metrics.jsonl has rows of 1 steps, the state beside it is of 2; put the"):
        Trainer(make_model(), make_source(), CrossEntropy(), STEADY, 4, trained).fit()


@pytest.mark.parametrize(
    ("optim", "objective", "steps", "words"),
    [
        (STEADY.model_copy(update={"adam_lr": 0.01}), CrossEntropy(), 4, "optim.adam_lr was 0.003 and is 0.01 now"),
        (STEADY, CrossEntropy(balance=0.5), 4, "objective.balance was 0.0 and is 0.5 now"),
        (STEADY, PolicyGradient(), 4, "objective.name was 'CrossEntropy' and is 'PolicyGradient' now"),
        (OptimConfig(), CrossEntropy(), 4, "optim.decay was 'constant' and is 'linear' now; steps was 'not set'"),
    ],
)
def test_changed_settings_are_refused_with_both_values(
    optim: OptimConfig, objective: Objective, steps: int, words: str, trained: Path, make_model: Make, make_source: Make
) -> None:
    before = (trained / "state.safetensors").read_bytes()
    model = make_model()
    with pytest.raises(InputError, match=words):
        Trainer(model, make_source(), objective, optim, steps, trained).fit()
    assert (trained / "state.safetensors").read_bytes() == before
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), make_model().parameters(), strict=True))


def test_steps_count_only_where_the_schedule_needs_them(
    trained: Path, tmp_path: Path, make_model: Make, make_source: Make
) -> None:
    longer = Trainer(make_model(), make_source(), CrossEntropy(), STEADY, 4, trained)
    longer.fit()
    assert longer.step == 4 and len(longer.metrics.rows()) == 4
    for steps in (2, 3):
        work, expected = tmp_path / "falling", pytest.raises(InputError, match="steps was 2 and is 3 now")
        with expected if steps == 3 else nullcontext():
            Trainer(make_model(), make_source(), CrossEntropy(), OptimConfig(), steps, work).fit()


def test_random_numbers_go_on_where_they_were(tmp_path: Path, make_model: Make, make_source: Make) -> None:
    torch.manual_seed(7)
    Trainer(make_model(), make_source(), CrossEntropy(), STEADY, 1, tmp_path).fit()
    drawn = torch.rand(3)
    torch.manual_seed(8)
    Trainer(make_model(), make_source(), CrossEntropy(), STEADY, 1, tmp_path).fit()
    assert torch.equal(torch.rand(3), drawn)


def test_idle_experts_are_counted_on(tmp_path: Path, make_model: Make, make_source: Make) -> None:
    objective = CrossEntropy()
    Trainer(make_model(True), make_source(), objective, STEADY, 1, tmp_path).fit()
    objective.load.load_state_dict({"idle": [[3, 0, 0, 1], [0, 0, 2, 0]]})
    Trainer(make_model(True), make_source(), objective, STEADY, 2, tmp_path / "other").fit()
    counted = objective.state_dict()["idle"]
    again = CrossEntropy()
    Trainer(make_model(True), make_source(), again, STEADY, 2, tmp_path / "other").fit()
    assert again.state_dict()["idle"] == counted


SAVING = """
import sys, torch
from pathlib import Path
from twofold.base.log import peak_memory_bytes
from twofold.train.checkpoint import load_state, save_state
tensors = {f"t{i}": torch.full((4_000_000,), float(i)) for i in range(8)}
before = peak_memory_bytes()
save_state(Path(sys.argv[1]), tensors, {"step": 3})
print((peak_memory_bytes() - before) / sum(t.nbytes for t in tensors.values()))
"""


def test_saving_needs_no_copy_of_the_state(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    done = subprocess.run([sys.executable, "-c", SAVING, str(path)], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.1
    tensors, facts = load_state(path)
    assert facts == {"step": 3}
    assert all(torch.equal(tensors[f"t{i}"], torch.full((4_000_000,), float(i))) for i in range(8))
