"""Values of the learning-rate schedule."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twofold.optim.schedule import lr_scale, piecewise, remark


def test_warm_up_then_each_decay() -> None:
    assert [lr_scale(s, 14, 4, "linear", end=0.0) for s in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert lr_scale(4, 14, 4, "linear", end=0.0) == 1.0
    assert lr_scale(9, 14, 4, "linear", end=0.0) == pytest.approx(0.5)
    assert lr_scale(13, 14, 4, "linear", end=0.0) == pytest.approx(0.1)
    assert lr_scale(9, 14, 4, "cosine", end=0.0) == pytest.approx(0.5)
    assert lr_scale(14, 14, 4, "cosine", end=0.1) == pytest.approx(0.1)
    assert lr_scale(13, 14, 4, "constant", start=0.3, end=0.0) == 0.3


def test_stages_join_without_a_jump() -> None:
    end_of_first = lr_scale(100, 100, 10, "linear", start=1.0, end=0.15)
    start_of_next = lr_scale(0, 50, 0, "linear", start=0.15, end=0.0)
    assert end_of_first == pytest.approx(start_of_next)


@given(
    total=st.integers(1, 50), warmup=st.integers(0, 60), decay=st.sampled_from(["constant", "linear", "cosine", "wsd"]),
    step=st.integers(0, 49),
)  # fmt: skip
def test_always_within_bounds(total: int, warmup: int, decay: str, step: int) -> None:
    value = lr_scale(min(step, total - 1), total, warmup, decay, start=1.0, end=0.1)  # type: ignore[arg-type]
    assert 0 < value <= 1


def test_stable_then_decay() -> None:
    rates = [lr_scale(s, 104, 4, "wsd", end=0.1) for s in range(105)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[4:85] == [1.0] * 81
    assert rates[94] == pytest.approx(0.55) and rates[104] == pytest.approx(0.1)
    assert all(a > b for a, b in zip(rates[84:], rates[85:], strict=False))


def test_points_in_tokens() -> None:
    points = [(100, 0.0), (200, 1.0), (1200, 0.5)]
    assert [piecewise(t, points) for t in (0, 100, 150, 200, 700, 1200, 9999)] == [0, 0, 0.5, 1.0, 0.75, 0.5, 0.5]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((4, 10, "cosine"), "warm-up of 10 steps takes the whole run of 4: the rate ends at 40%"),
        ((4, 10, "constant"), "the rate ends at 40%"),
        ((10, 10, "linear"), "takes the whole run of 10: there is no step after it"),
        ((1, 1, "linear"), "takes the whole run of 1"),
        ((100, 10, "linear", 1.0, 1.0), "decay=linear never lowers the rate in 100 steps: from start=1 to end=1"),
        ((100, 10, "cosine", 0.1, 1.0), "never lowers the rate"),
        ((5, 1, "wsd", 1.0, 0.0), "there are 4 after the warm-up"),
        ((11, 10, "linear", 1.0, 0.0), "there are 1 after the warm-up"),
    ],
)
def test_odd_schedules_have_a_remark(arguments: tuple[Any, ...], words: str) -> None:
    assert words in (remark(*arguments) or "")


@pytest.mark.parametrize(
    "arguments",
    [
        (100, 10, "linear", 1.0, 0.0), (12, 10, "cosine", 1.0, 0.1), (100, 10, "wsd", 1.0, 0.0), (1, 0, "linear"),
        (100, 10, "constant"), (2, 0, "linear", 1.0, 0.0), (0, 5, "linear"),
    ],
)  # fmt: skip
def test_sound_schedules_have_none(arguments: tuple[Any, ...]) -> None:
    assert remark(*arguments) is None
