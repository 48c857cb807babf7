"""Rows of chat data sets: read, named when bad, and round trips."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twofold.base.records import InputError, Message, ToolCall
from twofold.text.formats import Example, Format, read_example, write_example
from twofold.text.messages import TurnWeights

TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}
CALL = ToolCall("add", {"a": 1})
Q, A = Message("user", "q"), Message("assistant", "a")
SILENT = TurnWeights(0.0, 0.0, 0.0)
M: list[dict[str, Any]] = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def test_openai() -> None:
    row = {
        "id": 7,
        "messages": [
            {"role": "user", "content": "q", "weight": None},
            {"role": "assistant", "content": "a", "reasoning": "r", "weight": 0},
            {"role": "user", "content": "q", "train": False},
            {
                "role": "assistant",
                "content": "a",
                "train": True,
                "tool_calls": [{"name": "add", "arguments": '{"a":1}'}],
            },
            {"role": "tool", "content": "2"},
            {"role": "assistant", "content": "a", "weights": {"reasoning": 0.5, "calls": None}},
        ],
        "tools": json.dumps([TOOL]),
        "chat_template_kwargs": {"enable_thinking": True, "other": None},
        "text": None,
    }
    assert read_example(row) == Example(
        "openai",
        (Q, Message("assistant", "a", "r"), Q, Message("assistant", "a", None, (CALL,)), Message("tool", "2"), A),
        (TOOL,),
        {1: SILENT, 3: TurnWeights(), 5: TurnWeights(0.5)},
        True,
    )


def test_sharegpt() -> None:
    turns = [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": '<think>\nr\n</think>\n\n{"name": "add", "arguments": {"a": 1}}'},
        {"from": "observation", "value": "2"},
        {"from": "function_call", "value": json.dumps([{"name": "add", "arguments": '{"a": 1}'}] * 2)},
        {"from": "observation", "value": "2"},
        {"from": "gpt", "value": "<think>\nr\n</think>\n\na", "weight": 0.5},
    ]
    got = read_example({"conversations": turns, "system": "S", "tools": [TOOL]})
    assert got.format == "sharegpt" and got.tools == (TOOL,) and got.weights == {6: TurnWeights(0.5, 0.5, 0.5)}
    assert got.messages == (
        Message("system", "S"),
        Q,
        Message("assistant", "", "r", (CALL,)),
        Message("tool", "2"),
        Message("assistant", "", None, (CALL, CALL)),
        Message("tool", "2"),
        Message("assistant", "a", "r"),
    )
    openai = {"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    assert read_example(openai).messages == (Q, A)


def test_alpaca() -> None:
    row = {"instruction": "q", "input": "", "output": "<think>r</think>a", "system": "S", "history": [["q", "a"]]}
    assert read_example(row).messages == (Message("system", "S"), Q, A, Q, Message("assistant", "a", "r"))
    assert read_example({"instruction": "q", "input": "x", "output": "a"}).messages == (Message("user", "q\nx"), A)


def test_trl() -> None:
    rows = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    got = read_example({"prompt": [*rows, rows[0]], "completion": [rows[1]]})
    assert got.messages == (Q, A, Q, A) and got.weights == {1: SILENT}
    assert read_example({"prompt": [*rows, rows[0]]}).weights == {1: SILENT}
    assert read_example({"prompt": "p", "completion": " c"}).segments == (("p", 0.0), (" c", 1.0))
    assert read_example({"prompt": "p"}).segments == (("p", 0.0),)
    assert read_example({"text": "t"}).segments == (("t", 1.0),)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": M},
        {"conversations": M},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"prompt": [M[0]], "completion": [M[1]]},
    ],
)
def test_a_system_column_is_the_first_turn_and_an_empty_one_is_none(row: dict[str, Any]) -> None:
    assert read_example({**row, "system": "S"}).messages == (Message("system", "S"), Q, A)
    assert read_example({**row, "system": ""}).messages == (Q, A)


def test_inline_thinking_can_be_left_alone() -> None:
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "<think>r</think>a"}]}
    assert read_example(row).messages[1] == Message("assistant", "a", "r")
    assert read_example(row, inline_thinking=False).messages[1] == Message("assistant", "<think>r</think>a")


@pytest.mark.parametrize(
    ("row", "where"),
    [
        ([], "a row must be an object"),
        ({}, "unknown row with keys (none)"),
        ({"question": "q", "answer": "a"}, "unknown row with keys question, answer"),
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, "preference pair"),
        ({"messages": M, "chosen": "a", "rejected": "b"}, "preference pair"),
        ({"messages": "q"}, "messages must be a list"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content"),
        ({"messages": [{**M[0], "weight": 1}, M[1]]}, "messages[0].weight"),
        ({"messages": [M[0], {**M[1], "weight": -1}]}, "weights[1]"),
        ({"messages": [M[0], {**M[1], "weight": "1"}]}, "weights[1]"),
        ({"messages": [M[0], {**M[1], "train": "yes"}]}, "messages[1].train"),
        ({"messages": [M[0], {**M[1], "train": True, "weight": 1}]}, "messages[1] has weight and train"),
        ({"messages": [M[0], {**M[1], "weights": {"thoughts": 1}}]}, "messages[1].weights"),
        ({"messages": M, "tools": "{"}, "tools is text but not JSON"),
        ({"messages": M, "tools": ["add"]}, "tools[0]"),
        ({"messages": M, "tools": 5}, "tools must be a list"),
        ({"messages": [M[0], {**M[1], "weight": 10**400}]}, "weights[1]"),
        ({"messages": M, "chat_template_kwargs": {"think": True}}, "chat_template_kwargs.think is not supported"),
        ({"messages": M, "chat_template_kwargs": {"enable_thinking": "no"}}, "enable_thinking must be true or false"),
        ({"messages": M, "chat_template_kwargs": "x"}, "chat_template_kwargs must be an object"),
        (
            {
                "messages": [M[0], {**M[1], "reasoning_content": "r"}],
                "chat_template_kwargs": {"enable_thinking": False},
            },
            "messages[1].reasoning",
        ),
        ({"conversations": {}}, "conversations must be a list"),
        ({"conversations": ["q"]}, "conversations[0] must be an object"),
        ({"conversations": [{"from": "bot", "value": "x"}]}, "conversations[0].from"),
        ({"conversations": [{"from": "human", "value": None}]}, "conversations[0].value"),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "x"}]}, "not JSON"),
        ({"instruction": "q"}, "output must be a string"),
        ({"instruction": 1, "output": "a"}, "instruction must be a string"),
        ({"instruction": "q", "output": "a", "history": [["q"]]}, "history[0]"),
        ({"instruction": "q", "output": "a", "history": 5}, "history must be a list"),
        ({"prompt": "p", "completion": M}, "both be strings or both be lists"),
        ({"prompt": 3}, "both be strings or both be lists"),
        ({"text": 3}, "text must be a string"),
    ],
)
def test_bad_rows_are_named(row: Any, where: str) -> None:
    with pytest.raises(InputError) as error:
        read_example(row)
    assert where in str(error.value)


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
answers = st.builds(
    Message,
    st.just("assistant"),
    st.one_of(texts, st.sampled_from(["", "a</think>b", "<think>x", "\nlead"])),
    st.one_of(st.none(), texts),
    st.lists(st.builds(ToolCall, st.just("add"), st.dictionaries(texts, st.integers(), max_size=2)), max_size=2).map(
        tuple
    ),
)
turns = st.lists(st.tuples(st.builds(Message, st.just("user"), texts), answers), min_size=1, max_size=3)


@given(turns, st.booleans(), st.sampled_from([None, True]), st.lists(st.sampled_from([0.0, 0.5, 1.0]), max_size=3))
def test_openai_holds_everything(
    pairs: list[tuple[Message, Message]], tools: bool, thinking: bool | None, weights: list[float]
) -> None:
    messages = tuple(message for pair in pairs for message in pair)
    spread = {2 * i + 1: TurnWeights(w, 1.0, w) for i, w in enumerate(weights[: len(pairs)])}
    example = Example("openai", messages, (TOOL,) if tools else None, spread, thinking)
    row = json.loads(json.dumps(write_example(example, "openai")))
    again = read_example(row)
    assert (again.tools, again.thinking) == (example.tools, example.thinking)
    assert [m.content for m in again.messages] == [m.content for m in messages]
    assert [m.tool_calls for m in again.messages] == [m.tool_calls for m in messages]


@given(turns, st.sampled_from(["sharegpt", "alpaca", "prompt_completion"]))
def test_what_is_written_reads_the_same_and_the_rest_is_refused(
    pairs: list[tuple[Message, Message]], format: Format
) -> None:
    messages = tuple(message for pair in pairs for message in pair)
    try:
        row = write_example(Example("openai", messages), format)
    except InputError as error:
        assert "cannot hold" in str(error) or "messages[" in str(error)
        return
    again = read_example(json.loads(json.dumps(row)))
    assert again.format == format
    assert [m.content for m in again.messages] == [m.content for m in messages]
    assert [m.reasoning or "" for m in again.messages] == [m.reasoning or "" for m in messages]


@pytest.mark.parametrize(
    ("row", "format"),
    [
        ({"messages": M, "tools": [TOOL]}, "openai"),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "sharegpt"),
        ({"instruction": "q", "input": "", "output": "a", "system": "S", "history": [["q", "a"]]}, "alpaca"),
        ({"prompt": M, "completion": []}, None),
        ({"prompt": [M[0]], "completion": [M[1]]}, "prompt_completion"),
        ({"prompt": "p", "completion": "c"}, "prompt_completion"),
        ({"prompt": "p"}, "prompt_completion"),
        ({"text": "t"}, "text"),
    ],
)
def test_rows_come_back(row: dict[str, Any], format: Format | None) -> None:
    example = read_example(row)
    if format is not None:
        assert write_example(example, format) == row


def test_what_does_not_fit_is_refused() -> None:
    calls = Example("openai", (Q, Message("assistant", "a", None, (CALL,))))
    parts = Example("openai", (Q, A), weights={1: TurnWeights(0.0)})
    text = read_example({"text": "t"})
    for example, format in (
        (calls, "sharegpt"),
        (calls, "alpaca"),
        (calls, "text"),
        (parts, "sharegpt"),
        (parts, "alpaca"),
        (text, "openai"),
        (text, "prompt_completion"),
        (Example("openai", (Message("assistant", "a"),)), "alpaca"),
    ):
        with pytest.raises(InputError, match="cannot hold"):
            write_example(example, format)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="use one of"):
        write_example(calls, "jsonl")  # type: ignore[arg-type]
