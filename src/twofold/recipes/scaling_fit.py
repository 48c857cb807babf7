"""From sweeps to laws: optima by parabolas in log space, power laws by least squares, intervals by bootstrap.

Pure functions on numbers. rate* = a N^alpha D^beta B^delta and batch* = c D^gamma, which together are Step Law's forms
(arXiv 2503.04715); the loss law is Chinchilla's, E + A / N^alpha + B / D^beta (arXiv 2203.15556). N: parameters without
embeddings. D: tokens trained. B: tokens a step. An optimum at the edge of what was swept is flagged and is in no law.
Not here: training, drawing. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from twofold.base.records import InputError
from twofold.eval.stats import Interval

Edge = Literal["", "low", "high"]
Losses = Mapping[tuple[float, int], float]  # (rate, batch) -> loss; inf where training failed
Array = npt.NDArray[np.float64]
_T = TypeVar("_T")

_GRID = 24  # exponents tried on each axis of the loss law, in each of _ZOOMS rounds
_ZOOMS = 4
_TRIES = 20  # resamplings of the cells until one determines the laws


class Optimum(NamedTuple):
    """Where a swept loss is smallest. edge: "low" or "high" where that is the first or last value swept."""

    value: float
    loss: float
    edge: Edge


class Best(NamedTuple):
    """What one cell says: the largest batch that costs next to nothing, the best rate there, the least loss of all.

    rate_edge, batch_edge: the side on which the sweep does not enclose it.
    """

    rate: float
    batch: float
    loss: float
    rate_edge: Edge
    batch_edge: Edge

    @property
    def inside(self) -> bool:
        """Whether the sweep encloses it."""
        return not self.rate_edge and not self.batch_edge


class Grid(NamedTuple):
    """Rates and batches that may be run, both rising, and the pair to begin at."""

    rates: Sequence[float]
    batches: Sequence[int]
    start: tuple[float, int]


class Cell(NamedTuple):
    """What was swept for one model size and one length of training."""

    parameters: int
    tokens: int
    losses: dict[tuple[float, int], float]


@dataclass(frozen=True)
class PowerLaw:
    """``factor`` times each named quantity to its exponent."""

    factor: float
    exponents: dict[str, float]

    def at(self, **quantities: float) -> float:
        """Value for the named quantities; those without an exponent have no effect."""
        return self.factor * math.prod(quantities[name] ** power for name, power in self.exponents.items())


@dataclass(frozen=True)
class LossLaw:
    """L = E + A / N^alpha + B / D^beta."""

    e: float
    a: float
    alpha: float
    b: float
    beta: float

    def at(self, parameters: float, tokens: float) -> float:
        """Loss in the unit it was fitted in."""
        return self.e + self.a / parameters**self.alpha + self.b / tokens**self.beta


class Laws(NamedTuple):
    """All that is fitted to one ladder; loss is None where no non-negative E, A and B fit."""

    rate: PowerLaw
    batch: PowerLaw
    loss: LossLaw | None


def optimum(values: Sequence[float], losses: Sequence[float]) -> Optimum:
    """Vertex of the parabola in ln(value) through the smallest loss and its two neighbours.

    Args:
        values: positive, rising. losses: of each; inf where training failed. A neighbour that is inf leaves the
        smallest measured one.

    Raises:
        InputError: no loss is finite.
    """
    best = min(range(len(values)), key=lambda index: losses[index])
    if not math.isfinite(losses[best]):
        raise InputError("every run of a sweep failed; lower the learning rates")
    if best in (0, len(values) - 1):
        return Optimum(values[best], losses[best], "low" if best == 0 else "high")
    (x0, x1, x2), (y0, y1, y2) = (
        [math.log(value) for value in values[best - 1 : best + 2]],
        losses[best - 1 : best + 2],
    )
    left, right = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    curvature = (right - left) / (x2 - x0)
    if not 0 < curvature < math.inf:
        return Optimum(values[best], losses[best], "")
    slope = left - curvature * (x0 + x1)  # of y = c + slope x + curvature x^2
    vertex = -slope / (2 * curvature)
    return Optimum(math.exp(vertex), y1 - curvature * (x1 - vertex) ** 2, "")


def losses_of(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[float, int], float]:
    """Losses by rate and batch from rows of runs; inf where training failed."""
    return {(row["rate"], row["batch"]): math.inf if row["loss"] is None else row["loss"] for row in rows}


def by_batch(losses: Losses) -> dict[int, dict[float, float]]:
    """Losses by rate for each batch, both rising."""
    lines: dict[int, dict[float, float]] = {batch: {} for batch in sorted({batch for _, batch in losses})}
    for rate, batch in sorted(losses):
        lines[batch][rate] = losses[rate, batch]
    return lines


def best_rates(losses: Losses) -> dict[int, Optimum]:
    """The best rate at every batch."""
    return {batch: optimum(list(line), list(line.values())) for batch, line in by_batch(losses).items()}


def best_setting(losses: Losses, tolerance: float) -> Best:
    """The largest batch whose loss, at its best rate, is at most ``tolerance`` (a share) above that of any batch.

    With the rate tuned to each, small batches are about equally good and large ones worse: a smallest loss over batches
    says little, where the loss begins to rise says how much can be done in one step. That place is interpolated in log
    space, and the rate there. "low": the smallest batch still gains more than the tolerance on the next; "high": none
    is worse by the tolerance.
    """
    rates = best_rates(losses)
    batches, levels = list(rates), [found.loss for found in rates.values()]
    least = min(range(len(levels)), key=lambda index: levels[index])
    limit = levels[least] * (1 + tolerance)
    place = next((index for index in range(least, len(levels)) if levels[index] > limit), None)
    edge: Edge = "low" if least == 0 and _still_falls(levels, tolerance) else "high" if place is None else ""
    if place is None:
        batch, near = float(batches[-1]), {least, len(levels) - 1}
    else:
        share = (limit - levels[place - 1]) / (levels[place] - levels[place - 1])
        batch = batches[place - 1] * (batches[place] / batches[place - 1]) ** share
        near = {least, place - 1, place}
    edges = [rates[batches[index]].edge for index in sorted(near) if rates[batches[index]].edge]
    rate = np.interp(math.log(batch), np.log(batches), np.log([found.value for found in rates.values()]))
    return Best(float(np.exp(rate)), batch, levels[least], edges[0] if edges else "", edge)


def _still_falls(levels: Sequence[float], tolerance: float) -> bool:
    """Whether the smallest of the batches gains more than the tolerance on the next."""
    return len(levels) < 2 or levels[0] < levels[1] / (1 + tolerance)


def next_settings(grid: Grid, losses: Losses, tolerance: float) -> list[tuple[float, int]]:
    """Which (rate, batch) of a grid to run next, given what is known; nothing once the best setting is enclosed.

    The start and its neighbours come first. Then every batch's rates grow towards the side where the loss still falls,
    and then the batches do, each new one about the best rate of its neighbour. What stops at an end of the grid stays
    there, to be flagged.
    """
    rates, batches = grid.rates, grid.batches
    if not losses:
        near = _around(rates, rates.index(grid.start[0])), _around(batches, batches.index(grid.start[1]))
        return [(rate, batch) for batch in near[1] for rate in near[0]]
    lines = by_batch(losses)
    wanted = []
    for batch, line in lines.items():
        place = rates.index(min(line, key=lambda rate: line[rate]))
        if not math.isfinite(line[rates[place]]):
            place = 0  # all failed: the rates are too high
        wanted += [(rate, batch) for rate in _around(rates, place) if rate not in line]
    if wanted:
        return wanted
    levels = [found.loss for found in best_rates(losses).values()]
    first, last = (batches.index(end) for end in (min(lines), max(lines)))
    new = []
    if first > 0 and _still_falls(levels, tolerance):
        new.append((batches[first - 1], lines[batches[first]]))
    if last + 1 < len(batches) and levels[-1] <= min(levels) * (1 + tolerance):
        new.append((batches[last + 1], lines[batches[last]]))
    return [
        (rate, batch)
        for batch, line in new
        for rate in _around(rates, rates.index(min(line, key=lambda rate: line[rate])))
    ]


def _around(values: Sequence[_T], place: int) -> Sequence[_T]:
    """The value at a place and its neighbours."""
    return values[max(0, place - 1) : place + 2]


def fit_power(points: Sequence[Mapping[str, float]], values: Sequence[float], names: Sequence[str]) -> PowerLaw:
    """Least squares in log space of ``values`` on the named quantities of the points.

    Raises:
        InputError: the points do not determine the exponents.
    """
    rows = np.array([[1.0, *(math.log(point[name]) for name in names)] for point in points]).reshape(-1, len(names) + 1)
    if np.linalg.matrix_rank(rows) <= len(names):
        raise InputError(
            f"{len(points)} optima inside their sweeps do not determine a law in {' and '.join(names)}; "
            "widen rates and batches, or add widths and tokens"
        )
    solution = np.linalg.lstsq(rows, np.log(np.array(values)), rcond=None)[0]
    exponents = {name: float(power) for name, power in zip(names, solution[1:], strict=True)}
    return PowerLaw(float(np.exp(solution[0])), exponents)


def fit_loss(parameters: Sequence[float], tokens: Sequence[float], losses: Sequence[float]) -> LossLaw | None:
    """Least squares over E, A, B >= 0 and exponents in 0.02 to 3; None where no such law fits, or fewer than 5 points.

    For given exponents the law is linear, so exponents are searched on a grid that closes in on the best.
    """
    if len(losses) < 5:
        return None
    n, d, y = (np.array(values, dtype=np.float64) for values in (parameters, tokens, losses))
    middle_n, middle_d = (float(np.exp(np.log(values).mean())) for values in (n, d))
    spans = [(math.log(0.02), math.log(3.0))] * 2
    found: tuple[float, Array, float, float] | None = None
    for _ in range(_ZOOMS):
        axes = [np.exp(np.linspace(low, high, _GRID)) for low, high in spans]
        alphas, betas = (axis.ravel() for axis in np.meshgrid(*axes, indexing="ij"))
        features = np.stack(
            [
                np.ones((len(alphas), len(y))),
                (n / middle_n) ** -alphas[:, None],
                (d / middle_d) ** -betas[:, None],
            ],
            axis=-1,
        )
        solved = np.linalg.pinv(features) @ y
        errors = ((features @ solved[..., None])[..., 0] - y) ** 2
        totals = np.where((solved >= 0).all(-1), errors.sum(-1), np.inf)
        best = int(totals.argmin())
        if not np.isfinite(totals[best]):
            break
        if found is None or totals[best] < found[0]:
            found = float(totals[best]), solved[best], float(alphas[best]), float(betas[best])
        steps = [(high - low) / (_GRID - 1) for low, high in spans]
        spans = [
            (math.log(power) - 2 * step, math.log(power) + 2 * step)
            for power, step in zip((alphas[best], betas[best]), steps, strict=True)
        ]
    if found is None:
        return None
    _, (e, a, b), alpha, beta = found
    return LossLaw(float(e), float(a * middle_n**alpha), alpha, float(b * middle_d**beta), beta)


def rate_points(cells: Sequence[Cell]) -> list[tuple[dict[str, float], float]]:
    """Every batch of every cell whose best rate is enclosed: (parameters, tokens, batch), and that rate."""
    return [
        ({"parameters": float(cell.parameters), "tokens": float(cell.tokens), "batch": float(batch)}, found.value)
        for cell in cells
        for batch, found in best_rates(cell.losses).items()
        if not found.edge
    ]


def batch_points(cells: Sequence[Cell], tolerance: float) -> list[tuple[dict[str, float], float]]:
    """Every cell whose best batch is enclosed: (parameters, tokens), and that batch."""
    return [(place, best.batch) for place, best in _enclosed(cells, tolerance)]


def _enclosed(cells: Sequence[Cell], tolerance: float) -> list[tuple[dict[str, float], Best]]:
    """Every cell whose best setting is enclosed: (parameters, tokens), and that setting."""
    return [
        ({"parameters": float(cell.parameters), "tokens": float(cell.tokens)}, best)
        for cell in cells
        if (best := best_setting(cell.losses, tolerance)).inside
    ]


def fit_laws(cells: Sequence[Cell], tolerance: float) -> Laws:
    """All three laws: the rate's from every enclosed best rate, the others from the cells whose best batch is enclosed.

    Raises:
        InputError: too few of them; the message says what to widen.
    """
    found = _enclosed(cells, tolerance)
    places, least = [place for place, _ in found], [best.loss for _, best in found]
    return Laws(
        rate=fit_power(*_unzip(rate_points(cells)), ("parameters", "tokens", "batch")),
        batch=fit_power(places, [best.batch for _, best in found], ("tokens",)),
        loss=fit_loss([place["parameters"] for place in places], [place["tokens"] for place in places], least),
    )


def _unzip(points: Sequence[tuple[dict[str, float], float]]) -> tuple[list[dict[str, float]], list[float]]:
    return [place for place, _ in points], [value for _, value in points]


def bootstrap(cells: Sequence[Cell], tolerance: float, noise: float, draws: int, seed: int) -> list[Laws]:
    """Laws refitted to cells drawn with replacement, whose losses are shaken by the noise of a run.

    Args:
        noise: standard deviation of a run's loss between seeds, relative to the loss.

    Returns:
        At most ``draws`` of them: where no resampling out of a few determines the laws there is none.
    """
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(draws):
        for _ in range(_TRIES):
            chosen = [cells[index] for index in rng.integers(0, len(cells), len(cells))]
            try:
                out.append(fit_laws([shaken(cell, noise, rng) for cell in chosen], tolerance))
            except InputError:
                continue
            break
    return out


def shaken(cell: Cell, noise: float, rng: np.random.Generator) -> Cell:
    """The cell as other seeds might have given it."""
    return cell._replace(losses={key: loss * (1 + noise * rng.normal()) for key, loss in cell.losses.items()})


def batch_interval(cell: Cell, tolerance: float, noise: float, draws: int, seed: int) -> Interval:
    """The cell's best batch, with its interval from losses shaken by the noise of a run."""
    rng = np.random.default_rng(seed)
    found = [best_setting(shaken(cell, noise, rng).losses, tolerance).batch for _ in range(draws)]
    return spread(best_setting(cell.losses, tolerance).batch, found)


def spread(value: float, draws: Sequence[float]) -> Interval:
    """``value`` with the 95 % interval of what bootstrap draws give for it; nan where there are no draws."""
    if not draws:
        return Interval(value, math.nan, math.nan)
    low, high = np.quantile(draws, [0.025, 0.975])
    return Interval(value, float(low), float(high))


def relative_noise(groups: Sequence[Sequence[Sequence[float]]]) -> tuple[float, int]:
    """Standard deviation, relative to the loss, of what a seed does to one setting and not to the others.

    A seed decides what text is read, which moves all settings together; comparisons at one seed are free of that. So
    the noise is what is left of ln(loss) when the mean of the setting and that of the seed are taken away.

    Args:
        groups: tables of losses [settings, seeds] of one model size and length of training.

    Returns:
        It, and its degrees of freedom.

    Raises:
        InputError: no group has two settings with two seeds.
    """
    squares, freedom = 0.0, 0
    for group in groups:
        table = np.log(np.array(group, dtype=np.float64))
        rest = table - table.mean(0) - table.mean(1, keepdims=True) + table.mean()
        squares += float((rest**2).sum())
        freedom += (table.shape[0] - 1) * (table.shape[1] - 1)
    if not freedom:
        raise InputError("the noise of a run needs two settings run with two seeds each; raise noise_seeds")
    return math.sqrt(squares / freedom), freedom
