"""Attention on the flat stream, fast on CPU and correct anywhere: bucketed SDPA for whole sequences, batched matrix
products for decoding from a paged cache, blocks of queries for windows and Dual Chunk Attention.

The idea of the packed path: sequences of similar length are right-padded into one [n, L] batch. Under a causal mask a
real token never sees the padding to its right, so no mask tensor is needed. The idea of the paged path: blocks that lie
one after another are a view, others are gathered, and then decoding is the same two products. The specification is
``ops.reference``. GPU kernels are not here, nor who owns which block.

Shape legend: T tokens, S sequences, Q queries of one sequence, N query heads, K key/value heads, G = N // K,
H head dimension, L padded length or keys of one sequence, R rows being decoded, P blocks of a pool, B positions of a
block, J blocks of a row.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from twofold.ops.reference import rope_at

_MAX_PADDING = 0.25  # share of a bucket's longest sequence that a member may fall short of
_WINDOW_BLOCK = 128  # fewest queries that share one slice of keys under a sliding window
_SCORES = 1 << 24  # most scores (heads x queries x keys) that a block of queries holds at once
_GATHERED = 1 << 21  # bytes of keys that decoding on a CPU gathers at once; they stay in its caches


@dataclass(frozen=True, slots=True)
class Bucket:
    """n sequences padded to L: ``gather_nL`` maps padded places to stream places (padding repeats a real one)."""

    gather_nL: torch.Tensor
    contiguous: tuple[int, int] | None  # the stream span when no padding and no reordering is needed


@dataclass(frozen=True, slots=True)
class PackedPlan:
    """How to run packed attention for one set of boundaries; built once a step, used by every layer."""

    buckets: tuple[Bucket, ...]
    scatter_T: torch.Tensor | None  # place of each stream token in the concatenated bucket outputs


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Rows decoded together and where their keys are.

    rows: their place among all rows. blocks: J of each row. first: the first of R * J blocks that follow each other
    (None: the pool holds no others), or table: [R * J], of blocks that do not. places_R: position of each row's query.
    mask_RL: 0 where a key is visible.
    """

    rows: slice
    blocks: int
    first: int | None
    table: torch.Tensor | None
    places_R: torch.Tensor
    mask_RL: torch.Tensor


@dataclass(frozen=True, slots=True)
class Chunks:
    """Dual Chunk Attention: keys are rotated at position mod ``length``, no query stands beyond ``size``.

    inv_freq: fp32 [H/2].
    """

    length: int
    size: int
    inv_freq: torch.Tensor

    def ahead(self, within_Q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """How much further than their place in the chunk queries stand for the chunk before, and for earlier ones."""
        return (self.size - within_Q).clamp(max=self.length), min(2 * self.length - 1, self.size) - within_Q


def plan_packed(cu_seqlens: list[int], device: torch.device | str = "cpu") -> PackedPlan:
    """Group sequences of similar length into padded buckets (at most 25 % short of the longest)."""
    starts = cu_seqlens[:-1]
    lengths = [end - start for start, end in zip(cu_seqlens, cu_seqlens[1:], strict=False)]
    if len(set(lengths)) == 1:
        index = torch.arange(cu_seqlens[-1], device=device).view(len(lengths), lengths[0])
        return PackedPlan((Bucket(index, (0, cu_seqlens[-1])),), None)
    order = sorted(range(len(lengths)), key=lambda s: -lengths[s])
    buckets: list[Bucket] = []
    place = torch.empty(cu_seqlens[-1], dtype=torch.int64)  # built on the CPU, moved once
    offset = begin = 0
    while begin < len(order):
        longest = lengths[order[begin]]
        end = begin
        while end < len(order) and lengths[order[end]] >= longest * (1 - _MAX_PADDING):
            end += 1
        members = order[begin:end]
        first = torch.tensor([starts[s] for s in members])[:, None]
        length = torch.tensor([lengths[s] for s in members])[:, None]
        column = torch.arange(longest)[None]
        gather = first + torch.minimum(column, length - 1)
        padded_place = offset + torch.arange(gather.numel()).view_as(gather)
        real = column < length
        place[gather[real]] = padded_place[real]
        buckets.append(Bucket(gather.to(device), None))
        offset += gather.numel()
        begin = end
    return PackedPlan(tuple(buckets), place.to(device))


def packed_attention(
    q_TNH: torch.Tensor, k_TKH: torch.Tensor, v_TKH: torch.Tensor, plan: PackedPlan, window: int | None = None
) -> torch.Tensor:
    """Causal attention inside each sequence of a flat stream, over ``window`` keys if given. Returns [T, N, H]."""
    outputs = []
    for bucket in plan.buckets:
        n, length = bucket.gather_nL.shape
        q, k, v = (
            t.view(n, length, *t.shape[1:]) if bucket.contiguous else t[bucket.gather_nL] for t in (q_TNH, k_TKH, v_TKH)
        )
        out = _causal(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), window)
        outputs.append(out.transpose(1, 2).reshape(n * length, *q_TNH.shape[1:]))
    flat = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return flat if plan.scatter_T is None else flat.index_select(0, plan.scatter_T)


def _causal(q_nNLH: torch.Tensor, k_nKLH: torch.Tensor, v_nKLH: torch.Tensor, window: int | None) -> torch.Tensor:
    """SDPA of whole sequences; under a window shorter than they are, in blocks that read only the keys they see."""
    length = q_nNLH.shape[2]
    if window is None or window >= length:
        return F.scaled_dot_product_attention(q_nNLH, k_nKLH, v_nKLH, is_causal=True, enable_gqa=True)
    block = max(window, _WINDOW_BLOCK)
    place = torch.arange(length, device=q_nNLH.device)
    outputs = []
    for begin in range(0, length, block):
        mine, seen = slice(begin, begin + block), slice(max(0, begin - window + 1), begin + block)
        distance = place[mine, None] - place[None, seen]
        visible = (distance >= 0) & (distance < window)
        q, k, v = q_nNLH[:, :, mine], k_nKLH[:, :, seen], v_nKLH[:, :, seen]
        outputs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True))
    return torch.cat(outputs, dim=2)


def plan_decode(
    tables: list[list[int]], places_R: torch.Tensor, places: list[int], block_size: int, dtype: torch.dtype, heads: int
) -> tuple[RowGroup, ...]:
    """Which blocks decoding reads; built once a step, used by every layer.

    All rows are one group where their blocks lie one after another, as they do when every sequence has one block, and
    on GPUs. Else a group ends where its gathered keys would outgrow a processor's caches, or where a row is less than
    half as long as the group's first: order rows by length.

    Args:
        tables: the blocks of each row. places_R, places: the position of each row's query.
        heads: numbers in the keys of one position, K * H.
    """
    blocks = len(tables[0])
    if _run(tables, blocks):
        return (_group(slice(0, len(tables)), blocks, tables[0][0], None, places_R, max(places) + 1, dtype),)
    groups, begin, cpu = [], 0, places_R.device.type == "cpu"
    while begin < len(tables):
        blocks = len(tables[begin])
        most = max(1, _GATHERED // (blocks * block_size * heads * dtype.itemsize)) if cpu else len(tables)
        end = begin + 1
        while end < len(tables) and (not cpu or (end - begin < most and 2 * len(tables[end]) > blocks)):
            blocks = max(blocks, len(tables[end]))
            end += 1
        rows = slice(begin, end)
        padded = [block for table in tables[rows] for block in (*table, *table[:1] * (blocks - len(table)))]
        table = None if _run(tables[rows], blocks) else torch.tensor(padded, device=places_R.device)
        groups.append(_group(rows, blocks, padded[0], table, places_R[rows], max(places[rows]) + 1, dtype))
        begin = end
    return tuple(groups)


def _run(tables: list[list[int]], blocks: int) -> bool:
    """True where the blocks of all rows together are one run and every row has as many."""
    flat = list(itertools.chain.from_iterable(tables))
    return flat == list(range(flat[0], flat[0] + len(flat))) and set(map(len, tables)) == {blocks}


def _group(
    rows: slice,
    blocks: int,
    first: int,
    table: torch.Tensor | None,
    places_R: torch.Tensor,
    length: int,
    dtype: torch.dtype,
) -> RowGroup:
    hidden_RL = torch.arange(length, device=places_R.device)[None] > places_R[:, None]
    mask_RL = torch.zeros(hidden_RL.shape, dtype=dtype, device=places_R.device).masked_fill_(hidden_RL, -math.inf)
    return RowGroup(rows, blocks, first, table, places_R, mask_RL)


def read_blocks(pool_KPBH: torch.Tensor, group: RowGroup) -> torch.Tensor:
    """Keys or values of a group's rows, [R, K, L, H]: a view where its blocks lie one after another, else a copy."""
    rows, length = group.mask_RL.shape
    if group.table is not None:
        blocks = pool_KPBH.index_select(1, group.table)
    elif group.first is not None:
        blocks = pool_KPBH.narrow(1, group.first, rows * group.blocks)
    else:
        blocks = pool_KPBH
    return blocks.unflatten(1, (rows, -1)).flatten(2, 3).transpose(0, 1)[:, :, :length]


def decode_attention(
    q_RNH: torch.Tensor, k_RKLH: torch.Tensor, v_RKLH: torch.Tensor, mask_RL: torch.Tensor
) -> torch.Tensor:
    """One query a row against its keys (no gradient).

    Args:
        q_RNH: queries. k_RKLH, v_RKLH: strided as ``read_blocks`` gives them, so that rows and heads are one axis in
            one order or the other. mask_RL: 0 where a key is visible, -inf elsewhere.

    Returns:
        [R, N, H].
    """
    rows, kv_heads, length, head = k_RKLH.shape
    q_RKGH = q_RNH.reshape(rows, kv_heads, -1, head)
    swap = _heads_first(k_RKLH)
    mask = mask_RL[:, None].expand(rows, kv_heads, length)
    q, k, v, mask = (_merge(t, swap) for t in (q_RKGH, k_RKLH, v_RKLH, mask))
    probs = torch.baddbmm(mask[:, None], q, k.transpose(1, 2), alpha=1 / math.sqrt(head)).softmax(-1)
    return _split(torch.bmm(probs, v), rows, swap).reshape(q_RNH.shape)


def _heads_first(t_RKLH: torch.Tensor) -> bool:
    """True where the heads are the outer axis in memory."""
    return t_RKLH.shape[0] > 1 and t_RKLH.stride(1) > t_RKLH.stride(0)


def _merge(t_RK: torch.Tensor, swap: bool) -> torch.Tensor:
    """Rows and heads as one axis, heads outside if ``swap``."""
    return (t_RK.transpose(0, 1) if swap else t_RK).flatten(0, 1)


def _split(t: torch.Tensor, rows: int, swap: bool) -> torch.Tensor:
    """The inverse of ``_merge``."""
    return t.unflatten(0, (-1, rows)).transpose(0, 1) if swap else t.unflatten(0, (rows, -1))


def extend_attention(
    q_TNH: torch.Tensor,
    caches: list[tuple[torch.Tensor, torch.Tensor]],
    cu_seqlens: list[int],
    window: int | None = None,
) -> torch.Tensor:
    """Several queries a sequence against its cached keys (chunked prefill), by blocks of queries.

    Args:
        caches: for each sequence its (k, v), each [K, L, H], this step's keys already written.
    """
    outputs = []
    for begin, end, (k_KLH, v_KLH) in zip(cu_seqlens[:-1], cu_seqlens[1:], caches, strict=True):
        keys = k_KLH.shape[1]
        before = keys - (end - begin)
        block = max(1, _SCORES // (q_TNH.shape[1] * keys))
        place = torch.arange(keys, device=q_TNH.device)
        for first in range(begin, end, block):
            last = min(first + block, end)
            oldest = 0 if window is None else max(0, before + first - begin - window + 1)
            newest = before + last - begin
            distance = place[before + first - begin : newest, None] - place[None, oldest:newest]
            visible = distance >= 0 if window is None else (distance >= 0) & (distance < window)
            q = q_TNH[first:last].transpose(0, 1)
            out = _masked(q, k_KLH[:, oldest:newest], v_KLH[:, oldest:newest], visible)
            outputs.append(out.transpose(0, 1))
    return torch.cat(outputs)


def _masked(q_NQH: torch.Tensor, k_KLH: torch.Tensor, v_KLH: torch.Tensor, visible_QL: torch.Tensor) -> torch.Tensor:
    q, k, v = (t[None] for t in (q_NQH, k_KLH, v_KLH))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible_QL, enable_gqa=True)[0]


def dual_chunk_attention(q_QNH: torch.Tensor, k_LKH: torch.Tensor, v_LKH: torch.Tensor, chunks: Chunks) -> torch.Tensor:
    """Dual Chunk Attention of one sequence whose Q queries are the last of its L positions, by blocks of queries.

    Args:
        q_QNH, k_LKH: both rotated already, at their position mod ``chunks.length``. Queries are rotated further here.
    """
    queries, heads, head = q_QNH.shape
    keys, kv_heads, _ = k_LKH.shape
    q_KGQH = (q_QNH / math.sqrt(head)).view(queries, kv_heads, -1, head).permute(1, 2, 0, 3)
    k_KLH, v_KLH = k_LKH.transpose(0, 1), v_LKH.transpose(0, 1)
    before, block = keys - queries, max(1, _SCORES // (heads * keys))
    outputs, begin = [], before
    while begin < keys:
        start = begin // chunks.length * chunks.length
        end = min(begin + block, start + chunks.length, keys)
        q = q_KGQH[:, :, begin - before : end - before]
        outputs.append(_dual_chunk_block(q, k_KLH[:, :end], v_KLH[:, :end], start, chunks))
        begin = end
    return torch.cat(outputs, dim=2).permute(2, 0, 1, 3).reshape(queries, heads, head)


def _dual_chunk_block(
    q_KGQH: torch.Tensor, k_KLH: torch.Tensor, v_KLH: torch.Tensor, start: int, chunks: Chunks
) -> torch.Tensor:
    """The last Q of L positions, all in the chunk that begins at ``start``; queries are scaled. [K, G, Q, H]."""
    kv_heads, group, queries, head = q_KGQH.shape
    keys = k_KLH.shape[1]
    within_Q = torch.arange(keys - queries, keys, device=q_KGQH.device) - start
    successive_Q, inter_Q = chunks.ahead(within_Q)
    earlier = max(0, start - chunks.length)
    scores = []
    for ahead_Q, first, last in ((inter_Q, 0, earlier), (successive_Q, earlier, start), (None, start, keys)):
        if first == last:
            continue
        q = q_KGQH
        if ahead_Q is not None:
            q = rope_at(q.reshape(-1, queries, head).transpose(0, 1), ahead_Q, chunks.inv_freq).transpose(0, 1)
        part = torch.bmm(q.reshape(kv_heads, group * queries, head), k_KLH[:, first:last].transpose(1, 2)).float()
        scores.append(part)
    hidden_QL = torch.arange(keys - start, device=q_KGQH.device)[None] > within_Q[:, None]
    scores[-1] = scores[-1].masked_fill(hidden_QL.repeat(group, 1), -math.inf)
    probs = torch.cat(scores, dim=-1).softmax(-1).to(v_KLH.dtype)
    return torch.bmm(probs, v_KLH).view(kv_heads, group, queries, head)


def dual_chunk_decode(
    q_RNH: torch.Tensor,
    k_RKLH: torch.Tensor,
    v_RKLH: torch.Tensor,
    mask_RL: torch.Tensor,
    places_R: torch.Tensor,
    chunked_R: torch.Tensor,
    chunks: Chunks,
) -> torch.Tensor:
    """``decode_attention`` where rows marked in ``chunked_R`` use Dual Chunk Attention and the others plain attention.

    Args:
        q_RNH, keys: rotated at position mod ``chunks.length`` in marked rows. places_R: position of each query.
    """
    rows, kv_heads, length, head = k_RKLH.shape
    turned = [rope_at(q_RNH, ahead_R, chunks.inv_freq) for ahead_R in chunks.ahead(places_R % chunks.length)]
    q = torch.stack([q_RNH, *turned], dim=1).view(rows, 3, kv_heads, -1, head).transpose(1, 2).flatten(2, 3)
    swap = _heads_first(k_RKLH)
    q, k, v = (_merge(t, swap) for t in (q, k_RKLH, v_RKLH))
    scores = _split(torch.bmm(q, k.transpose(1, 2)), rows, swap).unflatten(2, (3, -1))
    intra, successive, inter = scores.unbind(2)
    chunk_L = torch.arange(length, device=places_R.device) // chunks.length
    back_RL = ((places_R // chunks.length)[:, None] - chunk_L[None]) * chunked_R[:, None]
    back = back_RL[:, None, None]
    chosen = torch.where(back <= 0, intra, torch.where(back == 1, successive, inter)) / math.sqrt(head)
    probs = _merge((chosen + mask_RL[:, None, None]).softmax(-1), swap)
    return _split(torch.bmm(probs, v), rows, swap).reshape(q_RNH.shape)
