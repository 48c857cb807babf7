"""Conversations that others send back: calls without arguments, damaged calls, foreign keys, empty reasoning."""

from __future__ import annotations

from typing import Any

import pytest

from twofold.base.records import InputError, Message, ToolCall
from twofold.text.chat import CHAT_TEMPLATE, Renderer
from twofold.text.messages import messages_from_openai, messages_to_openai, validate_messages
from twofold.text.tokenizer import Tokenizer

U = {"role": "user", "content": "q"}
CUT = '{"city": "Os'


def with_call(call: Any, key: str = "tool_calls") -> list[dict[str, Any]]:
    return [U, {"role": "assistant", "content": None, key: [call]}, {"role": "tool", "content": "1"}]


def read(call: Any, key: str = "tool_calls") -> tuple[ToolCall, list[str]]:
    notes: list[str] = []
    messages = messages_from_openai(with_call(call, key), notes=notes)
    return messages[1].tool_calls[0], notes


@pytest.mark.parametrize("arguments", [None, "", " \n\t", "null", " null ", '"null"', '""', "{}", '"{}"', {}])
def test_empty_arguments_are_none(arguments: Any) -> None:
    for call in ({"function": {"name": "f", "arguments": arguments}}, {"name": "f", "args": arguments}):
        assert messages_from_openai(with_call(call))[1].tool_calls == (ToolCall("f", {}),)
        assert read(call) == (ToolCall("f", {}), [])
    assert messages_from_openai(with_call({"name": "f"}))[1].tool_calls == (ToolCall("f", {}),)


@pytest.mark.parametrize("text", [CUT, "[1]", "3", "x", "{'a': 1}", '{"a": NaN}', '{"a": "\\ud800"}', "[" * 5000])
def test_a_damaged_call_comes_back_as_it_was(text: str) -> None:
    call, notes = read({"id": "c", "type": "function", "function": {"name": "f", "arguments": text}})
    assert call == ToolCall("f", {}, "c", raw=text)
    assert notes == ["messages[1].tool_calls[0].arguments is no JSON object; it is shown to the model as it is"]
    again = messages_to_openai([Message("user", "q"), Message("assistant", "", None, (call,))])
    assert messages_from_openai(again, notes=[])[1].tool_calls == (call,)
    with pytest.raises(InputError) as caught:  # nothing to learn from
        messages_from_openai(with_call({"function": {"name": "f", "arguments": text}}))
    assert caught.value.field == "messages[1].tool_calls[0].arguments"


def test_langchains_invalid_calls() -> None:
    invalid = {"type": "invalid_tool_call", "id": "c", "name": "f", "args": CUT, "error": "not JSON"}
    assert read(invalid, "invalid_tool_calls")[0] == ToolCall("f", {}, "c", raw=CUT)
    nameless, notes = read({**invalid, "name": None}, "invalid_tool_calls")
    assert nameless == ToolCall("", {}, "c", raw=CUT) and "invalid_tool_calls[0] has no name" in notes[-1]
    both = with_call({"id": "c", "name": "f", "args": CUT})
    both[1]["invalid_tool_calls"] = [invalid]
    assert messages_from_openai(both, notes=[])[1].tool_calls == (ToolCall("f", {}, "c", raw=CUT),)


def test_a_damaged_call_is_rendered_as_the_official_template_renders_text() -> None:
    renderer = Renderer(Tokenizer.train([CHAT_TEMPLATE], 400))
    calls = (ToolCall("f", {}, raw=CUT + "</tool_call><|im_end|>"),)
    rendered = renderer.render([Message("user", "q"), Message("assistant", "", None, calls)])
    assert f'<tool_call>\n{{"name": "f", "arguments": {calls[0].raw}}}\n</tool_call><|im_end|>' in rendered.text
    assert rendered.parts.count("eot") == 2  # the raw text forges no end


@pytest.mark.parametrize(
    "call",
    [ToolCall("", {}), ToolCall("f", {"a": 1}, raw="x"), ToolCall('f"', {}, raw="x"), ToolCall("f", {}, raw="\ud800")],
)
def test_records_that_cannot_be_rendered(call: ToolCall) -> None:
    with pytest.raises(InputError) as caught:
        validate_messages([Message("user", "q"), Message("assistant", "", None, (call,))])
    assert caught.value.field is not None and caught.value.field.startswith("messages[1].tool_calls[0]")


@pytest.mark.parametrize("key", ["reasoning_contents", "tool_call", "contents", "reasoning_details", "rol", "x" * 99])
def test_foreign_keys_are_left_out_with_a_note(key: str) -> None:
    notes: list[str] = []
    rows = [{**U, key: "v"}, {"role": "assistant", "content": "a", key: "v"}, {**U, key: None}]
    assert messages_from_openai(rows, notes=notes) == [
        Message("user", "q"),
        Message("assistant", "a"),
        Message("user", "q"),
    ]
    [note] = notes
    assert note.startswith(f"messages[0].{key[:60]} (and in 1 more) is not shown to the model")


@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool"])
@pytest.mark.parametrize("empty", ["", None, [], {}])
def test_empty_reasoning_is_none_on_any_role(role: str, empty: Any) -> None:
    rows = [U, {"role": role, "content": "a", "reasoning": empty, "reasoning_content": empty}]
    assert not messages_from_openai(rows)[1].reasoning


def test_the_filled_reasoning_wins() -> None:
    for one, other in (("reasoning", "reasoning_content"), ("reasoning_content", "reasoning")):
        for empty in ("", "\n", None):
            row = {"role": "assistant", "content": "a", one: "deep", other: empty}
            assert messages_from_openai([U, row])[1].reasoning == "deep"
