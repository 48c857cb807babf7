"""Turns of rows: speakers by any name, tool calls and results spelled in text."""

from __future__ import annotations

from typing import Any

import pytest

from twofold.base.records import InputError, Message, ToolCall
from twofold.text.formats import read_example

CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1, "b": null}}\n</tool_call>'
READ = ToolCall("f", {"a": 1, "b": None})
Q = {"from": "human", "value": "q"}
RESULT = "<tool_response>\n{}\n</tool_response>"


def last(text: str, **more: Any) -> Message:
    return read_example(
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": text, **more}]}
    ).messages[-1]


def test_a_hermes_row_is_what_the_template_writes() -> None:
    turns = [
        {"from": "system", "value": "You call functions."},
        Q,
        {"from": "gpt", "value": f"<think>\nr\n</think>\n\nI look.\n{CALL}\n{CALL}"},
        {"from": "tool", "value": RESULT.format("1") + "\n" + RESULT.format("2\n")},
        {"from": "gpt", "value": "It is 1."},
    ]
    read = read_example({"conversations": turns, "tools": '[{"type": "function", "function": {"name": "f"}}]'})
    assert read.messages[2:] == (
        Message("assistant", "I look.", "r", (READ, READ)),
        Message("tool", "1"),
        Message("tool", "2\n"),
        Message("assistant", "It is 1."),
    )


def test_calls_in_every_chat_format() -> None:
    user, turn = {"role": "user", "content": "q"}, {"role": "assistant", "content": CALL}
    for row in (
        {"messages": [user, turn]},
        {"conversations": [Q, {"from": "gpt", "value": CALL}]},
        {"conversations": [Q, {"from": "function_call", "value": CALL}]},
        {"instruction": "q", "output": CALL},
        {"prompt": [user], "completion": [turn]},
        {"messages": [user, {**turn, "content": [{"type": "text", "text": CALL}], "tool_calls": []}]},
    ):
        assert read_example(row).messages == (Message("user", "q"), Message("assistant", "", None, (READ,)))
    assert last("<tool_call>{'name': 'f', 'arguments': {'a': True,}}</tool_call>").tool_calls[0].arguments == {
        "a": True
    }
    xml = "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>"
    assert last(xml).tool_calls == (ToolCall("f", {"a": "1"}),)
    assert last("a", reasoning_content="I could write <tool_call>.").reasoning == "I could write <tool_call>."


@pytest.mark.parametrize(
    ("text", "more", "message"),
    [
        ("<tool_call>{oops</tool_call>", {}, r"messages\[1\] spells a tool call that cannot be read \(malformed"),
        ('<tool_call>{"name": "f", "arguments": {}}', {}, "not closed"),
        ("Write <tool_call> to call.", {}, "cannot be read"),
        ("so </tool_call>", {}, "without an open tool call"),
        (f"{CALL} and then?", {}, "text stands behind a call"),
        (f"{CALL}x{CALL}", {}, "text stands behind a call"),
        (f"a<|im_end|>{CALL}", {}, "a control token ends it"),
        (f"<think>{CALL}</think>a", {}, "inside the thought"),
        ("a", {"reasoning": CALL}, "inside the thought"),
        (CALL, {"tool_calls": [{"name": "f", "arguments": {}}]}, "as well"),
        ("a", {"thinking": "r"}, "thinking is not read; name it reasoning_content"),
    ],
)
def test_what_cannot_be_read_is_reported(text: str, more: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        last(text, **more)


@pytest.mark.parametrize(
    "row",
    [
        {"text": f"q\n{CALL}"},
        {"prompt": "q", "completion": CALL},
        {"text": "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"},
        {"prompt": "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n", "completion": "a"},
    ],
)
def test_plain_text_that_spells_a_chat_is_reported(row: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="whose tags are no tokens here"):
        read_example(row)


def test_a_family_without_tools_keeps_calls_as_text() -> None:
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": CALL}]}
    assert read_example(row, inline_calls=False).messages[1] == Message("assistant", CALL)
    assert read_example({"text": CALL}, inline_calls=False).segments == ((CALL, 1.0),)


def test_results_are_taken_out_of_their_tags_and_other_text_is_data() -> None:
    def third(role: str, text: str, before: dict[str, Any]) -> list[Message]:
        turns = [{"role": "user", "content": "q"}, {"role": "assistant", **before}, {"role": role, "content": text}]
        return list(read_example({"messages": turns}).messages[2:])

    called: dict[str, Any] = {"content": CALL}
    assert third("tool", RESULT.format("1"), called) == [Message("tool", "1")]
    assert third("user", RESULT.format("1"), called) == [Message("tool", "1")]
    assert third("user", RESULT.format("1"), {"content": "a"}) == [Message("user", RESULT.format("1"))]
    for text in ("1", "see <tool_response>", RESULT.format("1") + "more", "<tool_response>1"):
        assert third("tool", text, called) == [Message("tool", text)]


@pytest.mark.parametrize(
    ("speaker", "role"),
    [("Human", "user"), ("USER", "user"), ("model", "assistant"), ("chatgpt", "assistant"), ("function", "tool")],
)
def test_speakers_by_other_names(speaker: str, role: str) -> None:
    before = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    for turn in ({"from": speaker, "value": "x"}, {"role": speaker, "content": "x"}):
        for column in ("messages", "conversations"):
            assert read_example({column: [*before, turn]}).messages[2] == Message(role, "x")  # type: ignore[arg-type]
    for turn in ({"from": "asistant", "value": "x"}, {"role": "asistant", "content": "x"}):
        with pytest.raises(InputError, match="asistant"):
            read_example({"messages": [*before, turn]})


def test_a_turn_of_calls() -> None:
    turn = {"role": "tool_call", "content": '{"name": "f", "arguments": {"a": 1, "b": null}}'}
    assert read_example({"messages": [{"role": "user", "content": "q"}, turn]}).messages[1].tool_calls == (READ,)
    sharegpt = {"from": "gpt", "value": "a", "reasoning_content": "r"}
    assert read_example({"conversations": [Q, sharegpt]}).messages[1].reasoning == "r"
