"""Token shards: a folder with all documents' token ids end to end, memory-mapped, plus offsets and a manifest.

Files: tokens.bin (uint16 or uint32, little endian), offsets.npy (int64, documents + 1), shard.json (written last).
A shard is whole or it is refused: sizes and SHA-256 are checked on opening.
Not here: tokenisation, shuffling, packing (packing.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from twofold.base.files import atomic_path, read_json, sha256_file, write_json
from twofold.base.records import InputError

FORMAT = 1
_FLUSH_TOKENS = 1 << 20


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
    (folder / "shard.json").unlink(missing_ok=True)  # from here on an interrupted write is visibly incomplete
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
        "sha256": {name: sha256_file(folder / name) for name in ("tokens.bin", "offsets.npy")},
        "meta": meta,
    }
    write_json(folder / "shard.json", manifest)


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
    def open(cls, folder: Path, verify: bool = True) -> Shard:
        """Map a shard from disk.

        Args:
            verify: also compare SHA-256 of both files (reads them once).

        Raises:
            InputError: something is missing or does not agree with the manifest; the message names the fix.
        """
        manifest = _manifest(folder)
        dtype = np.dtype(manifest["dtype"])
        expected = manifest["tokens"] * dtype.itemsize
        actual = (folder / "tokens.bin").stat().st_size
        if actual != expected:
            raise InputError(
                f"{folder}/tokens.bin has {actual} bytes, not {expected}; delete the folder and rebuild it"
            )
        if verify:
            for name, digest in manifest["sha256"].items():
                if sha256_file(folder / name) != digest:
                    raise InputError(f"{folder}/{name} does not match its SHA-256; delete the folder and rebuild it")
        try:
            offsets = np.load(folder / "offsets.npy", allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise InputError(
                f"{folder}/offsets.npy cannot be read ({error}); delete the folder and rebuild it"
            ) from None
        good = offsets.shape == (manifest["documents"] + 1,) and offsets[0] == 0 and offsets[-1] == manifest["tokens"]
        if not good or (np.diff(offsets) <= 0).any():
            raise InputError(f"{folder}/offsets.npy does not fit shard.json; delete the folder and rebuild it")
        tokens = np.memmap(folder / "tokens.bin", dtype=dtype, mode="r").view(np.ndarray)
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


def _manifest(folder: Path) -> dict[str, Any]:
    for name in ("shard.json", "tokens.bin", "offsets.npy"):
        if not (folder / name).is_file():
            raise InputError(f"{folder} is not a complete shard ({name} is missing); write it again with write_shard")
    try:
        manifest = read_json(folder / "shard.json")
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{folder}/shard.json is not JSON ({error}); delete the folder and rebuild it") from None
    needed = {"format", "dtype", "documents", "tokens", "bytes", "vocab_size", "sha256", "meta"}
    if not isinstance(manifest, dict) or not needed <= manifest.keys() or manifest["format"] != FORMAT:
        raise InputError(f"{folder}/shard.json is not of shard format {FORMAT}; delete the folder and rebuild it")
    return manifest
