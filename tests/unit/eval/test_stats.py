from __future__ import annotations

import math
import random
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twofold.base.records import InputError
from twofold.eval.stats import (
    across,
    mean_interval,
    paired_difference,
    pass_at_k,
    pass_at_k_interval,
    spearman,
    student_t,
    wilson,
)

# Quantiles of Student's t at 97.5 %, 1 to 30 degrees of freedom, as any printed table has them.
T_TABLE = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


def test_wilson_against_published_values() -> None:
    # Newcombe 1998, table I, method 3 (score, no continuity correction)
    for successes, n, low, high in [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (1, 29, 0.0061, 0.1718)]:
        interval = wilson(successes, n, z=1.959964)
        assert interval.value == pytest.approx(successes / n)
        assert interval.low == pytest.approx(low, abs=5e-5)
        assert interval.high == pytest.approx(high, abs=5e-5)
    assert wilson(0, 20).low == 0.0 and wilson(0, 20, 1.959964).high == pytest.approx(0.1611, abs=5e-5)
    assert wilson(29, 29).high == 1.0


@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
@settings(deadline=None, max_examples=60)
def test_wilson_brackets_the_share_and_mirrors(case: tuple[int, int]) -> None:
    successes, n = case
    interval, mirror = wilson(successes, n), wilson(n - successes, n)
    assert 0 <= interval.low <= interval.value <= interval.high <= 1
    assert interval.low == pytest.approx(1 - mirror.high, abs=1e-12)


def test_mean_interval_by_hand() -> None:
    interval = mean_interval([1.0, 2.0, 3.0, 4.0])
    half = 1.96 * math.sqrt((5 / 3) / 4)  # sample variance 5/3
    assert (interval.value, interval.low, interval.high) == pytest.approx((2.5, 2.5 - half, 2.5 + half))


def test_samples_of_one_item_are_one_piece_of_evidence() -> None:
    assert mean_interval([[1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0]]) == mean_interval([1, 0, 0.5])


def test_paired_difference_uses_the_pairs() -> None:
    a, b = [0.1, 0.5, 0.9, 0.4], [0.0, 0.4, 0.8, 0.3]
    interval = paired_difference(a, b)
    assert interval.value == pytest.approx(0.1) and interval.high - interval.low == pytest.approx(0, abs=1e-9)
    hand = paired_difference([1, 1, 0, 1], [0, 1, 0, 0])
    assert hand.value == 0.5 and hand.high - hand.value == pytest.approx(1.96 * math.sqrt((1 / 3) / 4))


@given(st.integers(1, 8).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
@settings(deadline=None, max_examples=60)
def test_pass_at_k_equals_enumeration(case: tuple[int, int, int]) -> None:
    n, c, k = case
    draws = list(combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(any(draw) for draw in draws) / len(draws))


def test_pass_at_k_interval_is_over_items() -> None:
    assert pass_at_k_interval([(4, 2), (4, 0), (4, 4)], 1) == mean_interval([0.5, 0.0, 1.0])
    assert pass_at_k_interval([(4, 1), (4, 0)], 2).value == pytest.approx(0.25)


def test_spearman_by_hand() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 30, 40]) == 1.0
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == -1.0
    # IQ against hours of television, the textbook example: rho = -29/165
    iq = [86, 97, 99, 100, 101, 103, 106, 110, 112, 113]
    hours = [2, 20, 28, 27, 50, 29, 7, 17, 6, 12]
    assert spearman(iq, hours) == pytest.approx(-29 / 165)
    # ties take the average rank: x ranks 1.5 1.5 3, y ranks 1 2 3
    assert spearman([1, 1, 2], [1, 2, 3]) == pytest.approx(math.sqrt(3) / 2)
    assert math.isnan(spearman([1, 1, 1], [1, 2, 3]))


@given(st.lists(st.integers(-50, 50), min_size=3, max_size=12), st.integers(0, 10**6))
@settings(deadline=None, max_examples=40)
def test_spearman_ignores_monotone_maps(x: list[int], seed: int) -> None:
    y = [random.Random(seed).random() for _ in x]
    first, second = spearman(x, y), spearman([value**3 + 7 for value in x], [math.exp(value) for value in y])
    assert (math.isnan(first) and math.isnan(second)) or first == pytest.approx(second)


def test_student_t_against_the_table() -> None:
    assert [round(student_t(0.975, df), 3) for df in range(1, 31)] == list(T_TABLE)
    # other columns and the limits
    assert student_t(0.95, 4) == pytest.approx(2.132, abs=5e-4) and student_t(0.995, 9) == pytest.approx(
        3.250, abs=5e-4
    )
    assert student_t(0.5, 3) == pytest.approx(0, abs=1e-9) and student_t(0.025, 7) == -student_t(0.975, 7)
    assert student_t(0.75, 1) == pytest.approx(1.0) and student_t(0.975, 5000) == pytest.approx(1.9604, abs=1e-4)


def test_across_by_hand() -> None:
    interval = across([4.0, 6.0, 8.0])
    half = 4.302653 * 2 / math.sqrt(3)
    assert (interval.value, interval.low, interval.high) == pytest.approx((6, 6 - half, 6 + half), abs=1e-5)
    assert across([1.0, 1.0]) == across([1.0, 1.0, 1.0])
    assert across([0.0, 1.0], share=0.5).high == pytest.approx(1.0)  # t(0.75, 1) is 1, the spread of the mean 0.5
    wider = across([4.0, 6.0, 8.0], [3.0, 3.0, 3.0])
    assert wider.value == 6 and wider.high - 6 == pytest.approx(math.hypot(half, 3), abs=1e-5) == 6 - wider.low
    assert across([1.0, 1.0], [3.0, 4.0]).high == pytest.approx(1 + math.sqrt((9 + 16) / 2))
    with pytest.raises(InputError, match="at least 2 seeds, got 1; run more seeds"):
        across([3.0])


def test_across_covers_seeds_and_items() -> None:
    """Five seeds of 40 items each; the seeds differ too. Pooling all items pretends that they do not."""
    rng = random.Random(20261130)
    truth, between, runs = 0.6, 0.08, 2000
    covered = pooled_covered = 0
    for _ in range(runs):
        shares = [min(1.0, max(0.0, rng.gauss(truth, between))) for _ in range(5)]
        items = [[float(rng.random() < share) for _ in range(40)] for share in shares]
        interval = across([sum(row) / len(row) for row in items])
        covered += interval.low <= truth <= interval.high
        pooled = mean_interval([value for row in items for value in row])
        pooled_covered += pooled.low <= truth <= pooled.high
    assert 0.93 <= covered / runs <= 0.97
    assert pooled_covered / runs < 0.85


def _coverage(shared: float, between: float, runs: int = 2000) -> tuple[float, float]:
    """How often ``across`` covers the true mean without and with the error over items: five seeds of 40 items whose
    difficulty varies; ``shared`` of the items are those of every seed."""
    rng, truth, size = random.Random(20261201), 0.6, 40
    bare = whole = 0
    for _ in range(runs):
        common = [float(rng.random() < truth) for _ in range(round(shared * size))]
        means, halves = [], []
        for _ in range(5):
            own = [float(rng.random() < truth) for _ in range(size - len(common))]
            offset = rng.gauss(0, between)
            interval = mean_interval([value + offset for value in (*common, *own)])
            means.append(interval.value)
            halves.append((interval.high - interval.low) / 2)
        found = [across(means), across(means, halves)]
        bare += found[0].low <= truth <= found[0].high
        whole += found[1].low <= truth <= found[1].high
    return bare / runs, whole / runs


@pytest.mark.parametrize("between", [0.02, 0.08])
def test_across_covers_items_that_seeds_share(between: float) -> None:
    bare, whole = _coverage(1.0, between)
    assert bare < 0.9 and 0.93 <= whole <= 0.98, (bare, whole)
    half_shared, wide = _coverage(0.5, between)[1], _coverage(0.0, between)[1]
    assert 0.93 <= half_shared <= wide, "the less is shared, the wider than needed"


def test_bad_input_is_refused() -> None:
    for call in (
        lambda: wilson(3, 2),
        lambda: wilson(0, 0),
        lambda: mean_interval([1.0]),
        lambda: mean_interval([[1.0], []]),
        lambda: paired_difference([1, 2], [1, 2, 3]),
        lambda: pass_at_k(4, 5, 1),
        lambda: pass_at_k(4, 2, 5),
        lambda: spearman([1], [1]),
        lambda: spearman([1, 2], [1]),
        lambda: student_t(1.0, 3),
        lambda: student_t(0.9, 0),
        lambda: across([]),
    ):
        with pytest.raises(InputError):
            call()
