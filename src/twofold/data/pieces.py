"""Documents of one source of a mixture, cut into pieces: in order, for ever, and from any place again.

Not here: which source comes next, and how pieces fill a batch (packing.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from twofold.base.records import InputError
from twofold.data.order import Order, order
from twofold.data.shard_set import Documents

LengthMix = tuple[tuple[float, int, int], ...]

_CAP_BLOCK = 4096  # length caps are drawn in blocks of this many
_CAP_STREAM, _ORDER_STREAM = 1, 2  # independent random streams of one seed


@dataclass(frozen=True)
class MixtureEntry:
    """One source of a mixture.

    Attributes:
        shard: one shard, or many as a ShardSet.
        weight: relative share of tokens, 0 only for a source that has a head start.
        shuffle: False keeps the stored order (curricula).
        head_start: tokens drawn from this source before the mixture begins, on top of its share.
        lengths: fewest and most tokens (None: no limit) of the documents that are read. Two entries may read short
            and long documents of one shard; a long-context stage leaves out what is too short for its lengths.
    """

    name: str
    shard: Documents
    weight: float
    shuffle: bool = True
    head_start: int = 0
    lengths: tuple[int, int | None] = (2, None)


class Piece(NamedTuple):
    """Input tokens ``start`` to ``end`` of one document of a mixture entry; targets are the same shifted by one.

    ``last``: the document's only further token is the last target.
    """

    entry: int
    start: int
    end: int
    last: bool

    @property
    def tokens(self) -> int:
        """Predictions it holds."""
        return self.end - self.start


@dataclass(slots=True)
class Cursor:
    """Where one source stands: document ``position`` of ``epoch``, ``offset`` tokens into it; totals drawn so far."""

    epoch: int = 0
    position: int = 0
    offset: int = 0
    pieces: int = 0
    tokens: int = 0


class EntryReader:
    """Cuts the documents of one source into pieces, in order, for ever."""

    def __init__(self, index: int, entry: MixtureEntry, length_mix: LengthMix, seed: int) -> None:
        self.documents = entry.shard
        self.cursor = Cursor()
        self._index = index
        self._seed = seed
        self._shuffle = entry.shuffle
        self._lows = np.array([low for _, low, _ in length_mix], dtype=np.int64)
        self._highs = np.array([high for _, _, high in length_mix], dtype=np.int64)
        chances = np.array([share / ((low + high) / 2) for share, low, high in length_mix])
        self._edges = np.cumsum(chances / chances.sum())
        low, high = entry.lengths
        self._kept = entry.shard.of_lengths(max(2, low), high)  # a document of one token predicts nothing
        self.count = len(entry.shard) if self._kept is None else len(self._kept)
        if not self.count:
            limits = f"at least {max(2, low)} tokens" if high is None else f"{max(2, low)} to {high} tokens"
            raise InputError(f"source {entry.name!r} has no document of {limits}; check how it was tokenised")
        self._order_epoch = -1
        self._cap_block = -1
        self._order: Order | npt.NDArray[np.int64] = range(0)
        self._caps: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def next_piece(self) -> Piece:
        """The next piece, cut from the document at the cursor."""
        cursor = self.cursor
        if cursor.epoch != self._order_epoch:
            self._load_order(cursor.epoch)
        block, place = divmod(cursor.pieces, _CAP_BLOCK)
        if block != self._cap_block:
            self._load_caps(block)
        document = int(self._order[cursor.position])
        document_start, document_end = self.documents.span(
            document if self._kept is None else int(self._kept[document])
        )
        start, limit = document_start + cursor.offset, document_end - 1  # the last token is only a target
        end = min(start + int(self._caps[place]), limit)
        cursor.pieces += 1
        cursor.tokens += end - start
        if end < limit:
            cursor.offset += end - start
            return Piece(self._index, start, end, False)
        cursor.offset = 0
        cursor.position += 1
        if cursor.position == self.count:
            cursor.position = 0
            cursor.epoch += 1
        return Piece(self._index, start, end, True)

    def _load_order(self, epoch: int) -> None:
        key = [self._seed, _ORDER_STREAM, self._index, epoch]
        self._order = order(self.count, key) if self._shuffle else range(self.count)
        self._order_epoch = epoch

    def _load_caps(self, block: int) -> None:
        generator = np.random.default_rng([self._seed, _CAP_STREAM, self._index, block])
        bucket = np.searchsorted(self._edges, generator.random(_CAP_BLOCK), side="right")
        bucket = np.minimum(bucket, len(self._edges) - 1)
        self._caps = generator.integers(self._lows[bucket], self._highs[bucket] + 1)
        self._cap_block = block
