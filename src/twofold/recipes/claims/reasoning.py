"""Claims about reasoning: that thinking pays, and that RL with a verifier adds to it where no traces exist.

Not here: thresholds (``declared``).
"""

from __future__ import annotations

from functools import partial

from twofold.recipes.claims.case import Case, Measured
from twofold.recipes.claims.declared import RL_GAIN, THINKING_GAIN
from twofold.recipes.evidence import (
    HARD,
    SIGNED,
    Facts,
    fact,
    lookup,
    missing,
    pass_at_level,
    rows,
    samples_per_item,
)
from twofold.report.model import Claim
from twofold.report.text import amount

PASS_K = 8


def thinking_gain(facts: Facts) -> Claim:
    """Thinking minus direct on the step-by-step families is at least 30 points, twice (paired, lower ends).

    Once after the cold start against a control that was trained on direct answers alone with at least as many tokens,
    once in the finished model against its own hard switch.
    """
    case = Case(facts, THINKING_GAIN)
    case.gain("control", "eval_cold_start/items/think", "eval_direct/items/direct", HARD)
    case.gain("own_switch", "eval_final/items/think", "eval_final/items/direct", HARD)
    counts = ("direct/result/tokens", "cold_start/result/tokens")

    def tokens() -> Measured:
        theirs, ours = (lookup(facts, path) for path in counts)
        return fact(theirs >= ours), f"{amount(theirs)} against {amount(ours)}"

    case.measure("tokens", counts, tokens)
    return case.claim()


def rl_gain(facts: Facts) -> Claim:
    """On sizes without traces RL beats, at equal operations, more SFT and rejection-sampling SFT at T = 0.6, and the
    cold start in greedy decoding (paired, lower ends above 0).

    T = 1, pass@8 of all arms, sizes beyond all training and families as shown in text are shown, not judged.
    """
    case = Case(facts, RL_GAIN)
    for name, other in (("more_sft", "rl_more_sft"), ("rejection", "rl_rejection")):
        case.gain(name, "eval_rl/items/mixed", f"eval_{other}/items/mixed", SIGNED)
    case.gain("greedy", "eval_rl/items/mixed_greedy", "eval_cold_start/items/mixed_greedy", SIGNED)
    arms = {"start": "cold_start", "rl": "rl", "rejection": "rl_rejection", "more_sft": "rl_more_sft"}
    for name, stage in arms.items():
        path = f"eval_{stage}/items/mixed_hot"
        if name != "rl":
            case.gain(f"hot_{name}", "eval_rl/items/mixed_hot", path)
        if not missing(facts, path) and samples_per_item(facts, path) >= PASS_K:
            case.measure(f"pass_{name}", (path,), partial(pass_at_level, rows(facts, path), PASS_K))
    case.gain("beyond", "eval_rl/items/beyond", "eval_cold_start/items/beyond")
    case.gain("beyond_rejection", "eval_rl/items/beyond", "eval_rl_rejection/items/beyond")
    case.gain("short", "eval_rl/items/think", "eval_cold_start/items/think", HARD)
    return case.claim()
