"""What a claim's protocol consists of: arms, conditions, figures beside them, and differences that are allowed.

Not here: the nine protocols (``declared``), and judging (``case``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from twofold.report.model import Sense

# Ways in which two arms can differ: see ``fairness``.
Difference = Literal["forms", "tokens", "flops", "labels", "tuning"]
DIFFERENCES: dict[Difference, str] = {
    "forms": "prompt forms",
    "tokens": "tokens",
    "flops": "operations",
    "labels": "labels",
    "tuning": "tuning",
}


@dataclass(frozen=True)
class Arm:
    """A stage that the claim looks at. scored: where its held-out score stands (``eval_rl/items/mixed``), or ""."""

    stage: str
    what: str
    scored: str = ""


@dataclass(frozen=True)
class Shown:
    """A figure that is printed beside the conditions and decides nothing."""

    name: str
    text: str
    unit: str = "points"


@dataclass(frozen=True)
class Rule:
    """A condition of a claim; ``sense`` says which part of the figure is held against ``target``."""

    name: str
    text: str
    target: float
    sense: Sense
    unit: str = "points"


@dataclass(frozen=True)
class Protocol:
    """Everything about a claim that is fixed before the runs that count.

    control: what an opponent would ask for, and what answers it. items: which, how many. rules: the claim holds when
    all are met; the first is its headline. comparisons: pairs of arms whose training must be equal, but for
    ``allowed_differences``, which give a reason each.
    """

    key: str
    title: str
    question: str
    arms: tuple[Arm, ...]
    control: str
    items: str
    rules: tuple[Rule, ...]
    refuted: str
    shown: tuple[Shown, ...] = ()
    comparisons: tuple[tuple[str, str], ...] = ()
    allowed_differences: Mapping[tuple[str, str], Mapping[Difference, str]] = field(default_factory=dict)

    def rule(self, name: str) -> Rule:
        """The condition of this name."""
        return next(rule for rule in self.rules if rule.name == name)
