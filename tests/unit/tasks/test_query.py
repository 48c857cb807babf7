"""Queries: which mode each pattern of soft switches calls for, and how conversations are built."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest

from twofold.base.records import Message
from twofold.tasks import query as query_module
from twofold.tasks.base import Item
from twofold.tasks.families import REACHES, Reach, SumMod, signed_families
from twofold.tasks.query import (
    FLAG_PATTERNS,
    HELD_OUT_PATTERNS,
    SYSTEM_PATTERNS,
    TAUGHT_PATTERNS,
    Mode,
    Query,
    flagged,
    random_pattern,
    single,
    turns_of,
    user_turns,
    with_tools,
)
from twofold.tasks.tools import Calc
from twofold.text.messages import last_flag, validate_messages

ITEMS = [Item("sum", f"sum mod 10: A{i}", str(i), (), f"k{i}") for i in range(4)]
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
    "off, kept for two turns": "no_think",
    "on again, then kept": "think",
    "off again, then kept": "no_think",
    "on again after a pause": "think",
    "four turns": "think",
    "system /no_think, then kept": "no_think",
}
SPELLED = {"u": "think", "u- u u+": "think", "u+ u- u u": "no_think", "u-+ u+-": "no_think", "u u u u": "think"}


def signature(query: Query) -> tuple[str, ...]:
    """The turns of a conversation and their flags in the notation of ``FLAG_PATTERNS``, read off the messages."""
    turns = [(m.role, re.findall(r"/(no_think|think)\b", m.content)) for m in query.messages if m.role != "assistant"]
    return tuple(role[0] + "".join({"think": "+", "no_think": "-"}[flag] for flag in flags) for role, flags in turns)


def asked(pattern: str) -> Query:
    return flagged([(item, SumMod()) for item in ITEMS[: user_turns(pattern)]], pattern)


def test_every_pattern_is_covered_here() -> None:
    assert set(EXPECTED) == set(FLAG_PATTERNS)
    assert set(SYSTEM_PATTERNS) == {name for name in EXPECTED if name.startswith("system")}


@pytest.mark.parametrize("pattern", [*FLAG_PATTERNS, *SPELLED])
def test_the_last_flag_decides(pattern: str) -> None:
    count = user_turns(pattern)
    query = asked(pattern)
    named = next((name for name, turns in FLAG_PATTERNS.items() if turns == turns_of(pattern)), pattern)
    assert query.mode == (EXPECTED | SPELLED)[pattern] and query.kind == f"mode: {named}"
    validate_messages(query.messages)
    users = [m.content for m in query.messages if m.role == "user"]
    answers = [m for m in query.messages if m.role == "assistant"]
    assert len(users) == count and query.messages[-1].role == "user" and query.item == ITEMS[count - 1]
    assert all(text.startswith(item.prompt) for text, item in zip(users, ITEMS, strict=False))
    assert answers == [Message("assistant", item.answer) for item in ITEMS[: count - 1]]
    written = [c for m in query.messages for c in m.content.split() if c.startswith("/")]
    signs = "".join(turn[1:] for turn in turns_of(pattern))
    assert written == ["/think" if sign == "+" else "/no_think" for sign in signs]
    assert signature(query) == turns_of(pattern)


@pytest.mark.parametrize("pattern", FLAG_PATTERNS)
def test_the_form_of_a_pattern_is_its_name(pattern: str) -> None:
    assert asked(pattern).form == pattern


@pytest.mark.parametrize(("flag", "form"), [(None, "no flag"), ("think", "/think"), ("no_think", "/no_think")])
def test_the_form_of_other_queries_is_their_flag(flag: Mode | None, form: str) -> None:
    item, calc = ITEMS[0], Calc().generate(random.Random(0), 1.0)
    for kind in ("", "think", "direct", "style any"):
        assert single(item, SumMod(), flag, kind=kind).form == form
    assert single(item, SumMod(), flag, hard_switch=True).form == "hard switch"
    assert with_tools(calc, Calc(), flag).form == f"tool, {form}"


def test_held_out_patterns_are_the_rest_of_the_taught_ones() -> None:
    assert {*HELD_OUT_PATTERNS, *TAUGHT_PATTERNS} == set(FLAG_PATTERNS)
    assert len(HELD_OUT_PATTERNS) == 8 and not set(HELD_OUT_PATTERNS) & set(TAUGHT_PATTERNS)
    assert set(HELD_OUT_PATTERNS) & set(SYSTEM_PATTERNS) == {"system /no_think, then kept"}
    assert len(set(FLAG_PATTERNS.values())) == len(FLAG_PATTERNS)  # no held-out pattern is taught under another name
    modes = Counter(EXPECTED[pattern] for pattern in HELD_OUT_PATTERNS)
    assert modes == {"think": 4, "no_think": 4}  # never thinking at all, or always, follows half of them
    assert max(map(user_turns, FLAG_PATTERNS)) == 4


@pytest.mark.parametrize("name", [name for name in FLAG_PATTERNS if name not in SYSTEM_PATTERNS])
def test_a_pattern_may_be_spelled_out(name: str) -> None:
    spelled = " ".join(FLAG_PATTERNS[name])
    assert turns_of(spelled) == turns_of(name) == FLAG_PATTERNS[name] and user_turns(spelled) == user_turns(name)
    query = asked(spelled)
    assert query.messages == asked(name).messages and query.mode == EXPECTED[name]
    assert (query.form, query.kind) == (name, f"mode: {name}")  # the same conversation has the same name


def test_random_patterns_are_never_held_out_ones_and_cover_the_rest() -> None:
    rng = random.Random(0)
    drawn = [random_pattern(rng) for _ in range(3000)]
    untaught = {FLAG_PATTERNS[name] for name in HELD_OUT_PATTERNS}
    assert not untaught & {turns_of(pattern) for pattern in drawn}
    queries = [asked(pattern) for pattern in drawn]
    assert not untaught & {signature(query) for query in queries}
    assert all(signature(query) == turns_of(pattern) for query, pattern in zip(queries, drawn, strict=True))
    never = (*HELD_OUT_PATTERNS, "three flags")  # no turn is drawn with three flags
    taught = {name for name in FLAG_PATTERNS if name not in never}
    assert {query.form for query in queries} == {"random flags", *taught}
    shown = Counter((user_turns(query.kind.removeprefix("mode: ")), query.mode) for query in queries)
    assert set(shown) == {(turns, mode) for turns in (1, 2, 3, 4) for mode in ("think", "no_think")}
    assert min(shown.values()) > 100, shown
    assert {turn for pattern in drawn for turn in pattern.split()} == {"u", "u+", "u-", "u+-", "u-+", "s+", "s-"}
    assert len(set(drawn)) > 300
    assert drawn[:20] == [random_pattern(again) for again in [random.Random(0)] for _ in range(20)]


def test_without_the_rule_random_patterns_would_meet_held_out_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(query_module, "HELD_OUT_PATTERNS", ())
    rng = random.Random(0)
    drawn = {turns_of(random_pattern(rng)) for _ in range(6000)}
    of_users = {FLAG_PATTERNS[name] for name in HELD_OUT_PATTERNS if name not in SYSTEM_PATTERNS}
    assert of_users <= drawn


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
