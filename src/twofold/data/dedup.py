"""De-duplication and decontamination of documents, with a reason on record for every one that is dropped.

Exact copies go by a hash of the normalised text; near copies by MinHash over word 5-shingles, confirmed by the true
Jaccard similarity; overlap with held-out data by shared 13-word runs or by a held-out prompt on a line of its own.
Not here: quality filters, fuzzy matching across languages, distributed operation (all fits in memory).
"""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from twofold.base.records import InputError
from twofold.data.corpus import Document

_SHINGLE = 5
_BANDS, _ROWS = 32, 4
_WORD = re.compile(r"\w+")
_WORD_OR_MARK = re.compile(r"\w+|[^\w\s]")


class Dropped(NamedTuple):
    """One dropped document. ``reason`` is ``kind: detail``; kinds: exact-duplicate, near-duplicate, held-out-prompt,
    held-out-overlap."""

    id: str
    reason: str


def normalise(text: str) -> str:
    """Lower case, single spaces."""
    return " ".join(text.lower().split())


def deduplicate(documents: Sequence[Document], threshold: float = 0.8) -> tuple[list[Document], list[Dropped]]:
    """Keep the first of all documents that are equal or nearly equal.

    Args:
        threshold: Jaccard similarity of word 5-shingle sets from which a document counts as a near copy, in
            [0.6, 1] (below 0.6 the hashed bands would miss too many pairs; at 0.8 they miss fewer than one in 10^7).

    Returns:
        Kept documents in order, and the dropped ones with reasons.
    """
    if not 0.6 <= threshold <= 1.0:
        raise InputError(f"threshold must be in [0.6, 1], got {threshold}")
    kept: list[Document] = []
    dropped: list[Dropped] = []
    by_hash: dict[bytes, str] = {}
    buckets: dict[tuple[int, bytes], list[int]] = {}
    shingle_sets: list[npt.NDArray[np.uint64]] = []
    for document in documents:
        exact = hashlib.sha256(normalise(document.text).encode()).digest()
        if exact in by_hash:
            dropped.append(Dropped(document.id, f"exact-duplicate: {by_hash[exact]}"))
            continue
        shingles = word_runs(document.text, _SHINGLE, marks=True)
        bands = _bands(shingles)
        candidates = sorted({index for band in bands for index in buckets.get(band, ())})
        near = next((i for i in candidates if _jaccard(shingles, shingle_sets[i]) >= threshold), None)
        if near is not None:
            dropped.append(Dropped(document.id, f"near-duplicate: {kept[near].id}"))
            continue
        by_hash[exact] = document.id
        for band in bands:
            buckets.setdefault(band, []).append(len(kept))
        shingle_sets.append(shingles)
        kept.append(document)
    return kept, dropped


def decontaminate(
    train: Sequence[Document],
    held_out: Sequence[Document],
    held_out_keys: Collection[str] = (),
    line_key: Callable[[str], str] = normalise,
    ngram: int = 13,
    max_share: float = 0.0,
) -> tuple[list[Document], list[Dropped]]:
    """Drop training documents that give held-out data away.

    Args:
        held_out_keys: keys of held-out prompts; a document with a line whose ``line_key`` is among them is dropped.
        line_key: normalisation of a line; pass the tasks' own key function to catch renamed letters.
        ngram: length in words of a run that must not be shared with a held-out document.
        max_share: share of a document's runs that may be shared all the same (boilerplate such as licence headers).

    Returns:
        Kept documents in order, and the dropped ones with reasons.
    """
    if ngram < 1 or not 0.0 <= max_share <= 1.0:
        raise InputError(f"ngram must be >= 1 and max_share in [0, 1], got {ngram} and {max_share}")
    keys = set(held_out_keys)
    runs = [word_runs(document.text, ngram) for document in held_out if len(_words(document.text, _WORD)) >= ngram]
    forbidden = np.unique(np.concatenate(runs)) if runs else np.empty(0, dtype=np.uint64)
    kept: list[Document] = []
    dropped: list[Dropped] = []
    for document in train:
        line = next((text for text in document.text.splitlines() if keys and line_key(text) in keys), None)
        if line is not None:
            dropped.append(Dropped(document.id, f"held-out-prompt: {line.strip()[:80]}"))
            continue
        own = word_runs(document.text, ngram)
        shared = int(np.isin(own, forbidden, assume_unique=True).sum())
        if shared > max_share * len(own):
            dropped.append(Dropped(document.id, f"held-out-overlap: {shared} of {len(own)} {ngram}-word runs"))
            continue
        kept.append(document)
    return kept, dropped


def word_runs(text: str, length: int, marks: bool = False) -> npt.NDArray[np.uint64]:
    """Sorted distinct 64-bit hashes of all runs of ``length`` words (of the whole text when it is shorter).

    ``marks`` counts punctuation marks as words; without it, runs of code hold more than brackets.
    """
    words = _words(text, _WORD_OR_MARK if marks else _WORD)
    length = max(1, min(length, len(words)))
    count = max(1, len(words) - length + 1)
    hashes = np.zeros(count, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for shift in range(min(length, len(words))):
            hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + words[shift : shift + count]
            hashes ^= hashes >> np.uint64(29)
    return np.unique(hashes)


def _words(text: str, pattern: re.Pattern[str]) -> npt.NDArray[np.uint64]:
    words = pattern.findall(text.lower())
    return np.array([zlib.crc32(word.encode()) + 1 for word in words], dtype=np.uint64)


def _multipliers() -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    generator = np.random.default_rng(20250514)  # any fixed seed: signatures must agree between runs
    draw = generator.integers(0, 2**63, size=(2, _BANDS * _ROWS), dtype=np.uint64)
    return draw[0] * np.uint64(2) + np.uint64(1), draw[1]


_FACTORS, _SHIFTS = _multipliers()


def _bands(shingles: npt.NDArray[np.uint64]) -> list[tuple[int, bytes]]:
    with np.errstate(over="ignore"):
        signature = np.array(
            [((shingles * a + b) >> np.uint64(32)).min() for a, b in zip(_FACTORS, _SHIFTS, strict=True)],
            dtype=np.uint64,
        )
    return [(band, signature[band * _ROWS : (band + 1) * _ROWS].tobytes()) for band in range(_BANDS)]


def _jaccard(left: npt.NDArray[Any], right: npt.NDArray[Any]) -> float:
    shared = len(np.intersect1d(left, right, assume_unique=True))
    return shared / (len(left) + len(right) - shared)
