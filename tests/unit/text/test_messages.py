"""Reading, checking and flag-scanning of conversations."""

from __future__ import annotations

from typing import Any

import pytest

from twofold.base.records import InputError, Message, ToolCall
from twofold.text.messages import (
    last_flag,
    messages_from_openai,
    messages_to_openai,
    turn_weights,
    validate_messages,
    validate_tools,
)


def test_openai_forms_are_read() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
    rows: list[dict[str, Any]] = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "reasoning": "r", "tool_calls": [call]},
        {"role": "tool", "content": "1", "tool_call_id": "c1"},
        {"role": "assistant", "content": "done", "tool_calls": [{"name": "g", "arguments": {"b": 2}}]},
    ]
    assert messages_from_openai(rows) == [
        Message("system", "be brief"),
        Message("user", "ab"),
        Message("assistant", "", "r", (ToolCall("f", {"a": 1}, "c1"),)),
        Message("tool", "1", tool_call_id="c1"),
        Message("assistant", "done", None, (ToolCall("g", {"b": 2}),)),
    ]


@pytest.mark.parametrize(
    ("content", "reasoning", "answer"),
    [
        ("<think>\nabc\n</think>\n\nyo", "abc", "yo"),
        ("<think>\n\n</think>\n\nyo", "", "yo"),
        ("abc\n</think>\n\nyo", "abc", "yo"),  # a prompt that pre-fills <think>
        ("<think>abc", None, "<think>abc"),
        ("<think>a</think>b</think>c", "a", "b</think>c"),  # the official template drops b
        ("<think>x<think>y</think>z", "x<think>y", "z"),  # ... and x
        ("Well. <think>a</think>b", None, "Well. <think>a</think>b"),  # ... and "Well."
        (" \n<think>a</think>b", "a", "b"),
        ("plain", None, "plain"),
    ],
)
def test_inline_thinking_loses_no_text(content: str, reasoning: str | None, answer: str) -> None:
    [_, message] = messages_from_openai([{"role": "user", "content": "q"}, {"role": "assistant", "content": content}])
    assert (message.reasoning, message.content) == (reasoning, answer)


def test_explicit_reasoning_leaves_content_alone_and_users_may_write_tags() -> None:
    rows = [
        {"role": "user", "content": "x</think>y"},
        {"role": "assistant", "content": "a</think>b", "reasoning_content": "r"},
    ]
    assert messages_from_openai(rows) == [Message("user", "x</think>y"), Message("assistant", "a</think>b", "r")]


def test_to_openai_comes_back() -> None:
    messages = [
        Message("user", "q"),
        Message("assistant", "a</think>b", "r", (ToolCall("f", {"x": [1]}, "id1"),)),
        Message("tool", "1", tool_call_id="c1"),
        Message("assistant", "", None),
    ]
    assert messages_from_openai(messages_to_openai(messages)) == messages
    assert messages_to_openai([Message("assistant", "a</think>b")])[0]["reasoning_content"] == ""


U = {"role": "user", "content": "q"}


@pytest.mark.parametrize(
    ("rows", "where"),
    [
        ([], "messages is empty"),
        ("hello", "list of objects"),
        (None, "list of objects"),
        ([{"role": "bot", "content": "x"}], r"messages\[0\]\.role"),
        ([U, {"role": "user", "content": None}], r"messages\[1\]\.content"),
        ([{"role": "user", "content": 3}], r"messages\[0\]\.content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], r"messages\[0\]\.content\[0\]"),
        ([{"role": "tool", "content": "x"}], r"messages\[0\]\.role is 'tool'"),
        ([{"role": "user", "content": "x", "reasoning_content": "r"}], r"messages\[0\]\.reasoning"),
        ([U, {"role": "assistant", "reasoning_content": 1}], r"messages\[1\]\.reasoning_content"),
        ([U, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}], r"tool_calls\[0\]\.arguments"),
        ([U, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[1]"}]}], "must be a JSON object"),
        ([U, {"role": "assistant", "tool_calls": [{"name": 'f"', "arguments": {}}]}], r"tool_calls\[0\]\.name"),
        ([U, {"role": "assistant", "tool_calls": [{}]}], r"tool_calls\[0\]"),
        ([U, {"role": "assistant", "tool_calls": "f"}], "must be a list"),
        ([{**U, "tool_calls": [{"name": "f", "arguments": {}}]}], "only assistant turns call tools"),
        ([U, {"role": "assistant", "function_call": {"name": "f"}}], "use tool_calls"),
        ([U, {"role": "assistant", "content": None, "refusal": "No."}], r"messages\[1\]\.refusal is not supported"),
        ([U, {"role": "assistant", "reasoning": "a", "reasoning_content": "b"}], r"messages\[1\]\.reasoning.* differ"),
    ],
)
def test_bad_rows_are_named(rows: Any, where: str) -> None:
    with pytest.raises(InputError, match=where):
        messages_from_openai(rows)


def test_bad_records_and_tools_are_named() -> None:
    bad: Any = [Message("user", "q"), {"role": "user"}]
    with pytest.raises(InputError, match=r"messages\[1\] must be a Message"):
        validate_messages(bad)
    with pytest.raises(InputError, match=r"arguments is not JSON"):
        validate_messages([Message("user", "q"), Message("assistant", "", None, (ToolCall("f", {"a": {1}}),))])
    tools: Any = [{"name": "f"}, "g"]
    with pytest.raises(InputError, match=r"tools\[1\]"):
        validate_tools(tools)
    for tools in ({"name": "f"}, 5, iter([{"name": "f"}])):  # an iterator would be used up before it is rendered
        with pytest.raises(InputError, match="tools must be a list"):
            validate_tools(tools)
    for weights in ([1.0], {"1": 1.0}, {1: "x"}, {1: 10**400}):
        with pytest.raises(InputError, match="weights"):
            turn_weights([Message("user", "q"), Message("assistant", "a")], weights)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("texts", "flag"),
    [
        (["hi"], None),
        (["hi /think"], "think"),
        (["hi /no_think"], "no_think"),
        (["/no_think hi /think"], "think"),
        (["/think", "then /no_think."], "no_think"),
        (["see http://a/think and a/no_think"], None),
        (["/thinking /no_thinking /think.py /think/x"], None),
    ],
)
def test_last_flag(texts: list[str], flag: str | None) -> None:
    assert last_flag([Message("user", text) for text in texts]) == flag


def test_last_flag_reads_user_and_system_turns_only() -> None:
    messages = [Message("system", "/no_think"), Message("user", "q"), Message("assistant", "try /think")]
    assert last_flag(messages) == "no_think"


def test_a_misspelled_field_is_an_error_and_a_foreign_one_is_not() -> None:
    row = {"role": "assistant", "content": "4", "resoning_content": "2 + 2"}
    with pytest.raises(
        InputError, match=r"messages\[1\].resoning_content is not a field; did you mean 'reasoning_content'"
    ):
        messages_from_openai([{"role": "user", "content": "2+2"}, row])
    assert messages_from_openai([{"role": "user", "content": "2+2", "created": 7}]) == [Message("user", "2+2")]


def test_tool_results_keep_the_call_they_answer() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {}}}
    rows = [
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "4", "tool_call_id": "c1"},
    ]
    assert messages_to_openai(messages_from_openai(rows)) == rows
