"""Claims over several training seeds, from made-up runs and from their JSON."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest

from twofold.base.records import InputError
from twofold.eval.stats import across
from twofold.recipes.claims import judge
from twofold.recipes.claims.declared import PROTOCOLS
from twofold.recipes.claims.seeds import claim_cell, combine, markdown_table
from twofold.report.model import Claim

Facts = dict[str, dict[str, Any]]
SEEDS = (3, 4, 5, 6, 7)


@pytest.fixture
def reports(facts: Facts) -> dict[int, list[Claim]]:
    """Five runs that differ a little in RL's accuracy on mixed signs."""
    return {seed: shifted(judge(facts), "rl_gain", "more_sft", float(seed - 5)) for seed in SEEDS}


def shifted(claims: list[Claim], key: str, name: str, by: float) -> list[Claim]:
    return [moved(claim, name, by) if claim.key == key else claim for claim in claims]


def moved(claim: Claim, name: str, by: float) -> Claim:
    conditions = [
        part.model_copy(update={"value": part.value + by}) if part.name == name and part.value is not None else part
        for part in claim.conditions
    ]
    return claim.model_copy(update={"conditions": conditions})


def find(claims: list[Claim], key: str, name: str = "") -> Any:
    claim = next(claim for claim in claims if claim.key == key)
    return next(part for part in (*claim.conditions, *claim.shown) if part.name == name) if name else claim


def test_all_hold_over_seeds(reports: dict[int, list[Claim]]) -> None:
    claims = combine(reports)
    assert [claim.key for claim in claims] == list(PROTOCOLS)
    assert [claim.verdict for claim in claims] == ["holds"] * 9 and claims[0].seeds == list(SEEDS)
    part = find(claims, "rl_gain", "more_sft")
    values = [find(reports[seed], "rl_gain", "more_sft").value for seed in SEEDS]
    found = [find(reports[seed], "rl_gain", "more_sft") for seed in SEEDS]
    halves = [(one.high - one.low) / 2 for one in found]
    expected = across(values, halves)
    assert (part.value, part.low, part.high) == (expected.value, expected.low, expected.high)
    assert part.high - part.low == pytest.approx(2 * math.hypot(2.776 * (2.5**0.5) / 5**0.5, halves[0]), abs=1e-3)
    assert part.detail.startswith("worst seed 3: ")
    assert find(claims, "rl_gain", "hot_start").value == find(reports[3], "rl_gain", "hot_start").value


def test_items_count_once_more_where_runs_have_intervals(reports: dict[int, list[Claim]]) -> None:
    """Seeds that agree to the bit still leave the error of their items, which they may share."""
    one, part = find(reports[3], "rl_gain", "pooled_greedy"), find(combine(reports), "rl_gain", "pooled_greedy")
    assert (part.value, part.low, part.high) == pytest.approx((one.value, one.low, one.high)) and one.high > one.low
    bare = find(combine(reports), "general_rl", "largest_lead")
    assert find(reports[3], "general_rl", "largest_lead").low is None and bare.low == bare.value == bare.high


def test_stored_reports_give_the_same(reports: dict[int, list[Claim]]) -> None:
    stored = {
        seed: [Claim.model_validate_json(c.model_dump_json()) for c in claims] for seed, claims in reports.items()
    }
    assert combine(stored) == combine(reports)


def test_spread_between_seeds_refutes_what_every_run_holds(facts: Facts) -> None:
    base = find(judge(facts), "rl_gain", "greedy").value
    offsets = (40.0, -base + 1, 40.0, -base + 1, 40.0)
    reports = {seed: shifted(judge(facts), "rl_gain", "greedy", by) for seed, by in zip(SEEDS, offsets, strict=True)}
    claim = find(combine(reports), "rl_gain")
    assert all(find(reports[seed], "rl_gain", "greedy").value > 0 for seed in SEEDS)
    assert claim.verdict == "does not hold" and claim.judged
    assert [part.name for part in claim.conditions if not part.met] == ["greedy"]


def test_levels_are_judged_on_the_mean_and_at_most_on_the_upper_end(reports: dict[int, list[Claim]]) -> None:
    level = find(reports[3], "both_modes", "thinking").value
    for seed, to in zip(SEEDS, (95, 95, 95, 60, 75), strict=True):
        reports[seed] = shifted(reports[seed], "both_modes", "thinking", to - level)
    claims = combine(reports)
    part = find(claims, "both_modes", "thinking")
    assert part.met and part.value == pytest.approx(84) and part.low < 75 and part.detail.startswith("worst seed 6: 60")
    for seed, by in zip(SEEDS, (0, 14, 0, 14, 0), strict=True):
        reports[seed] = shifted(reports[seed], "general_rl", "absent", by)
    part = find(combine(reports), "general_rl", "absent")
    assert not part.met and part.value < 10 < part.high and part.detail.startswith(("worst seed 4", "worst seed 6"))


def test_a_fact_must_be_so_on_every_seed(reports: dict[int, list[Claim]]) -> None:
    assert find(combine(reports), "moe_balance", "dead").detail == "on every seed"
    reports[6] = shifted(reports[6], "moe_balance", "dead", -1.0)
    claim = find(combine(reports), "moe_balance")
    part = find([claim], "moe_balance", "dead")
    assert claim.verdict == "does not hold" and part.detail == "not on seed 6" and part.low is None


def test_what_is_missing_anywhere_is_not_judged(facts: Facts, reports: dict[int, list[Claim]]) -> None:
    without = copy.deepcopy(facts)
    del without["eval_direct"]
    reports[4] = judge(without)
    claims = combine(reports)
    claim = find(claims, "thinking_gain")
    assert claim.verdict == "not judged" and "Seed 4: This run lacks `eval_direct`" in claim.note
    assert find(claims, "thinking_gain", "control").value is None
    assert sum(not other.judged for other in claims) == 1
    reports[5] = reports[5][1:]
    assert "Seed 5 has no such claim." in find(combine(reports), "thinking_gain").note


def test_a_refusal_on_one_seed_refuses_the_claim(facts: Facts, reports: dict[int, list[Claim]]) -> None:
    facts["student_rl"]["result"]["saw"]["forms"] = {"/think": 3000}
    reports[7] = judge(facts)
    claim = find(combine(reports), "distillation")
    assert claim.verdict == "not judged" and "Seed 7: **Refused**" in claim.note and claim.value is not None


def test_runs_of_another_protocol_are_refused(reports: dict[int, list[Claim]]) -> None:
    claim = reports[4][0]
    eased = claim.conditions[0].model_copy(update={"target": 10.0})
    reports[4][0] = claim.model_copy(update={"conditions": [eased, *claim.conditions[1:]]})
    with pytest.raises(InputError, match=r"seed 4 was judged by another protocol \(condition 'control'"):
        combine(reports)
    with pytest.raises(InputError, match="at least 2 seeds, got 1"):
        combine({3: reports[3]})


def test_the_table_has_a_row_a_claim(reports: dict[int, list[Claim]], make: SimpleNamespace) -> None:
    reports[6] = shifted(reports[6], "moe_balance", "dead", -1.0)
    claims = combine(reports)
    lines = markdown_table(claims).splitlines()
    assert len(lines) == 11 and all(line.count("|") == 4 for line in lines)
    assert "| **holds** |" in lines[2] and "| **does not hold** |" in lines[-1]
    assert lines[-1].count("<br>") == 1 and "**not met**" in lines[-1] and "**not met**" not in lines[2]
    assert claim_cell(claims[0], {"tokens": "词元"}).endswith("词元: yes")
