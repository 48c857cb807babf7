"""Planted differences between arms: each kind is refused unless the protocol declares it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from twofold.recipes.claims import judge
from twofold.recipes.claims.case import Case
from twofold.recipes.claims.declared import DISTILLATION, PROTOCOLS, RL_GAIN
from twofold.recipes.claims.fairness import alike, differences, unequal, what_it_saw
from twofold.report.model import Claim

Facts = dict[str, dict[str, Any]]
Plant = Callable[[dict[str, Any]], None]


def more_forms(saw: dict[str, Any]) -> None:
    saw["forms"]["three flags"] = 50


def more_operations(saw: dict[str, Any]) -> None:
    saw["flops"] *= 1.2


def other_labels(saw: dict[str, Any]) -> None:
    saw["labels"] = "the answer key"


def more_tuning(saw: dict[str, Any]) -> None:
    saw["tuned"].append(8e-3)


def more_tokens(saw: dict[str, Any]) -> None:
    saw["trained_tokens"] *= 1.2


# kind, claim, arm, what is planted in it, what is said
PLANTED: list[tuple[Any, str, str, Plant, str]] = [
    ("forms", "distillation", "student_rl", more_forms, "`student_rl` alone saw three flags."),
    ("flops", "distillation", "student_rl", more_operations, "`student_opd` had 1.5 T operations, `student_rl` 1.8 T."),
    ("labels", "thinking_budget", "uncut", other_labels, "solver answers, `uncut` from the answer key."),
    ("tuning", "rl_gain", "rl_more_sft", more_tuning, "`rl` had 3 settings tried, `rl_more_sft` 4."),
    ("tokens", "thinking_budget", "uncut", more_tokens, "`fusion` had 500 k tokens, `uncut` 592 k."),
]
KINDS = [kind for kind, *_ in PLANTED]


def claim_of(facts: Facts, key: str) -> Claim:
    return next(claim for claim in judge(facts) if claim.key == key)


@pytest.mark.parametrize(("kind", "key", "stage", "plant", "said"), PLANTED, ids=KINDS)
def test_a_planted_difference_refuses_the_claim(
    facts: Facts, kind: Any, key: str, stage: str, plant: Plant, said: str
) -> None:
    plant(facts[stage]["result"]["saw"])
    claim = claim_of(facts, key)
    assert not claim.judged and not claim.holds and claim.verdict == "not judged"
    assert claim.note.startswith("**Refused**") and said in claim.note.replace("\u00a0", " ")
    assert all(part.value is not None for part in claim.conditions), "the figures are shown all the same"
    assert sum(not other.judged for other in judge(facts)) == 1


@pytest.mark.parametrize(("kind", "key", "stage", "plant", "said"), PLANTED, ids=KINDS)
def test_a_declared_difference_passes(facts: Facts, kind: Any, key: str, stage: str, plant: Plant, said: str) -> None:
    plant(facts[stage]["result"]["saw"])
    strict = PROTOCOLS[key]
    assert len(unequal(facts, strict)) == 1
    allowed = {pair: {**strict.allowed_differences.get(pair, {}), kind: "a reason"} for pair in strict.comparisons}
    assert unequal(facts, replace(strict, allowed_differences=allowed)) == []


def test_the_audit_of_distillation_would_have_been_refused(facts: Facts) -> None:
    """RL that trained with /think alone, against distillation with and without the flag."""
    facts["student_rl"]["result"]["saw"]["forms"] = {"/think": 3000}
    (problem,) = unequal(facts, DISTILLATION)
    assert problem == "Prompt forms differ: `student_opd` alone saw no flag."
    assert not claim_of(facts, "distillation").judged


def test_the_made_up_run_is_fair_and_differs_as_declared(facts: Facts) -> None:
    for protocol in PROTOCOLS.values():
        assert unequal(facts, protocol) == []
    pair = ("rl", "rl_more_sft")
    found = differences(pair, *(what_it_saw(facts, stage) for stage in pair))
    assert set(found) == {"labels", "tokens"} == set(RL_GAIN.allowed_differences[pair])


@pytest.mark.parametrize("field", ["saw", "forms", "labels", "trained_tokens", "flops", "tuned"])
def test_an_arm_that_does_not_say_what_it_saw_is_refused(facts: Facts, field: str) -> None:
    result = facts["student_rl"]["result"]
    del (result if field == "saw" else result["saw"])[field]
    claim = claim_of(facts, "distillation")
    assert not claim.judged and "`student_rl` does not say what it saw." in claim.note


@pytest.mark.parametrize(("key", "stage"), [("pretraining", "s3_old_base"), ("moe_balance", "moe_micro")])
def test_pretraining_arms_are_compared_by_sources_and_tokens(facts: Facts, key: str, stage: str) -> None:
    facts[stage]["result"]["tokens_by_source"]["gym"] = 1000
    assert "alone saw gym" in claim_of(facts, key).note
    del facts[stage]["result"]["tokens_by_source"]
    assert f"`{stage}` does not say what it saw." in claim_of(facts, key).note


def test_arms_that_did_not_run_are_no_difference(facts: Facts) -> None:
    del facts["rl_more_sft"]
    assert unequal(facts, RL_GAIN) == [] and unequal({}, RL_GAIN) == []


def test_a_form_without_queries_is_no_form() -> None:
    base = {"labels": "x", "trained_tokens": 100, "flops": 1.0, "tuned": []}
    assert differences(("a", "b"), base | {"forms": {"u": 3, "v": 0}}, base | {"forms": {"u": 9}}) == {}


def test_a_tenth_is_the_tolerance() -> None:
    assert alike(100, 110) and alike(110, 100) and not alike(100, 111) and alike(0, 0) and not alike(0, 1)
    assert alike(100, 105, 110) and not alike(95, 105, 110)


def test_a_refused_case_says_so_beside_what_is_lacking(facts: Facts) -> None:
    facts["uncut"]["result"]["saw"]["labels"] = "other"
    note = Case(facts, PROTOCOLS["thinking_budget"]).claim().note
    assert note.startswith("**Refused**, the arms were not equal: `fusion` learnt from")
