"""BlockManager: which blocks of the KV cache are in use, by how many samples, and which finished prefixes they hold.

A block holds ``block_size`` positions of one sequence. A full block has a key: the hash of everything up to its end,
chained block by block, over the tokens and whatever else decides its contents (the root: weights, adapter, coding). A
later sequence that begins with the same tokens shares the block. Blocks that nobody uses keep their contents until they
are needed, the longest unused first. No tensors here, and nothing about requests.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

Key = bytes


def root_key(*facts: object) -> Key:
    """The key that a chain starts from: what decides the contents of blocks besides their tokens."""
    return hashlib.blake2b(repr(facts).encode(), digest_size=16).digest()


def next_key(key: Key, tokens: Sequence[int]) -> Key:
    """The key of a full block with these tokens after a prefix with that key."""
    return hashlib.blake2b(key + array("q", tokens).tobytes(), digest_size=16).digest()


class BlockManager:
    """Blocks 0 .. ``blocks`` - 1: free, in use (counted), or kept for their contents.

    Args:
        blocks: how many there are. block_size: positions of each. whole: each holds a whole sequence; then none is
            shared or kept, and ``compact`` may move them.
    """

    def __init__(self, blocks: int, block_size: int, whole: bool = False) -> None:
        self.total, self.block_size, self.whole = blocks, block_size, whole
        self._users = [0] * blocks
        self._keys: list[Key | None] = [None] * blocks
        self._by_key: dict[Key, int] = {}
        self._free = dict.fromkeys(range(blocks - 1, -1, -1))  # the last one is taken first: low numbers
        self._kept: OrderedDict[int, None] = OrderedDict()  # unused with contents; the first one goes first

    @property
    def available(self) -> int:
        """Blocks that can be taken now."""
        return len(self._free) + len(self._kept)

    @property
    def used(self) -> int:
        """Blocks that sequences hold."""
        return self.total - self.available

    def needed(self, tokens: int) -> int:
        """Blocks that so many positions take."""
        return -(-tokens // self.block_size)

    def kept(self, blocks: Sequence[int]) -> int:
        """How many of these are unused: sharing them takes that many from ``available``."""
        return sum(self._users[block] == 0 for block in blocks)

    def lookup(self, tokens: Sequence[int], root: Key) -> tuple[list[int], list[Key]]:
        """The longest run of full blocks that hold the beginning of ``tokens``, and their keys.

        At least the last token is left over: its forward pass gives what comes next. Takes nothing.
        """
        blocks: list[int] = []
        keys: list[Key] = []
        if self.whole:
            return blocks, keys
        for end in range(self.block_size, len(tokens), self.block_size):
            root = next_key(root, tokens[end - self.block_size : end])
            if root not in self._by_key:
                break
            blocks.append(self._by_key[root])
            keys.append(root)
        return blocks, keys

    def take(self, count: int, after: int | None = None) -> list[int]:
        """``count`` blocks for one user, each if possible the one that follows the last.

        Args:
            after: the block before the first.

        Raises:
            ValueError: fewer are available.
        """
        if count > self.available:
            raise ValueError(f"{count} blocks asked for, {self.available} available")
        taken: list[int] = []
        for _ in range(count):
            after = self._take_one(None if after is None else after + 1)
            taken.append(after)
        return taken

    def _take_one(self, wanted: int | None) -> int:
        if wanted is not None and wanted in self._free:
            del self._free[wanted]
            block = wanted
        elif self._free:
            block = self._free.popitem()[0]
        else:
            block = self._kept.popitem(last=False)[0]
            self._forget(block)
        self._users[block] = 1
        return block

    def share(self, blocks: Iterable[int]) -> None:
        """One more user of each."""
        for block in blocks:
            if self._users[block] == 0:
                del self._kept[block]
            self._users[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One user less of each block of a sequence, given in the sequence's order.

        Raises:
            ValueError: a block that nobody uses.
        """
        for block in reversed(blocks):  # the end of a sequence is given up before its beginning
            if self._users[block] < 1:
                raise ValueError(f"block {block} is released but not in use")
            self._users[block] -= 1
            if self._users[block] == 0:
                (self._free if self._keys[block] is None else self._kept)[block] = None

    def compact(self) -> dict[int, int]:
        """Give blocks in use the lowest numbers, keeping the order of those that may stay: {old block: new block}.

        For whole sequences only. The caller moves contents and tables.
        """
        assert self.whole, "blocks that are shared cannot move"
        used = [block for block, users in enumerate(self._users) if users]
        holes = [block for block in range(len(used)) if not self._users[block]]
        moves = dict(zip(reversed(used), holes, strict=False))
        for old, new in moves.items():
            self._users[old], self._users[new] = 0, self._users[old]
        self._free = dict.fromkeys(range(self.total - 1, len(used) - 1, -1))
        return moves

    def register(self, block: int, key: Key) -> None:
        """A block in use is full: it may be shared under ``key`` from now on. A key that is known stays where it is."""
        if not self.whole and key not in self._by_key and self._keys[block] is None:
            self._by_key[key] = block
            self._keys[block] = key

    def flush(self) -> None:
        """Share nothing that has been computed so far."""
        for block in list(self._by_key.values()):
            self._forget(block)
        self._free.update(self._kept)
        self._kept.clear()

    def _forget(self, block: int) -> None:
        key = self._keys[block]
        assert key is not None
        del self._by_key[key]
        self._keys[block] = None

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Assert that counts, keys and lists agree with each other and with the blocks that sequences hold."""
        held = Counter(block for table in tables for block in table)
        assert [held[block] for block in range(self.total)] == self._users, "user counts differ from the tables"
        unused = {block for block, users in enumerate(self._users) if users == 0}
        assert self._free.keys() | self._kept.keys() == unused, "an unused block is in no list, or a used one in one"
        assert not self._free.keys() & self._kept.keys(), "a block is both free and kept"
        assert {key: block for block, key in enumerate(self._keys) if key is not None} == self._by_key, "keys differ"
        assert all(self._keys[block] is not None for block in self._kept), "a kept block has no contents to share"
        assert all(self._keys[block] is None for block in self._free), "a free block is still shared"
        assert not self.whole or (not self._by_key and max(self._users, default=0) < 2), "a whole sequence is shared"
