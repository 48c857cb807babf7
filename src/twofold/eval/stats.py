"""Intervals and rank correlation for evaluation results, in plain Python.

Every interval is two-sided, 95 % by default (z = 1.96). Within a run the unit of evidence is the *item*: several
samples of one item are averaged first and the error is taken over items. Over runs it is the training seed
(``across``), with the error over items once more. Not here: running evaluations. Imports neither torch nor scipy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from twofold.base.records import InputError

Z95 = 1.96

ItemValues = Sequence[float] | Sequence[Sequence[float]]


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its lower and upper bound."""

    value: float
    low: float
    high: float


def wilson(successes: int, n: int, z: float = Z95) -> Interval:
    """Wilson score interval of a proportion (Wilson 1927); sound near 0 and 1, where the normal one is not.

    Raises:
        InputError: n is not positive, or successes lies outside 0..n.
    """
    if n < 1 or not 0 <= successes <= n:
        raise InputError(f"wilson needs 0 <= successes <= n and n >= 1, got {successes} of {n}")
    share = successes / n
    scale = 1 + z * z / n
    centre = (share + z * z / (2 * n)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return Interval(share, low, high)


def mean_interval(values: ItemValues, z: float = Z95) -> Interval:
    """Mean over items with a normal interval.

    Args:
        values: one number an item, or one list of numbers an item (its samples), which is averaged first: samples
            of one item are not independent evidence.

    Raises:
        InputError: fewer than two items, or an item without samples.
    """
    means = _item_means(values)
    if len(means) < 2:
        raise InputError(f"an interval needs at least 2 items, got {len(means)}")
    mean = math.fsum(means) / len(means)
    variance = math.fsum((value - mean) ** 2 for value in means) / (len(means) - 1)
    half = z * math.sqrt(variance / len(means))
    return Interval(mean, mean - half, mean + half)


def paired_difference(a_items: ItemValues, b_items: ItemValues, z: float = Z95) -> Interval:
    """Mean of a - b over the same items, in the same order, with the error of the per-item differences.

    Raises:
        InputError: different numbers of items, fewer than two, or an item without samples.
    """
    a_means, b_means = _item_means(a_items), _item_means(b_items)
    if len(a_means) != len(b_means):
        raise InputError(f"a paired difference needs the same items on both sides, got {len(a_means)}, {len(b_means)}")
    return mean_interval([a - b for a, b in zip(a_means, b_means, strict=True)], z)


def student_t(share: float, df: int) -> float:
    """Quantile of Student's t distribution: ``student_t(0.975, 4)`` is 2.776.

    Bisection on the distribution function, which is a finite sum for whole degrees of freedom (Abramowitz and Stegun,
    26.7.3 and 26.7.4).

    Raises:
        InputError: share outside (0, 1), or fewer than one degree of freedom.
    """
    if not 0 < share < 1 or df < 1:
        raise InputError(f"student_t needs 0 < share < 1 and df >= 1, got {share} and {df}")
    if share < 0.5:
        return -student_t(1 - share, df)
    low, high = 0.0, 1.0
    while _t_below(high, df) < share:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_below(middle, df) < share else (low, middle)
    return (low + high) / 2


def across(values: Sequence[float], halves: Sequence[float] = (), share: float = 0.95) -> Interval:
    """Mean of estimates, one a training seed, with an interval over seeds that takes the items' own error in once more.

    A seed's estimate differs from the true effect by the luck of its training and by the luck of its items. Were the
    items of every seed its own, the spread between the estimates would hold both (Student's t). Some families have so
    few held-out items that seeds share them, and luck that all seeds share makes no spread. So the half width is
    sqrt((t · s / √S)² + mean of h²), with h a run's half width over its items: as if every seed had the same items.
    That is right when all items are shared and too wide when none is.
    Example: gains of 4, 6 and 8 points, each ± 3 over its items: mean 6, spread 2, so 6 ± √((4.303 · 2 / √3)² + 3²) =
    6 ± 5.80 = [0.20, 11.80].

    Args:
        halves: half widths over items of the runs that have one, in the unit of the values; without any, Student's t
            alone.

    Raises:
        InputError: fewer than two estimates, which have no spread.
    """
    if len(values) < 2:
        raise InputError(f"an interval over training seeds needs at least 2 seeds, got {len(values)}; run more seeds")
    seeds = mean_interval(values, student_t((1 + share) / 2, len(values) - 1))
    items = math.sqrt(math.fsum(half * half for half in halves) / len(halves)) if halves else 0.0
    half = math.hypot((seeds.high - seeds.low) / 2, items)
    return Interval(seeds.value, seeds.value - half, seeds.value + half)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased chance that k of n samples, c of them correct, hold a correct one (Chen et al. 2021, equation 1).

    Raises:
        InputError: not 0 <= c <= n or not 1 <= k <= n.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise InputError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    if n - c < k:
        return 1.0
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def pass_at_k_interval(counts: Sequence[tuple[int, int]], k: int, z: float = Z95) -> Interval:
    """Mean pass@k over items, each given as (samples, correct samples), with the error over items."""
    return mean_interval([pass_at_k(n, c, k) for n, c in counts], z)


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman rank correlation, ties given their average rank.

    Returns:
        A number in [-1, 1], or nan when either side is constant (there is no order to compare).

    Raises:
        InputError: different lengths, or fewer than two points.
    """
    if len(x) != len(y) or len(x) < 2:
        raise InputError(f"spearman needs two lists of one length >= 2, got {len(x)} and {len(y)}")
    x_ranks, y_ranks = _ranks(x), _ranks(y)
    mean = (len(x) + 1) / 2
    covariance = math.fsum((a - mean) * (b - mean) for a, b in zip(x_ranks, y_ranks, strict=True))
    x_spread = math.fsum((a - mean) ** 2 for a in x_ranks)
    y_spread = math.fsum((b - mean) ** 2 for b in y_ranks)
    if x_spread == 0 or y_spread == 0:
        return math.nan
    return max(-1.0, min(1.0, covariance / math.sqrt(x_spread * y_spread)))


def _t_below(t: float, df: int) -> float:
    """P(T < t) for t >= 0."""
    angle = math.atan(t / math.sqrt(df))
    cos, sin = math.cos(angle), math.sin(angle)
    odd = df % 2
    # even: 1 + 1/2 cos^2 + (1*3)/(2*4) cos^4 + ...; odd: cos + 2/3 cos^3 + (2*4)/(3*5) cos^5 + ...; df // 2 terms
    term, terms = (cos if odd else 1.0), []
    for number in range(df // 2):
        terms.append(term)
        term *= cos * cos * (2 * number + 1 + odd) / (2 * number + 2 + odd)
    inside = sin * math.fsum(terms)
    return 0.5 + ((angle + inside) / math.pi if odd else inside / 2)


def _item_means(values: ItemValues) -> list[float]:
    means: list[float] = []
    for index, value in enumerate(values):
        samples: Sequence[float] = value if isinstance(value, Sequence) else (value,)  # type: ignore[assignment]
        if len(samples) == 0:
            raise InputError(f"item {index} has no samples")
        means.append(math.fsum(samples) / len(samples))
    return means


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=lambda index: values[index])
    ranks = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end + 1 < len(order) and values[order[end + 1]] == values[order[start]]:
            end += 1
        for place in range(start, end + 1):
            ranks[order[place]] = (start + end) / 2 + 1
        start = end + 1
    return ranks
