"""AttnInputs says, for one step, which tokens see which: packed training, prefill into a cache, or decoding.

It is passed explicitly to the model; nothing is global, so a teacher and a student can live in one process. The cache
is one row of ``capacity`` places a sequence; which row belongs to whom is the engine's business. So is, for a model
with a long context, which sequences are coded beyond the native length: cached keys are rotated, so a sequence keeps
the coding it began with.

Shape legend: T tokens, S sequences, R cache rows, K key/value heads, C capacity, H head dimension, L visible keys.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from twofold.model.config import Context, ModelConfig
from twofold.ops import attention as ops
from twofold.ops.attention import Chunks, PackedPlan


class KVCache:
    """Keys and values of R sequences, per layer two tensors [R, K, C, H]."""

    def __init__(
        self,
        config: ModelConfig,
        rows: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.rows, self.capacity, self.dtype, self.device = rows, capacity, dtype, torch.device(device)
        shape = (rows, config.num_key_value_heads, capacity, config.head_dim)
        self.layers = [
            (torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))
            for _ in range(config.num_hidden_layers)
        ]

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
    longest: positions of the longest sequence, cached ones included.
    cache / rows / cached_lens: where keys go and how many are already there; None for plain training.
    places_R, mask_RL: decoding only. The position of each row's query; 0 where a cached key is visible to it, -inf
        elsewhere.
    extended_S: which sequences are coded beyond the native length (bool); None: whole sequences decide by their
        length. chunks: Dual Chunk Attention, for those sequences.
    """

    cu_seqlens: list[int]
    plan: PackedPlan | None
    longest: int
    cache: KVCache | None = None
    rows_S: torch.Tensor | None = None
    cached_lens: list[int] | None = None
    slot_row_T: torch.Tensor | None = None
    slot_place_T: torch.Tensor | None = None
    places_R: torch.Tensor | None = None
    mask_RL: torch.Tensor | None = None
    extended_S: torch.Tensor | None = None
    chunks: Chunks | None = None

    @classmethod
    def packed(
        cls,
        cu_seqlens: list[int],
        device: torch.device | str = "cpu",
        extended_S: Sequence[bool] | torch.Tensor | None = None,
    ) -> AttnInputs:
        """Whole sequences, no cache: training and scoring."""
        longest = max(_lengths(cu_seqlens))
        return cls(cu_seqlens, ops.plan_packed(cu_seqlens, device), longest, extended_S=_flags(extended_S, device))

    @classmethod
    def prefill(
        cls,
        cu_seqlens: list[int],
        cache: KVCache,
        rows_S: torch.Tensor,
        cached_lens: list[int] | None = None,
        extended_S: Sequence[bool] | torch.Tensor | None = None,
    ) -> AttnInputs:
        """Several tokens a sequence, appended to its cache row after ``cached_lens`` earlier ones (default none).

        Raises:
            ValueError: a sequence that does not fit its row.
        """
        lengths = _lengths(cu_seqlens)
        before = cached_lens or [0] * len(lengths)
        longest = max(b + n for b, n in zip(before, lengths, strict=True))
        if longest > cache.capacity:
            raise ValueError(f"{longest} tokens do not fit a cache of {cache.capacity}")
        rows_S = rows_S.to(cache.device)
        place = torch.cat([torch.arange(b, b + n) for b, n in zip(before, lengths, strict=True)])
        return cls(
            cu_seqlens,
            None if any(before) else ops.plan_packed(cu_seqlens, cache.device),
            longest,
            cache,
            rows_S,
            cached_lens,
            _spread(rows_S, lengths),
            place.to(cache.device),
            extended_S=_flags(extended_S, cache.device),
        )

    @classmethod
    def decode(cls, cache: KVCache, places_R: torch.Tensor, extended_R: torch.Tensor | None = None) -> AttnInputs:
        """One token for each of the first R rows; ``places_R`` is the position that token takes."""
        rows = len(places_R)
        length = int(places_R.max()) + 1
        if length > cache.capacity:
            raise ValueError(f"{length} tokens do not fit a cache of {cache.capacity}")
        places_R, row = places_R.to(cache.device), torch.arange(rows, device=cache.device)
        visible = torch.arange(length, device=cache.device)[None] <= places_R[:, None]
        mask = torch.zeros(rows, length, dtype=cache.dtype, device=cache.device).masked_fill_(~visible, -math.inf)
        return cls(
            list(range(rows + 1)),
            None,
            length,
            cache,
            row,
            None,
            row,
            places_R,
            places_R,
            mask,
            _flags(extended_R, cache.device),
        )

    def coded(self, context: Context, inv_freq: torch.Tensor) -> AttnInputs:
        """The same facts with the coding of every sequence decided: ``extended_S`` is None only if none is extended.

        Raises:
            ValueError: a step with a cache that does not say how its sequences began.
        """
        flags, device = self.extended_S, inv_freq.device
        if context.always:
            flags = torch.ones(len(self.cu_seqlens) - 1, dtype=torch.bool, device=device)
        elif flags is None and self.cache is not None:
            raise ValueError("a model with a long context needs extended_S for prefill and decode: keys stay rotated")
        elif flags is None:
            decided = [context.extends(n) for n in _lengths(self.cu_seqlens)]
            flags = _flags(decided, device) if any(decided) else None
        chunked = flags is not None and context.method == "dca" and self.longest > context.chunk_len
        chunks = Chunks(context.chunk_len, context.dca_chunk_size, inv_freq) if chunked else None
        return replace(self, extended_S=flags, chunks=chunks)

    @property
    def extended_T(self) -> torch.Tensor | None:
        """``extended_S`` of each token's sequence."""
        if self.extended_S is None or self.mask_RL is not None:
            return self.extended_S
        return _spread(self.extended_S, _lengths(self.cu_seqlens))

    def attend(
        self,
        layer: int,
        q_TNH: torch.Tensor,
        k_TKH: torch.Tensor,
        v_TKH: torch.Tensor,
        window: int | None = None,
    ) -> torch.Tensor:
        """Write this step's keys and values where they belong, attend, and return [T, N, H].

        A query sees the last ``window`` positions up to its own, or all of them (None).
        """
        if self.cache is not None:
            k_cache, v_cache = self.cache.layers[layer]
            k_cache[self.slot_row_T, :, self.slot_place_T] = k_TKH
            v_cache[self.slot_row_T, :, self.slot_place_T] = v_TKH
            if self.mask_RL is not None:
                return self._decode(q_TNH, k_cache, v_cache, window)
        if self.chunks is not None:
            return self._chunked(layer, q_TNH, k_TKH, v_TKH, self.chunks)
        if self.plan is not None:
            return ops.packed_attention(q_TNH, k_TKH, v_TKH, self.plan, window)
        return ops.extend_attention(q_TNH, self._cached(layer), self.cu_seqlens, window)

    def _decode(
        self, q_RNH: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, window: int | None
    ) -> torch.Tensor:
        mask_RL, places_R = self.mask_RL, self.places_R
        assert mask_RL is not None and places_R is not None
        rows, length = mask_RL.shape
        k_cache, v_cache = k_cache[:rows], v_cache[:rows]
        if self.chunks is not None:
            assert self.extended_S is not None
            return ops.dual_chunk_decode(q_RNH, k_cache, v_cache, mask_RL, places_R, self.extended_S, self.chunks)
        if window is not None and window < length:
            gone_RL = torch.arange(length, device=places_R.device)[None] <= places_R[:, None] - window
            mask_RL = mask_RL.masked_fill(gone_RL, -math.inf)
        return ops.decode_attention(q_RNH, k_cache, v_cache, mask_RL)

    def _chunked(
        self, layer: int, q_TNH: torch.Tensor, k_TKH: torch.Tensor, v_TKH: torch.Tensor, chunks: Chunks
    ) -> torch.Tensor:
        """One sequence after another: Dual Chunk Attention where it is extended, plain attention where not."""
        assert self.extended_S is not None
        cached = self._cached(layer) if self.plan is None else []
        outputs = []
        for s, extended in enumerate(self.extended_S.tolist()):
            mine = slice(self.cu_seqlens[s], self.cu_seqlens[s + 1])
            q, tokens = q_TNH[mine], mine.stop - mine.start
            if extended:
                k, v = (t.transpose(0, 1) for t in cached[s]) if cached else (k_TKH[mine], v_TKH[mine])
                outputs.append(ops.dual_chunk_attention(q, k, v, chunks))
            elif cached:
                outputs.append(ops.extend_attention(q, [cached[s]], [0, tokens]))
            else:
                plan = ops.plan_packed([0, tokens], q.device)
                outputs.append(ops.packed_attention(q, k_TKH[mine], v_TKH[mine], plan))
        return torch.cat(outputs)

    def _cached(self, layer: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Of each sequence, all its keys and values so far, [K, L, H] each."""
        assert self.cache is not None and self.rows_S is not None and self.cached_lens is not None
        k_cache, v_cache = self.cache.layers[layer]
        totals = [before + new for before, new in zip(self.cached_lens, _lengths(self.cu_seqlens), strict=True)]
        rows_totals = zip(self.rows_S.tolist(), totals, strict=True)
        return [(k_cache[row, :, :total], v_cache[row, :, :total]) for row, total in rows_totals]


def _lengths(cu_seqlens: list[int]) -> list[int]:
    """Tokens of each sequence."""
    return [end - begin for begin, end in zip(cu_seqlens, cu_seqlens[1:], strict=False)]


def _spread(values_S: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """One value a token of each sequence's value."""
    counts = torch.tensor(lengths, device=values_S.device)
    return values_S.repeat_interleave(counts, output_size=sum(lengths))


def _flags(extended_S: Sequence[bool] | torch.Tensor | None, device: torch.device | str) -> torch.Tensor | None:
    """As a bool tensor on the step's device."""
    return None if extended_S is None else torch.as_tensor(extended_S, dtype=torch.bool, device=device)
