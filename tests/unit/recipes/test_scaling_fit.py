"""The laws behind a scaling run, on sweeps made from known ones."""

from __future__ import annotations

import math

import numpy as np
import pytest

from twofold.base.records import InputError
from twofold.recipes.scaling_fit import (
    Cell,
    Grid,
    batch_interval,
    best_rates,
    best_setting,
    bootstrap,
    fit_laws,
    fit_loss,
    fit_power,
    next_settings,
    optimum,
    relative_noise,
    shaken,
    spread,
)

RATES = [0.0025 * 2**k for k in range(7)]
BATCHES = [64 * 2**k for k in range(8)]
SIZES = [(n, d) for n in (5e4, 1e5, 2e5) for d in (1e5, 2e5, 4e5)]
TOLERANCE = 0.01


def best_rate(n: float, d: float, batch: float) -> float:
    return 0.02 * (n / 1e5) ** -0.4 * (d / 2e5) ** -0.2 * (batch / 500) ** 0.5


def best_batch(d: float) -> float:
    return 500 * (d / 2e5) ** 0.5


def least_loss(n: float, d: float) -> float:
    return 1.2 + 300 / n**0.5 + 400 / d**0.45


def swept_loss(n: float, d: float, rate: float, batch: float) -> float:
    """A valley in log space: level for small batches, 1 % up at the best batch, steep beyond."""
    x = math.log(rate / best_rate(n, d, batch))
    return least_loss(n, d) * (1 + 0.02 * x * x + 0.01 * (batch / best_batch(d)) ** 1.5)


def walk(n: float, d: float, rates: list[float] = RATES, batches: list[int] = BATCHES) -> Cell:
    losses: dict[tuple[float, int], float] = {}
    grid = Grid(rates, batches, (rates[len(rates) // 2], batches[len(batches) // 2]))
    while new := next_settings(grid, losses, TOLERANCE):
        assert not losses.keys() & set(new), "nothing is run twice"
        losses |= {key: swept_loss(n, d, *key) for key in new}
    return Cell(int(n), int(d), losses)


def test_the_vertex_of_a_parabola_is_found_exactly() -> None:
    values = [0.01, 0.02, 0.05, 0.11]
    found = optimum(values, [2.0 + 0.3 * math.log(value / 0.031) ** 2 for value in values])
    assert found.value == pytest.approx(0.031) and found.loss == pytest.approx(2.0) and found.edge == ""


@pytest.mark.parametrize(("losses", "edge", "value"), [([1.0, 2.0, 3.0], "low", 1.0), ([3.0, 2.0, 1.0], "high", 4.0)])
def test_an_optimum_at_the_edge_is_flagged_and_not_extrapolated(losses: list[float], edge: str, value: float) -> None:
    found = optimum([1.0, 2.0, 4.0], losses)
    assert found.edge == edge and found.value == value


def test_failed_runs_bound_a_sweep_without_bending_it() -> None:
    assert optimum([1.0, 2.0, 4.0], [2.0, 1.0, math.inf])[:2] == (2.0, 1.0)
    with pytest.raises(InputError, match="lower the learning rates"):
        optimum([1.0, 2.0], [math.inf, math.inf])


@pytest.mark.parametrize(("n", "d"), SIZES)
def test_a_walk_encloses_the_best_setting_with_few_runs(n: float, d: float) -> None:
    cell = walk(n, d)
    best = best_setting(cell.losses, TOLERANCE)
    assert best.inside and len(cell.losses) <= 24 < len(RATES) * len(BATCHES)
    assert best.batch == pytest.approx(best_batch(d), rel=0.3)
    assert best.rate == pytest.approx(best_rate(n, d, best.batch), rel=0.01)
    assert best.loss == pytest.approx(least_loss(n, d), rel=0.006)
    for batch, found in best_rates(cell.losses).items():
        assert found.value == pytest.approx(best_rate(n, d, batch), rel=1e-6)


def test_a_grid_too_narrow_is_walked_to_its_end_and_flagged() -> None:
    low = best_setting(walk(5e4, 1e5, rates=RATES[:3]).losses, TOLERANCE)  # the best are above 0.01
    assert low.rate_edge == "high" and not low.inside
    assert best_setting(walk(1e5, 2e5, batches=BATCHES[5:]).losses, TOLERANCE).batch_edge == "low"
    assert best_setting(walk(1e5, 2e5, batches=BATCHES[:3]).losses, TOLERANCE).batch_edge == "high"


def test_a_walk_leaves_rates_that_fail() -> None:
    losses: dict[tuple[float, int], float] = {}
    while new := next_settings(Grid(RATES, BATCHES, (RATES[5], 512)), losses, TOLERANCE):
        losses |= {key: math.inf if key[0] > 0.03 else swept_loss(1e5, 2e5, *key) for key in new}
    assert best_setting(losses, TOLERANCE).inside
    assert min(losses, key=lambda key: losses[key])[0] <= 0.02


def test_known_laws_come_back() -> None:
    laws = fit_laws([walk(n, d) for n, d in SIZES], TOLERANCE)
    assert laws.rate.exponents == pytest.approx({"parameters": -0.4, "tokens": -0.2, "batch": 0.5}, abs=1e-6)
    assert laws.rate.at(parameters=4e5, tokens=8e5, batch=900) == pytest.approx(best_rate(4e5, 8e5, 900))
    assert laws.batch.exponents["tokens"] == pytest.approx(0.5, abs=0.1)
    assert laws.batch.at(parameters=4e5, tokens=8e5) == pytest.approx(best_batch(8e5), rel=0.3)
    assert laws.loss is not None
    assert laws.loss.at(4e5, 8e5) == pytest.approx(least_loss(4e5, 8e5), rel=0.01)


def test_the_loss_law_comes_back_from_exact_losses() -> None:
    law = fit_loss([n for n, _ in SIZES], [d for _, d in SIZES], [least_loss(n, d) for n, d in SIZES])
    assert law is not None
    assert (law.e, law.alpha, law.beta) == pytest.approx((1.2, 0.5, 0.45), rel=0.02)
    assert (law.a, law.b) == pytest.approx((300, 400), rel=0.2)


def test_a_loss_that_grows_with_size_has_no_law_or_none_in_size() -> None:
    law = fit_loss([n for n, _ in SIZES], [d for _, d in SIZES], [n / 1e5 + 1e5 / d for n, d in SIZES])
    assert law is None or law.a == pytest.approx(0, abs=1e-6)
    assert fit_loss([1, 2], [1, 2], [1, 2]) is None


def test_flagged_optima_are_left_out_of_the_laws() -> None:
    cells = [walk(n, d) for n, d in SIZES]
    wrong = walk(2e5, 4e5, rates=RATES[-3:], batches=BATCHES[:3])  # its best rates would be far off
    assert {found.edge for found in best_rates(wrong.losses).values()} == {"low"}
    assert fit_laws([*cells, wrong], TOLERANCE) == fit_laws(cells, TOLERANCE)


def test_too_few_optima_say_what_to_widen() -> None:
    with pytest.raises(InputError, match="widen rates and batches"):
        fit_laws([walk(1e5, 1e5), walk(1e5, 2e5), walk(1e5, 4e5)], TOLERANCE)  # one size
    with pytest.raises(InputError, match="do not determine"):
        fit_power([], [], ("tokens",))


def test_intervals_cover_the_truth_and_grow_with_noise() -> None:
    rng = np.random.default_rng(3)
    cells = [shaken(walk(n, d), 0.001, rng) for n, d in SIZES]
    fitted = fit_laws(cells, TOLERANCE).rate.exponents["parameters"]
    widths = []
    for noise in (0.001, 0.004):
        draws = bootstrap(cells, TOLERANCE, noise, 40, seed=1)
        assert len(draws) >= 30
        found = spread(fitted, [draw.rate.exponents["parameters"] for draw in draws])
        assert found.low < -0.4 < found.high
        widths.append(found.high - found.low)
    assert widths[1] > 1.5 * widths[0]
    assert bootstrap(cells, TOLERANCE, 0.001, 2, seed=1) == bootstrap(cells, TOLERANCE, 0.001, 2, seed=1)
    batch = batch_interval(walk(1e5, 2e5), TOLERANCE, 0.001, 100, seed=1)
    assert batch.low < batch.value < batch.high < 2 * batch.low


def test_noise_is_what_a_seed_does_to_one_setting_alone() -> None:
    rng = np.random.default_rng(0)
    tables = []
    for _ in range(60):
        setting, seed = rng.normal(size=(2, 1)), rng.normal(size=(1, 3))  # both far larger than the noise
        tables.append(np.exp(setting + seed + 0.004 * rng.normal(size=(2, 3))).tolist())
    noise, freedom = relative_noise(tables)
    assert freedom == 120 and noise == pytest.approx(0.004, rel=0.2)
    with pytest.raises(InputError, match="noise_seeds"):
        relative_noise([[[1.0], [2.0]], [[1.0, 2.0]]])
    assert math.isnan(spread(1.0, []).low)
