"""Objectives: weights, policy gradients and distillation, against plain formulas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from twofold.base.batch import TokenBatch
from twofold.model.attn_inputs import AttnInputs
from twofold.model.qwen3 import Qwen3
from twofold.ops import reference
from twofold.train.objectives import LOGP_DIFFERENCE, CrossEntropy, PolicyGradient, TokenKL

Make = Callable[..., Any]
LENGTHS = [7, 5]


def number(tensor: torch.Tensor) -> float:
    return tensor.detach().item()


def logits(model: Qwen3, batch: TokenBatch) -> torch.Tensor:
    return model.logits(model(batch.tokens_T, batch.positions_T, AttnInputs.packed(batch.cu_seqlens)))


def logprobs(model: Qwen3, batch: TokenBatch) -> torch.Tensor:
    return reference.token_logprobs(logits(model, batch), batch.targets_T)


def grads(model: Qwen3, loss: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)


def same(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-4)


def rollout(model: Qwen3, make_batch: Make, advantages: list[float], shift: float | list[float] = 0.0) -> TokenBatch:
    """A batch whose recorded log-probabilities are the model's own minus ``shift``; the first two tokens are prompt."""
    weights = [[0.0, 0.0] + [1.0] * (n - 2) for n in LENGTHS]
    batch: TokenBatch = make_batch(LENGTHS, 0, weights)
    counts = torch.tensor(batch.cu_seqlens).diff()
    batch.extras["advantages"] = torch.tensor(advantages).repeat_interleave(counts)
    with torch.no_grad():
        batch.extras["old_logprobs"] = logprobs(model, batch) - torch.as_tensor(shift)
    return batch


def test_cross_entropy_weighs_tokens(make_model: Make, make_batch: Make) -> None:
    model = make_model()
    weights = [[1.0, 0.0, 2.0, 1.0, 0.0, 0.5, 1.0], [1.0, 0.0, 0.0, 3.0, 0.0]]
    batch = make_batch(LENGTHS, 0, weights)
    objective = CrossEntropy()
    losses, stats = objective(model, batch)
    expected = -(batch.weights_T * logprobs(model, batch)).sum()
    torch.testing.assert_close(losses["loss"], expected, atol=1e-5, rtol=1e-5)
    same(grads(model, losses["loss"]), grads(model, expected))
    assert objective.counts(batch) == {"loss": 7.5, "mean_token_accuracy": 7.5}
    hits = logits(model, batch).argmax(-1) == batch.targets_T
    assert number(stats["mean_token_accuracy"]) == pytest.approx(number((batch.weights_T * hits).sum()))


def test_targets_without_weight_do_not_matter(make_model: Make, make_batch: Make) -> None:
    model, batch = make_model(), make_batch(LENGTHS, 0, [[0.0] * 3 + [1.0] * (n - 3) for n in LENGTHS])
    before = CrossEntropy()(model, batch)[0]["loss"]
    batch.targets_T = torch.where(batch.weights_T > 0, batch.targets_T, (batch.targets_T + 1) % 32)
    assert torch.equal(before, CrossEntropy()(model, batch)[0]["loss"])


@pytest.mark.parametrize("kind", ["grpo", "gspo"])
def test_at_ratio_one_the_gradient_is_reinforce(kind: Any, make_model: Make, make_batch: Make) -> None:
    model = make_model()
    batch = rollout(model, make_batch, [1.5, -0.5])
    losses, stats = PolicyGradient(kind)(model, batch)
    reinforce = -(batch.weights_T * batch.extras["advantages"] * logprobs(model, batch)).sum()
    same(grads(model, losses["policy"]), grads(model, reinforce))
    assert number(stats[LOGP_DIFFERENCE + "/max"]) < 1e-5
    assert number(stats["clip_ratio/low_mean"]) == number(stats["clip_ratio/high_mean"]) == 0
    assert set(losses) | set(stats) <= {*PolicyGradient(kind).counts(batch), LOGP_DIFFERENCE + "/max"}


@pytest.mark.parametrize("kind", ["grpo", "gspo"])
@pytest.mark.parametrize(
    ("shift", "advantage", "clipped"),
    [
        (0.5, 1.0, True),
        (0.5, -1.0, False),
        (-0.5, -1.0, True),
        (-0.5, 1.0, False),
        (0.22, 1.0, False),
        (0.22, -1.0, False),
    ],
)
def test_clipping_on_both_sides(
    kind: Any, shift: float, advantage: float, clipped: bool, make_model: Make, make_batch: Make
) -> None:
    model = make_model()
    batch = rollout(model, make_batch, [advantage, advantage], shift)
    losses, stats = PolicyGradient(kind, clip_low=0.2, clip_high=0.28)(model, batch)
    largest = max(number(g.abs().max()) for g in grads(model, losses["policy"]))
    assert largest == 0 if clipped else largest > 1e-3
    tokens = number(batch.weights_T.sum())
    assert number(stats["clip_ratio/high_mean"]) == (tokens if clipped and shift > 0 else 0)
    assert number(stats["clip_ratio/low_mean"]) == (tokens if clipped and shift < 0 else 0)
    assert number(stats[LOGP_DIFFERENCE + "/mean"]) == pytest.approx(tokens * abs(shift), rel=1e-4)


def test_gspo_uses_one_ratio_a_sequence(make_model: Make, make_batch: Make) -> None:
    model = make_model()
    shift = [0.3, 0.3, 0.3, -0.4, 0.1, 0.0, 0.0, 0.05, -0.1, 0.2]
    batch = rollout(model, make_batch, [1.0, -2.0], shift)
    batch.weights_T[:] = 1.0  # the first places too: they are where a sequence could be taken for its neighbour
    batch.weights_T[4] = 0.0
    losses, _ = PolicyGradient("gspo", 10.0, 10.0)(model, batch)
    ratio = (logprobs(model, batch) - batch.extras["old_logprobs"]).double()
    expected = torch.zeros(())
    for start, end, advantage in ((0, 6, 1.0), (6, 10, -2.0)):
        weight = batch.weights_T[start:end]
        mean = (weight * ratio[start:end]).sum() / weight.sum()
        expected = expected - advantage * weight.sum() * mean.exp()
    assert number(losses["policy"]) == pytest.approx(number(expected), rel=1e-5)
    same(grads(model, losses["policy"]), grads(model, expected.float()))


def test_tokens_of_weight_zero_carry_no_gradient(make_model: Make, make_batch: Make) -> None:
    model = make_model()
    batch = rollout(model, make_batch, [1.0, -1.0])
    forced = torch.tensor([2, 3, 8])
    batch.weights_T[forced] = 0.0
    for objective in (PolicyGradient(), PolicyGradient("gspo"), PolicyGradient(entropy_coef=0.1)):
        before = objective(model, batch)[0]
        plain = grads(model, torch.stack(list(before.values())).sum())
        batch.extras["advantages"][forced] = 1e3
        batch.extras["old_logprobs"][forced] = -50.0
        after = objective(model, batch)[0]
        assert all(torch.equal(before[name], after[name]) for name in before)
        same(plain, grads(model, torch.stack(list(after.values())).sum()))
    kept = batch.weights_T > 0
    reinforce = -(batch.extras["advantages"] * logprobs(model, batch))[kept].sum()
    same(grads(model, PolicyGradient()(model, batch)[0]["policy"]), grads(model, reinforce))


def test_kl_penalty_and_entropy_bonus(make_model: Make, make_batch: Make) -> None:
    model = make_model()
    batch = rollout(model, make_batch, [0.0, 0.0])
    batch.extras["ref_logprobs"] = batch.extras["old_logprobs"].clone()
    objective = PolicyGradient(kl_coef=0.5)
    losses, _ = objective(model, batch)
    assert abs(number(losses["kl"])) < 1e-5 and "kl" in objective.counts(batch)
    batch.extras["ref_logprobs"] -= 0.3
    tokens = number(batch.weights_T.sum())
    expected = 0.5 * tokens * (torch.tensor(-0.3).exp().item() + 0.3 - 1)
    assert number(objective(model, batch)[0]["kl"]) == pytest.approx(expected, rel=1e-3)
    entropy = (batch.weights_T * reference.entropy(logits(model, batch))).sum()
    losses, stats = PolicyGradient(entropy_coef=0.2)(model, batch)
    bonus = losses["entropy_bonus"]
    assert number(stats["entropy"]) == pytest.approx(number(entropy), rel=1e-5)
    torch.testing.assert_close(bonus, -0.2 * entropy, atol=1e-5, rtol=1e-5)
    same(grads(model, bonus), grads(model, -0.2 * entropy))


def test_a_micro_batch_without_weights_adds_nothing(make_model: Make, make_batch: Make) -> None:
    model = make_model()
    batch = rollout(model, make_batch, [1.0, 1.0])
    batch.weights_T.zero_()
    for objective in (CrossEntropy(), PolicyGradient(), PolicyGradient("gspo"), TokenKL(make_model(), "reverse", 32)):
        losses, stats = objective(model, batch)
        assert all(number(value) == 0 for value in (*losses.values(), *stats.values()))


def test_token_kl_is_zero_for_a_perfect_student_and_has_a_direction(make_model: Make, make_batch: Make) -> None:
    student, teacher = make_model(), make_model(seed=1)
    batch = rollout(student, make_batch, [0.0, 0.0])
    losses, _ = TokenKL(make_model(), "reverse", 32)(student, batch)
    assert abs(number(losses["kl"])) < 1e-4
    assert max(number(g.abs().max()) for g in grads(student, losses["kl"])) < 1e-4
    places = batch.weights_T > 0
    ours, theirs = logits(student, batch)[places], logits(teacher, batch)[places].detach()
    for direction, pair in (("reverse", (ours, theirs)), ("forward", (theirs, ours))):
        loss = TokenKL(teacher, direction, 32)(student, batch)[0]["kl"]  # type: ignore[arg-type]
        expected = reference.kl_divergence(*pair).sum()
        torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-4)
        same(grads(student, loss), grads(student, expected))
        assert all(p.grad is None for p in teacher.parameters())


def test_token_kl_leaves_padded_columns_out(make_model: Make, make_batch: Make) -> None:
    student, teacher = (make_model(seed=s, tie_word_embeddings=False) for s in (0, 1))
    batch = rollout(student, make_batch, [0.0, 0.0])
    objective = TokenKL(teacher, "reverse", 28)
    before = number(objective(student, batch)[0]["kl"])
    with torch.no_grad():
        teacher.lm_head.weight[28:] = 7.0
        student.lm_head.weight[28:] = -3.0
    assert number(objective(student, batch)[0]["kl"]) == before
    loss = objective(student, batch)[0]["kl"]
    gradient = torch.autograd.grad(loss, student.lm_head.weight)[0]
    assert number(gradient[28:].abs().max()) == 0 < number(gradient[:28].abs().max())


def test_many_logits_are_made_in_chunks_with_the_same_numbers(
    monkeypatch: pytest.MonkeyPatch, make_model: Make, make_batch: Make
) -> None:
    model, batch = make_model(), make_batch([9, 5, 7], 3)

    def run() -> list[torch.Tensor]:
        model.zero_grad()
        losses, stats = CrossEntropy()(model, batch)
        losses["loss"].backward()
        return [losses["loss"].detach(), stats["mean_token_accuracy"], *(p.grad.clone() for p in model.parameters())]

    whole = run()
    monkeypatch.setattr("twofold.train.objectives.MOST_LOGITS", 3 * model.config.vocab_size)
    for chunked, plain in zip(run(), whole, strict=True):
        torch.testing.assert_close(chunked, plain, atol=1e-5, rtol=1e-5)
