"""One claim being judged: figures go in by name, a ``Claim`` comes out.

The protocol says which figures there are and what each must reach; a claim's function says only how they are measured.
What cannot be measured leaves the claim unjudged, and so do arms that were not equal. Not here: thresholds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from twofold.eval.stats import Interval
from twofold.recipes.claims.fairness import unequal
from twofold.recipes.claims.record import Protocol, Rule, Shown
from twofold.recipes.evidence import Facts, difference, lacks, missing, smallest
from twofold.report.model import Claim, Condition, Figure, Sense

MAIN_STAGES = (
    *("data", "s1", "s2", "s3", "cold_start", "eval_cold_start", "rl", "eval_rl", "fusion", "eval_fusion"),
    *("general_rl", "eval_final"),
)
Measured = Interval | tuple[Interval, str]


class Case:
    """Figures of one claim, gathered one by one."""

    def __init__(self, facts: Facts, protocol: Protocol) -> None:
        self.facts, self.protocol = facts, protocol
        self.measured: dict[str, Measured] = {}
        self.absent: list[str] = []

    def measure(self, name: str, needs: Sequence[str], value: Callable[[], Measured | None]) -> None:
        """Add a figure, with words about it if there are any; it stays out where facts are absent or are too few.

        Args:
            needs: paths that must lead somewhere before ``value`` is called. value: gives None where they hold too
                little to say anything.
        """
        absent = missing(self.facts, *needs)
        found = None if absent else value()
        if found is not None:
            self.measured[name] = found
        elif any(rule.name == name for rule in self.protocol.rules):
            self.absent += absent or needs

    def gain(
        self, name: str, after: str, before: str, kinds: Collection[str] | None = None, column: str = "correct"
    ) -> None:
        """Add the difference of two battery parts over the same items, in points; every kind must be there."""

        def value() -> Interval | None:
            if any(lacks(self.facts, path, kinds or ()) for path in (after, before)):
                return None
            return difference(self.facts, after, before, kinds, column)

        self.measure(name, (after, before), value)

    def smallest_gain(self, name: str, after: str, before: str, kinds: Collection[str]) -> None:
        """Add the smallest of the kinds' differences, each over its own items, in points; every kind must be there."""

        def value() -> Measured | None:
            if any(lacks(self.facts, path, kinds) for path in (after, before)):
                return None
            return smallest({kind: difference(self.facts, after, before, (kind,)) for kind in kinds})

        self.measure(name, (after, before), value)

    def claim(self) -> Claim:
        """The claim as judged; refused where arms differ in what they saw and the protocol does not say so."""
        unfair = unequal(self.facts, self.protocol)
        notes = ["**Refused**, the arms were not equal: " + " ".join(unfair)] if unfair else []
        notes += [_lacking(self.facts, self.absent)] if self.absent else []
        return settle(
            self.protocol,
            [filled(Condition, rule, self.measured.get(rule.name)) for rule in self.protocol.rules],
            [
                filled(Figure, part, self.measured[part.name])
                for part in self.protocol.shown
                if part.name in self.measured
            ],
            judged=not unfair,
            note=" ".join(notes),
        )


def filled(model: type[Any], part: Rule | Shown, found: Measured | None) -> Any:
    """A condition or figure of the report from its declaration and what was measured."""
    value, detail = found if isinstance(found, tuple) else (found, "")
    fields: dict[str, Any] = {"name": part.name, "text": part.text, "unit": part.unit, "detail": detail}
    if value is not None:
        bounded = not math.isnan(value.low)
        fields |= {"value": value.value, "low": value.low if bounded else None, "high": value.high if bounded else None}
    if isinstance(part, Rule):
        fields |= {"target": part.target, "sense": part.sense}
        fields["met"] = value is not None and meets(part.sense, value, part.target)
    return model(**fields)


def meets(sense: Sense, value: Interval, target: float) -> bool:
    """Whether a figure reaches its target; an absent end of the interval is replaced by the estimate."""
    low, high = (value.value if math.isnan(end) else end for end in (value.low, value.high))
    return {
        "above": low > target,
        "at least": low >= target,
        "at most": high <= target,
        "level": value.value >= target,
        "exact": value.value == target,
    }[sense]


def settle(
    protocol: Protocol,
    conditions: Sequence[Condition],
    shown: Sequence[Figure],
    judged: bool,
    note: str,
    seeds: Sequence[int] = (),
) -> Claim:
    """The verdict: a claim holds when all conditions are met, and is not judged when one has no figure."""
    head = conditions[0]
    judged = judged and all(condition.value is not None for condition in conditions)
    return Claim(
        key=protocol.key,
        name=protocol.title,
        statement=head.text,
        question=protocol.question,
        conditions=list(conditions),
        shown=list(shown),
        seeds=list(seeds),
        value=head.value,
        low=head.low,
        high=head.high,
        target=head.target,
        direction="at most" if head.sense == "at most" else "at least",
        unit=head.unit,
        holds=judged and all(condition.met for condition in conditions),
        judged=judged,
        note=note,
    )


def _lacking(facts: Mapping[str, Any], paths: Sequence[str]) -> str:
    """Names the stages a run has not, and what is not in the stages it has."""
    names = sorted({path if path.split("/")[0] in facts else path.split("/")[0] for path in paths})
    controls = [name for name in names if "/" not in name and name not in MAIN_STAGES]
    advice = " The control arms are made with `--set controls=true`." if controls else ""
    return f"This run lacks {', '.join(f'`{name}`' for name in names)}.{advice}"
