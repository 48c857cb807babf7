from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twofold.base.records import InputError
from twofold.recipes import claims
from twofold.recipes.claims import judge, percentile_interval
from twofold.recipes.evidence import HARD
from twofold.report.model import Claim

Facts = dict[str, dict[str, Any]]
Break = Callable[[Facts, SimpleNamespace], None]
RULES = {rule.__name__: rule for rule in (
    claims.thinking_gain, claims.both_modes, claims.rl_gain, claims.mode_following, claims.general_rl,
    claims.thinking_budget, claims.distillation, claims.pretraining, claims.moe_balance,
)}  # fmt: skip
CONTROL_ARMS = ("direct", "s3_old_base", "student", "eval_direct", "eval_student", "moe")


def test_all_nine_hold(facts: Facts) -> None:
    judged = judge(facts)
    assert [claim.verdict for claim in judged] == ["holds"] * 9
    assert len({claim.name for claim in judged}) == 9
    for claim in judged:
        assert "not met" not in claim.note and claim.value is not None and claim.target is not None
        if claim.low is not None and claim.high is not None:
            assert claim.low <= claim.value <= claim.high


def battery_of(stage: str, *figures: float, **named: float) -> Break:
    def change(facts: Facts, make: SimpleNamespace) -> None:
        facts[stage]["items"] |= make.battery(*figures, **named)

    return change


def untaught(share: float) -> Break:
    def change(facts: Facts, make: SimpleNamespace) -> None:
        facts["eval_final"]["items"]["general"] = make.general(share)

    return change


def bpb_of(stage: str, *levels: float) -> Break:
    def change(facts: Facts, make: SimpleNamespace) -> None:
        facts[stage]["result"]["bpb"] = make.bpb(*levels)

    return change


def result_of(stage: str, key: str, value: Any) -> Break:
    def change(facts: Facts, make: SimpleNamespace) -> None:
        facts[stage]["result"][key] = value(make) if callable(value) else value

    return change


def unfollowed(facts: Facts, make: SimpleNamespace) -> None:
    followed = dict.fromkeys(make.modes, 1.0) | {"mode: /no_think": 0.8}
    facts["eval_final"]["items"]["modes"] = make.part(dict.fromkeys(make.modes, 0.8), followed=followed)


def budget_rows(change: Callable[[list[dict[str, Any]]], object]) -> Break:
    def apply(facts: Facts, make: SimpleNamespace) -> None:
        change(facts["eval_final"]["scores"]["budget"])

    return apply


def forced_never_better(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        row["truncated_items"] = row["forced_items"]


def small_span(rows: list[dict[str, Any]]) -> None:
    rows[0]["forced_items"] = [[1.0] for _ in rows[0]["forced_items"]]


def swap_two(rows: list[dict[str, Any]]) -> None:
    rows[0]["forced"], rows[3]["forced"] = rows[3]["forced"], rows[0]["forced"]


def overrun(rows: list[dict[str, Any]]) -> None:
    rows[2]["max_thinking_tokens"] = rows[2]["budget"] + 1


def few_pass(facts: Facts, make: SimpleNamespace) -> None:
    """pass@1 of RL stays below, but RL solves every item at least once."""
    rows = facts["eval_student_rl"]["items"]["hot"]["correct"]
    facts["eval_student_rl"]["items"]["hot"]["correct"] = [[1.0] + [0.0] * (len(row) - 1) for row in rows]


BROKEN: list[tuple[str, str, Break]] = [
    ("thinking_gain", "direct-only control", battery_of("eval_direct", 0.1, 0.5)),
    ("thinking_gain", "own hard switch", battery_of("eval_final", 0.83, 0.6)),
    ("thinking_gain", "as many tokens", result_of("direct", "tokens", 299_999)),
    ("both_modes", "thinking: ", battery_of("eval_final", 0.7, 0.12)),
    ("both_modes", "`max` under", battery_of("eval_final", 0.83, 0.12, easy=0.6)),
    ("both_modes", "fusion cost", battery_of("eval_fusion", 0.75, 0.1)),
    ("rl_gain", "at T = 0.6", battery_of("eval_rl", 0.66, 0.1, 0.75)),
    ("rl_gain", "at T = 1", battery_of("eval_rl", 0.84, 0.1, 0.5)),
    ("mode_following", "conversations", unfollowed),
    ("general_rl", "mean gain", untaught(0.4)),
    ("general_rl", "thinking lost", battery_of("eval_final", 0.76, 0.12)),
    ("thinking_budget", "over 7 budgets", budget_rows(lambda rows: rows.pop())),
    ("thinking_budget", "rank correlation", budget_rows(swap_two)),
    ("thinking_budget", "from 0 to 64", budget_rows(small_span)),
    ("thinking_budget", "plain truncation", budget_rows(forced_never_better)),
    ("thinking_budget", "exceeded at 8", budget_rows(overrun)),
    ("distillation", "pass@1", battery_of("eval_student_opd", 0.5, 0.1, 0.08)),
    ("distillation", "pass@8", few_pass),
    ("distillation", "operations", result_of("student_opd", "flops", 2e12)),
    ("pretraining", "stage 2 saves", bpb_of("s2", 2.5, 2.2, 2.35)),
    ("pretraining", "bare change", bpb_of("s3", 2.08, 2.3, 2.4)),
    ("pretraining", "old base", bpb_of("s3_old_base", 2.08, 1.9, 1.9)),
    ("pretraining", "retrieval", result_of("s2", "probe", lambda make: make.interval(0.64))),
    ("moe_balance", "distance", result_of("moe_micro", "experts", lambda make: make.experts(0.7, 0))),
    ("moe_balance", "dead experts with the global", result_of("moe_global", "experts", lambda m: m.experts(0.55, 1))),
]


@pytest.mark.parametrize(("rule", "words", "change"), BROKEN, ids=[f"{rule}-{words}" for rule, words, _ in BROKEN])
def test_each_condition_can_fail_a_claim(
    facts: Facts, make: SimpleNamespace, rule: str, words: str, change: Break
) -> None:
    change(facts, make)
    claim: Claim = RULES[rule](facts)
    assert claim.verdict == "does not hold"
    failing = [text for text in claim.note.split("; ") if "**not met**" in text]
    assert any(words in text for text in failing), claim.note


def test_absent_control_arms_are_not_judged_and_named(facts: Facts) -> None:
    for name in [name for name in facts if name.startswith(CONTROL_ARMS)]:
        del facts[name]
    verdicts = {claim.name: claim for claim in judge(facts)}
    assert sorted(claim.verdict for claim in verdicts.values()) == ["holds"] * 5 + ["not judged"] * 4
    thinking = verdicts["Thinking pays"]
    assert not thinking.judged and thinking.value == pytest.approx(70.0) and "own hard switch" in thinking.note
    assert "`direct`, `eval_direct`" in thinking.note and "--set controls=true" in thinking.note
    assert verdicts["Each pre-training stage pays"].value == pytest.approx(0.3)


def test_a_run_without_anything_is_no_error() -> None:
    judged = judge({})
    assert {claim.verdict for claim in judged} == {"not judged"} and len(judged) == 9
    assert all(claim.value is None for claim in judged)


@pytest.mark.parametrize("stage", ["eval_final", "eval_rl", "eval_fusion", "s3", "s1"])
def test_any_absent_main_stage_is_no_error(facts: Facts, stage: str) -> None:
    del facts[stage]
    open_ = [claim for claim in judge(facts) if not claim.judged]
    assert open_ and all(f"`{stage}`" in claim.note and "--set" not in claim.note for claim in open_)


def test_rl_says_what_it_did_not_raise(facts: Facts, make: SimpleNamespace) -> None:
    facts["eval_rl"]["items"]["greedy"] = facts["eval_cold_start"]["items"]["greedy"]
    assert "RL did not raise greedy accuracy beyond doubt." in claims.rl_gain(facts).note
    assert claims.rl_gain(facts).holds


def test_fewer_samples_are_called_by_their_number(facts: Facts) -> None:
    hot = facts["eval_student_rl"]["items"]["hot"]
    hot["correct"] = [row[:4] for row in hot["correct"]]
    note = claims.distillation(facts).note
    assert "pass@4" in note and "pass@8" not in note


def test_different_items_are_refused(facts: Facts) -> None:
    facts["eval_rl"]["items"]["think"]["kinds"].reverse()
    with pytest.raises(InputError, match=r"eval_rl and eval_cold_start were measured on different items.*--redo"):
        claims.rl_gain(facts)


def test_moe_without_resamples_is_judged_on_the_estimate(facts: Facts) -> None:
    del facts["moe_micro"]["result"]["experts"]["family_tv_samples"]
    claim = claims.moe_balance(facts)
    assert claim.holds and claim.low is None and claim.value == pytest.approx(0.21)


def test_families_are_those_that_need_steps() -> None:
    assert HARD == ("sum", "let", "swap")


@settings(max_examples=50)
@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=60))
def test_percentiles_lie_in_the_samples(samples: list[float]) -> None:
    value = percentile_interval(0.0, samples)
    assert min(samples) <= value.low <= value.high <= max(samples)
    assert percentile_interval(0.0, samples[::-1]) == value


def test_claims_do_without_torch() -> None:
    code = "import sys, twofold.recipes.claims; sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
