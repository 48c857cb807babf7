"""Fast attention against the plain reference, forward and backward: packed, decoding from a cache, chunked."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twofold.ops import attention, reference


def qkv(tokens: int, n: int = 4, k: int = 2, h: int = 8, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(tokens, heads, h, generator=generator).requires_grad_() for heads in (n, k, k)]


@settings(max_examples=30)
@given(
    lengths=st.lists(st.integers(1, 24), min_size=1, max_size=7),
    heads=st.sampled_from([(4, 2), (3, 3), (4, 1)]),
)
def test_packed_attention_equals_the_reference_on_ragged_lengths(lengths: list[int], heads: tuple[int, int]) -> None:
    cu = list(itertools.accumulate(lengths, initial=0))
    inputs = qkv(cu[-1], *heads)
    upstream = torch.randn(cu[-1], heads[0], 8, generator=torch.Generator().manual_seed(1))
    fast = attention.packed_attention(*inputs, attention.plan_packed(cu))
    slow = reference.packed_attention(*inputs, cu)
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-5)
    grads = [torch.autograd.grad(out, inputs, upstream) for out in (fast, slow)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


@settings(max_examples=50)
@given(lengths=st.lists(st.integers(1, 200), min_size=1, max_size=30))
def test_a_plan_covers_every_token_once_and_pads_at_most_a_quarter(lengths: list[int]) -> None:
    cu = list(itertools.accumulate(lengths, initial=0))
    plan = attention.plan_packed(cu)
    padded = torch.cat([bucket.gather_nL.flatten() for bucket in plan.buckets])
    real = padded if plan.scatter_T is None else padded[plan.scatter_T]
    assert real.tolist() == list(range(cu[-1]))
    assert len(padded) <= cu[-1] / 0.75
    assert sum(bucket.gather_nL.shape[0] for bucket in plan.buckets) == len(lengths)


def test_equal_lengths_need_neither_padding_nor_reordering() -> None:
    plan = attention.plan_packed([0, 5, 10, 15])
    assert len(plan.buckets) == 1 and plan.scatter_T is None and plan.buckets[0].contiguous == (0, 15)


def test_nothing_crosses_a_boundary() -> None:
    q, k, v = qkv(9)
    plan = attention.plan_packed([0, 4, 9])
    before = attention.packed_attention(q, k, v, plan)
    with torch.no_grad():
        k[:4] += 100.0
        v[:4] -= 100.0
    after = attention.packed_attention(q, k, v, plan)
    assert torch.equal(before[4:], after[4:]) and not torch.allclose(before[:4], after[:4])


@pytest.mark.parametrize("heads", [(4, 2), (2, 2), (6, 1)])
def test_decode_attention_equals_the_last_row_of_the_reference(heads: tuple[int, int]) -> None:
    (n, k), h, capacity = heads, 8, 16
    lengths = [1, 7, 16, 3]
    generator = torch.Generator().manual_seed(3)
    keys, values = (torch.randn(len(lengths), k, capacity, h, generator=generator) for _ in range(2))
    queries = torch.randn(len(lengths), n, h, generator=generator)
    longest = max(lengths)
    hidden = torch.arange(longest)[None] >= torch.tensor(lengths)[:, None]
    mask = torch.zeros(len(lengths), longest).masked_fill(hidden, -math.inf)
    fast = attention.decode_attention(queries, keys, values, mask)
    for row, length in enumerate(lengths):
        k_row, v_row = (t[row, :, :length].transpose(0, 1) for t in (keys, values))
        slow = reference.attention_one(queries[row : row + 1], k_row, v_row)
        torch.testing.assert_close(fast[row : row + 1], slow, atol=1e-5, rtol=1e-5)


def test_extend_attention_equals_the_tail_of_whole_sequences() -> None:
    lengths, new = [6, 9], [2, 5]
    parts = [qkv(length, seed=length) for length in lengths]
    whole = [reference.attention_one(*part)[-count:] for part, count in zip(parts, new, strict=True)]
    queries = torch.cat([q[-count:] for (q, _, _), count in zip(parts, new, strict=True)])
    caches = [(k.transpose(0, 1), v.transpose(0, 1)) for _, k, v in parts]
    extended = attention.extend_attention(queries, caches, [0, 2, 7])
    torch.testing.assert_close(extended, torch.cat(whole), atol=1e-6, rtol=1e-6)
