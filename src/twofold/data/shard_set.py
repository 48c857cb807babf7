"""Many shards as one sequence of documents, from folders of this machine or from any address that fsspec reads.

Opening maps the files and reads none of them, so that gigabytes open in milliseconds once they were verified.
Not here: the file format (shards.py), downloading (remote.py), shuffling and packing (packing.py).
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from twofold.base.records import InputError
from twofold.data.remote import is_address, local_copies
from twofold.data.shards import MANIFEST, Shard, Verify, write_shard


class Documents(Protocol):
    """Tokenised documents as a mixture reads them: a Shard or a ShardSet."""

    @property
    def sha256(self) -> str: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def num_tokens(self) -> int: ...

    def __len__(self) -> int: ...

    def span(self, index: int, /) -> tuple[int, int]: ...

    def read(self, start: int, end: int, /) -> npt.NDArray[Any]: ...

    def of_lengths(self, low: int, high: int | None, /) -> npt.NDArray[np.uint32] | None: ...


class ShardSet:
    """Shards end to end: documents and token places are numbered through, in the order given.

    Raises:
        InputError: no shards, or shards of different vocabularies.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        if not shards:
            raise InputError("a shard set needs at least one shard")
        for shard in shards[1:]:
            if shard.vocab_size != shards[0].vocab_size:
                raise InputError(
                    f"{shard.folder} was made for {shard.vocab_size} token ids and {shards[0].folder} for "
                    f"{shards[0].vocab_size}; tokenise both with one tokenizer"
                )
        self.shards = tuple(shards)
        self._first_document = list(accumulate((len(shard) for shard in shards), initial=0))
        self._first_token = list(accumulate((shard.num_tokens for shard in shards), initial=0))
        self.sha256 = hashlib.sha256("".join(shard.sha256 for shard in shards).encode()).hexdigest()
        self.vocab_size = shards[0].vocab_size
        self.text_bytes = sum(shard.text_bytes for shard in shards)

    def __len__(self) -> int:
        return self._first_document[-1]

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""
        return self._first_token[-1]

    def document(self, index: int) -> npt.NDArray[Any]:
        """Token ids of one document (a read-only view)."""
        return self.read(*self.span(index))

    def span(self, index: int) -> tuple[int, int]:
        """Where one document begins and ends, for ``read``."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        place = bisect_right(self._first_document, index) - 1
        start, end = self.shards[place].span(index - self._first_document[place])
        return start + self._first_token[place], end + self._first_token[place]

    def read(self, start: int, end: int) -> npt.NDArray[Any]:
        """Token ids from ``start`` to ``end``, within one document (a read-only view)."""
        place = bisect_right(self._first_token, start) - 1
        first = self._first_token[place]
        return self.shards[place].read(start - first, end - first)

    def of_lengths(self, low: int, high: int | None) -> npt.NDArray[np.uint32] | None:
        """Documents of ``low`` to ``high`` tokens (None: any number more), in order; None when that is all of them."""
        found = [shard.of_lengths(low, high) for shard in self.shards]
        if all(part is None for part in found):
            return None
        pairs = zip(self.shards, found, self._first_document, strict=False)
        whole = [(np.arange(len(s), dtype=np.uint32) if part is None else part, first) for s, part, first in pairs]
        return np.concatenate([part + np.uint32(first) for part, first in whole])


def open_shards(
    places: str | Path | Sequence[str | Path], verify: Verify = "once", cache: Path | None = None
) -> Documents:
    """One shard, a folder of shards (by name), or a list of either.

    Args:
        places: folders, or addresses with ``://`` that fsspec reads (``s3://bucket/corpus``).
        verify: as for ``Shard.open``. Downloads are compared with their SHA-256 whatever it says.
        cache: folder for copies of remote shards; needed for addresses.

    Raises:
        InputError: a shard is missing, broken or cannot be fetched; the message names the fix.
    """
    listed = [places] if isinstance(places, str | Path) else list(places)
    folders = [folder for place in listed for folder in _folders(place, cache)]
    shards = [Shard.open(folder, verify) for folder in folders]
    return shards[0] if len(shards) == 1 else ShardSet(shards)


def _folders(place: str | Path, cache: Path | None) -> list[Path]:
    if is_address(place):
        if cache is None:
            raise InputError(f"{place} is not on this machine; name a cache folder for its copy")
        return local_copies(str(place), cache)
    folder = Path(place)
    if (folder / MANIFEST).exists() or (folder / "tokens.bin").exists():
        return [folder]
    if not folder.is_dir():
        raise InputError(f"{folder} is not there; check the path of the shards")
    found = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not found:
        raise InputError(f"{folder} holds no shards; write some with write_shard or write_shards")
    return found  # one of them that is incomplete is refused when it is opened


def write_shards(
    folder: Path,
    documents_tokens: Iterable[Sequence[int]],
    meta: dict[str, Any],
    *,
    tokens_per_shard: int,
    vocab_size: int = 65536,
) -> list[Path]:
    """Write a stream of documents as a folder of shards named 00000, 00001, …; returns their folders.

    Args:
        tokens_per_shard: a shard ends with the document that reaches it.
        meta, vocab_size: as for ``write_shard``; every shard gets the same.

    Raises:
        InputError: as ``write_shard``, or the folder already holds other shards.
    """
    if tokens_per_shard < 1:
        raise InputError(f"tokens_per_shard must be >= 1, got {tokens_per_shard}")
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty; choose a new folder for the shards, or empty it")
    written: list[Path] = []
    stream = iter(documents_tokens)
    for first in stream:
        written.append(folder / f"{len(written):05d}")
        write_shard(written[-1], _up_to(tokens_per_shard, first, stream), meta, vocab_size=vocab_size)
    if not written:
        raise InputError("a folder of shards needs at least one document; the source was empty")
    return written


def _up_to(tokens: int, first: Sequence[int], stream: Iterator[Sequence[int]]) -> Iterator[Sequence[int]]:
    """``first`` and the next documents, to the one that reaches ``tokens``."""
    yield first
    tokens -= len(first)
    while tokens > 0 and (document := next(stream, None)) is not None:
        yield document
        tokens -= len(document)
