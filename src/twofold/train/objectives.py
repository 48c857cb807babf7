"""Objectives: what is minimised, as sums and counts. The loop divides once by the count of the whole step.

An objective returns ``{name: sum}``; ``counts`` says beforehand what each sum will be divided by, from the batch alone,
so that accumulation over micro-batches and ranks equals one big batch. Pre-training, SFT, RL and distillation are
settings of the three classes here. Where batches come from is not known here.

Shape legend: T tokens of a micro-batch, A of them with a loss weight, S sequences, V vocabulary, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal, Protocol

import torch

from twofold.base.batch import TokenBatch
from twofold.base.dist import ALONE, Ranks
from twofold.model.attn_inputs import AttnInputs
from twofold.model.qwen3 import Qwen3, Routing
from twofold.ops import loss as ops
from twofold.train.balance import MICRO_TOKENS, ExpertLoad, Scope

Sums = dict[str, torch.Tensor]
MOST_LOGITS = 1 << 26  # of a micro-batch, at once (256 MiB in fp32)
LOGP_DIFFERENCE = "sampling/sampling_logp_difference"  # TRL's name


class Objective(Protocol):
    """Sums for one micro-batch, and the counts they are divided by.

    by_token: whether every token's terms need that token's hidden state alone, so that ranks may share a sequence.
    """

    @property
    def by_token(self) -> bool:
        return True

    def counts(self, batch: TokenBatch) -> dict[str, float]: ...

    def __call__(self, model: Qwen3, batch: TokenBatch) -> tuple[Sums, Sums]:
        """Returns (loss sums with gradient, statistics sums without); keys of both appear in ``counts``.

        A statistic whose name ends in "/max" is a maximum: it is not divided, and the step keeps the largest.
        """
        ...

    def begin_step(self, model: Qwen3, batches: Sequence[TokenBatch], ranks: Ranks = ALONE) -> None:
        """Look at all micro-batches of a step before the first is run; by default there is nothing to look for.

        ``ranks`` are the processes that have the step's other tokens.
        """
        return None

    def end_step(self) -> dict[str, float]:
        """Statistics that only the whole step has, for its row of metrics."""
        return {}

    def settings(self) -> dict[str, Any]:
        """What must be the same when a run is resumed, JSON-able."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What is carried from step to step, JSON-able."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what ``state_dict`` gave."""
        return None


class Scored:
    """Hidden states and logits of the places of a batch that carry a loss weight; logits are made when asked for."""

    def __init__(self, model: Qwen3, batch: TokenBatch, routing: Routing | None = None) -> None:
        attn = AttnInputs.packed(batch.cu_seqlens, batch.tokens_T.device)
        hidden = model(batch.tokens_T, batch.positions_T, attn, routing)
        self.places_A = batch.weights_T.nonzero().flatten()
        self.weights_A = batch.weights_T[self.places_A]
        self.targets_A = batch.targets_T[self.places_A]
        self.model, self.hidden_AD = model, hidden.index_select(0, self.places_A)

    @cached_property
    def logits_AV(self) -> torch.Tensor:
        """All logits at once, fp32."""
        return self.model.logits(self.hidden_AD)

    def target_logprobs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability of each target, and whether it is the likeliest token; in chunks where logits are many."""
        rows, vocabulary = len(self.hidden_AD), self.model.config.vocab_size
        if rows * vocabulary <= MOST_LOGITS or self.model.packed_head is not None:
            hits_A = self.logits_AV.detach().argmax(-1) == self.targets_A
            return ops.token_logprobs(self.logits_AV, self.targets_A), hits_A
        chunk = max(1, MOST_LOGITS // vocabulary)
        return ops.linear_logprobs(self.hidden_AD, self.model.head_weight, self.targets_A, chunk)


class CrossEntropy(Objective):
    """Weighted next-token cross entropy; with ``balance`` > 0 plus the MoE load-balancing loss.

    ``balance_scope`` "global" takes expert fractions over the whole step, as Qwen3 does (arXiv 2501.11873); "micro"
    takes them over each run of whole sequences of about ``micro_tokens`` tokens by itself, the control. The load of
    experts is reported with and without the loss.
    """

    def __init__(self, balance: float = 0.0, balance_scope: Scope = "global", micro_tokens: int = MICRO_TOKENS) -> None:
        self.balance, self.load = balance, ExpertLoad(balance_scope, micro_tokens)

    @property
    def by_token(self) -> bool:
        return not self.balance or self.load.scope == "global"

    def counts(self, batch: TokenBatch) -> dict[str, float]:
        weight = float(batch.weights_T.sum())
        out = {"loss": weight, "mean_token_accuracy": weight}
        return out | {"balance": float(batch.num_tokens)} if self.balance else out

    def begin_step(self, model: Qwen3, batches: Sequence[TokenBatch], ranks: Ranks = ALONE) -> None:
        self.load.begin_step(model, batches, self.balance > 0, ranks)

    def __call__(self, model: Qwen3, batch: TokenBatch) -> tuple[Sums, Sums]:
        routing = Routing()
        scored = Scored(model, batch, routing)
        logp_A, hits_A = scored.target_logprobs()
        losses = {"loss": -(scored.weights_A * logp_A).sum()}
        stats = {"mean_token_accuracy": (scored.weights_A * hits_A).sum()}
        if routing.ids:
            self.load.add(routing)
            if self.balance:
                losses["balance"] = self.balance * self.load.loss(routing, batch)
        return losses, stats

    def end_step(self) -> dict[str, float]:
        return self.load.end_step()

    def settings(self) -> dict[str, Any]:
        """The size of groups only where there are groups: states of the global scope do not name it."""
        groups = {"micro_tokens": self.load.micro_tokens} if self.load.scope == "micro" else {}
        return {"balance": self.balance, "balance_scope": self.load.scope} | groups

    def state_dict(self) -> dict[str, Any]:
        return self.load.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.load.load_state_dict(state)


class PolicyGradient(Objective):
    """Clipped policy gradient on rollouts: GRPO's token ratios or GSPO's sequence ratios.

    The batch carries ``extras`` "advantages" and "old_logprobs" per token. GRPO (arXiv 2402.03300) clips each token's
    ratio to [1 - clip_low, 1 + clip_high] (clip-higher, arXiv 2503.14476); GSPO (arXiv 2507.18071) clips
    exp(mean log-ratio) of the sequence. Losses are averaged over tokens of the whole step. ``entropy_coef`` is a bonus
    that the caller may change between steps (an entropy controller); ``kl_coef`` weighs the k3 estimate against
    ``extras["ref_logprobs"]``.
    """

    def __init__(
        self,
        kind: Literal["grpo", "gspo"] = "grpo",
        clip_low: float = 0.2,
        clip_high: float = 0.28,
        entropy_coef: float = 0.0,
        kl_coef: float = 0.0,
    ) -> None:
        self.kind, self.clip_low, self.clip_high = kind, clip_low, clip_high
        self.entropy_coef, self.kl_coef = entropy_coef, kl_coef

    @property
    def by_token(self) -> bool:
        return self.kind == "grpo"

    def settings(self) -> dict[str, Any]:
        """Without the entropy coefficient, which a controller moves."""
        clip = {"clip_low": self.clip_low, "clip_high": self.clip_high}
        return {"kind": self.kind, **clip, "kl_coef": self.kl_coef}

    def counts(self, batch: TokenBatch) -> dict[str, float]:
        tokens = float(batch.weights_T.sum())
        names = ["policy", "entropy", "clip_ratio/low_mean", "clip_ratio/high_mean", LOGP_DIFFERENCE + "/mean"]
        names += ["kl"] if self.kl_coef else []
        return {name: tokens for name in [*names, "entropy_bonus"]}

    def __call__(self, model: Qwen3, batch: TokenBatch) -> tuple[Sums, Sums]:
        scored = Scored(model, batch)
        logp_A = ops.token_logprobs(scored.logits_AV, scored.targets_A)
        old_A, advantage_A = (batch.extras[name][scored.places_A] for name in ("old_logprobs", "advantages"))
        log_ratio_A = logp_A - old_A
        if self.kind == "gspo":
            log_ratio_A = _sequence_mean(log_ratio_A, batch, scored.places_A)
        ratio_A = log_ratio_A.exp()
        clipped_A = ratio_A.clamp(1 - self.clip_low, 1 + self.clip_high)
        gain_A = torch.minimum(ratio_A * advantage_A, clipped_A * advantage_A)
        weights_A = scored.weights_A
        losses = {"policy": -(weights_A * gain_A).sum()}
        if self.kl_coef:
            delta_A = batch.extras["ref_logprobs"][scored.places_A] - logp_A
            losses["kl"] = self.kl_coef * (weights_A * (delta_A.exp() - delta_A - 1)).sum()
        stats: Sums = {}
        if self.entropy_coef:
            entropy_A = ops.entropy_with_grad(scored.logits_AV)
            losses["entropy_bonus"] = -self.entropy_coef * (weights_A * entropy_A).sum()
        stats["entropy"] = (weights_A * ops.entropy(scored.logits_AV)).sum()
        with torch.no_grad():
            stats["clip_ratio/low_mean"] = (weights_A * ((ratio_A < 1 - self.clip_low) & (advantage_A < 0))).sum()
            stats["clip_ratio/high_mean"] = (weights_A * ((ratio_A > 1 + self.clip_high) & (advantage_A > 0))).sum()
            stats |= _logp_difference(logp_A, old_A, weights_A)
        return losses, stats


def _sequence_mean(values_A: torch.Tensor, batch: TokenBatch, places_A: torch.Tensor) -> torch.Tensor:
    """Replace each value by the mean over its sequence (gradient flows through the mean)."""
    ends_S = torch.tensor(batch.cu_seqlens[1:], device=places_A.device)
    sequence_A = torch.bucketize(places_A, ends_S, right=True)
    sequences = len(batch.cu_seqlens) - 1
    sums_S = torch.zeros(sequences, device=values_A.device).index_add(0, sequence_A, values_A)
    counts_S = torch.bincount(sequence_A, minlength=sequences).clamp(min=1)
    return (sums_S / counts_S)[sequence_A]


def _logp_difference(logp_A: torch.Tensor, sampled_A: torch.Tensor, weights_A: torch.Tensor) -> Sums:
    """How far the trainer's log-probabilities are from those recorded while sampling."""
    difference_A = weights_A * (logp_A.detach() - sampled_A).abs()
    largest = difference_A.max() if len(difference_A) else difference_A.sum()  # a micro-batch may carry no weight
    return {LOGP_DIFFERENCE + "/mean": difference_A.sum(), LOGP_DIFFERENCE + "/max": largest}


class TokenKL(Objective):
    """Token-level KL between student and teacher over the full vocabulary, on tokens the student wrote.

    "reverse" is KL(student || teacher), "forward" KL(teacher || student). No gradient flows through sampling. Ids at
    and above ``vocab_limit`` (padding rows) take no part.
    """

    def __init__(self, teacher: Qwen3, direction: Literal["reverse", "forward"], vocab_limit: int) -> None:
        self.teacher, self.direction, self.vocab_limit = teacher, direction, vocab_limit

    def settings(self) -> dict[str, Any]:
        return {"direction": self.direction, "vocab_limit": self.vocab_limit}

    def counts(self, batch: TokenBatch) -> dict[str, float]:
        tokens = float(batch.weights_T.sum())
        return {"kl": tokens, "entropy": tokens, LOGP_DIFFERENCE + "/mean": tokens}

    def __call__(self, model: Qwen3, batch: TokenBatch) -> tuple[Sums, Sums]:
        student = Scored(model, batch)
        with torch.no_grad():
            teacher_AV = Scored(self.teacher, batch).logits_AV[:, : self.vocab_limit]
        student_AV = student.logits_AV[:, : self.vocab_limit]
        pair = (student_AV, teacher_AV) if self.direction == "reverse" else (teacher_AV, student_AV)
        losses = {"kl": (student.weights_A * ops.kl_divergence(*pair)).sum()}
        with torch.no_grad():
            logp_A = ops.token_logprobs(student.logits_AV, student.targets_A)
            stats = {"entropy": (student.weights_A * ops.entropy(student_AV)).sum()}
            stats |= _logp_difference(logp_A, batch.extras["old_logprobs"][student.places_A], student.weights_A)
        return losses, stats
