"""What a finished run measured, as plain dictionaries, and how rows are picked and compared.

``read_facts`` loads the JSON of every artefact; the rest works on those dictionaries alone, so that claims and report
sections can be tested without a run. Shares become percents here. Not here: what a number means. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from twofold.base.files import read_json, read_jsonl
from twofold.base.records import InputError
from twofold.eval.stats import Interval, mean_interval, paired_difference, pass_at_k, pass_at_k_interval, wilson
from twofold.recipes.artefacts import ChainError, read_manifest
from twofold.report.text import interval, number
from twofold.tasks.families import default_families, easy_families, signed_families
from twofold.tasks.instruct import ORDERED, ORDERS, STYLES
from twofold.tasks.query import HELD_OUT_PATTERNS, MODE_KIND, TAUGHT_PATTERNS

Facts = Mapping[str, Mapping[str, Any]]  # stage -> "result", "scores", "items", … -> the file's content
Rows = list[list[float]]

HARD = tuple(task.name for task in default_families() if task.step_by_step)
EASY = tuple(task.name for task in easy_families())
SIGNED = tuple(task.name for task in signed_families("mixed"))
TAUGHT_KINDS = tuple(MODE_KIND + name for name in TAUGHT_PATTERNS)
HELD_OUT_KINDS = tuple(MODE_KIND + name for name in HELD_OUT_PATTERNS)
SWITCH_KIND = MODE_KIND + "hard switch"
# skills that no stage before general RL teaches -> what guessing gets, in percent
SKILLS: dict[str, float] = {
    **{f"style {cue}": 100 / len(STYLES) for cue in STYLES},
    **{f"order {cue}": 100 / math.factorial(ORDERED) for cue in ORDERS},
}
BLOCK = 10  # steps whose mean is one point of a curve
LOGP_MAX = "sampling/sampling_logp_difference/max"
_JSON = ("result", "scores", "items", "samples", "card")


def read_facts(inputs: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """Load every stage's JSON files, ``metrics`` rows and ``manifest``; a file a stage has not written is left out.

    Raises:
        ChainError: an artefact without a readable manifest.
    """
    facts: dict[str, dict[str, Any]] = {}
    for name, folder in inputs.items():
        manifest = read_manifest(folder)
        if manifest is None:
            raise ChainError(f"{folder} is missing: make the stage with --only {name}")
        stage: dict[str, Any] = {"manifest": manifest.model_dump()}
        for part in _JSON:
            if (folder / f"{part}.json").is_file():
                stage[part] = read_json(folder / f"{part}.json")
        if (folder / "metrics.jsonl").is_file():
            stage["metrics"] = read_jsonl(folder / "metrics.jsonl")
        facts[name] = stage
    return facts


def lookup(facts: Facts, path: str) -> Any:
    """The value at ``stage/file/key/…``, or None where any step is absent."""
    value: Any = facts
    for key in path.split("/"):
        if not isinstance(value, Mapping) or key not in value:
            return None
        value = value[key]
    return value


def missing(facts: Facts, *paths: str) -> list[str]:
    """Those of the paths that lead nowhere."""
    return [path for path in paths if lookup(facts, path) is None]


def rows(facts: Facts, path: str, kinds: Collection[str] | None = None, column: str = "correct") -> Rows:
    """Item rows of a battery part (``eval_rl/items/hot``), of some kinds only, in order."""
    part = lookup(facts, path)
    return [list(row) for row, kind in zip(part[column], part["kinds"], strict=True) if kinds is None or kind in kinds]


def lacks(facts: Facts, path: str, kinds: Collection[str]) -> bool:
    """Whether a part has no item of one of the kinds."""
    return not set(kinds) <= set(lookup(facts, path)["kinds"])


def block_means(metrics: Sequence[Mapping[str, Any]], place: str, key: str) -> tuple[list[float], list[float]]:
    """For each ``BLOCK`` rows of metrics, ``place`` of the last one and the mean of ``key``."""
    blocks = [metrics[i : i + BLOCK] for i in range(0, len(metrics), BLOCK)]
    return [float(block[-1][place]) for block in blocks], [sum(r[key] for r in block) / len(block) for block in blocks]


def percent(value: Interval) -> Interval:
    """A share as a percentage."""
    return Interval(100 * value.value, 100 * value.low, 100 * value.high)


def stored(value: Mapping[str, float], scale: float = 1.0) -> Interval:
    """An interval as artefacts store it, times ``scale``."""
    return Interval(scale * value["value"], scale * value["low"], scale * value["high"])


def level(values: Rows) -> Interval:
    """Mean of item rows in percent: Wilson for one sample an item, else normal over item means."""
    if all(len(row) == 1 for row in values):
        return percent(wilson(round(sum(row[0] for row in values)), len(values)))
    return percent(mean_interval(values))


def difference(
    facts: Facts, after: str, before: str, kinds: Collection[str] | None = None, column: str = "correct"
) -> Interval:
    """``after`` minus ``before`` in points, paired over the same items.

    Raises:
        InputError: the two parts were not measured on the same items.
    """
    _check_same_items(facts, after, before, kinds)
    return percent(paired_difference(rows(facts, after, kinds, column), rows(facts, before, kinds, column)))


def fact(holds: bool) -> Interval:
    """A yes or a no, which has no interval."""
    return Interval(float(holds), math.nan, math.nan)


def mean_of(values: Sequence[Interval], same_items: bool = False) -> Interval:
    """Mean of estimates with normal intervals.

    Args:
        same_items: whether estimates may rest on the same items; half widths are averaged then, which is right for
            estimates that move together and too wide for others. Else they are independent.
    """
    mean, halves = sum(v.value for v in values) / len(values), [(v.high - v.low) / 2 for v in values]
    half = (sum(halves) if same_items else math.hypot(*halves)) / len(values)
    return Interval(mean, mean - half, mean + half)


def percentile_interval(value: float, samples: Sequence[float]) -> Interval:
    """The middle 95 % of resamples around an estimate (linear interpolation between ranks)."""
    ordered = sorted(samples)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = math.floor(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    return Interval(value, at(0.025), at(0.975))


def skill_levels(facts: Facts, path: str) -> dict[str, Interval]:
    """Level of every skill in a "general" part, in percent."""
    return {skill: level(rows(facts, path, (skill,))) for skill in SKILLS}


def skill_gains(facts: Facts, after: str, before: str) -> dict[str, Interval]:
    """``after`` minus ``before`` on every skill, in points, paired over the same items, less the way up to chance."""
    gains = {}
    for skill, found in skill_levels(facts, before).items():
        gain, to_chance = difference(facts, after, before, (skill,)), max(0.0, SKILLS[skill] - found.value)
        gains[skill] = Interval(*(end - to_chance for end in (gain.value, gain.low, gain.high)))
    return gains


def smallest(gains: Mapping[str, Interval]) -> tuple[Interval, str]:
    """The smallest estimate with its name, and the smallest ends: a lower end above 0 speaks for each of them."""
    name = min(gains, key=lambda key: gains[key].value)
    value, low, high = (min(getattr(gain, end) for gain in gains.values()) for end in ("value", "low", "high"))
    return Interval(value, low, high), name


def samples_per_item(facts: Facts, *paths: str) -> int:
    """The smallest number of samples an item has in any of the parts."""
    return min(len(row) for path in paths for row in rows(facts, path))


def pass_difference(facts: Facts, after: str, before: str, k: int, kinds: Collection[str] | None = None) -> Interval:
    """Unbiased pass@k of ``after`` minus ``before`` in points, paired over the same items."""
    _check_same_items(facts, after, before, kinds)
    sides = [[pass_at_k(len(r), round(sum(r)), k) for r in rows(facts, path, kinds)] for path in (after, before)]
    return percent(paired_difference(sides[0], sides[1]))


def pass_at_level(values: Rows, k: int) -> Interval:
    """Unbiased pass@k of item rows in percent."""
    return percent(pass_at_k_interval([(len(row), round(sum(row))) for row in values], k))


def window_values(bpb: list[Mapping[str, Any]], span: tuple[int, int]) -> list[float] | None:
    """Bits per byte of each window at the positions of ``span``; None where it was not measured."""
    return next((list(entry["values"]) for entry in bpb if tuple(entry["span"]) == span), None)


def on_policy_rows(facts: Facts, stage: str) -> list[Mapping[str, Any]]:
    """Metric rows whose batch was sampled by the very weights it trained."""
    metrics = lookup(facts, f"{stage}/metrics") or []
    return [row for row in metrics if row.get("on_policy") == 1.0]


def shown(value: Interval, unit: str = "") -> str:
    """``84.2 [80.4, 87.5]``, with the unit after the estimate."""
    return f"{number(value.value, unit)} {interval(value.low, value.high)}"


def _check_same_items(facts: Facts, after: str, before: str, kinds: Collection[str] | None) -> None:
    sides = [
        [kind for kind in lookup(facts, path)["kinds"] if kinds is None or kind in kinds] for path in (after, before)
    ]
    if sides[0] != sides[1]:
        stages = " and ".join(path.split("/")[0] for path in (after, before))
        raise InputError(f"{stages} were measured on different items; make both afresh with --redo")
