"""Document order: permutations, the same ones for ever, and nothing kept for them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twofold.data import order as module
from twofold.data.order import Scattered, order


@settings(max_examples=30)
@given(st.integers(1, 3000), st.lists(st.integers(0, 100), min_size=1, max_size=4))
def test_scattered_is_a_permutation(count: int, key: list[int]) -> None:
    scattered = Scattered(count, key)
    assert len(scattered) == count
    assert sorted(scattered[place] for place in range(count)) == list(range(count))


def test_any_position_at_once_and_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    straight = Scattered(70_000, [3, 1])
    expected = [straight[place] for place in range(10_000)]
    monkeypatch.setattr(module, "_BLOCK", 7)
    jumping = Scattered(70_000, [3, 1])
    for place in (9_999, 0, 5_000, 4_999, 6):
        assert jumping[place] == expected[place]
    for place in (-1, 70_000):
        with pytest.raises(IndexError):
            jumping[place]


GOLDEN = [4776928, 9410233, 9415829, 6652252]


def test_the_order_never_changes() -> None:
    """A saved run resumes in a later version only if these stay."""
    scattered = Scattered(10_000_000, [0, 2, 0, 0])
    assert [scattered[place] for place in range(4)] == GOLDEN
    assert order(5, [0, 2, 0, 0])[0] == np.random.default_rng([0, 2, 0, 0]).permutation(5)[0]


def test_it_looks_random() -> None:
    """Neighbours, fixed places and two keys have nothing to do with each other (bounds: 5 standard deviations)."""
    count, drawn = 1 << 20, 40_000
    first, second = (np.array([s[i] for i in range(drawn)]) for s in (Scattered(count, [1]), Scattered(count, [2])))
    limit = 5 / drawn**0.5
    for left, right in ((first[:-1], first[1:]), (first, second), (first, np.arange(drawn))):
        assert abs(np.corrcoef(left, right)[0, 1]) < limit
    shares = np.bincount(first * 16 // count, minlength=16) / drawn
    assert abs(shares - 1 / 16).max() < 5 * (1 / 16 / drawn) ** 0.5
    assert ((first[1:] - first[:-1]) % count == 1).sum() < 5
    assert (first == second).sum() < 5


def test_long_orders_are_functions_and_short_ones_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LISTED", 10)
    assert isinstance(order(10, [1]), np.ndarray)
    assert isinstance(order(11, [1]), Scattered)
