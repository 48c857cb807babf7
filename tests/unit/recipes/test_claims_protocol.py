"""The protocols: complete, consistent with the recipe, and equal to the document that shows them."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest

from twofold.base.records import InputError
from twofold.eval.stats import Interval
from twofold.recipes import tiny
from twofold.recipes.claims import protocol
from twofold.recipes.claims.case import MAIN_STAGES, meets
from twofold.recipes.claims.declared import ITEMS_PER_FAMILY, MIXED_ITEMS, PER_PATTERN, PER_SKILL, PER_TOOL, PROTOCOLS
from twofold.recipes.general import TEST_UNITS
from twofold.tasks.query import HELD_OUT_PATTERNS

ROOT = Path(__file__).resolve().parents[3]


def test_the_document_equals_the_protocols(tmp_path: Path) -> None:
    written = (ROOT / "docs" / "claims.md").read_text(encoding="utf-8")
    assert written == protocol.page(), "make it again: python -m twofold.recipes.claims.protocol"
    (tmp_path / "docs").mkdir()
    command = [sys.executable, "-W", "error", "-m", "twofold.recipes.claims.protocol"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stderr == "" and (tmp_path / "docs" / "claims.md").read_text(encoding="utf-8") == written


def test_it_is_written_only_at_the_top_of_the_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="top of the source tree"):
        protocol.main()


def test_seeds_for_tuning_and_for_confirming_are_apart() -> None:
    assert protocol.TUNING_SEEDS == (10, 11, 12) and protocol.CONFIRMING_SEEDS == (100, 200, 300, 400, 500)
    assert all(str(seed) in protocol.page() for seed in (*protocol.TUNING_SEEDS, *protocol.CONFIRMING_SEEDS))


@pytest.mark.parametrize("key", PROTOCOLS)
def test_a_protocol_is_whole(key: str) -> None:
    claim = PROTOCOLS[key]
    names = [part.name for part in (*claim.rules, *claim.shown)]
    assert claim.key == key and claim.rules and len(set(names)) == len(names)
    stages = {arm.stage for arm in claim.arms}
    assert len(stages) == len(claim.arms)
    assert {stage for pair in claim.comparisons for stage in pair} <= stages
    assert set(claim.allowed_differences) <= set(claim.comparisons)
    assert all(len(why) > 20 for allowed in claim.allowed_differences.values() for why in allowed.values())
    assert claim.control and claim.items and claim.refuted and claim.question.endswith("?")
    assert f"## {claim.title}\n" in protocol.page()
    for rule in claim.rules:
        assert rule.sense != "exact" or (rule.target, rule.unit) == (1, "")
        assert claim.rule(rule.name) is rule


def test_arms_and_sizes_are_those_of_the_recipe() -> None:
    stages = {stage.name: stage for stage in tiny.build(["controls=true"]).stages}
    for claim in PROTOCOLS.values():
        for arm in claim.arms:
            assert arm.stage in stages, f"{claim.key}: no stage {arm.stage}"
            assert not arm.scored or arm.scored.split("/")[0] in stages
    assert set(MAIN_STAGES) == {stage.name for stage in tiny.build().stages} - {"report"}
    battery = tiny.TinyConfig().measure
    sizes = (battery.items_per_family, battery.mixed_items, battery.per_pattern)
    assert sizes == (ITEMS_PER_FAMILY, MIXED_ITEMS, PER_PATTERN)
    asked = [battery.general_per_kind * TEST_UNITS[kind] for kind in ("skill", "tool")]
    assert asked == [PER_SKILL, PER_TOOL]
    assert battery.samples == 2 and battery.hot_samples == 8


def test_held_out_patterns_are_those_that_the_protocol_names() -> None:
    assert all(f"“{name}”" in PROTOCOLS["mode_following"].control for name in HELD_OUT_PATTERNS)


def test_senses() -> None:
    value = Interval(5.0, 2.0, 8.0)
    assert meets("above", value, 1.9) and not meets("above", value, 2.0)
    assert meets("at least", value, 2.0) and not meets("at least", value, 2.1)
    assert meets("at most", value, 8.0) and not meets("at most", value, 7.9)
    assert meets("level", value, 5.0) and not meets("level", value, 5.1)
    assert meets("exact", Interval(1.0, math.nan, math.nan), 1) and not meets("exact", Interval(0, 0, 0), 1)
    bare = Interval(5.0, math.nan, math.nan)  # no interval: the estimate stands for both ends
    assert meets("at most", bare, 5.0) and meets("at least", bare, 5.0) and not meets("above", bare, 5.0)
