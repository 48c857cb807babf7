"""TokenBatch: one micro-batch as a flat stream of T tokens, and the protocol of everything that makes them.

There is no batch axis and no padding: documents lie end to end and ``cu_seqlens`` says where each begins.
Shape legend: T tokens in the stream, S sequences in it, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch


@dataclass(slots=True)
class TokenBatch:
    """A flat micro-batch.

    tokens_T: int64 input ids. positions_T: int64, restarting at 0 with every sequence.
    cu_seqlens: S+1 offsets, first 0, last T; attention never crosses them.
    targets_T: int64 token to be predicted at each place. weights_T: fp32 loss weight of that prediction, 0 = none.
    extras: further [T] tensors an objective needs (advantages, rollout log-probabilities, …).
    source_S: which source each sequence came from (an index; used to report and to balance by family).
    """

    tokens_T: torch.Tensor
    positions_T: torch.Tensor
    cu_seqlens: list[int]
    targets_T: torch.Tensor
    weights_T: torch.Tensor
    extras: dict[str, torch.Tensor] = field(default_factory=dict)
    source_S: list[int] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return self.cu_seqlens[-1]


class BatchSource(Protocol):
    """Produces the micro-batches of one optimiser step; its state resumes exactly.

    Pre-training shards, rendered chats and engine rollouts are all sources. ``can_checkpoint`` is False while a
    source holds data that its state does not describe (the second half of a rollout batch).
    """

    @property
    def can_checkpoint(self) -> bool: ...

    def next_step(self) -> list[TokenBatch]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def boundaries(lengths: Sequence[int]) -> list[int]:
    """Cumulative lengths with a leading 0: where each sequence begins, and the end."""
    return list(itertools.accumulate(lengths, initial=0))


def positions(lengths: Sequence[int]) -> torch.Tensor:
    """0, 1, … restarting with every sequence, int64 [T]."""
    return torch.cat([torch.arange(n) for n in lengths])


def pack(
    sequences: Sequence[Sequence[int]],
    weights: Sequence[Sequence[float]] | None = None,
    extras: dict[str, Sequence[Sequence[float]]] | None = None,
    sources: Sequence[int] | None = None,
) -> TokenBatch:
    """Pack token sequences end to end for next-token training.

    Args:
        sequences: S lists of token ids, each at least 2 long.
        weights: loss weight of *predicting* each token (aligned with the sequence; entry 0 is never used because
            nothing predicts the first token). None means 1 everywhere.
        extras: further per-token values aligned like ``weights``, shifted the same way.
        sources: source index of each sequence.

    Returns:
        A TokenBatch whose inputs are each sequence without its last token.

    Raises:
        ValueError: a sequence of fewer than 2 tokens, or a misaligned weight list.
    """
    tokens: list[int] = []
    targets: list[int] = []
    flat_weights: list[float] = []
    lengths: list[int] = []
    flat_extras: dict[str, list[float]] = {name: [] for name in extras or {}}
    for index, sequence in enumerate(sequences):
        if len(sequence) < 2:
            raise ValueError(f"sequence {index} has {len(sequence)} tokens; at least 2 are needed to predict one")
        tokens.extend(sequence[:-1])
        targets.extend(sequence[1:])
        lengths.append(len(sequence) - 1)
        row = weights[index] if weights is not None else [1.0] * len(sequence)
        if len(row) != len(sequence):
            raise ValueError(f"sequence {index}: {len(sequence)} tokens but {len(row)} weights")
        flat_weights.extend(row[1:])
        for name, values in flat_extras.items():
            values.extend((extras or {})[name][index][1:])
    return TokenBatch(
        tokens_T=torch.tensor(tokens, dtype=torch.int64),
        positions_T=positions(lengths),
        cu_seqlens=boundaries(lengths),
        targets_T=torch.tensor(targets, dtype=torch.int64),
        weights_T=torch.tensor(flat_weights, dtype=torch.float32),
        extras={name: torch.tensor(values, dtype=torch.float32) for name, values in flat_extras.items()},
        source_S=list(sources) if sources is not None else [0] * len(lengths),
    )
