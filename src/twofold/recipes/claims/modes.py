"""Claims about the two modes: both in one model, the right one when asked, and a thinking budget of some worth.

Not here: thresholds (``declared``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

from twofold.base.records import InputError
from twofold.eval.stats import Interval, mean_interval, spearman
from twofold.recipes.claims.case import Case, Measured
from twofold.recipes.claims.declared import BOTH_MODES, MODE_FOLLOWING, THINKING_BUDGET
from twofold.recipes.evidence import (
    EASY,
    HARD,
    HELD_OUT_KINDS,
    SIGNED,
    SWITCH_KIND,
    TAUGHT_KINDS,
    Facts,
    fact,
    lacks,
    level,
    lookup,
    percent,
    rows,
)
from twofold.report.model import Claim

Table = Sequence[Mapping[str, Any]]  # rows of a budget table, smallest budget first
ItemValue = Callable[[Mapping[str, Any], int], float | None]


def both_modes(facts: Facts) -> Claim:
    """The finished model's worst step-by-step family is at 75 % or more when it thinks, and its worst easy family at
    80 % or more under /no_think (estimates). Fusion costs thinking at most 4 points against SFT of as many tokens on
    the same thinking responses alone, on the families as shown in text and on mixed signs (paired, lower ends)."""
    case = Case(facts, BOTH_MODES)
    case.measure("thinking", ("eval_final/items/think",), partial(worst, facts, "eval_final/items/think", HARD))
    case.measure("direct", ("eval_final/items/no_think",), partial(worst, facts, "eval_final/items/no_think", EASY))
    case.gain("fusion_cost", "eval_fusion/items/think", "eval_think_only/items/think", HARD)
    case.gain("fusion_cost_mixed", "eval_fusion/items/mixed", "eval_think_only/items/mixed", SIGNED)
    return case.claim()


def mode_following(facts: Facts) -> Claim:
    """The finished model replies in the mode called for: at least 90 % in the worst trained pattern of flags and 80 %
    in the worst held-out one (estimates), and 90 % in the held-out patterns together (lower end). The hard switch is
    shown apart."""
    case = Case(facts, MODE_FOLLOWING)
    path = "eval_final/items/modes"
    case.measure("worst", (path,), partial(worst, facts, path, TAUGHT_KINDS, "followed"))
    case.measure("held_out", (path,), partial(worst, facts, path, HELD_OUT_KINDS, "followed"))

    def pooled() -> Interval | None:
        return None if lacks(facts, path, HELD_OUT_KINDS) else level(rows(facts, path, HELD_OUT_KINDS, "followed"))

    case.measure("held_out_mean", (path,), pooled)
    case.measure("hard_switch", (path,), partial(worst, facts, path, (SWITCH_KIND,), "followed"))
    return case.claim()


def worst(facts: Facts, path: str, kinds: Collection[str], column: str = "correct") -> Measured | None:
    """The lowest level among kinds with its name, in percent; None where a kind has no item."""
    if lacks(facts, path, kinds):
        return None
    levels = {kind: level(rows(facts, path, (kind,), column)) for kind in kinds}
    name = min(levels, key=lambda kind: levels[kind].value)
    return levels[name], name.removeprefix("mode: ")


def thinking_budget(facts: Facts) -> Claim:
    """Replies that were stopped beat the same items without a thought, chance, and the stopped replies of a model
    trained without cut thoughts (paired by item, lower ends above 0), and no reply thinks beyond its budget. The items
    are of families whose thoughts are as long whatever the answer.

    The rank correlation of budget and accuracy is shown, not judged: it rises by itself as short thoughts finish.
    """
    case = Case(facts, THINKING_BUDGET)
    final, fusion, uncut = (f"eval_{name}/scores/budget" for name in ("final", "fusion", "uncut"))
    case.measure("over_none", (final,), lambda: over_none(budgets(facts, final)))
    case.measure("over_chance", (final,), lambda: over_chance(budgets(facts, final)))
    case.measure("over_uncut", (fusion, uncut), lambda: over_uncut(budgets(facts, fusion), budgets(facts, uncut)))
    case.measure("kept", (final,), lambda: kept(budgets(facts, final)))
    case.measure("rank", (final,), lambda: rank(budgets(facts, final)))
    case.measure("stopped_share", (final,), lambda: stopped_share(budgets(facts, final)))
    return case.claim()


def budgets(facts: Facts, path: str) -> Table:
    """A budget table by rising budget; every row has the same items.

    Raises:
        InputError: rows of different items.
    """
    table = sorted(lookup(facts, path), key=lambda row: row["budget"])
    if any(row["kinds"] != table[0]["kinds"] for row in table):
        raise InputError(f"{path} has different items at different budgets; make the stage afresh with --redo")
    return table


def over_none(table: Table) -> Measured | None:
    """Stopped replies minus the same items at budget 0."""
    if not table or table[0]["budget"] != 0:
        return None
    none = table[0]["correct"]
    return _by_item(table, lambda row, i: row["correct"][i] - none[i] if row["stopped"][i] else None)


def over_chance(table: Table) -> Measured | None:
    """Stopped replies minus the chance of guessing each item."""
    return _by_item(table, lambda row, i: row["correct"][i] - row["chance"][i] if row["stopped"][i] else None)


def over_uncut(fusion: Table, uncut: Table) -> Measured | None:
    """Stopped replies of two models on items that were stopped in both at the same budget.

    Raises:
        InputError: the two were asked different items.
    """
    others = {row["budget"]: row for row in uncut}
    if fusion and uncut and fusion[0]["kinds"] != uncut[0]["kinds"]:
        raise InputError("eval_fusion and eval_uncut were measured on different items; make both afresh with --redo")

    def value(row: Mapping[str, Any], i: int) -> float | None:
        other = others[row["budget"]]
        return row["correct"][i] - other["correct"][i] if row["stopped"][i] and other["stopped"][i] else None

    return _by_item([row for row in fusion if row["budget"] in others], value)


def kept(table: Table) -> Measured | None:
    """Whether no reply thought for more tokens than its budget."""
    if not table:
        return None
    over = {row["budget"]: sum(count > row["budget"] for count in row["thinking_tokens"]) for row in table}
    broken = ", ".join(f"{count} replies beyond {budget}" for budget, count in over.items() if count)
    return fact(not broken), broken


def rank(table: Table) -> Measured | None:
    """Spearman correlation of budget and accuracy over all replies."""
    if len(table) < 2:
        return None
    value = spearman([row["budget"] for row in table], [sum(row["correct"]) for row in table])
    return None if math.isnan(value) else Interval(value, math.nan, math.nan)


def stopped_share(table: Table) -> Measured | None:
    """Share of replies that were stopped, budgets above 0 together, in percent."""
    stopped = [value for row in table if row["budget"] > 0 for value in row["stopped"]]
    return Interval(100 * sum(stopped) / len(stopped), math.nan, math.nan) if stopped else None


def _by_item(table: Table, value: ItemValue) -> Measured | None:
    """Mean over items, in points, of each item's mean over the budgets above 0 that have a value for it."""
    counted = [row for row in table if row["budget"] > 0]
    items = []
    for i in range(len(counted[0]["correct"]) if counted else 0):
        values = [found for row in counted if (found := value(row, i)) is not None]
        items += [values] if values else []
    if len(items) < 2:
        return None
    return percent(mean_interval(items)), f"{len(items)} of {len(counted[0]['correct'])} items"
