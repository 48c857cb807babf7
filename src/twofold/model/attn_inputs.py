"""AttnInputs says, for one step, which tokens see which: packed training, prefill into a cache, or decoding.

It is passed explicitly to the model; nothing is global, so a teacher and a student can live in one process. The cache
is one row of ``capacity`` places a sequence; which row belongs to whom is the engine's business.

Shape legend: T tokens, S sequences, R cache rows, K key/value heads, C capacity, H head dimension, L visible keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from twofold.model.config import ModelConfig
from twofold.ops import attention as ops
from twofold.ops.attention import PackedPlan


class KVCache:
    """Keys and values of R sequences, per layer two tensors [R, K, C, H]."""

    def __init__(self, config: ModelConfig, rows: int, capacity: int, dtype: torch.dtype = torch.float32) -> None:
        self.rows, self.capacity, self.dtype = rows, capacity, dtype
        shape = (rows, config.num_key_value_heads, capacity, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.layers = [(torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)) for _ in layers]

    def copy_prefix(self, source: int, target: torch.Tensor, length: int) -> None:
        """Copy the first ``length`` places of row ``source`` to rows ``target`` (samples that share a prompt)."""
        for k, v in self.layers:
            k[target, :, :length] = k[source, :, :length]
            v[target, :, :length] = v[source, :, :length]

    def compact(self, keep: torch.Tensor, length: int) -> None:
        """Move rows ``keep`` (ascending) to the front; only the first ``length`` places are kept."""
        for k, v in self.layers:
            k[: len(keep), :, :length] = k[keep, :, :length]
            v[: len(keep), :, :length] = v[keep, :, :length]


@dataclass(frozen=True, slots=True)
class AttnInputs:
    """Attention facts of one step.

    cu_seqlens: S+1 boundaries of this step's tokens. plan: how to run whole sequences (None when decoding).
    cache / rows / cached_lens: where keys go and how many are already there; None for plain training.
    mask_RL: decoding only, 0 where a cached key is visible to its row's query, -inf elsewhere.
    """

    cu_seqlens: list[int]
    plan: PackedPlan | None
    cache: KVCache | None = None
    rows_S: torch.Tensor | None = None
    cached_lens: list[int] | None = None
    slot_row_T: torch.Tensor | None = None
    slot_place_T: torch.Tensor | None = None
    mask_RL: torch.Tensor | None = None

    @classmethod
    def packed(cls, cu_seqlens: list[int], device: torch.device | str = "cpu") -> AttnInputs:
        """Whole sequences, no cache: training and scoring."""
        return cls(cu_seqlens, ops.plan_packed(cu_seqlens, device))

    @classmethod
    def prefill(
        cls, cu_seqlens: list[int], cache: KVCache, rows_S: torch.Tensor, cached_lens: list[int] | None = None
    ) -> AttnInputs:
        """Several tokens a sequence, appended to its cache row after ``cached_lens`` earlier ones (default none)."""
        lengths = torch.tensor(cu_seqlens).diff()
        before = torch.tensor(cached_lens or [0] * len(lengths))
        if int((before + lengths).max()) > cache.capacity:
            raise ValueError(f"{int((before + lengths).max())} tokens do not fit a cache of {cache.capacity}")
        start = torch.tensor(cu_seqlens[:-1]) - before
        place = torch.arange(cu_seqlens[-1]) - start.repeat_interleave(lengths)
        whole = cached_lens is None or not any(cached_lens)
        return cls(
            cu_seqlens,
            ops.plan_packed(cu_seqlens) if whole else None,
            cache,
            rows_S,
            cached_lens,
            rows_S.repeat_interleave(lengths),
            place,
        )

    @classmethod
    def decode(cls, cache: KVCache, places_R: torch.Tensor) -> AttnInputs:
        """One token for each of the first R rows; ``places_R`` is the position that token takes."""
        rows = len(places_R)
        length = int(places_R.max()) + 1
        if length > cache.capacity:
            raise ValueError(f"{length} tokens do not fit a cache of {cache.capacity}")
        visible = torch.arange(length)[None] <= places_R[:, None]
        mask = torch.zeros(rows, length, dtype=cache.dtype).masked_fill_(~visible, -math.inf)
        row = torch.arange(rows)
        return cls(list(range(rows + 1)), None, cache, row, None, row, places_R, mask)

    def attend(self, layer: int, q_TNH: torch.Tensor, k_TKH: torch.Tensor, v_TKH: torch.Tensor) -> torch.Tensor:
        """Write this step's keys and values where they belong, attend, and return [T, N, H]."""
        if self.cache is None:
            assert self.plan is not None
            return ops.packed_attention(q_TNH, k_TKH, v_TKH, self.plan)
        k_cache, v_cache = self.cache.layers[layer]
        k_cache[self.slot_row_T, :, self.slot_place_T] = k_TKH
        v_cache[self.slot_row_T, :, self.slot_place_T] = v_TKH
        if self.mask_RL is not None:
            rows = len(self.mask_RL)
            return ops.decode_attention(q_TNH, k_cache[:rows], v_cache[:rows], self.mask_RL)
        if self.plan is not None:
            return ops.packed_attention(q_TNH, k_TKH, v_TKH, self.plan)
        assert self.rows_S is not None and self.cached_lens is not None
        lengths = torch.tensor(self.cu_seqlens).diff().tolist()
        totals = [before + new for before, new in zip(self.cached_lens, lengths, strict=True)]
        rows_lens = zip(self.rows_S.tolist(), totals, strict=True)
        caches = [(k_cache[row, :, :total], v_cache[row, :, :total]) for row, total in rows_lens]
        return ops.extend_attention(q_TNH, caches, self.cu_seqlens)
