"""The report of a scaling run: the sweeps, the laws with their intervals, and what the next size said to them.

Numbers in prose are computed from the stages' results. Not here: fitting (``scaling_fit``), training
(``scaling_runs``), drawing (``report``). Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from twofold.base.config import Config
from twofold.eval.stats import Z95
from twofold.recipes.chain import StageContext
from twofold.recipes.evidence import read_facts
from twofold.recipes.report import report_frame
from twofold.recipes.scaling_fit import LossLaw, by_batch, losses_of
from twofold.report.model import Claim, Plot, Report, Section, Series, Table
from twofold.report.text import amount, interval, number
from twofold.report.write import write_report

Rows = Sequence[Mapping[str, Any]]
_SYMBOL = {"parameters": "N", "tokens": "D", "batch": "B"}
_UNIT = {"rate": "learning rate", "batch": "tokens a step"}


class ScalingReportConfig(Config):
    """command: what reproduces the run, exactly. titles: of stages, by name.

    limit: percent of loss that the predicted rate may cost. tolerance: percent that the best batch may cost.
    """

    command: str = ""
    limit: float = 1.0
    tolerance: float = 1.0
    titles: dict[str, str] = Field(default_factory=dict)


def write_scaling_report(context: StageContext) -> None:
    """Write ``report.html``, ``report.md`` and ``report.json`` of a scaling run."""
    config: ScalingReportConfig = context.config
    facts = read_facts(context.inputs)
    fit, check = facts["fit"]["result"], facts["check"]["result"]
    sweeps = [stage["result"] for name, stage in facts.items() if name.startswith("sweep_")]
    report = Report(
        title="Learning rate and batch by scaling law",
        command=config.command,
        seed=context.seed,
        intro=_intro(fit, check, sweeps),
        claims=[rate_claim(fit, check, config.limit), batch_claim(check, config.tolerance)],
        sections=[
            _sweeps(fit, sweeps, context),
            _laws(fit),
            _check(fit, check),
            _losses(fit, check),
        ],
        data_card=_card(facts["text"]["card"]),
        **report_frame(facts, config.titles),
    )
    write_report(report, context.out)


def rate_claim(fit: Mapping[str, Any], check: Mapping[str, Any], limit: float) -> Claim:
    """Loss at the predicted rate above the best of the held-out sweep at the predicted batch, judged on the upper end.

    The interval is that of the noise of a run. A sweep that does not enclose its best rate judges nothing.
    """
    told = check["prediction"]
    losses = {name: check["losses"][name] for name in ("predicted", "best")}
    head: dict[str, Any] = {
        "name": "Predicted learning rate",
        "statement": f"Loss of the next size, width {told['width']}, at the predicted learning rate: percent above the "
        "best of its own sweep, at the predicted batch",
        "target": limit,
        "direction": "at most",
        "unit": "%",
    }
    if check["rate"]["edge"]:
        return Claim(**head, judged=False, note="The held-out sweep does not enclose its best rate.")
    if any(loss is None for group in losses.values() for loss in group):
        return Claim(**head, judged=False, note="A run at the predicted or the best rate failed.")
    excess = _excess(losses["predicted"], losses["best"])
    half = _half(fit, len(losses["best"]))
    best = check["settings"]["best"]["rate"] / told["rate"]
    return Claim(
        **head,
        value=excess,
        low=excess - half,
        high=excess + half,
        holds=excess + half <= limit,
        note=f"{number(excess, '%')} {interval(excess - half, excess + half)} over {len(losses['best'])} seeds. "
        f"The best run's rate is {best:g} times the predicted one, the parabola's "
        f"{check['rate']['value'] / told['rate']:.2f} times. {_neighbours(check)}",
    )


def batch_claim(check: Mapping[str, Any], tolerance: float) -> Claim:
    """The predicted batch and that of the held-out sweep differ by a factor of two at most, at the interval's ends."""
    told, measured = check["prediction"]["batch"], check["batch"]
    head: dict[str, Any] = {
        "name": "Predicted batch",
        "statement": f"Factor between the predicted and the measured largest batch that costs at most {tolerance:g} %",
        "target": 2.0,
        "direction": "at most",
        "unit": "times",
    }
    if check["optimum"]["batch_edge"]:
        return Claim(**head, judged=False, note="The held-out sweep does not enclose its best batch.")
    factors = [max(measured[end] / told, told / measured[end]) for end in ("value", "low", "high")]
    covered = measured["low"] <= told <= measured["high"]
    return Claim(
        **head,
        value=factors[0],
        low=1.0 if covered else min(factors),
        high=max(factors),
        holds=max(factors) <= 2.0,
        note=f"Predicted {told} tokens a step, measured {measured['value']:.0f} "
        f"{interval(measured['low'], measured['high'])}.",
    )


def _excess(losses: Sequence[float], best: Sequence[float]) -> float:
    return 100 * (sum(losses) / sum(best) * len(best) / len(losses) - 1)


def _half(fit: Mapping[str, Any], seeds: int) -> float:
    """Half of the 95 % interval of an excess, in percent, from the noise of a run."""
    return 100 * Z95 * float(fit["noise"]) * math.sqrt(2 / seeds)


def _neighbours(check: Mapping[str, Any]) -> str:
    """What a wrong rate costs, without which a small excess would say little."""
    told = check["prediction"]
    line = {
        round(math.log2(row["rate"] / told["rate"])): row["loss"]
        for row in check["sweep"]
        if row["loss"] is not None and row["batch"] == told["batch"]
    }
    sides = {-2: "a quarter", -1: "half", 1: "twice", 2: "four times"}
    costs = [
        f"{number(100 * (line[place] / min(line.values()) - 1), '%')} at {words}"
        for place, words in sides.items()
        if place in line
    ]
    return f"A wrong rate costs {', '.join(costs)} the predicted one." if costs else ""


def _intro(fit: Mapping[str, Any], check: Mapping[str, Any], sweeps: Rows) -> str:
    cells, told = fit["cells"], fit["prediction"]
    runs = sum(result["runs"] for result in sweeps)
    sizes, lengths = (sorted({cell[name] for cell in cells}) for name in ("parameters", "tokens"))
    text = (
        f"{runs} runs of {len(sizes)} models ({amount(sizes[0])} to {amount(sizes[-1])} parameters without embeddings) "
        f"on {amount(lengths[0])} to {amount(lengths[-1])} tokens gave {len(cells)} best settings, and these the laws. "
        f"They predict, for {amount(told['parameters'])} parameters and {amount(told['tokens'])} tokens, a rate of "
        f"{number(told['rate']['value'])} {interval(told['rate']['low'], told['rate']['high'])} and "
        f"{told['batch']['value']:.0f} tokens a step {interval(told['batch']['low'], told['batch']['high'])}; "
        f"{check['runs']} runs of that size checked it."
    )
    flagged = [cell for cell in cells if cell["rate_edge"] or cell["batch_edge"]]
    if flagged:
        text += (
            f"\n\n**{len(flagged)} of {len(cells)} best settings lie at the edge of what was swept** and are left out "
            "of the laws; widen `rates` or `batches` (the table of sweeps says which)."
        )
    return text


def _sweeps(fit: Mapping[str, Any], sweeps: Rows, context: StageContext) -> Section:
    longest = max(cell["tokens"] for cell in fit["cells"])
    groups: list[tuple[str, Rows]] = []
    for result in sweeps:
        rows = [row for row in result["rows"] if row["tokens"] == longest and row["seed"] == context.seed]
        groups.append((f"N = {amount(rows[0]['parameters'])}", rows))
    note = f"At {amount(longest)} tokens."
    plots = [
        Plot(
            title="Loss against learning rate",
            x_label="learning rate, at each size's best batch",
            y_label="bits a byte, held out",
            series=[_rate_line(name, rows) for name, rows in groups],
            log_x=True,
            note=note,
        ),
        Plot(
            title="Loss against batch",
            x_label="tokens a step, each at its best rate",
            y_label="bits a byte, held out",
            series=[_batch_line(name, rows) for name, rows in groups],
            log_x=True,
            note=note,
        ),
    ]
    cells = [
        [
            cell["parameters"],
            amount(cell["tokens"]),
            cell["runs"],
            number(cell["rate"]),
            round(cell["batch"]),
            f"{cell['loss']:.4f}",
            _flag(cell),
        ]
        for cell in fit["cells"]
    ]
    table = Table(
        title="Best settings",
        columns=["parameters", "tokens", "runs", "rate", "batch", "least bits a byte", "enclosed"],
        rows=cells,
        note="Rates are vertices of parabolas in log space. What is flagged is no optimum and is in no law.",
    )
    text = (
        "Each sweep begins at the middle of its grid and goes on until the best rate at every batch has worse "
        "neighbours and the best batch is enclosed: the largest that, at its best rate, costs at most "
        f"{context.config.tolerance:g} % against smaller ones. Chance moves a run, against others of its "
        f"seed, by {number(100 * fit['noise'], '%')} of the loss ({fit['noise_freedom']} degrees of freedom)."
    )
    return Section(title="Sweeps", text=text, plots=plots, tables=[table])


def _flag(cell: Mapping[str, Any]) -> str:
    edges = [f"{name} at its {cell[f'{name}_edge']} edge" for name in ("rate", "batch") if cell[f"{name}_edge"]]
    return ", ".join(edges) or "yes"


def _lines_of(rows: Rows) -> dict[int, dict[float, float]]:
    return by_batch(losses_of(rows))


def _rate_line(name: str, rows: Rows) -> Series:
    lines = _lines_of(rows)
    line = min(lines.values(), key=lambda found: min(found.values()))
    return Series(name=name, x=list(line), y=list(line.values()))


def _batch_line(name: str, rows: Rows) -> Series:
    lines = _lines_of(rows)
    return Series(name=name, x=[float(batch) for batch in lines], y=[min(line.values()) for line in lines.values()])


def _laws(fit: Mapping[str, Any]) -> Section:
    rows: list[list[Any]] = []
    for name, law in fit["laws"].items():
        if name == "loss":
            continue
        powers = " ".join(f"{_SYMBOL[q]}^{value['value']:.3f}" for q, value in law["exponents"].items())
        spans = ", ".join(
            f"{_SYMBOL[q]}: {interval(value['low'], value['high'])}" for q, value in law["exponents"].items()
        )
        rows.append([_UNIT[name], f"{number(law['factor'])} {powers}", spans])
    told = fit["prediction"]
    for name in ("rate", "batch"):
        value = told[name]
        rows.append([f"next size: {_UNIT[name]}", number(value["value"]), interval(value["low"], value["high"])])
    table = Table(title="Laws", columns=["what", "law or value", "95 % interval"], rows=rows)
    plots = [_law_plot(which, line) for which, line in fit["lines"].items()]
    gamma = fit["laws"]["batch"]["exponents"]["tokens"]["value"]
    power = {name: value["value"] for name, value in fit["laws"]["rate"]["exponents"].items()}
    text = (
        "Fitted by least squares in log space; N is parameters without embeddings, D tokens trained, B tokens a step. "
        f"The rate's law has {fit['points']['rate']} best rates, one for every batch of every sweep; the batch's has "
        f"{fit['points']['batch']} best batches. At the best batch the rate goes as N^{power['parameters']:.3f} "
        f"D^{power['tokens'] + power['batch'] * gamma:.3f}. Intervals come from {fit['draws']} refits to sweeps "
        "drawn with replacement, their losses shaken by the noise of a run."
    )
    return Section(title="Laws", text=text, plots=plots, tables=[table])


def _law_plot(which: str, line: Mapping[str, Any]) -> Plot:
    name, along = which.split("_")
    values = line["line"]
    middle = " and ".join(f"{_SYMBOL[quantity]} = {amount(value)}" for quantity, value in line["middle"].items())
    series = [
        Series(
            name="law",
            x=line["x"],
            y=[value["value"] for value in values],
            low=[value["low"] for value in values],
            high=[value["high"] for value in values],
        ),
        _dots("sweeps", line["points"]),
    ]
    if line["target"] is not None:
        series.append(_dots("next size", [[line["target"], values[line["x"].index(line["target"])]["value"]]]))
    return Plot(
        title=f"Best {_UNIT[name]} against {along}",
        x_label=f"{along} ({_SYMBOL[along]})",
        y_label=_UNIT[name],
        series=series,
        log_x=True,
        note=f"Moved along the law to {middle}." if middle else "",
    )


def _dots(name: str, points: list[list[float]]) -> Series:
    """Points without a line: a gap after each."""
    xs = [value for x, _ in sorted(points) for value in (x, x)]
    return Series(name=name, x=xs, y=[value for _, y in sorted(points) for value in (y, math.nan)])


def _check(fit: Mapping[str, Any], check: Mapping[str, Any]) -> Section:
    told, optimum = check["prediction"], check["optimum"]
    least = min(row["loss"] for row in check["sweep"] if row["loss"] is not None)
    rows: list[list[Any]] = [
        [
            f"×{row['rate'] / told['rate']:g}",
            f"×{row['batch'] / told['batch']:.3g}",
            number(row["rate"]),
            row["batch"],
            "failed" if row["loss"] is None else f"{row['loss']:.4f}",
            "" if row["loss"] is None else number(100 * (row["loss"] / least - 1), "%"),
        ]
        for row in sorted(check["sweep"], key=lambda row: (row["batch"], row["rate"]))
    ]
    sweep = Table(
        title="The held-out sweep",
        columns=["rate", "batch", "rate used", "batch used", "bits a byte", "above the best"],
        rows=rows,
        note="Factors are of the prediction; one seed.",
    )
    lines = _lines_of(check["sweep"])
    plot = Plot(
        title="The next size",
        x_label="learning rate, as a multiple of the predicted",
        y_label="bits a byte, held out",
        series=[
            Series(
                name=f"batch ×{batch / told['batch']:.3g}", x=[rate / told["rate"] for rate in line], y=[*line.values()]
            )
            for batch, line in lines.items()
        ],
        log_x=True,
    )
    text = (
        f"This sweep puts the best batch at {optimum['batch'] / told['batch']:.2f} times the predicted, and the best "
        f"rate there at {optimum['rate'] / told['rate']:.2f} times the predicted."
    )
    return Section(title="The next size, trained", text=text, plots=[plot], tables=[_settings(fit, check), sweep])


def _settings(fit: Mapping[str, Any], check: Mapping[str, Any]) -> Table:
    best, rows = check["losses"]["least"], []
    words = {
        "predicted": "predicted by the laws",
        "best": "best rate at the predicted batch",
        "least": "least loss of the held-out sweep",
        "carried": "carried over from the largest sweep",
    }
    for name, setting in check["settings"].items():
        losses = check["losses"][name]
        bad = any(loss is None for loss in (*losses, *best))
        half = _half(fit, len(best))
        excess = math.nan if bad else _excess(losses, best)
        mean = "failed" if bad else f"{sum(losses) / len(losses):.4f}"
        rows.append([
            words[name], number(setting["rate"]), setting["batch"], mean, number(excess, "%"),
            interval(excess - half, excess + half),
        ])  # fmt: skip
    return Table(
        title="Settings compared",
        columns=["setting", "rate", "batch", "bits a byte", "above the least", "95 % interval"],
        rows=rows,
        note=f"Means over {len(best)} seeds.",
    )


def _losses(fit: Mapping[str, Any], check: Mapping[str, Any]) -> Section:
    """The by-product: loss against size and tokens."""
    law, told = fit["laws"]["loss"], fit["prediction"]
    if law is None:
        return Section(title="Loss", text="No law E + A / N^α + B / D^β with E, A, B ≥ 0 fits these sweeps.")
    at = LossLaw(**law).at
    inside = [cell for cell in fit["cells"] if _flag(cell) == "yes"]
    sizes = [(cell["parameters"], cell["tokens"], cell["loss"]) for cell in inside]
    best = [loss for loss in check["losses"]["least"] if loss is not None]
    if best:
        sizes.append((told["parameters"], told["tokens"], sum(best) / len(best)))
    rows: list[list[Any]] = [
        [n, amount(d), f"{loss:.4f}", f"{at(n, d):.4f}", number(100 * (at(n, d) / loss - 1), "%")]
        for n, d, loss in sizes
    ]
    text = (
        f"A by-product of the sweeps: L = {law['e']:.3f} + {number(law['a'])} / N^{law['alpha']:.3f} + "
        f"{number(law['b'])} / D^{law['beta']:.3f} bits a byte. For the next size it gives "
        f"{told['loss']['value']:.4f} {interval(told['loss']['low'], told['loss']['high'])}. Five numbers from "
        f"{len(inside)} sweeps: E and the exponents are loosely determined, the loss nearby much better."
    )
    table = Table(
        title="Loss at the best setting",
        columns=["parameters", "tokens", "measured", "law", "law above measured"],
        rows=rows,
        note="The last row was not fitted to.",
    )
    return Section(title="Loss", text=text, tables=[table])


def _card(card: Mapping[str, Any]) -> Section:
    rows = [[row["name"], row["licence"], row["documents"], row["tokens"], row["bytes"]] for row in card["sources"]]
    table = Table(title="Sources", columns=["part", "licence", "files", "tokens", "bytes"], rows=rows)
    dropped = sum(card["totals"]["dropped"].values())
    text = f"The running interpreter's standard library; {dropped} near-copies left out; held out by file."
    return Section(title="Data", text=text, tables=[table])
