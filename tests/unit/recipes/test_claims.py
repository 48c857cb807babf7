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
from twofold.recipes import general as general_stage
from twofold.recipes.claims import general, judge, modes, pretrained, reasoning, students
from twofold.recipes.claims.declared import PROTOCOLS
from twofold.recipes.evidence import EASY, HARD, HELD_OUT_KINDS, SIGNED, SKILLS, mean_of, percentile_interval
from twofold.report.model import Claim

Facts = dict[str, dict[str, Any]]
Break = Callable[[Facts, SimpleNamespace], None]
RULES = {rule.__name__: rule for rule in (
    reasoning.thinking_gain, modes.both_modes, reasoning.rl_gain, modes.mode_following, general.general_rl,
    modes.thinking_budget, students.distillation, pretrained.pretraining, pretrained.moe_balance,
)}  # fmt: skip
MAIN = (
    *("data", "s1", "s2", "s3", "cold_start", "eval_cold_start", "rl", "eval_rl", "fusion", "eval_fusion"),
    *("general_rl", "eval_final"),
)


def condition(claim: Claim, name: str) -> Any:
    return next(part for part in (*claim.conditions, *claim.shown) if part.name == name)


def test_all_nine_hold(facts: Facts) -> None:
    judged = judge(facts)
    assert {claim.key: claim.verdict for claim in judged} == dict.fromkeys(PROTOCOLS, "holds in this run")
    for claim in judged:
        assert claim.note == "" and all(part.met for part in claim.conditions)
        assert (claim.value, claim.low) == (claim.conditions[0].value, claim.conditions[0].low)
        for part in (*claim.conditions, *claim.shown):
            assert part.value is not None
            if part.low is not None and part.high is not None:
                assert part.low <= part.value <= part.high


def test_every_rule_and_figure_of_the_protocols_is_measured(facts: Facts) -> None:
    for claim in judge(facts):
        protocol = PROTOCOLS[claim.key]
        assert [part.name for part in claim.conditions] == [rule.name for rule in protocol.rules]
        assert [part.name for part in claim.shown] == [extra.name for extra in protocol.shown]


def items_of(stage: str, name: str, build: Callable[[SimpleNamespace], Any]) -> Break:
    def change(facts: Facts, make: SimpleNamespace) -> None:
        facts[stage]["items"] |= {name: build(make)} if name else build(make)

    return change


def result_of(stage: str, key: str, build: Callable[[SimpleNamespace], Any]) -> Break:
    def change(facts: Facts, make: SimpleNamespace) -> None:
        facts[stage]["result"][key] = build(make)

    return change


def budget_of(stage: str, **shares: float) -> Break:
    def change(facts: Facts, make: SimpleNamespace) -> None:
        facts[stage]["scores"]["budget"] = make.budget_rows(**shares)

    return change


def overrun(facts: Facts, make: SimpleNamespace) -> None:
    facts["eval_final"]["scores"]["budget"][2]["thinking_tokens"][5] = 9


def one_of_eight(facts: Facts, make: SimpleNamespace) -> None:
    """RL solves every item once in eight: pass@1 stays below distillation, pass@8 does not."""
    for name in students.PARTS:
        part = facts["eval_student_rl"]["items"][name]
        part["correct"] = [[1.0] + [0.0] * 7 for _ in part["correct"]]


def costly(facts: Facts, make: SimpleNamespace) -> None:
    facts["student_opd"]["result"]["flops"] *= 1.2


def one_bad(kinds: tuple[str, ...], share: float, name: str, **more: int) -> Break:
    """The last family alone is bad; the mean stays high."""
    shares = dict.fromkeys((*HARD, *EASY), 0.95) | {kinds[-1]: share}
    return items_of("eval_final", name, lambda make: make.part(shares, **more))


def one_level(stage: str, name: str, level: float, other: float, **more: int) -> Break:
    """An opponent is level with RL in one family of two, and far below it in the other: pooled, RL still gains."""
    shares = dict.fromkeys(SIGNED, other) | {SIGNED[-1]: level}
    return items_of(stage, name, lambda make: make.part(shares, **more))


def held_out_at(share: float) -> dict[str, float]:
    return {kind.replace(" ", "_"): share for kind in HELD_OUT_KINDS}


HARD_KINDS, EASY_KINDS = tuple(HARD), tuple(EASY)
BROKEN: list[tuple[str, str, Break]] = [
    ("thinking_gain", "control", items_of("eval_direct", "direct", lambda m: m.part(m.short(0.5)))),
    ("thinking_gain", "own_switch", items_of("eval_final", "direct", lambda m: m.part(m.short(0.6)))),
    ("thinking_gain", "tokens", result_of("direct", "tokens", lambda m: 299_999)),
    ("both_modes", "thinking", one_bad(HARD_KINDS, 0.7, "think", samples=2)),
    ("both_modes", "direct", one_bad(EASY_KINDS, 0.7, "no_think")),
    ("both_modes", "fusion_cost", items_of("eval_think_only", "", lambda m: m.core(0.93))),
    ("both_modes", "fusion_cost_mixed", items_of("eval_think_only", "", lambda m: m.mixed(0.88, 0.8, 0.8))),
    ("rl_gain", "more_sft", one_level("eval_rl_more_sft", "mixed", 0.8, 0.1, samples=2)),
    ("rl_gain", "rejection", one_level("eval_rl_rejection", "mixed", 0.85, 0.85, samples=2)),
    ("rl_gain", "greedy", one_level("eval_cold_start", "mixed_greedy", 0.82, 0.1)),
    ("rl_gain", "forgetting", items_of("eval_rl", "think", lambda m: m.part(m.short(0.6), samples=2))),
    ("mode_following", "worst", items_of("eval_final", "modes", lambda m: m.modes(**{"mode:_three_flags": 0.8}))),
    ("mode_following", "held_out", items_of("eval_final", "modes", lambda m: m.modes(**{"mode:_three_turns": 0.7}))),
    ("mode_following", "held_out_mean", items_of("eval_final", "modes", lambda m: m.modes(**held_out_at(0.88)))),
    ("general_rl", "gain", items_of("eval_final", "general", lambda m: m.general(0.2, 0.8))),
    ("general_rl", "absent", items_of("eval_fusion", "general", lambda m: m.general(0.2, 0.2))),
    ("general_rl", "smallest", items_of("eval_final", "general", lambda m: m.general(0.6, 0.8, order_back=1 / 24))),
    ("general_rl", "sft_24", items_of("eval_general_sft_24", "general", lambda m: m.general(0.6, 0.2))),
    ("general_rl", "thinking", items_of("eval_final", "think", lambda m: m.part(m.short(0.8), samples=2))),
    ("general_rl", "tool", items_of("eval_final", "general", lambda m: m.general(0.6, 0.5))),
    ("thinking_budget", "over_none", budget_of("eval_final", none=0.7)),
    ("thinking_budget", "over_chance", budget_of("eval_final", partial=0.25, none=0.1)),
    ("thinking_budget", "over_uncut", budget_of("eval_uncut", partial=0.6)),
    ("thinking_budget", "kept", overrun),
    ("distillation", "over_rl", items_of("eval_student_rl", "", lambda m: m.student(0.7))),
    ("distillation", "over_sft", items_of("eval_student_more_sft", "", lambda m: m.student(0.7))),
    ("distillation", "pass_k", one_of_eight),
    ("distillation", "operations", costly),
    ("pretraining", "stage2_tasks", result_of("student_base_general", "tasks", lambda m: m.part(m.short(0.6)))),
    ("pretraining", "stage3_beyond", result_of("s3_old_base", "bpb", lambda m: m.bpb(2.08, 2.3, 2.0))),
    ("pretraining", "stage3_inside", result_of("s3_old_base", "bpb", lambda m: m.bpb(2.05, 2.05, 2.1))),
    ("pretraining", "stage2_text", result_of("student_base", "bpb", lambda m: m.bpb(2.71, 2.6, 2.7))),
    ("pretraining", "retrieval", result_of("s3_old_base", "probe", lambda m: m.interval(0.8))),
    ("moe_balance", "distance", result_of("moe_micro", "experts", lambda m: m.experts(0.6, 0))),
    ("moe_balance", "dead", result_of("moe_global", "experts", lambda m: m.experts(0.55, 1))),
]


def test_every_condition_is_broken_below() -> None:
    names = {(key, rule.name) for key, protocol in PROTOCOLS.items() for rule in protocol.rules}
    assert {(key, name) for key, name, _ in BROKEN} == names


@pytest.mark.parametrize(("key", "name", "change"), BROKEN, ids=[f"{key}-{name}" for key, name, _ in BROKEN])
def test_each_condition_can_fail_a_claim(
    facts: Facts, make: SimpleNamespace, key: str, name: str, change: Break
) -> None:
    change(facts, make)
    claim: Claim = RULES[key](facts)
    assert claim.judged, claim.note
    assert claim.verdict == "does not hold in this run"
    assert not condition(claim, name).met
    assert sum(not part.met for part in claim.conditions) <= 2


def test_absent_control_arms_are_not_judged_and_named(facts: Facts) -> None:
    for name in [name for name in facts if name not in MAIN]:
        del facts[name]
    verdicts = {claim.key: claim for claim in judge(facts)}
    assert {key for key, claim in verdicts.items() if claim.judged} == {"mode_following"}
    thinking = verdicts["thinking_gain"]
    assert thinking.value is None and condition(thinking, "own_switch").value == pytest.approx(71.7, abs=0.1)
    assert "`direct`, `eval_direct`" in thinking.note and "--set controls=true" in thinking.note
    assert condition(verdicts["rl_gain"], "greedy").met and condition(verdicts["general_rl"], "gain").met


def test_a_run_without_anything_is_no_error() -> None:
    judged = judge({})
    assert {claim.verdict for claim in judged} == {"not judged"} and len(judged) == 9
    assert all(claim.value is None for claim in judged)


@pytest.mark.parametrize("stage", ["eval_final", "eval_rl", "eval_fusion", "s3", "eval_direct", "moe_micro"])
def test_any_absent_stage_is_no_error(facts: Facts, stage: str) -> None:
    del facts[stage]
    open_ = [claim for claim in judge(facts) if not claim.judged]
    assert open_ and all(f"`{stage}`" in claim.note for claim in open_)
    assert all(("--set" in claim.note) == (stage not in MAIN) for claim in open_)


def test_a_part_that_a_stage_lacks_is_named(facts: Facts) -> None:
    del facts["eval_rl"]["items"]["mixed_greedy"]
    claim = reasoning.rl_gain(facts)
    assert not claim.judged and claim.note == "This run lacks `eval_rl/items/mixed_greedy`."


@pytest.mark.parametrize(
    ("rule", "stage", "name", "gone"),
    [
        (modes.both_modes, "eval_final", "think", HARD[-1]),
        (modes.mode_following, "eval_final", "modes", HELD_OUT_KINDS[0]),
        (general.general_rl, "eval_fusion", "general", "order back"),
        (general.general_rl, "eval_final", "general", "tool"),
        (reasoning.rl_gain, "eval_rl", "mixed", SIGNED[0]),
    ],
)
def test_a_kind_without_items_leaves_a_claim_open(facts: Facts, rule: Any, stage: str, name: str, gone: str) -> None:
    part = facts[stage]["items"][name]
    kept = [place for place, kind in enumerate(part["kinds"]) if kind != gone]
    facts[stage]["items"][name] = {
        key: [part[key][i] for i in kept] for key in ("kinds", "correct", "followed", "thinking_tokens")
    }
    claim = rule(facts)
    assert not claim.judged and f"`{stage}/items/{name}`" in claim.note


def test_different_items_are_refused(facts: Facts) -> None:
    facts["eval_rl"]["items"]["mixed"]["kinds"].reverse()
    with pytest.raises(InputError, match=r"eval_rl and eval_rl_more_sft were measured on different items.*--redo"):
        reasoning.rl_gain(facts)
    facts["eval_uncut"]["scores"]["budget"] = [
        row | {"kinds": ["least", *row["kinds"][1:]]} for row in facts["eval_uncut"]["scores"]["budget"]
    ]
    with pytest.raises(InputError, match="eval_fusion and eval_uncut"):
        modes.thinking_budget(facts)


def test_figures_of_rl_without_eight_samples_are_left_out(facts: Facts) -> None:
    for stage in ("eval_rl", "eval_cold_start", "eval_rl_more_sft", "eval_rl_rejection"):
        part = facts[stage]["items"]["mixed_hot"]
        part["correct"] = [row[:4] for row in part["correct"]]
    claim = reasoning.rl_gain(facts)
    assert claim.holds and not any(part.name.startswith("pass") for part in claim.shown)


def test_the_budget_counts_stopped_replies_alone(facts: Facts, make: SimpleNamespace) -> None:
    """Finished thoughts are right in 95 %, whatever a partial thought is worth; they must not help."""
    facts["eval_final"]["scores"]["budget"] = make.budget_rows(partial=0.25, none=0.25)
    claim = modes.thinking_budget(facts)
    assert abs(condition(claim, "over_none").value) < 3 and abs(condition(claim, "over_chance").value) < 3
    assert condition(claim, "rank").value > 0.9
    for row in facts["eval_final"]["scores"]["budget"]:
        row["stopped"] = [0.0] * len(row["stopped"])
    assert not modes.thinking_budget(facts).judged


def test_stopped_in_both_at_the_same_budget() -> None:
    def row(budget: int, correct: list[float], stopped: list[float]) -> dict[str, Any]:
        return {"budget": budget, "kinds": ["top"] * 3, "correct": correct, "stopped": stopped}

    fusion = [row(0, [1, 1, 1], [1, 1, 1]), row(8, [1, 1, 0], [1, 1, 0]), row(16, [1, 0, 0], [1, 1, 0])]
    uncut = [row(0, [0, 0, 0], [1, 1, 1]), row(8, [0, 1, 0], [1, 0, 0]), row(16, [1, 1, 0], [1, 1, 0])]
    found = modes.over_uncut(fusion, uncut)
    assert found is not None and isinstance(found, tuple)
    # item 0: (1 - 0 + 1 - 1) / 2; item 1: at 16 alone, 0 - 1; item 2: never stopped
    assert found[0].value == pytest.approx(100 * (0.5 - 1) / 2) and found[1] == "2 of 3 items"


def test_smallest_gain_speaks_for_every_skill(facts: Facts, make: SimpleNamespace) -> None:
    facts["eval_final"]["items"]["general"] = make.general(0.6, 0.8, **{"style_twice": 0.3})
    smallest = condition(general.general_rl(facts), "smallest")
    assert smallest.detail == "style twice" and smallest.value == pytest.approx(10, abs=1)


@pytest.mark.parametrize("name", ["more_sft", "greedy"])
def test_rl_is_judged_on_its_worse_family(facts: Facts, make: SimpleNamespace, name: str) -> None:
    change = next(change for key, broken, change in BROKEN if (key, broken) == ("rl_gain", name))
    change(facts, make)
    claim = reasoning.rl_gain(facts)
    worse, pooled = condition(claim, name), condition(claim, f"pooled_{name}")
    assert not worse.met and worse.detail == SIGNED[-1] and pooled.low > 20 > worse.value


def test_the_worst_held_out_pattern_is_named(facts: Facts, make: SimpleNamespace) -> None:
    facts["eval_final"]["items"]["modes"] = make.modes(**{"mode:_four_turns": 0.75})
    claim = modes.mode_following(facts)
    assert condition(claim, "held_out").detail == "four turns" and condition(claim, "held_out_mean").met
    assert condition(claim, "held_out").value == pytest.approx(75) and not claim.holds


def test_long_context_is_judged_on_the_last_span(facts: Facts, make: SimpleNamespace) -> None:
    facts["s3_old_base"]["result"]["bpb"] = make.bpb(2.075, 1.5, 2.1)
    claim = pretrained.pretraining(facts)
    assert claim.holds and condition(claim, "stage3_beyond").value == pytest.approx(0.1)
    assert condition(claim, "stage3_between").value == pytest.approx(-0.5)
    del facts["s3_old_base"]["result"]["bpb"][2]
    assert not pretrained.pretraining(facts).judged


def test_moe_shows_text_and_loads(facts: Facts, make: SimpleNamespace) -> None:
    facts["moe_micro"]["result"]["experts"]["load"][1] = [0.3] + [0.1] * 7
    claim = pretrained.moe_balance(facts)
    assert condition(claim, "distance_text").value == pytest.approx(0.21)
    loads = [condition(claim, name).value for name in ("load_global", "load_micro")]
    assert loads == pytest.approx([8 * 0.16, 8 * 0.3])


def test_moe_without_resamples_is_judged_on_the_estimate(facts: Facts) -> None:
    del facts["moe_micro"]["result"]["experts"]["task_tv_samples"]
    claim = pretrained.moe_balance(facts)
    assert claim.holds and claim.low is None and claim.value == pytest.approx(0.21)
    facts["moe_micro"]["result"]["experts"]["task_tv"] = []
    assert not pretrained.moe_balance(facts).judged


def test_families_and_skills_are_those_of_the_tasks() -> None:
    assert HARD == ("sum", "swap", "run", "least", "top") and EASY == ("max", "min", "last")
    assert SIGNED == ("run", "least") and len(SKILLS) == 7
    assert SKILLS["style quotes"] == 20 and SKILLS["order back"] == pytest.approx(100 / 24)


def test_skills_are_those_that_general_rl_counts() -> None:
    assert set(general_stage.SKILLS) == set(SKILLS)


@settings(max_examples=50)
@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=60))
def test_percentiles_lie_in_the_samples(samples: list[float]) -> None:
    value = percentile_interval(0.0, samples)
    assert min(samples) <= value.low <= value.high <= max(samples)
    assert percentile_interval(0.0, samples[::-1]) == value


def test_mean_of_independent_estimates() -> None:
    one = percentile_interval(2.0, [1.0, 3.0])
    mean = mean_of([one, one, one, one])
    assert mean.value == 2.0 and mean.high - mean.value == pytest.approx((one.high - one.low) / 2 / 2)
    together = mean_of([one, one, one, one], same_items=True)  # the same items four times are no more items
    assert (together.value, together.low, together.high) == pytest.approx((one.value, one.low, one.high))


def test_claims_do_without_torch() -> None:
    code = "import sys, twofold.recipes.claims; sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
