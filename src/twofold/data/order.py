"""The order in which documents are read: a permutation for every epoch, without a list of them where there are many.

Many documents are put in order by a keyed Feistel network, a function that sends every position to another document and
takes no memory. Not here: where in that order a run stands (packing.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

LISTED = 1 << 18  # up to so many documents the order is a list, drawn by numpy; artefacts depend on it
_ROUNDS = 8  # 4 are the fewest that look random (Luby and Rackoff 1988); all 8 take 0.3 microseconds a document
_BLOCK = 4096  # positions that are computed at once


class Order(Protocol):
    """Which document stands at a position."""

    def __len__(self) -> int: ...

    def __getitem__(self, position: int, /) -> int: ...


def order(count: int, key: Sequence[int]) -> Order | npt.NDArray[np.int64]:
    """A permutation of 0 to ``count`` - 1 that depends on ``key`` alone."""
    if count <= LISTED:
        return np.random.default_rng(key).permutation(count)
    return Scattered(count, key)


class Scattered:
    """A permutation as a function: O(1) memory, any position at once.

    The network permutes the numbers of as many bits as ``count`` - 1 has; a number outside is sent on until it is
    inside, which keeps it a permutation and takes fewer than two rounds on average.
    """

    def __init__(self, count: int, key: Sequence[int]) -> None:
        bits = max(2, (count - 1).bit_length())
        self._count = count
        self._low = np.uint64(bits - bits // 2)
        self._masks = [np.uint64((1 << (bits // 2)) - 1), np.uint64((1 << (bits - bits // 2)) - 1)]
        seed = hashlib.blake2b(repr([int(part) for part in key]).encode(), digest_size=8 * _ROUNDS).digest()
        self._keys = np.frombuffer(seed, dtype="<u8")
        self._block = -1
        self._values = np.empty(0, dtype=np.uint64)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, position: int, /) -> int:
        if not 0 <= position < self._count:
            raise IndexError(position)
        block, place = divmod(position, _BLOCK)
        if block != self._block:
            first = block * _BLOCK
            self._values = self._at(np.arange(first, min(first + _BLOCK, self._count), dtype=np.uint64))
            self._block = block
        return int(self._values[place])

    def _at(self, positions: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        values = self._network(positions)
        while (outside := values >= self._count).any():
            values[outside] = self._network(values[outside])
        return values

    def _network(self, values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        halves = [values >> self._low, values & self._masks[1]]
        for number, key in enumerate(self._keys):
            side = number % 2
            halves[side] = halves[side] ^ (_mixed(halves[1 - side] + key) & self._masks[side])
        return (halves[0] << self._low) | halves[1]


def _mixed(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of SplitMix64: every bit of the result depends on every bit of the argument."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
