"""Rank files of tiktoken (``qwen.tiktoken``) read as the vocabulary and merges of a byte-level BPE.

A rank file lists byte strings and their order; which two tokens each one was merged from is not written down and is
found again here. Not here: the pre-tokenisation and the added tokens, which such a file lacks (``tokenizer.py``).
"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path

from twofold.base.records import InputError

Merge = tuple[bytes, bytes]


def read_ranks(path: Path) -> dict[bytes, int]:
    """Byte string -> rank, from lines of ``base64 rank``.

    Raises:
        InputError: the file is absent, a line is not of that form, or ranks are not 0, 1, 2, … with all 256 bytes.
    """
    ranks: dict[bytes, int] = {}
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); give a .tiktoken file") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise InputError(f"{path}:{number} is not 'base64 rank'; give a .tiktoken file") from None
    if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([byte]) not in ranks for byte in range(256)):
        raise InputError(f"{path} is not a whole rank file (gaps, or bytes missing); copy the file again")
    return ranks


def merges_of(ranks: dict[bytes, int]) -> list[Merge]:
    """The merge behind every token of more than one byte, in rank order.

    A token's two halves are what byte-pair encoding makes of its bytes with earlier tokens alone.

    Raises:
        InputError: a token that no merge of two earlier ones makes.
    """
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            parts = _encode(token, ranks, rank)
            if len(parts) != 2:
                raise InputError(f"token {token!r} of rank {rank} is not a merge of two earlier ones; not a BPE")
            merges.append((parts[0], parts[1]))
    return merges


def _encode(token: bytes, ranks: dict[bytes, int], below: int) -> list[bytes]:
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 1:
        best, where = below, -1
        for index in range(len(parts) - 1):
            rank = ranks.get(parts[index] + parts[index + 1], below)
            if rank < best:
                best, where = rank, index
        if where < 0:
            break
        parts[where : where + 2] = [parts[where] + parts[where + 1]]
    return parts
