"""AttnInputs says, for one step, which tokens see which: packed training, or a mixture of decoding, whole prompts and
chunks of prompts over a paged cache.

It is passed explicitly to the model; nothing is global, so a teacher and a student can live in one process. The cache
is two pools of blocks a layer; which block belongs to whom is the engine's business. So is, for a model with a long
context, which sequences are coded beyond the native length: cached keys are rotated, so a sequence keeps the coding it
began with.

Shape legend: T tokens, S sequences, R rows being decoded, K key/value heads, P blocks of a pool, B positions of a
block, H head dimension, L keys of one sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from twofold.base.batch import boundaries
from twofold.model.config import Context, ModelConfig
from twofold.ops import attention as ops
from twofold.ops.attention import Chunks, PackedPlan, RowGroup


class Pools:
    """Blocks of keys and values, per layer two pools [K, P, B, H]."""

    def __init__(self, layers: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.layers = layers


class PagedKV(Pools):
    """Keys and values in blocks of ``block_size`` positions, per layer two pools [K, P, B, H].

    Blocks are laid out so that gathered ones form rows without a further copy. Where one block holds a whole sequence
    (``whole``), the heads of a block lie together instead: then neighbouring blocks are rows already.
    """

    def __init__(
        self,
        config: ModelConfig,
        blocks: int,
        block_size: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        whole: bool = False,
    ) -> None:
        self.blocks, self.block_size, self.whole = blocks, block_size, whole
        self.dtype, self.device = dtype, torch.device(device)
        self.shape = (config.num_key_value_heads, block_size, config.head_dim)
        super().__init__([(self._pool(blocks), self._pool(blocks)) for _ in range(config.num_hidden_layers)])

    def _pool(self, blocks: int) -> torch.Tensor:
        heads, block_size, head = self.shape
        if self.whole:
            return torch.zeros(blocks, heads, block_size, head, dtype=self.dtype, device=self.device).transpose(0, 1)
        return torch.zeros(heads, blocks, block_size, head, dtype=self.dtype, device=self.device)

    @property
    def bytes(self) -> int:
        """Memory that it takes."""
        return sum(pool.numel() * pool.element_size() for pools in self.layers for pool in pools)

    def grow(self, blocks: int) -> None:
        """Have at least this many blocks; what is in those that are there is kept.

        One layer after the other, so that little is held twice; where memory does not suffice, some layers have grown
        already and nothing is lost.
        """
        for index, pools in enumerate(self.layers):
            held = pools[0].shape[1]
            if held < blocks:
                larger = (self._pool(blocks), self._pool(blocks))
                for old, new in zip(pools, larger, strict=True):
                    new[:, :held] = old
                self.layers[index] = larger
        self.blocks = max(self.blocks, blocks)

    def copy(self, sources: Sequence[int], targets: Sequence[int], length: int) -> None:
        """Copy the first ``length`` positions of blocks to others; no block is both a source and a target."""
        source, target = (torch.tensor(list(blocks), device=self.device) for blocks in (sources, targets))
        for pools in self.layers:
            for pool in pools:
                pool[:, target, :length] = pool[:, source, :length]

    def read(self, layer: int, blocks: Sequence[int], length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the first ``length`` positions of one sequence, [K, L, H] each."""
        first, count = blocks[0], -(-length // self.block_size)
        if list(blocks[:count]) == list(range(first, first + count)):
            k, v = (pool[:, first : first + count] for pool in self.layers[layer])
        else:
            table = torch.tensor(list(blocks[:count]), device=self.device)
            k, v = (pool.index_select(1, table) for pool in self.layers[layer])
        return k.flatten(1, 2)[:, :length], v.flatten(1, 2)[:, :length]


class Span(NamedTuple):
    """New tokens of one sequence in a step: positions ``begin`` to ``end``, kept in ``blocks``.

    extended: whether the sequence is coded beyond the native length of a model with a long context.
    """

    blocks: list[int]
    begin: int
    end: int
    extended: bool


class Rows(NamedTuple):
    """One new token each of several sequences that have keys already: like spans, a column a field."""

    blocks: list[list[int]]
    begin: list[int]
    extended: list[bool]


@dataclass(frozen=True, slots=True)
class AttnInputs:
    """Attention facts of one step.

    cu_seqlens: S+1 boundaries of this step's tokens, by sequence; ``idle`` further tokens see nothing and are not kept.
    longest: positions of the longest sequence, cached ones included.
    plan: how to run sequences that begin in this step; all of them in plain training.
    cache, block_T, place_T: where keys go; None for plain training.
    groups, rows: how to decode the first ``rows`` tokens, one for each of the first sequences. spans: the sequences
        after them, those that begin first.
    extended_S: which sequences are coded beyond the native length (bool); None: whole sequences decide by their
        length, cached ones are not. chunks: Dual Chunk Attention, for those sequences.
    """

    cu_seqlens: list[int]
    plan: PackedPlan | None
    longest: int
    cache: Pools | None = None
    block_T: torch.Tensor | None = None
    place_T: torch.Tensor | None = None
    groups: tuple[RowGroup, ...] = ()
    rows: int = 0
    spans: tuple[Span, ...] = ()
    idle: int = 0
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
    def paged(cls, rows: Rows, spans: Sequence[Span], cache: PagedKV, idle: int = 0) -> AttnInputs:
        """One step over a cache: the tokens of ``rows``, then those of the spans, then ``idle`` ones.

        Raises:
            ValueError: a sequence that does not fit its blocks, or one that begins after one that goes on.
        """
        size, device, count = cache.block_size, cache.device, len(rows.begin)
        begun = sum(span.begin == 0 for span in spans)
        if any(span.begin for span in spans[:begun]):
            raise ValueError("sequences that begin come before those that go on")
        places = list(rows.begin)
        try:
            blocks = [table[place // size] for table, place in zip(rows.blocks, places, strict=True)]
            for table, begin, end, _ in spans:
                blocks += [table[place // size] for place in range(begin, end)]
                places += range(begin, end)
        except IndexError:
            raise ValueError(f"a sequence does not fit its blocks of {size} positions") from None
        place_T = integers(places, device)
        extended = [*rows.extended, *(span.extended for span in spans)]
        return cls(
            [*range(count), *(count + bound for bound in boundaries([span.end - span.begin for span in spans]))],
            ops.plan_packed(boundaries([span.end for span in spans[:begun]]), device) if begun else None,
            max(places) + 1,
            cache,
            integers(blocks, device),
            place_T % size,
            _decoding(rows, place_T[:count], cache),
            count,
            tuple(spans),
            idle,
            _flags(extended, device) if any(extended) else None,
        )

    def coded(self, context: Context, inv_freq: torch.Tensor) -> AttnInputs:
        """The same facts with the coding of every sequence decided: ``extended_S`` is None only if none is extended."""
        flags, device = self.extended_S, inv_freq.device
        if context.always:
            flags = torch.ones(len(self.cu_seqlens) - 1, dtype=torch.bool, device=device)
        elif flags is None and self.cache is None:
            decided = [context.extends(n) for n in _lengths(self.cu_seqlens)]
            flags = _flags(decided, device) if any(decided) else None
        chunked = flags is not None and context.method == "dca" and self.longest > context.chunk_len
        chunks = Chunks(context.chunk_len, context.dca_chunk_size, inv_freq) if chunked else None
        return replace(self, extended_S=flags, chunks=chunks)

    @property
    def extended_T(self) -> torch.Tensor | None:
        """``extended_S`` of each token's sequence; idle tokens belong to none."""
        if self.extended_S is None:
            return None
        lengths = _lengths(self.cu_seqlens)
        counts = torch.tensor(lengths, device=self.extended_S.device)
        spread = self.extended_S.repeat_interleave(counts, output_size=sum(lengths))
        return torch.cat((spread, spread.new_zeros(self.idle))) if self.idle else spread

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
        if self.cache is None:
            return self._begin(q_TNH, k_TKH, v_TKH, window)
        for pool, new in zip(self.cache.layers[layer], (k_TKH, v_TKH), strict=True):
            places = pool.permute(1, 2, 0, 3)
            places.index_put_((self.block_T, self.place_T), new[: -self.idle] if self.idle else new)
        outputs = [self._decode(layer, q_TNH, group, window) for group in self.groups]
        if self.plan is not None:
            mine = slice(self.rows, self.cu_seqlens[self._begun.stop])
            outputs.append(self._begin(q_TNH[mine], k_TKH[mine], v_TKH[mine], window))
        for s in range(self._begun.stop, len(self.cu_seqlens) - 1):
            outputs.append(self._extend(layer, q_TNH, s, window))
        if self.idle:
            outputs.append(torch.zeros_like(q_TNH[-self.idle :]))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    @property
    def _begun(self) -> range:
        """Indices of the sequences whose first token is in this step."""
        if self.cache is None:
            return range(len(self.cu_seqlens) - 1)
        return range(self.rows, self.rows + sum(span.begin == 0 for span in self.spans))

    def _decode(self, layer: int, q_TNH: torch.Tensor, group: RowGroup, window: int | None) -> torch.Tensor:
        assert self.cache is not None
        k_RKLH, v_RKLH = (ops.read_blocks(pool, group) for pool in self.cache.layers[layer])
        q_RNH, mask_RL, places_R = q_TNH[group.rows], group.mask_RL, group.places_R
        if self.chunks is not None and self.extended_S is not None:
            chunked_R = self.extended_S[group.rows]
            return ops.dual_chunk_decode(q_RNH, k_RKLH, v_RKLH, mask_RL, places_R, chunked_R, self.chunks)
        if window is not None and window < mask_RL.shape[1]:
            gone_RL = torch.arange(mask_RL.shape[1], device=places_R.device)[None] <= places_R[:, None] - window
            mask_RL = mask_RL.masked_fill(gone_RL, -torch.inf)
        return ops.decode_attention(q_RNH, k_RKLH, v_RKLH, mask_RL)

    def _begin(self, q_TNH: torch.Tensor, k_TKH: torch.Tensor, v_TKH: torch.Tensor, window: int | None) -> torch.Tensor:
        """Sequences whose first token is in this step: no earlier keys are needed."""
        assert self.plan is not None
        if self.chunks is None or self.extended_S is None:
            return ops.packed_attention(q_TNH, k_TKH, v_TKH, self.plan, window)
        outputs, start = [], 0
        for s in self._begun:
            mine = slice(start, start + self.cu_seqlens[s + 1] - self.cu_seqlens[s])
            parts, start = (q_TNH[mine], k_TKH[mine], v_TKH[mine]), mine.stop
            if self.extended_S[s]:
                outputs.append(ops.dual_chunk_attention(*parts, self.chunks))
            else:
                plan = ops.plan_packed([0, mine.stop - mine.start], q_TNH.device)
                outputs.append(ops.packed_attention(*parts, plan))
        return torch.cat(outputs)

    def _extend(self, layer: int, q_TNH: torch.Tensor, s: int, window: int | None) -> torch.Tensor:
        """A later chunk of sequence ``s``, which has keys in the cache."""
        assert isinstance(self.cache, PagedKV)
        q_QNH, span = q_TNH[self.cu_seqlens[s] : self.cu_seqlens[s + 1]], self.spans[s - self.rows]
        k_KLH, v_KLH = self.cache.read(layer, span.blocks, span.end)
        if self.chunks is not None and self.extended_S is not None and self.extended_S[s]:
            return ops.dual_chunk_attention(q_QNH, k_KLH.transpose(0, 1), v_KLH.transpose(0, 1), self.chunks)
        return ops.extend_attention(q_QNH, [(k_KLH, v_KLH)], [0, len(q_QNH)], window)


def _decoding(rows: Rows, places_R: torch.Tensor, cache: PagedKV) -> tuple[RowGroup, ...]:
    if not rows.begin:
        return ()
    heads, _, head = cache.shape
    return ops.plan_decode(rows.blocks, places_R, rows.begin, cache.block_size, cache.dtype, heads * head)


def integers(values: Sequence[int], device: torch.device | str) -> torch.Tensor:
    """int64 tensor of a list; several times as fast as ``torch.tensor`` for the lists of a step."""
    return torch.from_numpy(np.array(values, dtype=np.int64)).to(device)


def _lengths(cu_seqlens: list[int]) -> list[int]:
    """Tokens of each sequence."""
    return [end - begin for begin, end in zip(cu_seqlens, cu_seqlens[1:], strict=False)]


def _flags(extended_S: Sequence[bool] | torch.Tensor | None, device: torch.device | str) -> torch.Tensor | None:
    """As a bool tensor on the step's device."""
    return None if extended_S is None else torch.as_tensor(extended_S, dtype=torch.bool, device=device)
