"""The nine effects the recipe must show, each judged by a rule that its function states.

A claim of a gain is judged on the lower end of the 95 % interval, over the same items on both sides. A claim whose arm
the run lacks is not judged, which is never an error. Nothing is measured, chosen or drawn here. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from twofold.eval.stats import Interval, paired_difference, spearman
from twofold.recipes.evidence import (
    HARD,
    SYSTEM_KINDS,
    Facts,
    Rows,
    difference,
    level,
    lookup,
    missing,
    pass_difference,
    percent,
    rows,
    samples_per_item,
    shown,
    stored,
    window_values,
)
from twofold.report.model import Claim
from twofold.report.text import amount, number

CONTROLS = ("direct", "eval_direct", "s3_old_base", "student_", "eval_student_", "moe_")
# groups of tasks that fusion leaves untaught -> their kinds, and what is counted
UNTAUGHT: dict[str, tuple[tuple[str, ...], str]] = {
    "answer format": (("format",), "correct"),
    "answer length": (("length",), "correct"),
    "flags in the system turn": (SYSTEM_KINDS, "followed"),
}


class Head(NamedTuple):
    """What a claim says, whatever was measured."""

    name: str
    statement: str
    target: float
    unit: str = "points"
    direction: Literal["at least", "at most"] = "at least"


class Condition(NamedTuple):
    """One part of a claim with its figures; a claim holds when all its conditions are met."""

    text: str
    met: bool


def judge(facts: Facts) -> list[Claim]:
    """All nine claims, what the finished model does first."""
    return [
        thinking_gain(facts),
        both_modes(facts),
        rl_gain(facts),
        mode_following(facts),
        general_rl(facts),
        thinking_budget(facts),
        distillation(facts),
        pretraining(facts),
        moe_balance(facts),
    ]


def thinking_gain(facts: Facts) -> Claim:
    """Thinking minus direct on the step-by-step families is at least 30 points, twice (paired, lower ends).

    Once after the cold start against a control that was trained on direct answers alone with at least as many tokens,
    once after the last stage against its own hard switch.
    """
    head = Head("Thinking pays", "Accuracy on tasks that need steps: thinking minus answering at once", 30.0)
    own_parts = ("eval_final/items/think", "eval_final/items/direct")
    own = None if missing(facts, *own_parts) else difference(facts, *own_parts, HARD)
    own_text = f"the final model against its own hard switch: {shown(own, 'points')}" if own else ""
    pair = ("eval_cold_start/items/think", "eval_direct/items/direct")
    absent = missing(facts, *own_parts, *pair, "cold_start/result/tokens", "direct/result/tokens")
    if absent or own is None:
        return _open(head, absent, own, f"Shown: {own_text}." if own else "")
    gap = difference(facts, *pair, HARD)
    ours, theirs = facts["cold_start"]["result"]["tokens"], facts["direct"]["result"]["tokens"]
    return _claim(
        head,
        gap,
        [
            Condition(f"the cold start against a direct-only control: {shown(gap, 'points')}", gap.low >= head.target),
            Condition(own_text, own.low >= head.target),
            Condition(f"the control saw at least as many tokens ({amount(theirs)}, {amount(ours)})", theirs >= ours),
        ],
    )


def both_modes(facts: Facts) -> Claim:
    """The final model answers `max` under /no_think at 80 % or more and thinks through the step-by-step families at
    75 % or more, and fusion cost thinking at most 4 points (paired, reasoning RL minus fusion).

    These are levels, not gains: judged on the estimates, with the intervals shown.
    """
    head = Head("One model, two modes", "Thinking accuracy of the final model on tasks that need steps", 75.0, "%")
    before, after = "eval_rl/items/think", "eval_fusion/items/think"
    absent = missing(facts, "eval_final/items/think", "eval_final/items/no_think", before, after)
    if absent:
        return _open(head, absent)
    hard = level(rows(facts, "eval_final/items/think", HARD))
    easy = level(rows(facts, "eval_final/items/no_think", ("max",)))
    cost = difference(facts, before, after, HARD)
    return _claim(
        head,
        hard,
        [
            Condition(f"thinking: {shown(hard, '%')}, at least 75 wanted", hard.value >= head.target),
            Condition(f"`max` under `/no_think`: {shown(easy, '%')}, at least 80 wanted", easy.value >= 80),
            Condition(f"fusion cost thinking {shown(cost, 'points')}, at most 4 allowed", cost.value <= 4),
        ],
    )


def rl_gain(facts: Facts) -> Claim:
    """Reasoning RL minus cold start on the step-by-step families, paired: above 0 at T = 0.6 and at least 15 points at
    T = 1, both at the lower end. The goal at T = 0.6 is +5. Greedy accuracy and pass@8 are shown, not judged.
    """
    head = Head("Reasoning RL helps", "Thinking accuracy at T = 0.6: after reasoning RL minus before", 0.0)
    parts = {name: (f"eval_rl/items/{name}", f"eval_cold_start/items/{name}") for name in ("think", "hot", "greedy")}
    absent = missing(facts, *parts["think"], *parts["hot"])
    if absent:
        return _open(head, absent)
    cool, hot = difference(facts, *parts["think"], HARD), difference(facts, *parts["hot"], HARD)
    k = min(8, samples_per_item(facts, *parts["hot"]))
    others = {f"pass@{k}": pass_difference(facts, *parts["hot"], k, HARD)}
    if not missing(facts, *parts["greedy"]):
        others = {"greedy accuracy": difference(facts, *parts["greedy"], HARD), **others}
    flat = [name for name, value in others.items() if value.low <= 0]
    figures = ", ".join(f"{name} {shown(value, 'points')}" for name, value in others.items())
    said = f"RL did not raise {' or '.join(flat)} beyond doubt." if flat else f"RL raised {' and '.join(others)} too."
    goal = "reached" if cool.value >= 5 else "not reached"
    return _claim(
        head,
        cool,
        [
            Condition(f"at T = 0.6: {shown(cool, 'points')} (goal +5 {goal})", cool.low > head.target),
            Condition(f"at T = 1: {shown(hot, 'points')}, at least 15 wanted", hot.low >= 15),
        ],
        f"Beside it: {figures}. {said}",
    )


def mode_following(facts: Facts) -> Claim:
    """The final model replies in the mode called for, over all flag patterns and the hard switch: lower end of the
    interval at least 98 %."""
    head = Head("The switch works", "Replies in the mode that was called for, over all flag patterns", 98.0, "%")
    absent = missing(facts, "eval_final/items/modes")
    if absent:
        return _open(head, absent)
    followed = rows(facts, "eval_final/items/modes", column="followed")
    kinds = set(lookup(facts, "eval_final/items/modes/kinds"))
    value = level(followed)
    text = f"{shown(value, '%')} over {len(followed)} conversations in {len(kinds)} patterns"
    return _claim(head, value, [Condition(text, value.low >= head.target)])


def untaught_gains(facts: Facts) -> dict[str, Interval]:
    """Gain of general RL in points on each group of UNTAUGHT, paired."""
    pair = ("eval_final/items/general", "eval_fusion/items/general")
    return {name: difference(facts, *pair, kinds, column) for name, (kinds, column) in UNTAUGHT.items()}


def general_rl(facts: Facts) -> Claim:
    """General RL lifts what fusion left untaught (answer format, answer length, flags in the system turn) by at least
    20 points, lower end of the paired interval of the mean over the three groups, and thinking on the step-by-step
    families loses at most 3 points (estimate)."""
    head = Head("General RL teaches new things", "Mean gain over three sorts of tasks that fusion left untaught", 20.0)
    think = ("eval_fusion/items/think", "eval_final/items/think")
    absent = missing(facts, "eval_final/items/general", "eval_fusion/items/general", *think)
    if absent:
        return _open(head, absent)
    groups = untaught_gains(facts)
    gain = _mean_of(list(groups.values()))
    loss = difference(facts, *think, HARD)
    each = ", ".join(f"{name} {shown(value)}" for name, value in groups.items())
    return _claim(
        head,
        gain,
        [
            Condition(f"mean gain {shown(gain, 'points')} ({each})", gain.low >= head.target),
            Condition(f"thinking lost {shown(loss, 'points')}, at most 3 allowed", loss.value <= 3),
        ],
    )


def thinking_budget(facts: Facts) -> Claim:
    """Accuracy rises with the thinking budget: Spearman correlation at least 0.95 over at least 8 budgets; the largest
    budget beats the smallest by at least 40 points (paired, lower end); the forced stop beats plain truncation (paired
    over items, all budgets together, lower end above 0); no reply thinks beyond its budget.
    """
    head = Head("The budget is a dial", "Rank correlation of thinking budget and accuracy", 0.95, "")
    table: list[dict[str, Any]] = sorted(lookup(facts, "eval_final/scores/budget") or [], key=lambda r: r["budget"])
    if len(table) < 2:
        return _open(head, ["eval_final/scores/budget"])
    rho = spearman([row["budget"] for row in table], [row["forced"]["value"] for row in table])
    span = percent(paired_difference(_verdicts(table[-1:], "forced"), _verdicts(table[:1], "forced")))
    forced = percent(paired_difference(_verdicts(table, "forced"), _verdicts(table, "truncated")))
    over = [row["budget"] for row in table if row["max_thinking_tokens"] > row["budget"]]
    kept = f"exceeded at {', '.join(map(str, over))}" if over else "kept by every reply"
    return _claim(
        head,
        Interval(rho, math.nan, math.nan),
        [
            Condition(
                f"rank correlation {number(rho)} over {len(table)} budgets, at least 8 wanted",
                rho >= head.target and len(table) >= 8,
            ),
            Condition(
                f"from {table[0]['budget']} to {table[-1]['budget']} tokens: {shown(span, 'points')}, "
                "at least 40 wanted",
                span.low >= 40,
            ),
            Condition(f"a forced stop against plain truncation: {shown(forced, 'points')}", forced.low > 0),
            Condition(f"the budget was {kept}", not over),
        ],
    )


def distillation(facts: Facts) -> Claim:
    """On-policy distillation beats RL on the same student at T = 1 on the step-by-step families: pass@1 and pass@8 both
    higher (paired, lower ends above 0), for at most a third of the floating-point operations (goal: a tenth)."""
    head = Head("Distilling beats RL on a small model", "Student at T = 1, pass@1: distillation minus RL", 0.0)
    pair = ("eval_student_opd/items/hot", "eval_student_rl/items/hot")
    absent = missing(facts, *pair, "student_opd/result/flops", "student_rl/result/flops")
    if absent:
        return _open(head, absent)
    k = min(8, samples_per_item(facts, *pair))
    first, any_of = difference(facts, *pair, HARD), pass_difference(facts, *pair, k, HARD)
    ratio = facts["student_opd"]["result"]["flops"] / facts["student_rl"]["result"]["flops"]
    goal = "reached" if ratio <= 0.1 else "not reached"
    remark = ""
    if not missing(facts, "eval_student_sft/items/hot"):
        remark = f"Both start from pass@1 {shown(level(rows(facts, 'eval_student_sft/items/hot', HARD)), '%')}."
    return _claim(
        head,
        first,
        [
            Condition(f"pass@1: {shown(first, 'points')}", first.low > head.target),
            Condition(f"pass@{k}: {shown(any_of, 'points')}", any_of.low > 0),
            Condition(f"{number(ratio)} of RL's operations, at most 1/3 allowed (goal 1/10 {goal})", ratio <= 1 / 3),
        ],
        remark,
    )


def pretraining(facts: Facts) -> Claim:
    """Each pre-training stage pays on held-out text, paired over windows, lower ends above 0: stage 2 lowers the bits
    per byte inside the short context; stage 3 lowers them beyond it, against the bare change of the RoPE base and
    against a control with the old base. Retrieval from afar gains at least 20 points over the model that stage 2 left
    (lower end of the difference, half widths of the Wilson intervals added in quadrature); what the bare change of base
    reaches without training is said beside it.
    """
    head = Head(
        "Each pre-training stage pays", "Fewer bits per byte after stage 2, inside the context", 0.0, "bits/byte"
    )
    early = missing(facts, "s1/result/bpb", "s2/result/bpb")
    measured = ("bpb", "probe", "before/bpb", "before/probe")
    late = missing(facts, *(f"s3/result/{part}" for part in measured), "s2/result/probe", "s3_old_base/result/bpb")
    if early:
        return _open(head, early + late)
    fall = _fall(facts, "s1/result/bpb", "s2/result/bpb", beyond=False)
    first = Condition(f"stage 2 saves {shown(fall, head.unit)} inside the short context", fall.low > 0)
    if late:
        return _open(head, late, fall, f"Shown: {first.text}.")
    untrained = _fall(facts, "s3/result/before/bpb", "s3/result/bpb", beyond=True)
    control = _fall(facts, "s3_old_base/result/bpb", "s3/result/bpb", beyond=True)
    probe = _probe_gain(facts)
    return _claim(
        head,
        fall,
        [
            first,
            Condition(
                f"beyond the old length stage 3 saves {shown(untrained)} against the bare change of base",
                untrained.low > 0,
            ),
            Condition(f"and {shown(control)} against training with the old base", control.low > 0),
            Condition(f"retrieval from afar: {shown(probe, 'points')}, at least 20 wanted", probe.low >= 20),
        ],
        f"Retrieval under the bare change of base: {shown(stored(lookup(facts, 's3/result/before/probe'), 100), '%')}.",
    )


def moe_balance(facts: Facts) -> Claim:
    """With the global balance loss no expert is dead, and experts specialise more by task family than under the
    micro-batch loss: mean total-variation distance between the families' routing, difference of the two arms above 0
    (lower end of the percentile interval over paired resamples of documents, where the arms have them)."""
    statement = "Distance between families' routing, global minus micro-batch"
    head = Head("Global balance lets experts specialise", statement, 0.0, "")
    absent = missing(facts, "moe_global/result/experts", "moe_micro/result/experts")
    if absent:
        return _open(head, absent)
    ours, theirs = (facts[stage]["result"]["experts"] for stage in ("moe_global", "moe_micro"))
    ours_tv, theirs_tv = (sum(arm["family_tv"]) / len(arm["family_tv"]) for arm in (ours, theirs))
    pairs = (ours.get("family_tv_samples") or [], theirs.get("family_tv_samples") or [])
    gain = Interval(ours_tv - theirs_tv, math.nan, math.nan)
    if pairs[0] and len(pairs[0]) == len(pairs[1]):
        gain = percentile_interval(gain.value, [a - b for a, b in zip(*pairs, strict=True)])
    judged = gain.value if math.isnan(gain.low) else gain.low
    return _claim(
        head,
        gain,
        [
            Condition(f"distance {number(ours_tv)} (global) against {number(theirs_tv)} (micro-batch)", judged > 0),
            Condition(f"dead experts with the global loss: {ours['dead']}", ours["dead"] == 0),
        ],
        f"Dead experts with the micro-batch loss: {theirs['dead']}.",
    )


def percentile_interval(value: float, samples: Sequence[float]) -> Interval:
    """The middle 95 % of resamples around an estimate (linear interpolation between ranks)."""
    ordered = sorted(samples)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = math.floor(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    return Interval(value, at(0.025), at(0.975))


def _mean_of(values: Sequence[Interval]) -> Interval:
    """Mean of independent estimates with normal intervals."""
    mean = sum(v.value for v in values) / len(values)
    half = math.sqrt(sum(((v.high - v.low) / 2) ** 2 for v in values)) / len(values)
    return Interval(mean, mean - half, mean + half)


def _verdicts(table: Sequence[dict[str, Any]], arm: str) -> Rows:
    """One row an item: its verdicts over the budgets of ``table``."""
    per_budget = [row[f"{arm}_items"] for row in table]
    return [[value for row in item for value in row] for item in zip(*per_budget, strict=True)]


def _fall(facts: Facts, before: str, after: str, beyond: bool) -> Interval:
    values = [window_values(lookup(facts, path), beyond) for path in (before, after)]
    return paired_difference(values[0], values[1])


def _probe_gain(facts: Facts) -> Interval:
    after, before = (stored(lookup(facts, f"{stage}/result/probe"), 100) for stage in ("s3", "s2"))
    half = math.hypot(after.high - after.low, before.high - before.low) / 2
    gain = after.value - before.value
    return Interval(gain, gain - half, gain + half)


def _claim(head: Head, effect: Interval, conditions: Sequence[Condition], remark: str = "") -> Claim:
    note = "; ".join(("met: " if c.met else "**not met**: ") + c.text for c in conditions) + "."
    return _filled(head, effect, f"{note} {remark}".strip(), holds=all(c.met for c in conditions), judged=True)


def _open(head: Head, absent: Sequence[str], effect: Interval | None = None, remark: str = "") -> Claim:
    stages = sorted({path.split("/")[0] for path in absent})
    advice = " The control arms are made with `--set controls=true`." if any(map(_is_control, stages)) else ""
    note = f"{remark} This run lacks {', '.join(f'`{name}`' for name in stages)}.{advice}".strip()
    return _filled(head, effect, note, holds=False, judged=False)


def _is_control(stage: str) -> bool:
    return any(stage == name or (name.endswith("_") and stage.startswith(name)) for name in CONTROLS)


def _filled(head: Head, effect: Interval | None, note: str, holds: bool, judged: bool) -> Claim:
    bounded = effect is not None and not math.isnan(effect.low)
    return Claim(
        name=head.name,
        statement=head.statement,
        value=effect.value if effect is not None else None,
        low=effect.low if effect is not None and bounded else None,
        high=effect.high if effect is not None and bounded else None,
        target=head.target,
        direction=head.direction,
        unit=head.unit,
        holds=holds,
        judged=judged,
        note=note,
    )
