"""Best of several: mean and sum rank differently, forced tokens count for nothing, aborted completions come last."""

from __future__ import annotations

import pytest

from twofold.base.records import Completion, InputError
from twofold.engine.choose import best_of, score


def made(index: int, logprobs: list[float], forced: list[bool] | None = None, reason: str = "stop") -> Completion:
    tokens = list(range(len(logprobs)))
    return Completion(0, index, tokens, logprobs, forced or [False] * len(tokens), [], reason)  # type: ignore[arg-type]


SHORT, LONG = made(0, [-1.5]), made(1, [-0.5, -0.5, -1.0])
FORCED = made(2, [-0.2, -30.0, -30.0], [False, True, True])
ABORTED = made(3, [-0.01], reason="aborted")


def test_mean_and_sum() -> None:
    assert score(LONG) == pytest.approx(-2 / 3) and score(LONG, "sum") == pytest.approx(-2.0)
    assert best_of([SHORT, LONG]) == [LONG] and best_of([SHORT, LONG], by="sum") == [SHORT]
    assert score(made(0, [])) == 0.0


def test_order_forced_tokens_and_aborted_completions() -> None:
    every = [SHORT, LONG, ABORTED, FORCED]
    assert [c.sample_index for c in best_of(every, 4)] == [2, 1, 0, 3]
    twin = made(5, [-1.5])
    assert best_of([twin, SHORT], 2) == [twin, SHORT]


def test_what_cannot_be_kept() -> None:
    for keep in (0, 3):
        with pytest.raises(InputError, match="cannot be kept"):
            best_of([SHORT, LONG], keep)
    with pytest.raises(InputError, match="'mean' or 'sum'"):
        best_of([SHORT], by="max")  # type: ignore[arg-type]
