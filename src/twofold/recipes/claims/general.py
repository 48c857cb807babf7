"""The claim about general RL: skills that were absent before, all of them counted, against labelled examples.

Not here: thresholds (``declared``), and what the skills are (``evidence.SKILLS``).
"""

from __future__ import annotations

from collections.abc import Callable

from twofold.eval.stats import Interval
from twofold.recipes.claims.case import Case, Measured
from twofold.recipes.claims.declared import GENERAL_RL
from twofold.recipes.evidence import (
    HARD,
    SKILLS,
    Facts,
    difference,
    lacks,
    level,
    mean_of,
    rows,
    skill_gains,
    skill_levels,
    smallest,
)
from twofold.report.model import Claim

BEFORE, AFTER = "eval_fusion/items/general", "eval_final/items/general"


def general_rl(facts: Facts) -> Claim:
    """General RL lifts seven skills by at least 20 points in the mean and each of them by more than 0 (paired, lower
    ends). Before, they are at most 10 points above chance in the mean (upper end). It beats SFT on 24 labelled
    examples (mean over the skills, lower end above 0), loses at most 3 points of thinking (upper end), and uses a tool
    in at least 60 % (estimate). SFT on 240 examples is shown."""
    case = Case(facts, GENERAL_RL)

    def skills(name: str, value: Callable[[], Measured], *paths: str) -> None:
        case.measure(name, paths, lambda: None if any(lacks(facts, path, SKILLS) for path in paths) else value())

    skills("gain", lambda: mean_of(list(skill_gains(facts, AFTER, BEFORE).values())), AFTER, BEFORE)
    skills("absent", lambda: mean_lead(facts, BEFORE), BEFORE)
    skills("largest_lead", lambda: largest_lead(facts, BEFORE), BEFORE)
    skills("smallest", lambda: smallest(skill_gains(facts, AFTER, BEFORE)), AFTER, BEFORE)
    for count in (24, 240):
        other = f"eval_general_sft_{count}/items/general"
        skills(f"sft_{count}", lambda other=other: _mean_over(facts, other), AFTER, other)  # type: ignore[misc]
    case.gain("thinking", "eval_fusion/items/think", "eval_final/items/think", HARD)

    def tool() -> Interval | None:
        return None if lacks(facts, AFTER, ("tool",)) else level(rows(facts, AFTER, ("tool",)))

    case.measure("tool", (AFTER,), tool)
    case.gain("tool_gain", AFTER, BEFORE, ("tool",))
    return case.claim()


def mean_lead(facts: Facts, path: str) -> Interval:
    """How far the skills are above what guessing gets, in the mean and in points.

    A form that is preferred whatever is asked leads in one skill and lacks in the others: in the mean it is no skill.
    """
    found = skill_levels(facts, path)
    mean, chance = mean_of(list(found.values())), sum(SKILLS[skill] for skill in found) / len(found)
    return Interval(*(end - chance for end in (mean.value, mean.low, mean.high)))


def largest_lead(facts: Facts, path: str) -> Measured:
    """How far the best skill is above what guessing gets, in points, with its name.

    It has no interval: the largest of seven is no mean of items.
    """
    leads = {skill: found.value - SKILLS[skill] for skill, found in skill_levels(facts, path).items()}
    name = max(leads, key=lambda skill: leads[skill])
    return Interval(leads[name], float("nan"), float("nan")), name


def _mean_over(facts: Facts, other: str) -> Interval:
    return mean_of([difference(facts, AFTER, other, (skill,)) for skill in SKILLS])
