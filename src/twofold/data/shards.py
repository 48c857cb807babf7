"""Token shards: a folder with all documents' token ids end to end, memory-mapped, plus offsets and a manifest.

Files: tokens.bin (uint16 or uint32, little endian), offsets.npy (int64, documents + 1), shard.json (written last).
A shard is whole or it is refused: sizes and offsets are checked whenever it is opened, SHA-256 always, once or never.
Not here: many shards as one (shard_set.py), tokenisation, shuffling, packing (packing.py).
"""

from __future__ import annotations

import errno
import json
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from twofold.base.files import atomic_path, read_json, sha256_file, write_json
from twofold.base.records import InputError

Verify = Literal["full", "once", "quick"]

FORMAT = 1
MANIFEST = "shard.json"
FILES = ("tokens.bin", "offsets.npy")
VERIFIED = "verified.json"  # beside them: which files have been hashed and found right
_FLUSH_TOKENS = 1 << 20
_CHECKED_AT_ONCE = 1 << 18  # offsets


def write_shard(
    folder: Path,
    documents_tokens: Iterable[Sequence[int]],
    meta: dict[str, Any],
    *,
    vocab_size: int = 65536,
    text_bytes: int | None = None,
) -> None:
    """Write one shard, streaming; an older shard in ``folder`` is replaced.

    Args:
        documents_tokens: token ids of each document, none empty.
        meta: any JSON-able description, returned by ``Shard.meta``.
        vocab_size: ids must be below it; over 65,536 four bytes a token are used.
        text_bytes: UTF-8 bytes of the text the tokens stand for; None takes ``meta.get("bytes", 0)``.

    Raises:
        InputError: an empty document, an id outside the vocabulary, or no documents at all.
    """
    dtype = np.dtype("<u2") if vocab_size <= 65536 else np.dtype("<u4")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)  # from here on an interrupted write is visibly incomplete
    lengths: list[int] = []
    with atomic_path(folder / "tokens.bin") as temporary, open(temporary, "wb") as handle:
        buffer: list[npt.NDArray[np.int64]] = []
        pending = 0
        for index, tokens in enumerate(documents_tokens):
            array = np.asarray(tokens, dtype=np.int64)
            if array.size == 0:
                raise InputError(f"document {index} has no tokens; drop empty documents before writing a shard")
            if array.min() < 0 or array.max() >= vocab_size:
                raise InputError(
                    f"document {index} has token ids {array.min()}..{array.max()}, outside [0, {vocab_size}); "
                    "pass the tokenizer's vocab_size"
                )
            lengths.append(array.size)
            buffer.append(array)
            pending += array.size
            if pending >= _FLUSH_TOKENS:
                handle.write(np.concatenate(buffer).astype(dtype).tobytes())
                buffer, pending = [], 0
        if not lengths:
            raise InputError("a shard needs at least one document; the source was empty")
        if buffer:
            handle.write(np.concatenate(buffer).astype(dtype).tobytes())
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    with atomic_path(folder / "offsets.npy") as temporary, open(temporary, "wb") as handle:
        np.save(handle, offsets)
    manifest = {
        "format": FORMAT,
        "dtype": dtype.str,
        "documents": len(lengths),
        "tokens": int(offsets[-1]),
        "bytes": int(meta.get("bytes", 0)) if text_bytes is None else text_bytes,
        "vocab_size": vocab_size,
        "sha256": {name: sha256_file(folder / name) for name in FILES},
        "meta": meta,
    }
    write_json(folder / MANIFEST, manifest)


@dataclass(frozen=True)
class Shard:
    """An opened shard: document i is ``tokens[offsets[i]:offsets[i + 1]]``; ``sha256`` is that of the token file."""

    folder: Path
    tokens: npt.NDArray[Any]
    offsets: npt.NDArray[np.int64]
    meta: dict[str, Any]
    text_bytes: int
    vocab_size: int
    sha256: str

    @classmethod
    def open(cls, folder: Path, verify: Verify = "full") -> Shard:
        """Map a shard from disk; nothing of it is read into memory.

        Args:
            verify: whether SHA-256 of both files is compared, which reads them: ``full`` always, ``quick`` never,
                ``once`` until it was found right, which ``verified.json`` in the folder remembers for files of that
                size, time of change and inode. Sizes and offsets are always checked.

        Raises:
            InputError: something is missing or does not agree with the manifest; the message names the fix.
        """
        manifest = read_manifest(folder)
        dtype = np.dtype(manifest["dtype"])
        expected = manifest["tokens"] * dtype.itemsize
        actual = (folder / "tokens.bin").stat().st_size
        if actual != expected:
            raise InputError(
                f"{folder}/tokens.bin has {actual} bytes, not {expected}; delete the folder and rebuild it"
            )
        if verify == "full" or (verify == "once" and not _remembered(folder, manifest)):
            for name, digest in manifest["sha256"].items():
                if sha256_file(folder / name) != digest:
                    raise InputError(f"{folder}/{name} does not match its SHA-256; delete the folder and rebuild it")
            if verify == "once":
                remember_verified(folder)
        try:
            offsets = np.load(folder / "offsets.npy", mmap_mode="r", allow_pickle=False).view(np.ndarray)
            tokens = np.memmap(folder / "tokens.bin", dtype=dtype, mode="r").view(np.ndarray)
        except (ValueError, EOFError, OSError) as error:
            raise _unreadable(folder, error) from None
        good = offsets.shape == (manifest["documents"] + 1,) and offsets.dtype == np.int64
        if not good or offsets[0] != 0 or offsets[-1] != manifest["tokens"] or not _rising(offsets):
            raise InputError(f"{folder}/offsets.npy does not fit shard.json; delete the folder and rebuild it")
        return cls(
            folder=folder,
            tokens=tokens,
            offsets=offsets,
            meta=manifest["meta"],
            text_bytes=manifest["bytes"],
            vocab_size=manifest["vocab_size"],
            sha256=manifest["sha256"]["tokens.bin"],
        )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""
        return int(self.offsets[-1])

    def document(self, index: int) -> npt.NDArray[Any]:
        """Token ids of one document (a read-only view)."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def span(self, index: int) -> tuple[int, int]:
        """Where one document begins and ends, for ``read``."""
        return int(self.offsets[index]), int(self.offsets[index + 1])

    def read(self, start: int, end: int) -> npt.NDArray[Any]:
        """Token ids from ``start`` to ``end``, within one document (a read-only view)."""
        return self.tokens[start:end]

    def of_lengths(self, low: int, high: int | None) -> npt.NDArray[np.uint32] | None:
        """Documents of ``low`` to ``high`` tokens (None: any number more), in order; None when that is all of them."""
        parts = []
        for first in range(0, len(self), _CHECKED_AT_ONCE):
            lengths = np.diff(self.offsets[first : first + _CHECKED_AT_ONCE + 1])
            wanted = (lengths >= low) & (lengths <= (high or np.iinfo(np.int64).max))
            parts.append((np.flatnonzero(wanted) + first).astype(np.uint32))
        kept = np.concatenate(parts)
        return None if len(kept) == len(self) else kept


def remember_verified(folder: Path) -> None:
    """Record that both files were compared with their SHA-256, so that ``verify="once"`` need not do it again.

    A folder that cannot be written is left as it is, with a warning that it will be hashed every time.
    """
    digests = read_manifest(folder)["sha256"]
    try:
        write_json(folder / VERIFIED, {name: _identity(folder / name) | {"sha256": digests[name]} for name in FILES})
    except OSError as error:
        warnings.warn(
            f"{folder} cannot be written ({error.strerror}), so it is hashed whenever it is opened; "
            'make it writable once, or open it with verify="quick"',
            RuntimeWarning,
            stacklevel=3,
        )


def _remembered(folder: Path, manifest: dict[str, Any]) -> bool:
    try:
        record = read_json(folder / VERIFIED)
    except (OSError, ValueError):
        return False
    digests = manifest["sha256"]
    return bool(record == {name: _identity(folder / name) | {"sha256": digests[name]} for name in FILES})


def _identity(path: Path) -> dict[str, int]:
    facts = path.stat()
    return {"size": facts.st_size, "mtime_ns": facts.st_mtime_ns, "inode": facts.st_ino}


def _rising(offsets: npt.NDArray[np.int64]) -> bool:
    """Whether every document has a token; looked at piece by piece, so that memory stays small."""
    firsts = range(0, len(offsets) - 1, _CHECKED_AT_ONCE)
    return all(bool((np.diff(offsets[first : first + _CHECKED_AT_ONCE + 1]) > 0).all()) for first in firsts)


def _unreadable(folder: Path, error: Exception) -> InputError:
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENOMEM):
        return InputError(f"{folder} cannot be mapped ({error.strerror}); raise `ulimit -n`, or write larger shards")
    return InputError(f"{folder}: its files cannot be read ({error}); delete the folder and rebuild it")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a shard whose files are all there.

    Raises:
        InputError: they are not, or it is not one.
    """
    for name in (MANIFEST, *FILES):
        if not (folder / name).is_file():
            raise InputError(f"{folder} is not a complete shard ({name} is missing); write it again with write_shard")
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{folder}/shard.json is not JSON ({error}); delete the folder and rebuild it") from None
    return parse_manifest(text, str(folder))


def parse_manifest(text: str, place: str) -> dict[str, Any]:
    """The text of a shard.json as data; ``place`` names it in errors.

    Raises:
        InputError: it is not one.
    """
    try:
        manifest = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{place}/shard.json is not JSON ({error}); delete the folder and rebuild it") from None
    needed = {"format", "dtype", "documents", "tokens", "bytes", "vocab_size", "sha256", "meta"}
    if not isinstance(manifest, dict) or not needed <= manifest.keys() or manifest["format"] != FORMAT:
        raise InputError(f"{place}/shard.json is not of shard format {FORMAT}; delete the folder and rebuild it")
    if not isinstance(manifest["sha256"], dict) or manifest["sha256"].keys() != set(FILES):
        raise InputError(f"{place}/shard.json lacks the SHA-256 of its files; delete the folder and rebuild it")
    return manifest
