"""The calculator tool: right results, harmless on hostile input."""

from __future__ import annotations

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twofold.base.records import InputError, ToolCall
from twofold.tasks.base import sample_items
from twofold.tasks.tools import CALC_TOOL, Calc, calculate


def test_items_are_solved_by_their_call() -> None:
    task = Calc()
    for item in sample_items([task], 50, seed=0, split="test"):
        assert re.fullmatch(r"calc \d\d\*\d\d", item.prompt)
        result = task.execute(task.solution_call(item))
        assert result == item.answer and task.verify(item, result) == 1.0
        a, b = map(int, item.prompt[5:].split("*"))
        assert a * b == int(item.answer)
        assert task.verify(item, f"{a}*{b}") == 0.0 and task.verify(item, "") == 0.0


def test_factor_order_and_level() -> None:
    keys: dict[frozenset[int], set[str]] = {}
    for seed in range(300):
        item = Calc().generate(random.Random(seed), 0.0)
        factors = [int(x) for x in item.meta["expression"].split("*")]
        assert all(10 <= x <= 39 for x in factors)
        keys.setdefault(frozenset(factors), set()).add(item.key)
    assert all(len(found) == 1 for found in keys.values())


def test_digits_never_repeat() -> None:
    """So that a model that copies one digit after another has one place to look at for each."""
    rng = random.Random(1)
    for level in (0.0, 0.5, 1.0):
        for _ in range(500):
            item = Calc().generate(rng, level)
            for text in (item.meta["expression"].replace("*", ""), item.answer):
                assert len(set(text)) == len(text), item.prompt


@pytest.mark.parametrize("task", [Calc(11, 11), Calc(22, 22), Calc(110, 119)], ids=repr)
def test_a_range_without_such_products_is_an_error(task: Calc) -> None:
    for level in (0.0, 1.0):
        with pytest.raises(InputError, match=f"between {task.low} and {task.high}; widen the range"):
            task.generate(random.Random(0), level)


def test_schema_names_the_argument() -> None:
    function = CALC_TOOL["function"]
    assert CALC_TOOL["type"] == "function" and function["name"] == "calc"
    assert function["parameters"]["required"] == ["expression"]
    assert Calc().tools == [CALC_TOOL]


@settings(deadline=None, max_examples=50)
@given(st.integers(-999, 999), st.integers(-999, 999), st.sampled_from("+-*"))
def test_arithmetic_agrees_with_python(a: int, b: int, sign: str) -> None:
    expected = {"+": a + b, "-": a - b, "*": a * b}[sign]
    assert calculate(f"({a}){sign}({b})") == str(expected)


def test_numbers_are_shown_plainly() -> None:
    assert calculate("7/2") == "3.5" and calculate("8/2") == "4" and calculate("2+3*4") == "14"
    assert calculate("1/3") == "0.3333333333" and calculate(" -(3) % 5") == "2" and calculate("7//2") == "3"


@pytest.mark.parametrize(
    "text",
    ["", " ", "1+", "__import__('os').system('x')", "2**99999999", "1<<9999", "a+1", "True", "1j", "'a'*9", "[1]*9"]
    + ["1/0", "1e999", "1e308*10", "(" * 199, "9" * 201, "\x00", "1;2", "lambda: 1", "f(1)", "1 if 1 else 2", "1,2"]
    + ["-" * 199 + "x"],
)
def test_hostile_expressions_give_error_text(text: str) -> None:
    result = calculate(text)
    assert result.startswith("error: ") and len(result) < 80


def test_bad_calls_give_error_text() -> None:
    task = Calc()
    for call in (
        ToolCall("rm", {"expression": "1+1"}),
        ToolCall("calc", {}),
        ToolCall("calc", {"expression": 5}),
        ToolCall("calc", {"expression": "1+1", "more": 1}),
        ToolCall("calc", [{"expression": "1"}]),  # type: ignore[arg-type]
    ):
        assert task.execute(call).startswith("error: ")
    assert task.execute(ToolCall("calc", {"expression": "1+1"})) == "2"
