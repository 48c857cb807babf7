"""The claim about distillation: a student against RL and against more SFT, equal in prompt forms and operations.

Not here: thresholds (``declared``).
"""

from __future__ import annotations

from functools import partial

from twofold.eval.stats import Interval
from twofold.recipes.claims.case import Case, Measured
from twofold.recipes.claims.declared import DISTILLATION
from twofold.recipes.claims.fairness import alike
from twofold.recipes.evidence import Facts, difference, fact, lookup, mean_of, pass_difference, samples_per_item
from twofold.report.model import Claim
from twofold.report.text import number

PASS_K = 8
# Families as shown in text, mixed signs, and mixed signs with /think: each counts a third.
PARTS = ("hot", "mixed_hot", "mixed_flag")
ARMS = ("student_opd", "student_rl", "student_more_sft")


def distillation(facts: Facts) -> Claim:
    """On-policy distillation beats RL and more SFT on the teacher's texts at T = 1, mean of three parts: pass@1 against
    both, pass@8 against RL (paired, lower ends above 0), with the operations of the three within 10 %. T = 0.6 on mixed
    signs is shown."""
    case = Case(facts, DISTILLATION)
    for name, other in (("over_rl", "student_rl"), ("over_sft", "student_more_sft"), ("start", "student_sft")):
        case.measure(name, _paths("student_opd", other), partial(mean_gain, facts, other))
    for name, other in (("pass_k", "student_rl"), ("pass_k_sft", "student_more_sft")):
        case.measure(name, _paths("student_opd", other), partial(mean_pass_gain, facts, other))
    for name, part in (("no_flag_pure", "hot"), ("no_flag_mixed", "mixed_hot"), ("flag_mixed", "mixed_flag")):
        case.gain(name, f"eval_student_opd/items/{part}", f"eval_student_rl/items/{part}")
    for name, other in (("cool_rl", "student_rl"), ("cool_sft", "student_more_sft")):
        case.gain(name, *_pair("student_opd", other, "mixed"))
    counts = [f"{arm}/result/flops" for arm in ARMS]

    def operations() -> Measured:
        spent = [lookup(facts, path) for path in counts]
        return fact(alike(*spent)), f"{', '.join(number(value / 1e12) for value in spent)} TFLOP"

    case.measure("operations", counts, operations)
    return case.claim()


def mean_gain(facts: Facts, other: str) -> Interval:
    """Distillation minus another arm in points: the mean of the parts' paired differences."""
    return mean_of([difference(facts, *_pair("student_opd", other, part)) for part in PARTS], same_items=True)


def mean_pass_gain(facts: Facts, other: str) -> Interval | None:
    """The same for pass@8; None where an item has fewer samples."""
    if samples_per_item(facts, *_paths("student_opd", other)) < PASS_K:
        return None
    gains = [pass_difference(facts, *_pair("student_opd", other, part), PASS_K) for part in PARTS]
    return mean_of(gains, same_items=True)


def _pair(a: str, b: str, part: str) -> tuple[str, str]:
    return f"eval_{a}/items/{part}", f"eval_{b}/items/{part}"


def _paths(a: str, b: str) -> list[str]:
    return [path for part in PARTS for path in _pair(a, b, part)]
