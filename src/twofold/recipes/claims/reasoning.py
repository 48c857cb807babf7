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
    """On mixed signs, which have no traces, RL beats at equal operations more SFT at T = 0.6 and the cold start in
    greedy decoding, in each family by itself (paired, smallest lower ends above 0), and rejection-sampling SFT on the
    same queries over both families. It loses at most 5 points on the families as shown in text (lower end).

    The other comparison of each pair, T = 1, pass@8 of all arms and sizes beyond all training are shown, not judged.
    """
    case = Case(facts, RL_GAIN)
    pairs = {
        "more_sft": ("eval_rl/items/mixed", "eval_rl_more_sft/items/mixed"),
        "rejection": ("eval_rl/items/mixed", "eval_rl_rejection/items/mixed"),
        "greedy": ("eval_rl/items/mixed_greedy", "eval_cold_start/items/mixed_greedy"),
    }
    for name, pair in pairs.items():
        case.smallest_gain(f"worse_{name}" if name == "rejection" else name, *pair, SIGNED)
        case.gain(name if name == "rejection" else f"pooled_{name}", *pair, SIGNED)
    case.gain("forgetting", "eval_rl/items/think", "eval_cold_start/items/think", HARD)
    arms = {"start": "cold_start", "rl": "rl", "rejection": "rl_rejection", "more_sft": "rl_more_sft"}
    for name, stage in arms.items():
        path = f"eval_{stage}/items/mixed_hot"
        if name != "rl":
            case.gain(f"hot_{name}", "eval_rl/items/mixed_hot", path)
        if not missing(facts, path) and samples_per_item(facts, path) >= PASS_K:
            case.measure(f"pass_{name}", (path,), partial(pass_at_level, rows(facts, path), PASS_K))
    for name, other in (
        ("beyond", "cold_start"),
        ("beyond_rejection", "rl_rejection"),
        ("beyond_more_sft", "rl_more_sft"),
    ):
        case.gain(name, "eval_rl/items/beyond", f"eval_{other}/items/beyond", SIGNED)
    return case.claim()
