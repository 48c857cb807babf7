"""Bodies of ``/v1/responses`` and ``/v1/messages`` become the chats they mean; refusals name the caller's places."""

from __future__ import annotations

import json
from typing import Any

import pytest

from twofold.serve.anthropic import read_messages
from twofold.serve.asked import Asked
from twofold.serve.errors import ApiError, bad_request
from twofold.serve.responses import read_responses
from twofold.text.policy import Family

SWITCH = Family(thinks=True, prompt="switch", tools=True)
ALWAYS = Family(thinks=True, prompt="open", tools=True)
NEVER = Family(thinks=False, prompt="plain", tools=False)
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
HI = [{"role": "user", "content": "hi"}]


def responses(**fields: Any) -> Asked:
    return read_responses(json.dumps({"input": "hi", **fields}).encode())[1]


def messages(family: Family = SWITCH, counting: bool = False, **fields: Any) -> Asked:
    given = {"messages": HI, **({} if counting else {"max_tokens": 50}), **fields}
    return read_messages(json.dumps(given).encode(), family, counting)[1]


def call(name: str, arguments: Any, call_id: str) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def test_items_become_messages() -> None:
    items = [
        {"role": "developer", "content": "be short"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "f", "arguments": "{}"},
        {"type": "function_call", "call_id": "c2", "name": "g", "arguments": '{"x": 1}', "status": "completed"},
        {"type": "function_call_output", "call_id": "c1", "output": "one"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "two"}]},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "so"}], "encrypted_content": None},
        {"role": "assistant", "content": [{"type": "output_text", "text": "b", "annotations": []}]},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "d"},
    ]
    asked = responses(instructions="you are x", input=items)
    assert asked.chat.messages == [
        {"role": "system", "content": "you are x"},
        {"role": "developer", "content": "be short"},
        {"role": "user", "content": "a"},
        {
            "role": "assistant",
            "reasoning_content": "hm",
            "tool_calls": [call("f", "{}", "c1"), call("g", '{"x": 1}', "c2")],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "one"},
        {"role": "tool", "tool_call_id": "c2", "content": "two"},
        {"role": "assistant", "reasoning_content": "so", "content": "b"},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "d"},
    ]
    assert asked.warnings == [] and not asked.chat.continue_final_message


def test_text_after_a_call_belongs_to_the_turn_of_the_call() -> None:
    """A stream may give text, a call, and text again; sent back, they are one turn, so that the result follows it."""
    items = [
        {"role": "assistant", "content": "a"},
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
        {"role": "assistant", "content": "b"},
        {"type": "function_call_output", "call_id": "c1", "output": ""},
    ]
    assert [message["role"] for message in responses(input=items).chat.messages] == ["assistant", "tool"]


def test_a_thought_that_was_not_shown_is_none() -> None:
    items = [{"type": "reasoning", "summary": [], "encrypted_content": "x"}, {"role": "assistant", "content": "a"}, *HI]
    asked = responses(input=items)
    assert asked.chat.messages[0] == {"role": "assistant", "content": "a"}
    assert asked.warnings == ["input[0].encrypted_content is not shown to the model"]
    blocks = [{"type": "thinking", "thinking": "", "signature": "x"}, {"type": "text", "text": "a"}]
    rows = [{"role": "assistant", "content": blocks}, *HI]
    assert messages(messages=rows).chat.messages[0] == {"role": "assistant", "content": "a"}


def test_fields_of_responses() -> None:
    form = {"type": "json_schema", "name": "place", "schema": SCHEMA, "strict": True}
    tool = {"type": "function", "name": "f", "description": "d", "parameters": SCHEMA, "strict": None}
    asked = responses(
        max_output_tokens=9, temperature=0.5, top_k=3, seed=4, stream=True, parallel_tool_calls=False,
        text={"format": form, "verbosity": "medium"}, tools=[tool], tool_choice={"type": "function", "name": "f"},
        reasoning={"effort": "low", "summary": "auto"}, store=False, include=["reasoning.encrypted_content"],
        stream_options={"include_obfuscation": False},
    )  # fmt: skip
    chat = asked.chat
    assert (chat.max_tokens, chat.temperature, chat.top_k, chat.seed, chat.stream) == (9, 0.5, 3, 4, True)
    assert chat.stream_options is not None and chat.stream_options.include_usage and not chat.parallel_tool_calls
    assert chat.response_format is not None and chat.response_format.json_schema is not None
    assert chat.response_format.json_schema.model_schema == SCHEMA
    assert chat.tools == [{"type": "function", "function": {"name": "f", "description": "d", "parameters": SCHEMA}}]
    assert chat.tool_choice == {"type": "function", "function": {"name": "f"}}
    assert asked.controls == {"reasoning": {"effort": "low"}}
    assert asked.warnings == [
        f"{name} has no effect here" for name in ("store", "include 'reasoning.encrypted_content'", "reasoning.summary")
    ]
    assert responses(tool_choice="auto", tools=[]).chat.tool_choice is None
    assert responses(reasoning={"effort": "max"}).controls["reasoning"] == {"effort": None, "enabled": True}
    assert responses(text={"format": {"type": "text"}}).chat.response_format is not None


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "send the whole conversation in input"),
        ({"conversation": "conv_1"}, "conversation", "send the whole conversation in input"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0]", "refers to an earlier item"),
        ({"background": True}, "background", "wait for the reply"),
        ({"prompt": {"id": "p"}}, "prompt", "write it into instructions"),
        ({"truncation": "auto"}, "truncation", "only disabled"),
        ({"max_tokens": 5}, "max_tokens", "use max_output_tokens"),
        ({"n": 2}, "n", "one reply"),
        ({"include": ["message.output_text.logprobs"]}, "include", "with logprobs"),
        ({"input": []}, "input", "input is empty"),
        ({"input": ["x"]}, "input[0]", "must be an object"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role", "use user, assistant"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]", "'input_image'"),
        ({"input": [{"type": "computer_call"}]}, "input[0]", "has the type 'computer_call'; use one of message"),
        ({"input": [{"type": "function_call", "name": "f", "call_id": "c"}]}, "input[0].arguments", "must be a text"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]", "only functions of the caller"),
        ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice", "none of tools"),
        ({"tool_choice": "any"}, "tool_choice", "none, auto, required"),
        ({"text": {"format": {"type": "xml"}}}, "text.format", "json_schema"),
        ({"text": {"form": {}}}, "text", "is not a field"),
        ({"imput": "x"}, "imput", "did you mean 'input'"),
    ],
)
def test_what_responses_refuse(fields: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(ApiError, match=words.replace("[", r"\[")) as caught:
        responses(**fields)
    assert caught.value.status == 400 and caught.value.param == param


def test_blocks_become_messages() -> None:
    asked = messages(
        system=[
            {"type": "text", "text": "be "},
            {"type": "text", "text": "short", "cache_control": {"type": "ephemeral"}},
        ],
        messages=[
            {"role": "user", "content": "a"},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": "unsigned"},
                    {"type": "text", "text": "b"},
                    {"type": "tool_use", "id": "c1", "name": "f", "input": {"x": 1}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "one"}]},
                    {"type": "tool_result", "tool_use_id": "c2", "is_error": True},
                    {"type": "text", "text": "c"},
                    {"type": "text", "text": "d"},
                ],
            },
        ],
    )
    assert asked.chat.messages == [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "reasoning_content": "hm", "content": "b", "tool_calls": [call("f", {"x": 1}, "c1")]},
        {"role": "tool", "tool_call_id": "c1", "content": "one"},
        {"role": "tool", "tool_call_id": "c2", "content": ""},
        {"role": "user", "content": "cd"},
    ]  # fmt: skip
    assert asked.warnings == [
        "cache_control has no effect here",
        "messages[2].content[1].is_error is not shown to the model",
    ]
    last = messages(messages=[*HI, {"role": "assistant", "content": "The answer is"}]).chat
    assert last.continue_final_message and last.messages[-1]["content"] == "The answer is"


def test_fields_of_messages() -> None:
    tool = {"name": "f", "description": "d", "input_schema": SCHEMA}
    asked = messages(
        max_tokens=9, temperature=0.5, top_k=3, stop_sequences=["x"], tools=[tool], stream=True,
        tool_choice={"type": "any", "disable_parallel_tool_use": True}, metadata={"user_id": "u"},
        output_config={"format": {"type": "json_schema", "schema": SCHEMA}},
    )  # fmt: skip
    chat = asked.chat
    assert (chat.max_tokens, chat.temperature, chat.top_k, chat.stop) == (9, 0.5, 3, ["x"])
    assert chat.tools == [{"type": "function", "function": {"name": "f", "description": "d", "parameters": SCHEMA}}]
    assert chat.tool_choice == "required" and not chat.parallel_tool_calls
    assert chat.response_format is not None and chat.response_format.type == "json_schema"
    assert chat.stream_options is not None and chat.stream_options.include_usage
    assert asked.warnings == ["metadata has no effect here"]
    assert messages(tools=[tool], tool_choice={"type": "tool", "name": "f"}).chat.tool_choice == {
        "type": "function",
        "function": {"name": "f"},
    }
    assert messages(counting=True).chat.max_tokens is None


@pytest.mark.parametrize(
    ("family", "fields", "controls", "warned"),
    [
        (SWITCH, {}, {"thinking": {"type": "disabled"}}, 0),
        (ALWAYS, {}, {}, 0),
        (NEVER, {}, {}, 0),
        (SWITCH, {"enable_thinking": True}, {"enable_thinking": True}, 0),
        (
            SWITCH,
            {"thinking": {"type": "enabled", "budget_tokens": 7}},
            {"thinking": {"type": "enabled", "budget_tokens": 7}},
            0,
        ),
        (
            SWITCH,
            {"thinking": {"type": "adaptive", "display": "omitted"}},
            {"thinking": {"type": "adaptive"}, "include_reasoning": False},
            0,
        ),
        (
            SWITCH,
            {"thinking": {"type": "adaptive"}, "output_config": {"effort": "low"}},
            {"thinking": {"type": "adaptive"}, "reasoning_effort": "low"},
            0,
        ),
        (
            SWITCH,
            {"thinking": {"type": "adaptive"}, "output_config": {"effort": "max"}},
            {"thinking": {"type": "adaptive"}},
            0,
        ),
        (SWITCH, {"output_config": {"effort": "low"}}, {"thinking": {"type": "disabled"}}, 1),
        (ALWAYS, {"output_config": {"effort": "low"}}, {"reasoning_effort": "low"}, 0),
        (NEVER, {"output_config": {"effort": "low"}}, {}, 1),
    ],
)
def test_thinking_in_messages(family: Family, fields: dict[str, Any], controls: dict[str, Any], warned: int) -> None:
    asked = messages(family, **fields)
    assert asked.controls == controls and len(asked.warnings) == warned


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"messages": []}, "messages", "messages is empty"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "use user, assistant"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "messages[0].content[0]",
            "'image'; use one of",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_use"}]}]},
            "messages[0].content[0]",
            "a user message",
        ),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": "f"}]}]},
            "messages[0].content[0].input",
            "object",
        ),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "list of blocks"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0]", "only tools of the caller"),
        ({"tool_choice": {"type": "required"}}, "tool_choice", "auto, any, tool or none"),
        ({"tool_choice": {"type": "tool", "name": "f"}}, "tool_choice", "none of tools"),
        ({"thinking": {"type": "adaptive", "display": "full"}}, "thinking.display", "summarized or omitted"),
        ({"stop": ["x"]}, "stop", "use stop_sequences"),
        ({"n": 2}, "n", "one reply"),
        ({"max_tokens": None}, "max_tokens", "max_tokens is missing"),
    ],
)
def test_what_messages_refuse(fields: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(ApiError, match=words) as caught:
        messages(**fields)
    assert caught.value.status == 400 and caught.value.param == param


def test_errors_of_lower_layers_name_the_callers_places() -> None:
    items = [*HI, {"type": "function_call", "call_id": "c", "name": "f", "arguments": "["}]
    asked = responses(instructions="x", input=items)
    error = asked.located(bad_request("messages[2].tool_calls[0].arguments is text", "messages[2].tool_calls[0]"))
    assert (error.message, error.param) == ("input[1].arguments is text", "input[1]")
    error = asked.located(bad_request("response_format has no effect", "tools[1].function.name"))
    assert (error.message, error.param) == ("text.format has no effect", "tools[1].name")
    told = messages(system="x").located(bad_request("stop has an empty string; messages[1].content is bad", "stop"))
    assert (told.message, told.param) == (
        "stop_sequences has an empty string; messages[0].content is bad",
        "stop_sequences",
    )
