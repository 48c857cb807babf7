"""Cutting micro-batches at sequence boundaries: nothing is lost, nothing is doubled, sequences stay whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from twofold.base.batch import TokenBatch, pack
from twofold.base.records import InputError
from twofold.train import micro

Make = Callable[..., Any]


def batch_of(lengths: list[int], first: int = 0) -> TokenBatch:
    """Sequence number i has token first + i everywhere, and the same number as its source."""
    rows = [[first + i] * (n + 1) for i, n in enumerate(lengths)]
    weights = [[0.5 + i] * (n + 1) for i, n in enumerate(lengths)]
    return pack(rows, weights, {"extra": weights}, sources=[first + i for i in range(len(lengths))])


def contents(batches: list[TokenBatch]) -> list[tuple[Any, ...]]:
    """Every sequence of every micro-batch."""
    out = []
    for batch in batches:
        assert batch.cu_seqlens[0] == 0 and batch.cu_seqlens[-1] == len(batch.tokens_T)
        assert len(batch.source_S) == len(batch.cu_seqlens) - 1
        for source, start, end in zip(batch.source_S, batch.cu_seqlens, batch.cu_seqlens[1:], strict=False):
            fields = [batch.tokens_T, batch.targets_T, batch.positions_T, batch.weights_T, batch.extras["extra"]]
            out.append((source, *(tuple(values[start:end].tolist()) for values in fields)))
    return out


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12), parts=st.integers(1, 14))
def test_a_cut_keeps_every_sequence_in_order(lengths: list[int], parts: int) -> None:
    batch = batch_of(lengths)
    pieces = micro.split(batch, parts)
    assert len(pieces) == min(parts, len(lengths)) and all(piece.num_tokens for piece in pieces)
    assert contents(pieces) == contents([batch])


def test_parts_are_about_equal() -> None:
    assert [p.num_tokens for p in micro.split(batch_of([1] * 64), 8)] == [8] * 8
    assert [p.num_tokens for p in micro.split(batch_of([30, 1, 1, 1, 1, 30]), 2)] == [32, 32]
    assert [p.num_tokens for p in micro.split(batch_of([9, 1, 1]), 3)] == [9, 1, 1]
    batch = batch_of([3, 4])
    assert micro.split(batch, 1) == [batch]


@given(
    steps=st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=6), min_size=1, max_size=5), ranks=st.integers(1, 4)
)
def test_shares_are_the_step_and_ranks_meet_at_every_micro_batch(steps: list[list[int]], ranks: int) -> None:
    batches = [batch_of(lengths, 100 * number) for number, lengths in enumerate(steps)]
    if sum(map(len, steps)) < ranks:
        with pytest.raises(InputError, match=f"cannot be shared among {ranks} processes"):
            micro.share(batches, 0, ranks)
        return
    shares = [micro.share(batches, rank, ranks) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(contents([batch for share in shares for batch in share])) == sorted(contents(batches))
    if len(batches) % ranks == 0:
        assert all(any(batch is whole for whole in batches) for share in shares for batch in share)


def test_what_says_that_memory_ran_out() -> None:
    with pytest.raises(RuntimeError) as real:
        torch.empty(1 << 60)
    assert micro.out_of_memory(real.value)
    assert micro.out_of_memory(torch.OutOfMemoryError("CUDA out of memory")) and micro.out_of_memory(MemoryError())
    assert micro.out_of_memory(RuntimeError("not enough memory: you tried to allocate 9 bytes"))
    assert not micro.out_of_memory(RuntimeError("shapes differ")) and not micro.out_of_memory(ValueError("memory"))


def test_a_batch_moves_whole_or_not_at_all() -> None:
    batch = batch_of([3, 2])
    assert micro.to_device(batch, torch.device("cpu")) is batch
    moved = micro.to_device(batch, torch.device("meta"))
    tensors = [moved.tokens_T, moved.positions_T, moved.targets_T, moved.weights_T, moved.extras["extra"]]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert moved.cu_seqlens == batch.cu_seqlens and moved.source_S == batch.source_S
