"""Attention on the flat stream, fast on CPU and correct anywhere: bucketed SDPA for whole sequences, batched matrix
products for decoding from a cache.

The idea of the packed path: sequences of similar length are right-padded into one [n, L] batch. Under a causal mask a
real token never sees the padding to its right, so no mask tensor is needed. The specification is
``reference.packed_attention``. Paged caches and GPU kernels are not here.

Shape legend: T tokens, S sequences, N query heads, K key/value heads, G = N // K, H head dimension,
L padded length, R cache rows, C cache capacity in tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from twofold.ops.reference import attention_one

_MAX_PADDING = 0.25  # share of a bucket's longest sequence that a member may fall short of


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


def plan_packed(cu_seqlens: list[int], device: torch.device | str = "cpu") -> PackedPlan:
    """Group sequences of similar length into padded buckets (at most 25 % short of the longest)."""
    starts = cu_seqlens[:-1]
    lengths = [end - start for start, end in zip(cu_seqlens, cu_seqlens[1:], strict=False)]
    if len(set(lengths)) == 1:
        index = torch.arange(cu_seqlens[-1], device=device).view(len(lengths), lengths[0])
        return PackedPlan((Bucket(index, (0, cu_seqlens[-1])),), None)
    order = sorted(range(len(lengths)), key=lambda s: -lengths[s])
    buckets: list[Bucket] = []
    place = torch.empty(cu_seqlens[-1], dtype=torch.int64)
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


def packed_attention(q_TNH: torch.Tensor, k_TKH: torch.Tensor, v_TKH: torch.Tensor, plan: PackedPlan) -> torch.Tensor:
    """Causal attention inside each sequence of a flat stream. Returns [T, N, H]."""
    outputs = []
    for bucket in plan.buckets:
        n, length = bucket.gather_nL.shape
        q, k, v = (
            t.view(n, length, *t.shape[1:]) if bucket.contiguous else t[bucket.gather_nL] for t in (q_TNH, k_TKH, v_TKH)
        )
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
        )
        outputs.append(out.transpose(1, 2).reshape(n * length, *q_TNH.shape[1:]))
    flat = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return flat if plan.scatter_T is None else flat.index_select(0, plan.scatter_T)


def decode_attention(
    q_RNH: torch.Tensor, k_RKCH: torch.Tensor, v_RKCH: torch.Tensor, mask_RL: torch.Tensor
) -> torch.Tensor:
    """One query a row against the first L places of a row cache (no gradient).

    Args:
        q_RNH: queries. k_RKCH, v_RKCH: caches, rows contiguous. mask_RL: 0 where a key is visible, -inf elsewhere.

    Returns:
        [R, N, H].
    """
    rows, kv_heads, capacity, head = k_RKCH.shape
    group = q_RNH.shape[1] // kv_heads
    length = mask_RL.shape[1]
    q = q_RNH.reshape(rows * kv_heads, group, head)
    k, v = (t.view(rows * kv_heads, capacity, head)[:, :length] for t in (k_RKCH, v_RKCH))
    mask = mask_RL[:, None, None, :].expand(rows, kv_heads, 1, length).reshape(rows * kv_heads, 1, length)
    probs = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=1 / math.sqrt(head)).softmax(-1)
    return torch.bmm(probs, v).view(rows, q_RNH.shape[1], head)


def extend_attention(
    q_TNH: torch.Tensor, caches: list[tuple[torch.Tensor, torch.Tensor]], cu_seqlens: list[int]
) -> torch.Tensor:
    """Several queries a sequence against its cached keys (chunked prefill): the reference, one sequence at a time.

    Args:
        caches: for each sequence its (k, v), each [K, L, H], this step's keys already written.
    """
    spans = zip(cu_seqlens, cu_seqlens[1:], strict=False)
    return torch.cat(
        [
            attention_one(q_TNH[a:b], k.transpose(0, 1), v.transpose(0, 1))
            for (a, b), (k, v) in zip(spans, caches, strict=True)
        ]
    )
