"""Packed pre-training batches from token shards, and fixed evaluation windows.

A step is a flat stream of document pieces; every piece is an attention sequence of its own. Sources are mixed by
share of tokens, and the whole state is a handful of integers, so a run resumes exactly.
Not here: loss weights other than 1, chats (rendered elsewhere), tokenisation. Legend: T tokens, S pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from twofold.base.batch import TokenBatch
from twofold.base.records import InputError
from twofold.data.shards import Shard

LengthMix = tuple[tuple[float, int, int], ...]

_CAP_BLOCK = 4096  # length caps are drawn in blocks of this many
_CAP_STREAM, _ORDER_STREAM = 1, 2  # independent random streams of one seed


@dataclass(frozen=True)
class MixtureEntry:
    """One source of a mixture.

    Attributes:
        weight: relative share of tokens, 0 only for a source that has a head start.
        shuffle: False keeps the stored order (curricula).
        head_start: tokens drawn from this source before the mixture begins, on top of its share.
    """

    name: str
    shard: Shard
    weight: float
    shuffle: bool = True
    head_start: int = 0


@dataclass(slots=True)
class _Cursor:
    """Where one source stands: document ``position`` of ``epoch``, ``offset`` tokens into it; totals drawn so far."""

    epoch: int = 0
    position: int = 0
    offset: int = 0
    pieces: int = 0
    tokens: int = 0


class _EntryReader:
    """Cuts the documents of one source into pieces, in order, for ever."""

    def __init__(self, index: int, entry: MixtureEntry, length_mix: LengthMix, seed: int) -> None:
        self.tokens = entry.shard.tokens
        self.cursor = _Cursor()
        self._index = index
        self._seed = seed
        self._shuffle = entry.shuffle
        self._lows = np.array([low for _, low, _ in length_mix], dtype=np.int64)
        self._highs = np.array([high for _, _, high in length_mix], dtype=np.int64)
        chances = np.array([share / ((low + high) / 2) for share, low, high in length_mix])
        self._edges = np.cumsum(chances / chances.sum())
        offsets = entry.shard.offsets
        usable = np.diff(offsets) >= 2  # a document of one token predicts nothing
        if not usable.any():
            raise InputError(f"source {entry.name!r} has no document of at least 2 tokens; check how it was tokenised")
        self._starts = offsets[:-1][usable]
        self._ends = offsets[1:][usable] - 1  # the last token is only a target
        self._order_epoch = -1
        self._cap_block = -1
        self._order: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._caps: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def next_piece(self) -> tuple[int, int]:
        """Start and end of the next piece's input tokens in the shard; targets are the same shifted by one."""
        cursor = self.cursor
        if cursor.epoch != self._order_epoch:
            self._load_order(cursor.epoch)
        block, place = divmod(cursor.pieces, _CAP_BLOCK)
        if block != self._cap_block:
            self._load_caps(block)
        document = self._order[cursor.position]
        start = int(self._starts[document]) + cursor.offset
        document_end = int(self._ends[document])
        end = min(start + int(self._caps[place]), document_end)
        cursor.pieces += 1
        cursor.tokens += end - start
        if end < document_end:
            cursor.offset += end - start
            return start, end
        cursor.offset = 0
        cursor.position += 1
        if cursor.position == len(self._order):
            cursor.position = 0
            cursor.epoch += 1
        return start, end

    def _load_order(self, epoch: int) -> None:
        count = len(self._starts)
        if self._shuffle:
            generator = np.random.default_rng([self._seed, _ORDER_STREAM, self._index, epoch])
            self._order = generator.permutation(count)
        else:
            self._order = np.arange(count)
        self._order_epoch = epoch

    def _load_caps(self, block: int) -> None:
        generator = np.random.default_rng([self._seed, _CAP_STREAM, self._index, block])
        bucket = np.searchsorted(self._edges, generator.random(_CAP_BLOCK), side="right")
        bucket = np.minimum(bucket, len(self._edges) - 1)
        self._caps = generator.integers(self._lows[bucket], self._highs[bucket] + 1)
        self._cap_block = block


class PackedSource:
    """A BatchSource over one or more shards.

    Args:
        sources: mixture entries; names are distinct.
        tokens_per_step: tokens of a step on average. A step stops at the first piece that reaches the target, what
            was drawn too much is taken off the next one; no step exceeds tokens_per_step + its longest piece.
        length_mix: (share, low, high) triples. Each piece is capped at a length drawn uniformly from low..high of
            a triple; shares are of tokens, where documents are long enough.
        seed: of the document order and the piece lengths; 0 or more.
        micro_batches: parts that a step is cut into at piece boundaries (fewer when a step has fewer pieces).

    Raises:
        InputError: no sources, a weight or length that is not positive, or a source without usable documents.
    """

    def __init__(
        self,
        sources: Sequence[MixtureEntry],
        tokens_per_step: int,
        length_mix: LengthMix,
        seed: int,
        micro_batches: int = 1,
    ) -> None:
        mix = tuple((float(share), int(low), int(high)) for share, low, high in length_mix)
        _check(sources, tokens_per_step, mix, seed, micro_batches)
        total = sum(entry.weight for entry in sources)
        self._shares = [entry.weight / total for entry in sources]
        self._head_starts = [entry.head_start for entry in sources]
        self._names = [entry.name for entry in sources]
        self._readers = [_EntryReader(index, entry, mix, seed) for index, entry in enumerate(sources)]
        self._tokens_per_step = tokens_per_step
        self._micro_batches = micro_batches
        self._carry = 0
        self._steps = 0
        self._identity = {
            "seed": seed,
            "tokens_per_step": tokens_per_step,
            "length_mix": [list(triple) for triple in mix],
            "micro_batches": micro_batches,
            "sources": [
                [e.name, e.shard.sha256, len(e.shard), float(e.weight), e.shuffle, e.head_start] for e in sources
            ],
        }

    @property
    def can_checkpoint(self) -> bool:
        """Always True: the state describes everything that comes next."""
        return True

    @property
    def tokens_by_source(self) -> dict[str, int]:
        """Tokens drawn from each source so far."""
        return {name: reader.cursor.tokens for name, reader in zip(self._names, self._readers, strict=True)}

    @property
    def epochs_by_source(self) -> dict[str, float]:
        """Passes over the documents of each source so far (documents finished / documents)."""
        pairs = zip(self._names, self._readers, strict=True)
        return {name: r.cursor.epoch + r.cursor.position / len(r._starts) for name, r in pairs}

    def next_step(self) -> list[TokenBatch]:
        """Draw one step: 1 to ``micro_batches`` flat batches of about equal size."""
        budget = self._tokens_per_step - self._carry
        spans: list[tuple[int, int, int]] = []
        drawn = 0
        while drawn < budget or not spans:
            entry = self._most_behind()
            start, end = self._readers[entry].next_piece()
            spans.append((entry, start, end))
            drawn += end - start
        self._carry = min(drawn - budget, self._tokens_per_step)
        self._steps += 1
        return [self._batch(part) for part in _split_spans(spans, self._micro_batches)]

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state."""
        cursors = [
            {"epoch": c.epoch, "position": c.position, "offset": c.offset, "pieces": c.pieces, "tokens": c.tokens}
            for c in (reader.cursor for reader in self._readers)
        ]
        return {"identity": self._identity, "cursors": cursors, "carry": self._carry, "steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where ``state`` was taken.

        Raises:
            InputError: the state belongs to other data or settings; the message names what differs.
        """
        identity = state.get("identity", {})
        changed = [name for name, value in self._identity.items() if identity.get(name) != value]
        if changed:
            raise InputError(
                f"the saved data state was made with other {', '.join(changed)}; restore them or start this stage anew"
            )
        for reader, saved in zip(self._readers, state["cursors"], strict=True):
            reader.cursor = _Cursor(**saved)
        self._carry = int(state["carry"])
        self._steps = int(state["steps"])

    def _most_behind(self) -> int:
        """Source short of its head start, else that with the largest deficit against its share; the first on a tie."""
        if len(self._readers) == 1:
            return 0
        counts = [r.cursor.tokens - start for r, start in zip(self._readers, self._head_starts, strict=True)]
        if min(counts) < 0:
            return next(index for index, count in enumerate(counts) if count < 0)
        total = sum(counts) + 1
        deficits = [share * total - count for share, count in zip(self._shares, counts, strict=True)]
        return deficits.index(max(deficits))

    def _batch(self, spans: list[tuple[int, int, int]]) -> TokenBatch:
        readers = self._readers
        tokens = np.concatenate([readers[entry].tokens[start:end] for entry, start, end in spans])
        targets = np.concatenate([readers[entry].tokens[start + 1 : end + 1] for entry, start, end in spans])
        lengths = np.array([end - start for _, start, end in spans], dtype=np.int64)
        return _token_batch(tokens, targets, lengths, [entry for entry, _, _ in spans])


def eval_windows(
    shard: Shard, window: int, count: int, token_bytes: Sequence[int] | npt.NDArray[Any]
) -> tuple[list[TokenBatch], list[int]]:
    """Fixed windows of exactly ``window`` predictions for bits per byte, spread evenly over the shard.

    Windows lie inside one document and do not overlap, so position p of a window has p tokens of real context.

    Args:
        token_bytes: UTF-8 bytes of each token id.

    Returns:
        At most ``count`` batches of one sequence each, and the bytes of each one's targets.

    Raises:
        InputError: no document is long enough, or the byte table is too short.
    """
    if window < 1 or count < 1:
        raise InputError(f"window and count must be >= 1, got {window} and {count}")
    table = np.asarray(token_bytes)
    lengths = np.diff(shard.offsets)
    per_document = (lengths - 1) // window
    total = int(per_document.sum())
    if total == 0:
        raise InputError(f"no document has {window + 1} tokens (the longest has {lengths.max()}); use a smaller window")
    first = np.concatenate([[0], np.cumsum(per_document)])
    chosen = np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(np.int64))
    batches, sizes = [], []
    for number in chosen:
        document = int(np.searchsorted(first, number, side="right")) - 1
        start = int(shard.offsets[document]) + int(number - first[document]) * window
        tokens = shard.tokens[start : start + window + 1]
        if int(tokens.max()) >= len(table):
            raise InputError(f"token {int(tokens.max())} is outside the byte table of {len(table)}; pass all tokens")
        batches.append(_token_batch(tokens[:-1], tokens[1:], np.array([window]), [0]))
        sizes.append(int(table[tokens[1:]].sum()))
    return batches, sizes


def _token_batch(
    tokens: npt.NDArray[Any], targets: npt.NDArray[Any], lengths: npt.NDArray[np.int64], sources: list[int]
) -> TokenBatch:
    edges = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=edges[1:])
    positions = np.arange(edges[-1]) - np.repeat(edges[:-1], lengths)
    return TokenBatch(
        tokens_T=torch.from_numpy(tokens.astype(np.int64)),
        positions_T=torch.from_numpy(positions),
        cu_seqlens=edges.tolist(),
        targets_T=torch.from_numpy(targets.astype(np.int64)),
        weights_T=torch.ones(int(edges[-1]), dtype=torch.float32),
        source_S=sources,
    )


def _split_spans(spans: list[tuple[int, int, int]], parts: int) -> list[list[tuple[int, int, int]]]:
    """Cut at piece boundaries into at most ``parts`` non-empty runs of about equal tokens."""
    total = sum(end - start for _, start, end in spans)
    runs: list[list[tuple[int, int, int]]] = [[]]
    drawn = 0
    for span in spans:
        if runs[-1] and len(runs) < parts and drawn * parts >= total * len(runs):
            runs.append([])
        runs[-1].append(span)
        drawn += span[2] - span[1]
    return runs


def _check(
    sources: Sequence[MixtureEntry], tokens_per_step: int, length_mix: LengthMix, seed: int, micro_batches: int
) -> None:
    if not sources:
        raise InputError("a packed source needs at least one mixture entry")
    names = [entry.name for entry in sources]
    if len(set(names)) != len(names):
        raise InputError(f"mixture names must be distinct, got {names}")
    for entry in sources:
        if entry.head_start < 0 or not entry.weight >= 0:
            raise InputError(f"weight and head start of {entry.name!r} must be 0 or more")
        if entry.weight == 0 and entry.head_start == 0:
            raise InputError(f"{entry.name!r} has neither a weight nor a head start; leave the entry out instead")
    if not any(entry.weight > 0 for entry in sources):
        raise InputError("a mixture needs at least one entry with a weight above 0")
    if tokens_per_step < 1 or micro_batches < 1 or seed < 0:
        raise InputError("tokens_per_step and micro_batches must be >= 1 and seed >= 0")
    if not length_mix:
        raise InputError("length_mix needs at least one (share, low, high)")
    for share, low, high in length_mix:
        if not share > 0 or not 1 <= low <= high:
            raise InputError(f"length_mix entry ({share}, {low}, {high}) needs share > 0 and 1 <= low <= high")
