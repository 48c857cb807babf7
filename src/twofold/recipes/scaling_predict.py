"""The stage between sweeps and check: the laws of a ladder with intervals, and the setting they give for the next size.

Reads the sweeps' rows and writes what the check and the report need. Not here: the mathematics (``scaling_fit``).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from twofold.base.config import Config
from twofold.base.files import read_json, write_json
from twofold.recipes.chain import StageContext
from twofold.recipes.scaling_fit import (
    Cell,
    Laws,
    batch_points,
    best_setting,
    bootstrap,
    fit_laws,
    losses_of,
    rate_points,
    relative_noise,
    spread,
)
from twofold.recipes.scaling_runs import ProxyConfig, Row, body_parameters
from twofold.text.tokenizer import Tokenizer


class FitConfig(Config):
    """The size to predict for, and how many bootstrap draws intervals are taken from."""

    width: int
    tokens: int
    draws: int
    tolerance: float
    proxy: ProxyConfig


def fit_and_predict(context: StageContext) -> None:
    """Optima of all sweeps, the laws through them with intervals, and the setting they give for the next size."""
    config: FitConfig = context.config
    rows = [
        row
        for name, folder in context.inputs.items()
        if name != "text"
        for row in read_json(folder / "result.json")["rows"]
    ]
    cells, tolerance = ladder(rows, context.seed), config.tolerance / 100
    noise, freedom = relative_noise(_repeats(rows))
    laws = fit_laws(cells, tolerance)
    draws = bootstrap(cells, tolerance, noise, config.draws, context.seed)
    vocab_size = Tokenizer.from_folder(context.inputs["text"] / "tokenizer").vocab_size
    parameters = body_parameters(config.proxy.model(config.width, vocab_size))
    points = {"rate": rate_points(cells), "batch": batch_points(cells, tolerance)}
    write_json(context.out / "result.json", {
        "cells": [_optimum_row(cell, tolerance) for cell in cells],
        "noise": noise, "noise_freedom": freedom, "draws": len(draws), "points": {n: len(p) for n, p in points.items()},
        "laws": _law_rows(laws, draws),
        "lines": _lines(points, laws, draws, {"parameters": float(parameters), "tokens": float(config.tokens)}),
        "prediction": _predicted(laws, draws, parameters, config),
    })  # fmt: skip


def ladder(rows: Sequence[Row], seed: int) -> list[Cell]:
    """The sweeps by size and length, at one seed."""
    groups: dict[tuple[int, int], list[Row]] = defaultdict(list)
    for row in rows:
        if row["seed"] == seed:
            groups[row["parameters"], row["tokens"]].append(row)
    return [Cell(*size, losses_of(group)) for size, group in sorted(groups.items())]


def _repeats(rows: Sequence[Row]) -> list[list[list[float]]]:
    """Losses [settings, seeds] of what was run with several seeds, by size and length."""
    found: dict[tuple[int, int], dict[tuple[float, int], list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in sorted(rows, key=lambda row: row["seed"]):
        if row["loss"] is not None:
            found[row["width"], row["tokens"]][row["rate"], row["batch"]].append(row["loss"])
    tables = [[losses for losses in group.values() if len(losses) > 1] for group in found.values()]
    return [table for table in tables if len(table) > 1 and len({len(losses) for losses in table}) == 1]


def _optimum_row(cell: Cell, tolerance: float) -> dict[str, Any]:
    best = best_setting(cell.losses, tolerance)
    return {"parameters": cell.parameters, "tokens": cell.tokens, "runs": len(cell.losses), **best._asdict()}


def _law_rows(laws: Laws, draws: Sequence[Laws]) -> dict[str, Any]:
    """Factors and exponents, each exponent with its interval."""
    out: dict[str, Any] = {}
    for name in ("rate", "batch"):
        law, drawn = getattr(laws, name), [getattr(draw, name) for draw in draws]
        intervals = {
            quantity: asdict(spread(power, [law.exponents[quantity] for law in drawn]))
            for quantity, power in law.exponents.items()
        }
        out[name] = {"factor": law.factor, "exponents": intervals}
    out["loss"] = None if laws.loss is None else asdict(laws.loss)
    return out


def _lines(
    points: dict[str, list[tuple[dict[str, float], float]]],
    laws: Laws,
    draws: Sequence[Laws],
    target: dict[str, float],
) -> dict[str, dict[str, Any]]:
    """Every law along each of its quantities, up to the next size, the others at their middle.

    The optima are moved along the law to that middle, so that all sweeps show in one picture.
    """
    out = {}
    for which, found in points.items():
        law, drawn = getattr(laws, which), [getattr(draw, which) for draw in draws]
        middle = {q: math.exp(sum(math.log(place[q]) for place, _ in found) / len(found)) for q in found[0][0]}
        for along in law.exponents:
            xs = sorted({place[along] for place, _ in found} | ({target[along]} if along in target else set()))
            places = [{**middle, along: x} for x in xs]
            out[f"{which}_{along}"] = {
                "middle": {q: value for q, value in middle.items() if q != along and q in law.exponents},
                "x": xs,
                "line": [asdict(spread(law.at(**place), [other.at(**place) for other in drawn])) for place in places],
                "points": [
                    [place[along], value * law.at(**{**middle, along: place[along]}) / law.at(**place)]
                    for place, value in found
                ],
                "target": target.get(along),
            }
    return out


def _predicted(laws: Laws, draws: Sequence[Laws], parameters: int, config: FitConfig) -> dict[str, Any]:
    """The next size's rate, batch and loss with intervals, and the setting that the check trains."""
    size = {"parameters": float(parameters), "tokens": float(config.tokens)}
    batch = spread(laws.batch.at(**size), [draw.batch.at(**size) for draw in draws])
    at = size | {"batch": batch.value}
    rate = spread(laws.rate.at(**at), [draw.rate.at(**at) for draw in draws])
    loss = None
    if laws.loss is not None:
        loss = asdict(spread(laws.loss.at(**size), [draw.loss.at(**size) for draw in draws if draw.loss]))
    return {
        "width": config.width,
        "parameters": parameters,
        "tokens": config.tokens,
        "rate": asdict(rate),
        "batch": asdict(batch),
        "loss": loss,
    }
