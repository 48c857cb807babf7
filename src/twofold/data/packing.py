"""Packed pre-training batches from token shards, and fixed evaluation windows.

A step is a flat stream of document pieces; every piece is an attention sequence of its own, unless that is turned off.
Sources are mixed by share of tokens, and the whole state is a few integers, so a run resumes exactly.
Not here: chats (rendered elsewhere), tokenisation, making batches ahead of time (prefetch.py). Legend: T tokens, S
sequences.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from twofold.base.batch import TokenBatch
from twofold.base.records import InputError
from twofold.data.pieces import Cursor, EntryReader, LengthMix, MixtureEntry, Piece
from twofold.data.shards import Shard

Packing = Literal["stream", "best_fit"]

_POOL = 128  # pieces that best-fit packing chooses from


class PackedSource:
    """A BatchSource over one or more shards.

    Args:
        sources: mixture entries; names are distinct.
        tokens_per_step: tokens of a step, as ``packing`` says.
        length_mix: (share, low, high) triples. Each piece is capped at a length drawn uniformly from low..high of
            a triple; shares are of tokens, where documents are long enough.
        seed: of the document order and the piece lengths; 0 or more.
        micro_batches: parts that a step is cut into at piece boundaries (fewer when a step has fewer pieces).
        packing: ``stream`` takes pieces as they come: a step stops at the first piece that reaches the target, what was
            drawn too much is taken off the next one, so tokens_per_step holds on average and no step exceeds it by more
            than its longest piece. ``best_fit`` never exceeds tokens_per_step / micro_batches in a micro-batch: the
            piece that has waited longest goes first, then always the longest of the next 128 that still fits.
        mask_documents: False lets tokens see the documents before theirs: neighbouring pieces are joined to sequences
            of at most the longest length in ``length_mix``. The predictions are the same ones; where a document ends
            within a sequence its last token stays between, with weight 0.

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
        packing: Packing = "stream",
        mask_documents: bool = True,
    ) -> None:
        mix = tuple((float(share), int(low), int(high)) for share, low, high in length_mix)
        _check(sources, tokens_per_step, mix, seed, micro_batches)
        total = sum(entry.weight for entry in sources)
        self._shares = [entry.weight / total for entry in sources]
        self._head_starts = [entry.head_start for entry in sources]
        self._names = [entry.name for entry in sources]
        self._readers = [EntryReader(index, entry, mix, seed) for index, entry in enumerate(sources)]
        self._tokens_per_step = tokens_per_step
        self._micro_batches = micro_batches
        self._carry = 0
        self._steps = 0
        self._pool: list[Piece] = []  # drawn and not handed out yet, the oldest first
        self._best_fit, self._masked = packing == "best_fit", mask_documents
        self._longest = max(high for _, _, high in mix)
        self._room = tokens_per_step // micro_batches
        needed = self._longest + (not mask_documents)
        if self._best_fit and self._room < needed:
            raise InputError(
                f"best-fit packing needs micro-batches of at least {needed} tokens, for the longest piece, and they "
                f"have {self._room}; raise tokens_per_step or lower length_mix"
            )
        self._identity: dict[str, Any] = {
            "seed": seed,
            "tokens_per_step": tokens_per_step,
            "length_mix": [list(triple) for triple in mix],
            "micro_batches": micro_batches,
            "sources": [
                [e.name, e.shard.sha256, len(e.shard), float(e.weight), e.shuffle, e.head_start] for e in sources
            ],
        }
        # Named only where they are not the usual ones, so that states from before they existed still fit.
        self._identity |= {"packing": packing} if self._best_fit else {}
        self._identity |= {} if mask_documents else {"mask_documents": False}
        limits = [list(e.lengths) for e in sources]
        self._identity |= {"lengths": limits} if any(limit != [2, None] for limit in limits) else {}

    @property
    def can_checkpoint(self) -> bool:
        """Always True: the state describes everything that comes next."""
        return True

    @property
    def can_prefetch(self) -> bool:
        """Always True: what comes next depends on the data alone."""
        return True

    @property
    def tokens_by_source(self) -> dict[str, int]:
        """Tokens handed out of each source so far."""
        waiting = Counter({index: 0 for index in range(len(self._readers))})
        for piece in self._pool:
            waiting[piece.entry] += piece.tokens
        return {name: self._readers[i].cursor.tokens - waiting[i] for i, name in enumerate(self._names)}

    @property
    def epochs_by_source(self) -> dict[str, float]:
        """Passes over the documents of each source so far (documents finished / documents)."""
        pairs = zip(self._names, self._readers, strict=True)
        return {name: r.cursor.epoch + r.cursor.position / r.count for name, r in pairs}

    def next_step(self) -> list[TokenBatch]:
        """Draw one step: 1 to ``micro_batches`` flat batches of about equal size."""
        self._steps += 1
        if self._best_fit:
            return [self._batch(self._fill(self._room)) for _ in range(self._micro_batches)]
        budget = self._tokens_per_step - self._carry
        pieces: list[Piece] = []
        drawn = 0
        while drawn < budget or not pieces:
            pieces.append(self._draw())
            drawn += pieces[-1].tokens
        self._carry = min(drawn - budget, self._tokens_per_step)
        return [self._batch(part) for part in _split_pieces(pieces, self._micro_batches)]

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state."""
        cursors = [
            {"epoch": c.epoch, "position": c.position, "offset": c.offset, "pieces": c.pieces, "tokens": c.tokens}
            for c in (reader.cursor for reader in self._readers)
        ]
        state = {"identity": self._identity, "cursors": cursors, "carry": self._carry, "steps": self._steps}
        return state | ({"pool": [list(piece) for piece in self._pool]} if self._best_fit else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where ``state`` was taken.

        Raises:
            InputError: the state belongs to other data or settings; the message names what differs.
        """
        identity = state.get("identity", {})
        names = dict.fromkeys((*self._identity, *identity))
        changed = [name for name in names if identity.get(name) != self._identity.get(name)]
        if changed:
            raise InputError(
                f"the saved data state was made with other {', '.join(changed)}; restore them or start this stage anew"
            )
        for reader, saved in zip(self._readers, state["cursors"], strict=True):
            reader.cursor = Cursor(**saved)
        self._pool = [Piece(*fields) for fields in state.get("pool", [])]
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

    def _draw(self) -> Piece:
        return self._readers[self._most_behind()].next_piece()

    def _fill(self, room: int) -> list[Piece]:
        """Pieces for one micro-batch of at most ``room`` tokens, the longest-waiting one first, then best fit.

        A last token that may stand between joined documents is counted too.
        """
        chosen: list[Piece] = []
        while True:
            while len(self._pool) < _POOL:
                self._pool.append(self._draw())
            sizes = [piece.end - piece.start + (piece.last and not self._masked) for piece in self._pool]
            fitting = [place for place, size in enumerate(sizes) if size <= room]
            if not fitting:
                return chosen
            best = max(fitting, key=sizes.__getitem__) if chosen else 0  # the first of equals: the oldest
            chosen.append(self._pool.pop(best))
            room -= sizes[best]

    def _batch(self, pieces: list[Piece]) -> TokenBatch:
        tokens, targets = [], []
        for piece in pieces:
            read = self._readers[piece.entry].documents.read(piece.start, piece.end + 1)
            tokens.append(read[:-1])
            targets.append(read[1:])
        if not self._masked:
            return self._joined(pieces, tokens, targets)
        lengths = np.array([piece.tokens for piece in pieces], dtype=np.int64)
        return _token_batch(np.concatenate(tokens), np.concatenate(targets), lengths, [piece.entry for piece in pieces])

    def _joined(
        self, pieces: list[Piece], tokens: list[npt.NDArray[Any]], targets: list[npt.NDArray[Any]]
    ) -> TokenBatch:
        """Neighbouring pieces as one sequence each; its source is the one that most of its tokens are from."""
        lengths: list[int] = []
        sources: list[Counter[int]] = []
        between: list[int] = []  # places in the stream of last tokens, which predict nothing
        for place, piece in enumerate(pieces):
            end = int(place > 0 and pieces[place - 1].last)
            if place and lengths[-1] + end + piece.tokens <= self._longest:
                if end:
                    last = targets[place - 1][-1:]
                    tokens[place - 1] = np.concatenate([tokens[place - 1], last])
                    targets[place - 1] = np.concatenate([targets[place - 1], tokens[place][:1]])
                    between.append(sum(lengths))
                lengths[-1] += end + piece.tokens
                sources[-1][piece.entry] += piece.tokens
            else:
                lengths.append(piece.tokens)
                sources.append(Counter({piece.entry: piece.tokens}))
        most = [count.most_common(1)[0][0] for count in sources]
        batch = _token_batch(np.concatenate(tokens), np.concatenate(targets), np.array(lengths), most)
        batch.weights_T[between] = 0.0
        return batch


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


def _split_pieces(pieces: list[Piece], parts: int) -> list[list[Piece]]:
    """Cut into at most ``parts`` non-empty runs of about equal tokens."""
    total = sum(piece.tokens for piece in pieces)
    runs: list[list[Piece]] = [[]]
    drawn = 0
    for piece in pieces:
        if runs[-1] and len(runs) < parts and drawn * parts >= total * len(runs):
            runs.append([])
        runs[-1].append(piece)
        drawn += piece.tokens
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
        if entry.lengths[1] is not None and entry.lengths[1] < max(2, entry.lengths[0]):
            raise InputError(
                f"lengths of {entry.name!r} must be (fewest, most) tokens with most >= 2, got {entry.lengths}"
            )
    if not any(entry.weight > 0 for entry in sources):
        raise InputError("a mixture needs at least one entry with a weight above 0")
    if tokens_per_step < 1 or micro_batches < 1 or seed < 0:
        raise InputError("tokens_per_step and micro_batches must be >= 1 and seed >= 0")
    if not length_mix:
        raise InputError("length_mix needs at least one (share, low, high)")
    for share, low, high in length_mix:
        if not share > 0 or not 1 <= low <= high:
            raise InputError(f"length_mix entry ({share}, {low}, {high}) needs share > 0 and 1 <= low <= high")
