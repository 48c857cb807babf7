"""The load of experts: the balancing loss over all micro-batches of an optimiser step, and an alarm for dead experts.

Qwen3 balances over the global batch (arXiv 2501.11873): an expert's share f of the assignments is counted over the
whole step, not over each micro-batch. f carries no gradient but is a factor of it, so it must be known before the
first backward pass; where a step has several micro-batches they are routed once beforehand, without gradient, at the
price of one more forward pass. Batches are flat streams, so there is no padding to leave out. Micro-batch balancing,
which the paper compares with it, is there as a control.

Not here: routing (``ops/reference.py``) and what the loss is weighed against (``objectives.py``).
Shape legend: T tokens of a micro-batch, G groups of it that are balanced by themselves, L MoE layers, E experts,
k experts per token.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch

from twofold.base.batch import TokenBatch
from twofold.base.dist import ALONE, Ranks
from twofold.base.records import InputError
from twofold.model.attn_inputs import AttnInputs
from twofold.model.qwen3 import Qwen3, Routing
from twofold.ops.reference import load_balancing_loss

Scope = Literal["global", "micro"]
MICRO_TOKENS = 256  # of a group, with the scope "micro"
DEAD_STEPS = 20  # steps without one token after which an expert is reported


class ExpertLoad:
    """Assignments by layer and expert in the current step, and for how many steps each expert has had none.

    ``scope`` "global" takes shares over the whole step; "micro" takes them over every group of about ``micro_tokens``
    tokens (``group_of_tokens``) by itself, as ranks do that have one such group each and do not tell each other their
    shares. Sources play no part. Groups of few sequences often hold one source, which then may not differ from others:
    for a fair control a group must have many.

    Raises:
        InputError: ``micro_tokens`` below 1.
    """

    def __init__(self, scope: Scope, micro_tokens: int = MICRO_TOKENS) -> None:
        if micro_tokens < 1:
            raise InputError(f"micro_tokens must be 1 or more, got {micro_tokens}")
        self.scope, self.micro_tokens = scope, micro_tokens
        self._known_LE: torch.Tensor | None = None  # of the whole step, counted before its first backward pass
        self._seen_LE: torch.Tensor | None = None  # of the micro-batches so far
        self._idle_LE: torch.Tensor | None = None  # steps in a row without a token
        self._layers: list[int] = []
        self._ranks = ALONE  # those that have the other tokens of the step

    def begin_step(self, model: Qwen3, batches: Sequence[TokenBatch], loss: bool, ranks: Ranks = ALONE) -> None:
        """Start a step; with ``loss``, count over several micro-batches what their losses need to know."""
        self._seen_LE = self._known_LE = None
        self._ranks = ranks
        self._layers = [i for i in range(model.config.num_hidden_layers) if model.config.is_moe_layer(i)]
        several = len(batches) > 1 or ranks.size > 1
        if loss and self.scope == "global" and several and self._layers:
            self._known_LE = over_step([_routed(model, batch) for batch in batches], ranks)

    def add(self, routing: Routing) -> None:
        """Count a micro-batch's assignments towards the step's metrics."""
        counts_LE = assignments(routing)
        self._seen_LE = counts_LE if self._seen_LE is None else self._seen_LE + counts_LE

    def loss(self, routing: Routing, batch: TokenBatch) -> torch.Tensor:
        """Sum over the micro-batch's tokens, mean over MoE layers, of E * sum(f * p): 1 a token at perfect balance.

        Divided by the tokens of the whole step, the sum over its micro-batches is ``load_balancing_loss`` of one
        batch with all of them, and so is the gradient. Without ``begin_step`` the micro-batch is the whole step.
        With the scope "micro" it is the mean of the groups' ``load_balancing_loss``, weighted by their tokens.
        """
        if self.scope == "micro":
            group_T = group_of_tokens(batch.cu_seqlens, self.micro_tokens).to(batch.tokens_T.device)
            pairs = zip(routing.probs, routing.ids, strict=True)
            return torch.stack([_grouped_loss(p_TE, ids_Tk, group_T) for p_TE, ids_Tk in pairs]).mean()
        counts_LE = self._known_LE if self._known_LE is not None else over_step([assignments(routing)])
        share_LE = counts_LE / counts_LE.sum(-1, keepdim=True)
        terms = [load_balancing_loss(f_E, p_TE.sum(0)) for f_E, p_TE in zip(share_LE, routing.probs, strict=True)]
        return torch.stack(terms).sum() / len(routing.probs)

    def end_step(self) -> dict[str, float]:
        """Largest load of each layer (1 = an even share) and of all, experts without a token; warns of dead ones."""
        if self._seen_LE is None:
            return {}
        counts_LE = over_step([self._seen_LE], self._ranks)
        load_LE = counts_LE / counts_LE.sum(-1, keepdim=True) * counts_LE.shape[1]
        largest = dict(zip(self._layers, load_LE.amax(-1).tolist(), strict=True))
        self._watch(counts_LE == 0)
        self._seen_LE = self._known_LE = None
        by_layer = {f"max_expert_load/layer_{layer}": load for layer, load in largest.items()}
        return {"max_expert_load": max(largest.values()), "dead_experts": float((counts_LE == 0).sum())} | by_layer

    def state_dict(self) -> dict[str, Any]:
        """For how many steps each expert has had no token."""
        return {} if self._idle_LE is None else {"idle": self._idle_LE.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting where ``state_dict`` stopped."""
        self._idle_LE = torch.tensor(state["idle"]) if "idle" in state else None

    def _watch(self, without_LE: torch.Tensor) -> None:
        idle_LE = torch.zeros_like(without_LE, dtype=torch.int64) if self._idle_LE is None else self._idle_LE
        idle_LE = idle_LE.to(without_LE.device)
        self._idle_LE = (idle_LE + 1) * without_LE
        for layer, idle_E in zip(self._layers, self._idle_LE, strict=True):
            dead = (idle_E == DEAD_STEPS).nonzero().flatten().tolist()  # once for each time an expert dies
            if dead:
                warnings.warn(
                    f"layer {layer}: no token has reached expert {', '.join(map(str, dead))} for {DEAD_STEPS} steps; "
                    f"raise `balance` or lower the learning rate",
                    RuntimeWarning,
                    stacklevel=2,
                )


def assignments(routing: Routing) -> torch.Tensor:
    """How often each expert was chosen, int64 [L, E]."""
    pairs = zip(routing.ids, routing.probs, strict=True)
    return torch.stack([torch.bincount(ids_Tk.flatten(), minlength=p_TE.shape[1]) for ids_Tk, p_TE in pairs])


def group_of_tokens(cu_seqlens: Sequence[int], micro_tokens: int) -> torch.Tensor:
    """The group of each token, int64 [T]: 0, 1, … in the order of the stream. A sequence is never cut.

    A group takes sequences until it has ``micro_tokens`` or more. A longer sequence is a group of its own, and what is
    left before it or at the end is a smaller group. With 10 tokens, sequences of 4, 7, 3, 25, 6 make 0, 0, 1, 2, 3.
    """
    lengths = [end - start for start, end in itertools.pairwise(cu_seqlens)]
    group_S: list[int] = []
    group, tokens = 0, 0
    for length in lengths:
        if tokens and (tokens >= micro_tokens or length > micro_tokens):
            group, tokens = group + 1, 0
        group_S.append(group)
        tokens += length
    return torch.tensor(group_S).repeat_interleave(torch.tensor(lengths))


def _grouped_loss(p_TE: torch.Tensor, ids_Tk: torch.Tensor, group_T: torch.Tensor) -> torch.Tensor:
    """One layer's sum over groups of their tokens times their ``load_balancing_loss``."""
    groups, experts = int(group_T[-1]) + 1, p_TE.shape[1]
    cells = (group_T[:, None] * experts + ids_Tk).flatten()  # one counter for each group and expert
    counts_GE = torch.bincount(cells, minlength=groups * experts).view(groups, experts)
    share_GE = counts_GE / counts_GE.sum(-1, keepdim=True)
    return experts * (share_GE[group_T] * p_TE).sum()


def over_step(counts: Sequence[torch.Tensor], ranks: Ranks = ALONE) -> torch.Tensor:
    """Counts of a whole step from those of its parts on all ranks: the one place where they are added up."""
    return ranks.sum(torch.stack(list(counts)).sum(0))


@torch.no_grad()
def _routed(model: Qwen3, batch: TokenBatch) -> torch.Tensor:
    routing = Routing()
    model(batch.tokens_T, batch.positions_T, AttnInputs.packed(batch.cu_seqlens, batch.tokens_T.device), routing)
    return assignments(routing)
