"""One verdict a claim from several runs: each condition's estimates over training seeds, with an interval over them.

Works on the claims as reports store them, so a table can be made again from JSON alone. Not here: judging one run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from twofold.base.records import InputError
from twofold.eval.stats import Interval, across
from twofold.recipes.claims.case import filled, settle
from twofold.recipes.claims.declared import PROTOCOLS
from twofold.recipes.claims.record import Protocol, Rule
from twofold.report.model import Claim, Condition, Figure
from twofold.report.text import cell_markdown, measured, number, wanted


def combine(reports: Mapping[int, Sequence[Claim]]) -> list[Claim]:
    """The nine claims over training seeds; ``reports`` maps a seed to the claims of its run.

    A condition is judged by its sense on the mean of the seeds' estimates and the interval ``across`` them, which takes
    in each run's interval over items; "level" on the mean alone, with the worst seed beside it; "exact" must be so on
    every seed. A claim that any seed leaves open, or a figure that any seed lacks, is not judged.

    Raises:
        InputError: fewer than two seeds, or a run that was judged by another protocol.
    """
    if len(reports) < 2:
        raise InputError(f"claims over training seeds need at least 2 seeds, got {len(reports)}; run more seeds")
    return [_over_seeds(protocol, reports) for protocol in PROTOCOLS.values()]


def _over_seeds(protocol: Protocol, reports: Mapping[int, Sequence[Claim]]) -> Claim:
    by_seed = {seed: next((c for c in claims if c.key == protocol.key), None) for seed, claims in reports.items()}
    found = {seed: claim for seed, claim in by_seed.items() if claim is not None}
    notes = [f"Seed {seed} has no such claim." for seed in by_seed if seed not in found]
    notes += [f"Seed {seed}: {claim.note}" for seed, claim in found.items() if not claim.judged]
    conditions = []
    for rule in protocol.rules:
        parts = {seed: _same(rule, claim.conditions, seed) for seed, claim in found.items()}
        conditions.append(_condition(rule, parts, complete=len(found) == len(reports)))
    shown = []
    for extra in protocol.shown:
        figures = [next((f for f in claim.shown if f.name == extra.name), None) for claim in found.values()]
        there = [figure for figure in figures if figure is not None and figure.value is not None]
        if len(there) == len(reports):
            shown.append(filled(Figure, extra, _interval(there)))
    judged = not notes
    return settle(protocol, conditions, shown, judged, " ".join(notes), seeds=list(reports))


def _same(rule: Rule, conditions: Sequence[Condition], seed: int) -> Condition:
    """The stored condition of a rule, which must have been judged by that very rule."""
    part = next((condition for condition in conditions if condition.name == rule.name), None)
    if part is None or (part.target, part.sense, part.unit) != (rule.target, rule.sense, rule.unit):
        raise InputError(
            f"seed {seed} was judged by another protocol (condition {rule.name!r} differs); judge its run again with "
            "--redo report"
        )
    return part


def _condition(rule: Rule, parts: Mapping[int, Condition], complete: bool) -> Condition:
    values = {seed: part.value for seed, part in parts.items() if part.value is not None}
    if not complete or len(values) < len(parts):
        return _as_condition(rule, None, "")
    if rule.sense == "exact":
        failed = [str(seed) for seed, value in values.items() if value != rule.target]
        value = Interval(min(values.values()), math.nan, math.nan)
        return _as_condition(rule, value, f"not on seed {', '.join(failed)}" if failed else "on every seed")
    worst = max(values, key=lambda seed: values[seed] if rule.sense == "at most" else -values[seed])
    detail = f"worst seed {worst}: {number(values[worst])}"
    return _as_condition(rule, _interval(list(parts.values())), detail)


def _interval(parts: Sequence[Figure]) -> Interval:
    """Over seeds, with the half widths over items of the runs that have an interval."""
    halves = [(part.high - part.low) / 2 for part in parts if part.low is not None and part.high is not None]
    return across([part.value for part in parts if part.value is not None], halves)


def _as_condition(rule: Rule, value: Interval | None, detail: str) -> Condition:
    condition: Condition = filled(Condition, rule, None if value is None else (value, detail))
    return condition


def claim_cell(claim: Claim, labels: Mapping[str, str] | None = None) -> str:
    """Every condition of a claim with its figures, one line each, for a Markdown cell; ``labels`` may rename them."""
    lines = []
    for condition in claim.conditions:
        label = (labels or {}).get(condition.name, condition.text)
        asked = "" if condition.sense == "exact" else f" ({wanted(condition)})"
        mark = "" if condition.met or condition.value is None else " **not met**"
        lines.append(cell_markdown(f"{label}: {measured(condition)}{asked}{mark}"))
    return "<br>".join(lines)


def markdown_table(claims: Sequence[Claim]) -> str:
    """One row a claim: its name, every condition with its interval over seeds, and the verdict."""
    lines = ["| Claim | Conditions: mean over seeds [95 % interval] (wanted) | Verdict |", "| --- | --- | --- |"]
    for claim in claims:
        note = f"<br>{cell_markdown(claim.note)}" if claim.note else ""
        title = f"{cell_markdown(claim.name)} (`{claim.key}`)"
        lines.append(f"| {title} | {claim_cell(claim)} | **{claim.verdict}**{note} |")
    return "\n".join(lines) + "\n"
