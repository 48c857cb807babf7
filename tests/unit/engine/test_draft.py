"""Prompt lookup: the latest place, the longest end, no false alarms."""

from __future__ import annotations

import random

import pytest

from twofold.engine.draft import prompt_lookup


@pytest.mark.parametrize(
    ("tokens", "count", "expected"),
    [
        ([1, 2, 3, 4, 9, 1, 2], 2, [3, 4]),
        ([1, 2, 3, 4, 9, 1, 2], 9, [3, 4, 9, 1, 2]),
        ([1, 2, 3, 1, 2, 4, 1, 2], 1, [4]),  # the latest place
        ([8, 1, 2, 3, 9, 1, 2, 5, 8, 1, 2], 1, [3]),  # a longer end is better than a later place
        ([7, 7, 7], 3, [7]),
        ([1, 2, 3, 4], 3, []),
        ([1, 2, 1], 3, []),  # one token is not enough
        ([1], 3, []),
        ([], 3, []),
        ([1, 2, 3, 1, 2], 0, []),
        ([256, 1, 1, 2, 65536, 256], 2, []),  # equal bytes across tokens are no match
    ],
)
def test_what_follows_the_end(tokens: list[int], count: int, expected: list[int]) -> None:
    assert prompt_lookup(tokens, count) == expected


def test_against_a_plain_search() -> None:
    draw = random.Random(0)

    def plain(tokens: list[int], count: int) -> list[int]:
        for length in range(5, 1, -1):
            for at in range(len(tokens) - length - 1, -1, -1):
                if tokens[at : at + length] == tokens[-length:]:
                    return tokens[at + length : at + length + count]
        return []

    for _ in range(400):
        tokens = [draw.choice((0, 1, 256, 257, 65536)) for _ in range(draw.randrange(30))]
        assert prompt_lookup(tokens, 4) == plain(tokens, 4)
