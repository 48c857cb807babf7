"""Fast attention against the plain reference, forward and backward: packed, from a cache, windows, Dual Chunk."""

from __future__ import annotations

import itertools
import math
import random

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


def pools(blocks: int, size: int, k: int = 2, whole: bool = False, seed: int = 3) -> list[torch.Tensor]:
    """Key and value pools [K, P, B, H] with rows together (whole) or blocks together."""
    generator = torch.Generator().manual_seed(seed)
    shape = (blocks, k, size, 8) if whole else (k, blocks, size, 8)
    drawn = [torch.randn(shape, generator=generator) for _ in range(2)]
    return [pool.transpose(0, 1) for pool in drawn] if whole else drawn


def decode(
    queries: torch.Tensor, kv: list[torch.Tensor], tables: list[list[int]], places: list[int]
) -> tuple[torch.Tensor, tuple[attention.RowGroup, ...]]:
    """All rows through the fast path, and the plan it took."""
    size, heads = kv[0].shape[2], kv[0].shape[0] * kv[0].shape[3]
    groups = attention.plan_decode(tables, torch.tensor(places), places, size, torch.float32, heads)
    outputs = []
    for group in groups:
        k, v = (attention.read_blocks(pool, group) for pool in kv)
        outputs.append(attention.decode_attention(queries[group.rows], k, v, group.mask_RL))
    return torch.cat(outputs), groups


@pytest.mark.parametrize("heads", [(4, 2), (2, 2), (6, 1)])
@pytest.mark.parametrize("whole", [False, True])
def test_decode_attention_equals_the_reference_where_every_row_has_one_block(
    heads: tuple[int, int], whole: bool
) -> None:
    (n, k), places = heads, [0, 6, 15, 2]
    kv, queries = pools(9, 16, k, whole), torch.randn(4, n, 8, generator=torch.Generator().manual_seed(1))
    for tables in ([[2], [3], [4], [5]], [[5], [0], [8], [3]]):  # a view, and gathered
        fast, (group,) = decode(queries, kv, tables, places)
        assert (group.table is None) == (tables[0] == [2])
        slow = reference.paged_decode(queries, *kv, tables, places)
        torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-5)
        k_RKLH = attention.read_blocks(kv[0], group)
        assert k_RKLH.shape == (4, k, 16, 8)
        if group.table is None:
            assert k_RKLH.data_ptr() == kv[0][:, 2].data_ptr(), "neighbouring blocks are not to be copied"


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    size=st.sampled_from([1, 3, 8]),
    scattered=st.booleans(),
    gathered=st.sampled_from([1, 2000, 1 << 21]),
    seed=st.integers(0, 99),
)
def test_paged_decoding_equals_the_reference(
    lengths: list[int], size: int, scattered: bool, gathered: int, seed: int
) -> None:
    lengths = sorted(lengths, reverse=True)
    counts = [-(-length // size) for length in lengths]
    order = list(range(1, sum(counts) + 1))
    if scattered:
        random.Random(seed).shuffle(order)
    parts = iter(order)
    tables = [list(itertools.islice(parts, count)) for count in counts]
    kv, places = pools(sum(counts) + 2, size, seed=seed), [length - 1 for length in lengths]
    queries = torch.randn(len(lengths), 4, 8, generator=torch.Generator().manual_seed(seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "_GATHERED", gathered)
        fast, groups = decode(queries, kv, tables, places)
    torch.testing.assert_close(fast, reference.paged_decode(queries, *kv, tables, places), atol=1e-5, rtol=1e-5)
    assert [row for group in groups for row in range(len(lengths))[group.rows]] == list(range(len(lengths)))
    if gathered == 1:
        assert all(group.table is None or group.mask_RL.shape[0] == 1 for group in groups)
    if not scattered and len(set(counts)) == 1:
        assert len(groups) == 1 and groups[0].table is None


def test_a_long_row_is_not_decoded_with_short_ones() -> None:
    tables = [[9, 3, 5, 7, 1, 2], [4], [6]]
    places = [45, 3, 4]
    groups = attention.plan_decode(tables, torch.tensor(places), places, 8, torch.float32, 16)
    assert [group.rows for group in groups] == [slice(0, 1), slice(1, 3)]
    assert [group.mask_RL.shape for group in groups] == [(1, 46), (2, 5)]


def test_the_paged_reference_equals_attention_over_gathered_positions() -> None:
    kv, queries = pools(4, 4), torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(1))
    table, place = [3, 0], 5
    whole = [torch.cat((pool[:, 3], pool[:, 0]), dim=1).transpose(0, 1)[: place + 1] for pool in kv]
    for window in (None, 3):
        out = reference.paged_decode(queries, *kv, [table], [place], window)
        torch.testing.assert_close(out, reference.attention_one(queries, *whole, window))


def test_extend_attention_equals_the_tail_of_whole_sequences() -> None:
    lengths, new = [6, 9], [2, 5]
    parts = [qkv(length, seed=length) for length in lengths]
    whole = [reference.attention_one(*part)[-count:] for part, count in zip(parts, new, strict=True)]
    queries = torch.cat([q[-count:] for (q, _, _), count in zip(parts, new, strict=True)])
    caches = [(k.transpose(0, 1), v.transpose(0, 1)) for _, k, v in parts]
    extended = attention.extend_attention(queries, caches, [0, 2, 7])
    torch.testing.assert_close(extended, torch.cat(whole), atol=1e-6, rtol=1e-6)


@settings(max_examples=25)
@given(
    lengths=st.lists(st.integers(1, 24), min_size=1, max_size=5),
    window=st.integers(1, 26),
    least_block=st.sampled_from([1, 7, 128]),
)
def test_a_sliding_window_equals_the_reference(lengths: list[int], window: int, least_block: int) -> None:
    cu = list(itertools.accumulate(lengths, initial=0))
    inputs = qkv(cu[-1])
    upstream = torch.randn(cu[-1], 4, 8, generator=torch.Generator().manual_seed(1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "_WINDOW_BLOCK", least_block)
        fast = attention.packed_attention(*inputs, attention.plan_packed(cu), window)
    slow = reference.packed_attention(*inputs, cu, window)
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-5)
    grads = [torch.autograd.grad(out, inputs, upstream) for out in (fast, slow)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def test_a_window_shows_exactly_the_last_keys() -> None:
    q, k, v = qkv(9)
    before = reference.attention_one(q, k, v, window=3)
    with torch.no_grad():
        k[:4] += 100.0
        v[4] += 100.0
    after = reference.attention_one(q, k, v, window=3)
    assert torch.equal(before[7:], after[7:])  # query 7 sees 5, 6 and itself
    assert not torch.allclose(before[6], after[6])
    torch.testing.assert_close(reference.attention_one(q, k, v, window=9), reference.attention_one(q, k, v))


@pytest.mark.parametrize("window", [None, 1, 4, 30])
@pytest.mark.parametrize("scores", [1, 90, 1 << 24])
def test_blocks_of_queries_change_nothing_in_extending(
    window: int | None, scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [qkv(length, seed=length) for length in (6, 9)]
    whole = [reference.attention_one(*part, window)[-count:] for part, count in zip(parts, (2, 5), strict=True)]
    queries = torch.cat([q[-count:] for (q, _, _), count in zip(parts, (2, 5), strict=True)])
    caches = [(k.transpose(0, 1), v.transpose(0, 1)) for _, k, v in parts]
    monkeypatch.setattr(attention, "_SCORES", scores)
    extended = attention.extend_attention(queries, caches, [0, 2, 7], window)
    torch.testing.assert_close(extended, torch.cat(whole), atol=1e-5, rtol=1e-5)


INV_FREQ = 100.0 ** -(torch.arange(4) / 4)


def dca_by_pairs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chunk_len: int, size: int) -> torch.Tensor:
    """The definition, a pair of tokens at a time: q, k, v of one head, [L, H], not rotated; complex rotations."""

    def turned(x: torch.Tensor, position: int) -> torch.Tensor:
        return torch.complex(x[:4], x[4:]) * torch.polar(torch.ones(4), position * INV_FREQ)

    rows = []
    for i in range(len(q)):
        scores = []
        for j in range(i + 1):
            chunk, back = i // chunk_len, i // chunk_len - j // chunk_len
            place = i - chunk * chunk_len
            at = (place, min(place + chunk_len, size), min(2 * chunk_len - 1, size))[min(back, 2)]
            product = turned(q[i], at) * turned(k[j], j % chunk_len).conj()
            scores.append(product.real.sum() / math.sqrt(8))
        rows.append(torch.stack(scores).softmax(0) @ v[: i + 1])
    return torch.stack(rows)


@pytest.mark.parametrize(("chunk_len", "size"), [(5, 6), (4, 7), (6, 6), (1, 2), (40, 41)])
def test_the_dual_chunk_reference_equals_its_definition(chunk_len: int, size: int) -> None:
    q, k, v = (t.detach() for t in qkv(23))
    out = reference.dual_chunk_attention(q, k, v, INV_FREQ, chunk_len, size)
    tail = reference.dual_chunk_attention(q[-7:], k, v, INV_FREQ, chunk_len, size)
    torch.testing.assert_close(tail, out[-7:], atol=1e-6, rtol=1e-6)
    for head in range(4):
        pairs = dca_by_pairs(q[:, head], k[:, head // 2], v[:, head // 2], chunk_len, size)
        torch.testing.assert_close(out[:, head], pairs, atol=1e-5, rtol=1e-5)


def test_up_to_a_chunk_dual_chunk_attention_is_plain_attention() -> None:
    q, k, v = qkv(14)
    positions = torch.arange(14)
    plain = reference.attention_one(*(reference.rope_at(t, positions, INV_FREQ) for t in (q, k)), v)
    assert torch.equal(reference.dual_chunk_attention(q, k, v, INV_FREQ, 14, 15), plain)
    beyond = reference.dual_chunk_attention(q, k, v, INV_FREQ, 11, 12)
    torch.testing.assert_close(beyond[:13], plain[:13])  # true distances up to chunk_size
    assert not torch.allclose(beyond[13], plain[13], atol=1e-3)


@settings(max_examples=25)
@given(
    keys=st.integers(1, 40),
    share=st.floats(0, 1),
    chunk_len=st.integers(1, 45),
    local_window=st.integers(0, 6),
    scores=st.sampled_from([1, 300, 1 << 24]),
)
def test_dual_chunk_attention_by_blocks_equals_the_reference(
    keys: int, share: float, chunk_len: int, local_window: int, scores: int
) -> None:
    chunks = attention.Chunks(chunk_len, chunk_len + local_window, INV_FREQ)
    q, k, v = qkv(keys)
    q = q[int(share * (keys - 1)) :]
    places = torch.arange(keys) % chunk_len
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "_SCORES", scores)
        q_rotated, k_rotated = (reference.rope_at(t, places[-len(t) :], INV_FREQ) for t in (q, k))
        fast = attention.dual_chunk_attention(q_rotated, k_rotated, v, chunks)
    slow = reference.dual_chunk_attention(q, k, v, INV_FREQ, chunks.length, chunks.size)
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-5)
    upstream = torch.randn(fast.shape, generator=torch.Generator().manual_seed(1))
    grads = [torch.autograd.grad(out, (q, k, v), upstream) for out in (fast, slow)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def test_dual_chunk_decoding_equals_the_last_row_of_the_reference_in_marked_rows() -> None:
    chunks, capacity = attention.Chunks(5, 7, INV_FREQ), 24
    lengths, chunked = [3, 24, 12, 17, 5, 6], [True, True, False, True, True, True]
    generator = torch.Generator().manual_seed(3)
    keys, values = (torch.randn(len(lengths), 2, capacity, 8, generator=generator) for _ in range(2))
    queries = torch.randn(len(lengths), 4, 8, generator=generator)
    cache, places = torch.empty_like(keys), torch.tensor(lengths) - 1
    for row, marked in enumerate(chunked):
        positions = torch.arange(capacity) % (chunks.length if marked else capacity)
        cache[row] = reference.rope_at(keys[row].transpose(0, 1), positions, INV_FREQ).transpose(0, 1)
    mask = torch.zeros(6, capacity).masked_fill(torch.arange(capacity)[None] > places[:, None], -math.inf)
    heads_outside = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (cache, values)]
    marks = torch.tensor(chunked)
    turned = reference.rope_at(queries, torch.where(marks, places % chunks.length, places), INV_FREQ)
    fast = attention.dual_chunk_decode(turned, cache, values, mask, places, marks, chunks)
    same = attention.dual_chunk_decode(turned, *heads_outside, mask, places, marks, chunks)
    torch.testing.assert_close(same, fast, atol=1e-6, rtol=1e-6)
    for row, (length, marked) in enumerate(zip(lengths, chunked, strict=True)):
        k, v = (t[row, :, :length].transpose(0, 1) for t in (keys, values))
        size = (chunks.length, chunks.size) if marked else (capacity, capacity)
        slow = reference.dual_chunk_attention(queries[row : row + 1], k, v, INV_FREQ, *size)
        torch.testing.assert_close(fast[row : row + 1], slow, atol=1e-5, rtol=1e-5)
