"""Claims about pre-training: that its later stages pay, and that global balance lets experts specialise between
task families.

Not here: thresholds (``declared``).
"""

from __future__ import annotations

from functools import partial
from math import hypot, nan
from statistics import fmean

from twofold.eval.stats import Interval, paired_difference
from twofold.recipes.claims.case import Case, Measured
from twofold.recipes.claims.declared import MOE_BALANCE, PRETRAINING
from twofold.recipes.evidence import Facts, fact, lookup, percentile_interval, stored, window_values
from twofold.report.model import Claim
from twofold.report.text import number

INSIDE, BETWEEN, BEYOND = (0, 256), (256, 512), (512, 1024)  # positions in a window, in tokens


def pretraining(facts: Facts) -> Claim:
    """Stage 2 beats stage 1 continued on tasks (paired, lower end above 0) and costs at most 0.3 bits per byte of text
    (paired over windows, upper end). Stage 3 saves bits at 512 to 1,024 tokens against training with the old base
    (lower end above 0), costs at most 0.02 bits per byte inside 256 (upper end), and retrieves more from afar than the
    old base (lower end above 0; half widths of the Wilson intervals added in quadrature). The positions between, and
    retrieval against stage 2, are shown."""
    case = Case(facts, PRETRAINING)
    case.gain("stage2_tasks", "student_base/result/tasks", "student_base_general/result/tasks")
    _bits(case, "stage2_text", "student_base", "student_base_general", INSIDE)
    _bits(case, "stage3_beyond", "s3_old_base", "s3", BEYOND)
    _bits(case, "stage3_between", "s3_old_base", "s3", BETWEEN)
    _bits(case, "stage3_inside", "s3", "s3_old_base", INSIDE)
    for name, other in (("retrieval", "s3_old_base"), ("retrieval_start", "s2")):
        probes = ("s3/result/probe", f"{other}/result/probe")
        case.measure(name, probes, partial(probe_gain, facts, *probes))
    return case.claim()


def moe_balance(facts: Facts) -> Claim:
    """Under the global balance loss no expert is dead, and task families are routed further apart than under the
    micro-batch loss: mean total-variation distance over layers, difference of the two arms above 0 (lower end of the
    percentile interval over paired resamples of documents, where the arms have them). Plain text does not count as a
    family there; the distance with it, the largest load of both and the loss on text are shown."""
    case = Case(facts, MOE_BALANCE)
    arms = ("moe_global/result/experts", "moe_micro/result/experts")
    for name, key in (("distance", "task_tv"), ("distance_text", "family_tv")):
        case.measure(name, [f"{arm}/{key}" for arm in arms], partial(distance_gain, facts, *arms, key))

    def dead() -> Measured:
        ours, theirs = (lookup(facts, f"{arm}/dead") for arm in arms)
        return fact(ours == 0), f"{ours} dead, under the micro-batch loss {theirs}"

    case.measure("dead", [f"{arm}/dead" for arm in arms], dead)
    for name, arm in zip(("load_global", "load_micro"), arms, strict=True):
        case.measure(name, (f"{arm}/load",), partial(largest_load, facts, arm))
    _bits(case, "text", "moe_global", "moe_micro", INSIDE)
    return case.claim()


def _bits(case: Case, name: str, more: str, fewer: str, span: tuple[int, int]) -> None:
    """Add bits per byte of one stage minus another's at some positions, paired over the same windows."""
    paths = (f"{more}/result/bpb", f"{fewer}/result/bpb")
    case.measure(name, paths, partial(more_bits, case.facts, *paths, span))


def more_bits(facts: Facts, more: str, fewer: str, span: tuple[int, int]) -> Interval | None:
    """Bits per byte of one model minus those of another over the same windows; None without these positions."""
    first, second = (window_values(lookup(facts, path), span) for path in (more, fewer))
    return None if first is None or second is None else paired_difference(first, second)


def probe_gain(facts: Facts, after: str, before: str) -> Interval:
    """Difference of two shares that were measured apart, in points."""
    first, second = (stored(lookup(facts, path), 100) for path in (after, before))
    half = hypot(first.high - first.low, second.high - second.low) / 2
    gain = first.value - second.value
    return Interval(gain, gain - half, gain + half)


def largest_load(facts: Facts, arm: str) -> Interval:
    """Load of the busiest expert of any layer; 1 is its fair share."""
    return Interval(max(share * len(layer) for layer in lookup(facts, f"{arm}/load") for share in layer), nan, nan)


def distance_gain(facts: Facts, ours: str, theirs: str, key: str) -> Measured | None:
    """Distance between families (``key``), mean over layers: one arm minus the other; None without two families."""
    layers = [lookup(facts, f"{arm}/{key}") for arm in (ours, theirs)]
    if not all(layers):
        return None
    means = [fmean(values) for values in layers]
    samples = [lookup(facts, f"{arm}/{key}_samples") or [] for arm in (ours, theirs)]
    gain = Interval(means[0] - means[1], nan, nan)
    if samples[0] and len(samples[0]) == len(samples[1]):
        gain = percentile_interval(gain.value, [a - b for a, b in zip(*samples, strict=True)])
    return gain, f"{number(means[0])} against {number(means[1])}"
