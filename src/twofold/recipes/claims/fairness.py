"""Whether the arms that a claim compares were equal but for what the claim is about.

Compared is what each arm's result says that it saw (``saw``): the forms of its prompts, its tokens, its operations,
what told it right from wrong, and how many settings were tried for it. A difference that the protocol does not declare
refuses the claim: a comparison that an opponent could explain otherwise shows nothing. Not here: which differences are
allowed (``declared``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from twofold.recipes.claims.record import Difference, Protocol
from twofold.recipes.evidence import Facts
from twofold.report.text import amount

TOLERANCE = 0.10  # by which tokens and operations of equal arms may differ
_FIELDS = ("forms", "labels", "trained_tokens", "flops", "tuned")


def unequal(facts: Facts, protocol: Protocol) -> list[str]:
    """A sentence for every difference between compared arms that the protocol does not allow; arms not run are left
    out."""
    problems = []
    for pair in protocol.comparisons:
        if not all(stage in facts for stage in pair):
            continue
        seen = {stage: what_it_saw(facts, stage) for stage in pair}
        silent = [stage for stage in pair if any(field not in seen[stage] for field in _FIELDS)]
        problems += [f"`{stage}` does not say what it saw." for stage in silent]
        if not silent:
            allowed = protocol.allowed_differences.get(pair, {})
            found = differences(pair, seen[pair[0]], seen[pair[1]])
            problems += [text for kind, text in found.items() if kind not in allowed]
    return list(dict.fromkeys(problems))


def what_it_saw(facts: Facts, stage: str) -> Mapping[str, Any]:
    """``saw`` of a stage's result; of a pre-training stage, which has no labels or prompts, its sources and tokens."""
    result = facts.get(stage, {}).get("result", {})
    if "saw" in result:
        return dict(result["saw"])
    if "tokens_by_source" not in result or "flops" not in result:
        return {}
    return {
        "forms": result["tokens_by_source"],
        "labels": "text",
        "trained_tokens": result["tokens"],
        "generated_tokens": 0,
        "flops": result["flops"],
        "tuned": result.get("tuned", []),
        "train_reward": None,
    }


def differences(pair: tuple[str, str], a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[Difference, str]:
    """Every way in which two arms differ, as a sentence."""
    first, second = (f"`{stage}`" for stage in pair)
    found: dict[Difference, str] = {}
    forms = [sorted(name for name, count in side["forms"].items() if count) for side in (a, b)]
    if forms[0] != forms[1]:
        alone = [", ".join(sorted(set(one) - set(other))) for one, other in (forms, forms[::-1])]
        said = [f"{name} alone saw {only}" for name, only in zip((first, second), alone, strict=True) if only]
        found["forms"] = f"Prompt forms differ: {'; '.join(said)}."
    tokens = [side["trained_tokens"] + side.get("generated_tokens", 0) for side in (a, b)]
    if not alike(*tokens):
        found["tokens"] = f"{first} had {amount(tokens[0])} tokens, {second} {amount(tokens[1])}."
    if not alike(a["flops"], b["flops"]):
        found["flops"] = f"{first} had {amount(a['flops'])} operations, {second} {amount(b['flops'])}."
    if a["labels"] != b["labels"]:
        found["labels"] = f"{first} learnt from {a['labels']}, {second} from {b['labels']}."
    if len(a["tuned"]) != len(b["tuned"]):
        found["tuning"] = f"{first} had {len(a['tuned'])} settings tried, {second} {len(b['tuned'])}."
    return found


def alike(*amounts: float) -> bool:
    """Whether the largest amount is at most a tenth above the smallest."""
    return max(amounts) <= (1 + TOLERANCE) * min(amounts)
