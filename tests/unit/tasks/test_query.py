"""Queries: which mode each pattern of soft switches calls for, and how conversations are built."""

from __future__ import annotations

import random

import pytest

from twofold.base.records import Message
from twofold.tasks.base import Item
from twofold.tasks.families import REACHES, Reach, SumMod, signed_families
from twofold.tasks.query import (
    FLAG_PATTERNS,
    HELD_OUT_PATTERNS,
    SYSTEM_PATTERNS,
    TAUGHT_PATTERNS,
    Mode,
    flagged,
    single,
    user_turns,
    with_tools,
)
from twofold.tasks.tools import Calc
from twofold.text.messages import last_flag, validate_messages

ITEMS = [Item("sum", f"sum mod 10: A{i}", str(i), (), f"k{i}") for i in range(3)]
EXPECTED = {
    "no flag": "think",
    "/think": "think",
    "/no_think": "no_think",
    "conflict, last /no_think": "no_think",
    "conflict, last /think": "think",
    "three flags": "no_think",
    "earlier turn /no_think": "no_think",
    "earlier turn /think": "think",
    "turned on again": "think",
    "turned off again": "no_think",
    "three turns": "no_think",
    "system /no_think": "no_think",
    "system /think": "think",
    "system against user": "think",
    "system against user, off": "no_think",
}


def test_every_pattern_is_covered_here() -> None:
    assert set(EXPECTED) == set(FLAG_PATTERNS)
    assert set(SYSTEM_PATTERNS) == {name for name in EXPECTED if name.startswith("system")}


@pytest.mark.parametrize("pattern", FLAG_PATTERNS)
def test_the_last_flag_decides(pattern: str) -> None:
    count = user_turns(pattern)
    query = flagged([(item, SumMod()) for item in ITEMS[:count]], pattern, random.Random(0))
    assert query.mode == EXPECTED[pattern] and query.kind == f"mode: {pattern}"
    validate_messages(query.messages)
    users = [m.content for m in query.messages if m.role == "user"]
    answers = [m for m in query.messages if m.role == "assistant"]
    assert len(users) == count and query.messages[-1].role == "user" and query.item == ITEMS[count - 1]
    assert all(text.startswith(item.prompt) for text, item in zip(users, ITEMS, strict=False))
    assert answers == [Message("assistant", item.answer) for item in ITEMS[: count - 1]]
    written = [c for m in query.messages for c in m.content.split() if c.startswith("/")]
    signs = "".join(turn[1:] for turn in FLAG_PATTERNS[pattern])
    assert written == ["/think" if sign == "+" else "/no_think" for sign in signs]


@pytest.mark.parametrize("pattern", FLAG_PATTERNS)
def test_the_form_of_a_pattern_is_its_name(pattern: str) -> None:
    items = [(item, SumMod()) for item in ITEMS[: user_turns(pattern)]]
    assert flagged(items, pattern, random.Random(0)).form == pattern


@pytest.mark.parametrize(("flag", "form"), [(None, "no flag"), ("think", "/think"), ("no_think", "/no_think")])
def test_the_form_of_other_queries_is_their_flag(flag: Mode | None, form: str) -> None:
    item, calc = ITEMS[0], Calc().generate(random.Random(0), 1.0)
    for kind in ("", "think", "direct", "style any"):
        assert single(item, SumMod(), flag, kind=kind).form == form
    assert single(item, SumMod(), flag, hard_switch=True).form == "hard switch"
    assert with_tools(calc, Calc(), flag).form == f"tool, {form}"


def test_held_out_patterns_are_the_rest_of_the_taught_ones() -> None:
    assert {*HELD_OUT_PATTERNS, *TAUGHT_PATTERNS} == set(FLAG_PATTERNS)
    assert not set(HELD_OUT_PATTERNS) & set(TAUGHT_PATTERNS) and not set(HELD_OUT_PATTERNS) & set(SYSTEM_PATTERNS)
    modes = {EXPECTED[pattern] for pattern in HELD_OUT_PATTERNS}
    assert modes == {"think", "no_think"}  # never thinking at all, or always, follows one of them only


def test_single_queries_and_the_hard_switch() -> None:
    item = ITEMS[1]
    assert single(item, SumMod()).mode == "think" and single(item, SumMod()).kind == "sum"
    assert single(item, SumMod(), "no_think", kind="direct").messages == (Message("user", "sum mod 10: A1 /no_think"),)
    hard = single(item, SumMod(), "think", hard_switch=True)
    assert hard.mode == "no_think" and last_flag(hard.messages) == "think"


@pytest.mark.parametrize("reach", REACHES)
def test_the_reach_of_an_item_is_in_its_prompt_alone(reach: Reach) -> None:
    for task in signed_families(reach):
        item = task.generate(random.Random(0), 1.0)
        query = single(item, task)
        assert (query.kind, query.form, query.mode) == (task.name, "no flag", "think")
        assert query.messages == (Message("user", item.prompt),)


def test_tool_queries_offer_the_tools() -> None:
    item = Calc().generate(random.Random(0), 1.0)
    query = with_tools(item, Calc(), "no_think")
    assert query.kind == "tool" and query.mode == "no_think" and query.tools == query.task == Calc()
    assert with_tools(item, Calc()).mode == "think"


def test_a_switch_must_stand_alone() -> None:
    for text in ("path/think", "/thinking about it", "a/no_think"):
        assert last_flag([Message("user", text)]) is None
    assert last_flag([Message("user", "x /no_think"), Message("assistant", "/think")]) == "no_think"
