"""Claims about pre-training: that its later stages pay, and that global balance lets experts specialise.

Not here: thresholds (``declared``).
"""

from __future__ import annotations

import math
from functools import partial
from statistics import fmean

from twofold.eval.stats import Interval, paired_difference
from twofold.recipes.claims.case import Case, Measured
from twofold.recipes.claims.declared import MOE_BALANCE, PRETRAINING
from twofold.recipes.evidence import Facts, fact, lookup, percentile_interval, stored, window_values
from twofold.report.model import Claim
from twofold.report.text import number


def pretraining(facts: Facts) -> Claim:
    """Stage 2 beats stage 1 continued on tasks (paired, lower end above 0). Stage 3 saves bits beyond 256 tokens
    against training with the old base (paired over windows, lower end above 0), costs at most 0.02 bits per byte inside
    them (upper end), and retrieves from afar at least 20 points more than stage 2 left (lower end; half widths of the
    Wilson intervals added in quadrature). What stage 2 costs on text is shown."""
    case = Case(facts, PRETRAINING)
    case.gain("stage2_tasks", "student_base/result/tasks", "student_base_general/result/tasks")
    text = ("student_base/result/bpb", "student_base_general/result/bpb")
    case.measure("stage2_text", text, partial(more_bits, facts, *text, beyond=False))
    ours, old = "s3/result/bpb", "s3_old_base/result/bpb"
    case.measure("stage3_beyond", (ours, old), partial(more_bits, facts, old, ours, beyond=True))
    case.measure("stage3_inside", (ours, old), partial(more_bits, facts, ours, old, beyond=False))
    for name, other in (("retrieval", "s2"), ("retrieval_base", "s3_old_base")):
        probes = ("s3/result/probe", f"{other}/result/probe")
        case.measure(name, probes, partial(probe_gain, facts, *probes))
    return case.claim()


def moe_balance(facts: Facts) -> Claim:
    """Under the global balance loss no expert is dead, and task families are routed further apart than under the
    micro-batch loss: mean total-variation distance over layers, difference of the two arms above 0 (lower end of the
    percentile interval over paired resamples of documents, where the arms have them). Plain text does not count as a
    family; the loss on it is shown."""
    case = Case(facts, MOE_BALANCE)
    arms = ("moe_global/result/experts", "moe_micro/result/experts")
    case.measure("distance", [f"{arm}/task_tv" for arm in arms], partial(distance_gain, facts, *arms))

    def dead() -> Measured:
        ours, theirs = (lookup(facts, f"{arm}/dead") for arm in arms)
        return fact(ours == 0), f"{ours} dead, under the micro-batch loss {theirs}"

    case.measure("dead", [f"{arm}/dead" for arm in arms], dead)
    text = ("moe_global/result/bpb", "moe_micro/result/bpb")
    case.measure("text", text, partial(more_bits, facts, *text, beyond=False))
    return case.claim()


def more_bits(facts: Facts, more: str, fewer: str, beyond: bool) -> Interval:
    """Bits per byte of one model minus those of another over the same windows, inside the first span or beyond it."""
    values = [window_values(lookup(facts, path), beyond) for path in (more, fewer)]
    return paired_difference(values[0], values[1])


def probe_gain(facts: Facts, after: str, before: str) -> Interval:
    """Difference of two shares that were measured apart, in points."""
    first, second = (stored(lookup(facts, path), 100) for path in (after, before))
    half = math.hypot(first.high - first.low, second.high - second.low) / 2
    gain = first.value - second.value
    return Interval(gain, gain - half, gain + half)


def distance_gain(facts: Facts, ours: str, theirs: str) -> Measured | None:
    """Distance between task families, mean over layers: one arm minus the other; None without two task families."""
    layers = [lookup(facts, f"{arm}/task_tv") for arm in (ours, theirs)]
    if not all(layers):
        return None
    means = [fmean(values) for values in layers]
    samples = [lookup(facts, f"{arm}/task_tv_samples") or [] for arm in (ours, theirs)]
    gain = Interval(means[0] - means[1], math.nan, math.nan)
    if samples[0] and len(samples[0]) == len(samples[1]):
        gain = percentile_interval(gain.value, [a - b for a, b in zip(*samples, strict=True)])
    return gain, f"{number(means[0])} against {number(means[1])}"
