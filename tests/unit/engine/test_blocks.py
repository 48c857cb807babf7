"""Blocks: what is shared, what is evicted first, and that misuse is noticed."""

from __future__ import annotations

import pytest

from twofold.engine.blocks import BlockManager, next_key, root_key

ROOT = root_key(0, None, False)


def filled(manager: BlockManager, tokens: list[int], root: bytes = ROOT) -> list[int]:
    """A sequence that has computed all of ``tokens``."""
    blocks = manager.take(manager.needed(len(tokens)))
    key, size = root, manager.block_size
    for index in range(len(tokens) // size):
        key = next_key(key, tokens[index * size : (index + 1) * size])
        manager.register(blocks[index], key)
    return blocks


def test_blocks_are_taken_in_a_row_and_the_lowest_first() -> None:
    manager = BlockManager(8, 4)
    assert (manager.needed(0), manager.needed(1), manager.needed(4), manager.needed(5)) == (0, 1, 1, 2)
    first, second = manager.take(2), manager.take(1)
    assert first == [0, 1] and second == [2]
    assert manager.take(1, after=3) == [4] and manager.take(1, after=1) == [3]  # 2 is taken: another one
    assert manager.available == 3 and manager.used == 5
    with pytest.raises(ValueError, match="4 blocks asked for, 3 available"):
        manager.take(4)


def test_a_prefix_is_found_while_it_is_used_and_after() -> None:
    manager = BlockManager(8, 4)
    tokens = list(range(10))
    blocks = filled(manager, tokens)
    assert manager.lookup(tokens, ROOT)[0] == blocks[:2]
    assert manager.lookup([*tokens[:7], 99, 1, 2], ROOT)[0] == blocks[:1]
    assert manager.lookup(tokens[:8], ROOT)[0] == blocks[:1], "the last token is always computed"
    assert manager.lookup(tokens[:4], ROOT)[0] == []
    assert manager.lookup(tokens, root_key(1, None, False))[0] == [], "other weights"
    manager.share(blocks[:2])
    manager.release(blocks)
    assert manager.used == 2
    manager.release(blocks[:2])
    assert manager.used == 0 and manager.lookup(tokens, ROOT)[0] == blocks[:2] and manager.kept(blocks[:2]) == 2
    manager.check_integrity([])
    with pytest.raises(ValueError, match="released but not in use"):
        manager.release(blocks[:1])


def test_what_was_unused_longest_goes_first_and_ends_before_beginnings() -> None:
    manager = BlockManager(5, 2)
    old, new = filled(manager, [1, 2, 3, 4]), filled(manager, [5, 6, 7, 8])
    manager.release(old)
    manager.release(new)
    assert manager.take(1) == [4], "a free block is taken before a kept one"
    assert manager.take(1) == [old[1]] and manager.lookup([1, 2, 3, 4, 5], ROOT)[0] == old[:1]
    manager.share(manager.lookup([1, 2, 9], ROOT)[0])  # used again, so it is not the next to go
    assert manager.take(2) == [new[1], new[0]] and manager.lookup([5, 6, 7], ROOT)[0] == []
    manager.check_integrity([[4], old, [new[1], new[0]]])


def test_equal_contents_computed_twice_are_shared_once() -> None:
    manager = BlockManager(4, 2)
    one, two = filled(manager, [1, 2]), filled(manager, [1, 2])
    manager.release(two)
    assert manager.lookup([1, 2, 3], ROOT)[0] == one and manager.kept(two) == 1 and manager.used == 1
    manager.check_integrity([one])


def test_after_a_flush_nothing_old_is_found() -> None:
    manager = BlockManager(6, 2)
    used, unused = filled(manager, [1, 2]), filled(manager, [3, 4])
    manager.release(unused)
    manager.flush()
    assert manager.lookup([1, 2, 3], ROOT)[0] == [] == manager.lookup([3, 4, 5], ROOT)[0]
    manager.check_integrity([used])
    manager.release(used)
    assert manager.available == 6
    manager.check_integrity([])


def test_whole_sequences_are_neither_found_nor_kept_and_move_together() -> None:
    manager = BlockManager(6, 4, whole=True)
    tables = [filled(manager, [1, 2, 3, 4]) for _ in range(5)]
    assert manager.lookup([1, 2, 3, 4, 5], ROOT) == ([], [])
    for gone in (0, 3):
        manager.release(tables[gone])
    moves = manager.compact()
    assert moves == {4: 0} and manager.take(1) == [3]
    manager.check_integrity([[0], [1], [2], [3]])


def test_keys_differ_where_contents_may() -> None:
    facts = [(0, None, False, None), (1, None, False, None), (0, "a", False, None), (0, None, True, None)]
    assert len({root_key(*fact) for fact in (*facts, (0, None, False, "a"))}) == 5
    assert next_key(ROOT, [1, 2]) != next_key(ROOT, [2, 1]) != next_key(next_key(ROOT, [1]), [2])


def test_lost_blocks_are_noticed() -> None:
    manager = BlockManager(4, 2)
    blocks = manager.take(2)
    with pytest.raises(AssertionError, match="user counts"):
        manager.check_integrity([blocks[:1]])
    manager.check_integrity([blocks])
