"""The balancing loss over a whole step, the load of experts in the metrics, and the alarm for dead ones."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from twofold.base.batch import TokenBatch, boundaries, pack
from twofold.base.records import InputError
from twofold.model.attn_inputs import AttnInputs
from twofold.model.qwen3 import Qwen3, Routing
from twofold.ops.reference import load_balancing_loss
from twofold.train import balance
from twofold.train.loop import OptimConfig, Trainer
from twofold.train.micro import part
from twofold.train.objectives import CrossEntropy

Make = Callable[..., Any]


def routing_of(model: Qwen3, batch: TokenBatch) -> Routing:
    routing = Routing()
    model(batch.tokens_T, batch.positions_T, AttnInputs.packed(batch.cu_seqlens), routing)
    return routing


def by_hand(model: Qwen3, batch: TokenBatch) -> torch.Tensor:
    """Mean over layers of the loss of one batch."""
    terms = []
    routing = routing_of(model, batch)
    for ids, probs in zip(routing.ids, routing.probs, strict=True):
        fraction = torch.tensor([(ids == expert).float().mean() for expert in range(probs.shape[1])])
        terms.append(load_balancing_loss(fraction, probs.mean(0)))
    return torch.stack(terms).mean()


def gates(model: Qwen3) -> list[torch.Tensor]:
    return [layer.mlp.gate.weight for layer in model.model.layers if hasattr(layer.mlp, "gate")]


def step_loss(objective: CrossEntropy, model: Qwen3, batches: list[TokenBatch], begin: bool = True) -> torch.Tensor:
    """The balancing loss as the loop adds it up."""
    if begin:
        objective.begin_step(model, batches)
    sums = [objective(model, batch)[0]["balance"] for batch in batches]
    return torch.stack(sums).sum() / sum(objective.counts(batch)["balance"] for batch in batches)


def push_to_one_expert(model: Qwen3, layer: int) -> None:
    """Norms are positive after abs, so a large constant row of the router wins."""
    with torch.no_grad():
        model.model.embed_tokens.weight.abs_()
        gate = model.model.layers[layer].mlp.gate.weight
        gate.mul_(0.01)
        gate[0] = 5.0


def test_it_has_a_gradient_and_follows_the_routing(make_model: Make, make_batch: Make) -> None:
    model, batch = make_model(True), make_batch([20, 20])
    loss = step_loss(CrossEntropy(balance=1.0), model, [batch])
    torch.testing.assert_close(loss, by_hand(model, batch))
    for gradient in torch.autograd.grad(loss, gates(model)):
        assert float(gradient.abs().max()) > 1e-4
    for layer in (0, 1):
        push_to_one_expert(model, layer)
    skewed = step_loss(CrossEntropy(balance=1.0), model, [batch]).detach()
    assert float(skewed) > 1.2 * float(loss.detach()) > 0.9
    torch.testing.assert_close(step_loss(CrossEntropy(balance=0.5), model, [batch]).detach(), 0.5 * skewed)


def test_micro_batches_equal_one_batch(make_model: Make) -> None:
    model = make_model(True)
    rows = [[i % 32 for i in range(a, a + 3 * n, 3)] for a, n in ((1, 25), (2, 4), (9, 9), (17, 14), (5, 2), (30, 30))]
    whole, parts = [pack(rows)], [pack(rows[:1]), pack(rows[1:4]), pack(rows[4:])]
    expected = step_loss(CrossEntropy(1.0), model, whole)
    together = step_loss(CrossEntropy(1.0), model, parts)
    torch.testing.assert_close(together, expected, atol=1e-6, rtol=1e-6)
    parameters = [p for p in model.parameters() if p is not model.model.norm.weight]
    expected_grads = torch.autograd.grad(expected, parameters, allow_unused=True)
    for a, b in zip(torch.autograd.grad(together, parameters, allow_unused=True), expected_grads, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
    apart = step_loss(CrossEntropy(1.0), model, parts, begin=False)
    assert float((apart - expected).detach().abs()) > 1e-3  # shares of each micro-batch are something else


def test_the_loop_logs_the_same_for_any_number_of_micro_batches(tmp_path: Path, make_model: Make) -> None:
    rows = [[(7 * i + j) % 32 for j in range(6 + i)] for i in range(6)]
    logged = []
    for parts in (1, 3):
        source = type("Source", (), {"can_checkpoint": False})()
        cuts = [rows[i : i + 6 // parts] for i in range(0, 6, 6 // parts)]
        source.next_step = lambda cuts=cuts: [pack(cut) for cut in cuts]
        trainer = Trainer(
            make_model(True), source, CrossEntropy(0.1), OptimConfig(muon_lr=0.0), 2, tmp_path / str(parts)
        )
        trainer.fit()
        logged.append(trainer.metrics.rows())
    for one, several in zip(*logged, strict=True):
        assert one.keys() == several.keys() and "balance" in one
        assert several == pytest.approx(one, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("objective", "parts", "calls"),
    [
        (CrossEntropy(1.0), 1, 1),
        (CrossEntropy(1.0), 3, 6),
        (CrossEntropy(0.0), 3, 3),
        (CrossEntropy(1.0, "micro"), 3, 3),
    ],
)
def test_only_a_global_loss_over_several_micro_batches_costs_another_pass(
    objective: CrossEntropy, parts: int, calls: int, make_model: Make, make_batch: Make
) -> None:
    model, batches, seen = make_model(True), [make_batch([6, 5], seed) for seed in range(parts)], []
    model.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    objective.begin_step(model, batches)
    for batch in batches:
        objective(model, batch)
    assert len(seen) == calls and sum(seen) == parts


def micro_by_hand(model: Qwen3, batch: TokenBatch, groups: list[tuple[int, int]]) -> torch.Tensor:
    """Mean over tokens of the loss of each group, where a group is all that its rank has; (first, last) sequences."""
    parts = [part(batch, first, last) for first, last in groups]
    return torch.stack([p.num_tokens * by_hand(model, p) for p in parts]).sum() / batch.num_tokens


def assert_same(model: Qwen3, loss: torch.Tensor, expected: torch.Tensor) -> None:
    """Values, and gradients of all parameters that either depends on."""
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-5)
    parameters = list(model.parameters())
    pairs = [torch.autograd.grad(value, parameters, allow_unused=True) for value in (loss, expected)]
    for a, b in zip(*pairs, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("lengths", "micro_tokens", "expected"),
    [
        ([4, 7, 3, 25, 6], 10, [0, 0, 1, 2, 3]),  # the docstring's example
        ([10, 10], 10, [0, 1]),
        ([9, 9, 9], 10, [0, 0, 1]),
        ([30], 10, [0]),
        ([3, 30, 30, 3], 10, [0, 1, 2, 3]),
        ([3, 4, 5], 100, [0, 0, 0]),
        ([3, 4, 5], 1, [0, 1, 2]),
    ],
)
def test_groups_are_runs_of_whole_sequences(lengths: list[int], micro_tokens: int, expected: list[int]) -> None:
    found = balance.group_of_tokens(boundaries(lengths), micro_tokens).tolist()
    assert found == [group for group, length in zip(expected, lengths, strict=True) for _ in range(length)]


def test_one_group_is_the_global_loss(make_model: Make, make_batch: Make) -> None:
    model, batch = make_model(True), make_batch([12, 7, 20])
    micro = CrossEntropy(1.0, "micro", micro_tokens=batch.num_tokens)
    assert_same(model, step_loss(micro, model, [batch]), step_loss(CrossEntropy(1.0), model, [batch]))
    assert_same(model, step_loss(micro, model, [batch]), by_hand(model, batch))


def test_groups_of_one_size_are_a_plain_mean(make_model: Make, make_batch: Make) -> None:
    model, batch = make_model(True), make_batch([7, 5, 4, 8, 11])  # a sequence of n has n - 1 predictions
    loss = step_loss(CrossEntropy(1.0, "micro", micro_tokens=10), model, [batch])
    parts = [part(batch, first, last) for first, last in ((0, 2), (2, 4), (4, 5))]
    assert [one.num_tokens for one in parts] == [10, 10, 10]
    assert_same(model, loss, torch.stack([by_hand(model, one) for one in parts]).mean())


def test_groups_of_several_sizes_one_longer_than_asked(make_model: Make, make_batch: Make) -> None:
    model, batch = make_model(True, num_hidden_layers=3, mlp_only_layers=(1,)), make_batch([6, 9, 4, 31, 13, 3, 2])
    loss = step_loss(CrossEntropy(1.0, "micro", micro_tokens=10), model, [batch])
    assert_same(model, loss, micro_by_hand(model, batch, [(0, 2), (2, 3), (3, 4), (4, 5), (5, 7)]))
    whole = step_loss(CrossEntropy(1.0), model, [batch])
    assert float((loss - whole).detach()) > 1e-2  # each group is asked to be even by itself


def test_groups_do_not_care_for_micro_batches_cut_between_them(make_model: Make, make_batch: Make) -> None:
    model, batch, groups = make_model(True), make_batch([6, 9, 4, 31, 13, 3, 2]), [(0, 2), (2, 4), (4, 7)]
    objective = CrossEntropy(1.0, "micro", micro_tokens=10)
    several = step_loss(objective, model, [part(batch, first, last) for first, last in groups])
    assert_same(model, several, step_loss(objective, model, [batch]))


def test_groups_do_not_care_for_sources(make_model: Make) -> None:
    model, objective = make_model(True), CrossEntropy(1.0, "micro", micro_tokens=10)
    rows = [[1, 2, 3] * 5, [20, 21, 22] * 5]
    values = [step_loss(objective, model, [pack(rows, sources=sources)]) for sources in ([0, 1], [4, 4])]
    assert torch.equal(*values)


def test_the_size_of_groups_is_a_setting_where_there_are_groups() -> None:
    assert CrossEntropy(0.1, "micro").settings() == {"balance": 0.1, "balance_scope": "micro", "micro_tokens": 256}
    assert CrossEntropy(0.1, "micro", 64).settings()["micro_tokens"] == 64
    assert CrossEntropy(0.1).settings() == {"balance": 0.1, "balance_scope": "global"}  # as in states from before
    assert CrossEntropy(0.1).by_token and CrossEntropy(0.0, "micro").by_token
    assert not CrossEntropy(0.1, "micro").by_token
    with pytest.raises(InputError, match="micro_tokens must be 1 or more, got 0"):
        CrossEntropy(0.1, "micro", 0)


def test_other_groups_are_noticed_on_resuming(tmp_path: Path, make_model: Make, make_source: Make) -> None:
    optim = OptimConfig(decay="constant")

    def trainer(objective: CrossEntropy, steps: int) -> Trainer:
        return Trainer(make_model(True), make_source(), objective, optim, steps, tmp_path)

    trainer(CrossEntropy(0.1, "micro", 10), 1).fit()
    with pytest.raises(InputError, match=r"objective\.micro_tokens was 10 and is 20 now"):
        trainer(CrossEntropy(0.1, "micro", 20), 2).fit()
    with pytest.raises(InputError, match=r"scope was 'micro' and is 'global' now; objective\.micro_tokens was 10"):
        trainer(CrossEntropy(0.1), 2).fit()
    trainer(CrossEntropy(0.1, "micro", 10), 2).fit()


def test_imbalance_of_one_layer_is_visible(make_model: Make, make_batch: Make) -> None:
    model, batch = make_model(True, num_hidden_layers=3, mlp_only_layers=(1,)), make_batch([30, 30])
    push_to_one_expert(model, 2)
    objective = CrossEntropy()
    objective.begin_step(model, [batch])
    objective(model, batch)
    row = objective.end_step()
    loads = {}
    for layer, ids in zip((0, 2), routing_of(model, batch).ids, strict=True):
        loads[f"max_expert_load/layer_{layer}"] = ids.flatten().bincount().max().item() / ids.numel() * 4
    assert {name: row[name] for name in row if "/" in name} == pytest.approx(loads)
    assert row["max_expert_load"] == row["max_expert_load/layer_2"] > row["max_expert_load/layer_0"] + 0.3
    assert objective.end_step() == {}  # a step is reported once


def test_a_dense_model_has_no_load(make_model: Make, make_batch: Make) -> None:
    model, objective, batches = make_model(), CrossEntropy(), [make_batch([5]), make_batch([6])]
    objective.begin_step(model, batches)
    assert set(objective(model, batches[0])[0]) == {"loss"} and objective.end_step() == {}


def test_an_expert_without_tokens_for_long_is_reported_once(
    make_model: Make, make_batch: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(balance, "DEAD_STEPS", 3)
    model, objective = make_model(True, num_hidden_layers=1), CrossEntropy()
    few, many = pack([[5, 5, 5]]), make_batch([32, 32])  # two equal tokens choose 2 of 4 experts
    dead = sorted({0, 1, 2, 3} - set(routing_of(model, few).ids[0].flatten().tolist()))
    assert len(dead) == 2 and len(set(routing_of(model, many).ids[0].flatten().tolist())) == 4

    def step(batch: TokenBatch) -> list[str]:
        objective.begin_step(model, [batch])
        objective(model, batch)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            row = objective.end_step()
        assert row["dead_experts"] == (2 if batch is few else 0)
        return [str(warning.message) for warning in caught]

    assert [step(batch) for batch in (few, few, many, few, few)] == [[]] * 5  # never three in a row
    (message,) = step(few)
    assert message.startswith(f"layer 0: no token has reached expert {dead[0]}, {dead[1]} for 3 steps; raise `balance`")
    assert step(few) == []
