"""The rewards as a table: what each sort of query earns for each sort of reply."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from twofold.base.records import InputError
from twofold.episodes.play import Trajectory
from twofold.post.rewards import brevity, checked, general_reward, reasoning_reward, reference_similarity
from twofold.tasks.base import Item
from twofold.tasks.families import Direct, SumMod
from twofold.tasks.instruct import STYLES, Order, Styled, with_style
from twofold.tasks.query import Query, flagged, single, with_tools
from twofold.tasks.tools import Calc

END = "<|im_end|>"
THOUGHT, EMPTY = "<think>\n E0+1=1\n</think>\n\n", "<think>\n\n</think>\n\n"
SUM = Item("sum", "sum mod 10: E1 B5", "6", (), "sum")
MAX = Item("max", "max: E1 B5", "5", (), "max")
RNG = random.Random(0)
BACK = Item("order back", "order E B I: back", "I B E", (), "order", {"letters": ["E", "B", "I"]})
CALC = Item("calc", "calc 37*48", "1776", (), "calc", {"expression": "37*48"})
Make = Callable[..., Trajectory]

QUERIES: dict[str, Query] = {
    "hard, thinking": single(SUM, SumMod(), kind="think"),
    "hard, direct": single(SUM, SumMod(), "no_think"),
    "easy, direct": single(MAX, Direct("max"), "no_think", kind="direct"),
    **{cue: single(with_style(MAX, cue, RNG), Styled((Direct("max"),), cue), "no_think") for cue in STYLES},
    "order": single(BACK, Order("back"), "no_think"),
    "system off, hard": flagged([(SUM, SumMod())], "system /no_think"),
    "system off, easy": flagged([(MAX, Direct("max"))], "system /no_think"),
    "system against user": flagged([(MAX, Direct("max"))], "system against user"),
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
        ("brackets", f"{EMPTY}[5]{END}", 1.0),
        ("brackets", f"{EMPTY}[4]{END}", 0.6),
        ("brackets", f"{EMPTY}5{END}", 0.2),
        ("brackets", f'{EMPTY}"5"{END}', 0.2),
        ("brackets", f"{THOUGHT}[5]{END}", 0.0),  # all right, in the wrong mode
        ("brackets", f"[5]{END}", 0.0),
        ("thrice", f"{EMPTY}5 5 5{END}", 1.0),
        ("thrice", f"{EMPTY}4 4 4{END}", 0.6),
        ("thrice", f"{EMPTY}5 5{END}", 0.2),
        ("order", f"{EMPTY}I B E{END}", 1.0),
        ("order", f"{EMPTY}E B I{END}", 0.2 + 0.8 * 0.6),
        ("order", f"{EMPTY}xyz{END}", 0.2),
        ("order", f"{THOUGHT}I B E{END}", 0.0),
        ("system off, hard", f"{EMPTY}7{END}", 1.0),  # the mode is all there is to learn
        ("system off, hard", f"{THOUGHT}6{END}", 0.0),
        ("system off, easy", f"{EMPTY}5{END}", 1.0),
        ("system off, easy", f"{EMPTY}4{END}", 0.4),
        ("system off, easy", f"{THOUGHT}5{END}", 0.0),
        ("system against user", f"{THOUGHT}5{END}", 1.0),
        ("system against user", f"{EMPTY}5{END}", 0.0),
    ],
)
def test_general_rewards(name: str, reply: str, total: float, make_trajectory: Make) -> None:
    parts = general_reward(make_trajectory(QUERIES[name], reply))
    assert sum(parts.values()) == pytest.approx(total)
    assert all(0 <= value <= 1 for value in parts.values())


@pytest.mark.parametrize("cue", STYLES)
def test_of_all_styles_the_one_asked_for_earns_most(cue: str, make_trajectory: Make) -> None:
    earned = {
        style: sum(general_reward(make_trajectory(QUERIES[cue], f"{EMPTY}{form.format(5)}{END}")).values())
        for style, form in STYLES.items()
    }
    assert earned.pop(cue) == pytest.approx(1.0)
    assert list(earned.values()) == pytest.approx([0.2] * 4)


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


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"correct": math.nan}, "reward 'correct' is nan for 'sum mod 10: E1 B5'"),
        ({"style": 1.0, "correct": -math.inf}, "reward 'correct' is -inf"),
        ({"correct": None}, "reward 'correct' is None"),
        ({"correct": "1"}, "reward 'correct' is '1'"),
        ({"correct": [1.0]}, "reward 'correct' is"),
        ({"correct": 10**400}, "reward 'correct' is 1000"),
        ({"a": 1.7e308, "b": 1.7e308}, "rewards 'a', 'b' are too large to be added"),
        (None, "the reward function gave None"),
        (0.5, "the reward function gave 0.5"),
    ],
)
def test_what_is_no_finite_number_is_refused_by_name(make_trajectory: Make, parts: object, words: str) -> None:
    trajectory = make_trajectory(QUERIES["hard, thinking"], THOUGHT + "6" + END)
    with pytest.raises(InputError, match=re.escape(words)):
        checked(parts, trajectory)


def test_any_real_number_is_a_reward(make_trajectory: Make) -> None:
    trajectory = make_trajectory(QUERIES["hard, thinking"], THOUGHT + "6" + END)
    given = {"bool": True, "int": 2, "fraction": Fraction(1, 4), "float32": np.float32(0.5), "float": -0.0}
    found = checked(given, trajectory)
    assert found == {"bool": 1.0, "int": 2.0, "fraction": 0.25, "float32": 0.5, "float": 0.0}
    assert all(type(value) is float for value in found.values())
    assert checked({}, trajectory) == {}
