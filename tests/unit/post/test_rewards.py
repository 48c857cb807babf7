"""The rewards as a table: what each sort of query earns for each sort of reply."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from twofold.episodes.play import Trajectory
from twofold.post.rewards import brevity, general_reward, reasoning_reward, reference_similarity
from twofold.tasks.base import Item
from twofold.tasks.families import Pick, SumMod
from twofold.tasks.instruct import AnswerFormat, AnswerLength, with_format, with_length
from twofold.tasks.query import Query, single, with_tools
from twofold.tasks.tools import Calc

END = "<|im_end|>"
THOUGHT, EMPTY = "<think>\n E0+1=1\n</think>\n\n", "<think>\n\n</think>\n\n"
SUM = Item("sum", "sum mod 10: E1 B5", "6", (), "sum")
PICK = Item("pick", "pick B: E1 B5", "5", (), "pick")
FORMAT = AnswerFormat((Pick(),))
LENGTH = AnswerLength((Pick(),))
CALC = Item("calc", "calc 37*48", "1776", (), "calc", {"expression": "37*48"})
Make = Callable[..., Trajectory]

QUERIES: dict[str, Query] = {
    "hard, thinking": single(SUM, SumMod(), kind="think"),
    "hard, direct": single(SUM, SumMod(), "no_think"),
    "easy, direct": single(PICK, Pick(), "no_think", kind="direct"),
    "format": single(with_format(PICK, "[x]"), FORMAT, "no_think"),
    "length": single(with_length(PICK, 3), LENGTH, "no_think"),
    "reference": single(PICK, Pick(), "no_think", kind="reference"),
    "tool": with_tools(CALC, Calc(), "no_think"),
}


@pytest.mark.parametrize(
    ("name", "reply", "total"),
    [
        ("hard, thinking", f"{THOUGHT}6{END}", 1.0),
        ("hard, thinking", f"{THOUGHT}7{END}", 0.4),
        ("hard, thinking", f"{EMPTY}6{END}", 0.0),  # right, in the wrong mode
        ("hard, thinking", f"6{END}", 0.0),
        ("hard, thinking", f"{THOUGHT}<think>6{END}", 0.0),  # malformed
        ("hard, direct", f"{EMPTY}6{END}", 1.0),
        ("hard, direct", f"{EMPTY}7{END}", 1.0),  # chance is not rewarded
        ("hard, direct", f"{THOUGHT}6{END}", 0.0),
        ("easy, direct", f"{EMPTY}5{END}", 1.0),
        ("easy, direct", f"{EMPTY}4{END}", 0.4),
        ("format", f"{EMPTY}[5]{END}", 1.0),
        ("format", f"{EMPTY}[4]{END}", 0.6),
        ("format", f"{EMPTY}5{END}", 0.2),
        ("length", f"{EMPTY}5 5 5{END}", 1.0),
        ("length", f"{EMPTY}4 4 4{END}", 0.6),
        ("length", f"{EMPTY}5 5{END}", 0.2),
        ("reference", f"{EMPTY}5{END}", 1.0),
        ("reference", f"{EMPTY}4{END}", 0.2),
        ("reference", f"{THOUGHT}5{END}", 0.0),
    ],
)
def test_general_rewards(name: str, reply: str, total: float, make_trajectory: Make) -> None:
    parts = general_reward(make_trajectory(QUERIES[name], reply))
    assert sum(parts.values()) == pytest.approx(total)
    assert all(0 <= value <= 1 for value in parts.values())


@pytest.mark.parametrize(
    ("results", "reply", "total"),
    [(["1776"], "1776", 1.0), (["1776"], "1", 0.4), (["error: no"], "1776", 0.7), ([], "1776", 0.7), ([], "0", 0.1)],
)
def test_tool_rewards(results: list[str], reply: str, total: float, make_trajectory: Make) -> None:
    trajectory = make_trajectory(QUERIES["tool"], f"{EMPTY}{reply}{END}", tool_results=results)
    assert sum(general_reward(trajectory).values()) == pytest.approx(total)


@pytest.mark.parametrize("changes", [{"truncated": True}, {"final": None}, {"first": None}])
def test_nothing_is_earned_without_a_whole_reply(changes: dict[str, Any], make_trajectory: Make) -> None:
    trajectory = make_trajectory(QUERIES["hard, thinking"], f"{THOUGHT}6{END}", **changes)
    assert sum(general_reward(trajectory).values()) == 0.0


def test_reasoning_needs_a_closed_thought_an_end_and_the_right_answer(make_trajectory: Make) -> None:
    query = QUERIES["hard, thinking"]
    cases = {
        f"{THOUGHT}6{END}": 1.0,
        f"{THOUGHT}7{END}": 0.0,
        f"{THOUGHT}6": 0.0,
        f"6{END}": 0.0,
        f"<think>\n E0+1=1{END}": 0.0,
        f"{THOUGHT}</think>6{END}": 0.0,
    }
    for reply, value in cases.items():
        assert reasoning_reward(make_trajectory(query, reply, not reply.endswith(END))) == {"correct": value}, reply


def test_reference_similarity_and_brevity(make_trajectory: Make) -> None:
    assert reference_similarity(" olleh\n", "olleh") == 1.0
    assert reference_similarity("", "olleh") == 0.0 == reference_similarity("xyz", "olleh")
    assert 0.5 < reference_similarity("olleg", "olleh") < 1.0
    shares = [
        brevity(make_trajectory(QUERIES["hard, thinking"], END, thinking_tokens=n), 10) for n in (0, 10, 15, 20, 90)
    ]
    assert shares == [1.0, 1.0, 0.5, 0.0, 0.0]
