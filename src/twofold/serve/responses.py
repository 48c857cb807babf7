"""Requests to ``/v1/responses``, OpenAI's newer form, read as chats: items become messages, flat tools nested ones.

Nothing is kept between requests, so every request carries its whole conversation. Not here: the reply
(``responses_reply.py``), and what a chat means (``prepare.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from twofold.serve.asked import (
    Asked,
    Turns,
    as_tool,
    named_tool,
    read_mapping,
    read_string,
    read_text,
    shared_fields,
)
from twofold.serve.errors import bad_request
from twofold.serve.protocol import Body, ChatRequest, PostThinking, SamplingFields, StreamOptions, read_body

Json = dict[str, Any]
_TEXTS = ("input_text", "output_text", "text")
_ITEM_KEYS = {"type", "id", "status", "role", "content", "phase"}
_THOUGHT_KEYS = {"type", "id", "status", "content", "summary"}
_CALL_KEYS = {"type", "id", "status", "call_id", "name", "arguments"}
_RESULT_KEYS = {"type", "id", "status", "call_id", "output"}
_KEPT = "replies are not kept here; send the whole conversation in input"
_CHOICES = 'none, auto, required or {"type": "function", "name": ...}'
_FIELDS = {"max_tokens": "max_output_tokens", "response_format": "text.format"}


class TextConfig(Body):
    """The form of the answer: ``format`` as text, JSON or a JSON schema."""

    format: Json | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ResponseStreamOptions(StreamOptions):
    """Usage is in the last event of every stream."""

    include_obfuscation: bool = False


class ResponsesRequest(SamplingFields):
    """``POST /v1/responses``; sampling fields beyond OpenAI's are those of chats."""

    input: str | list[Any]
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    text: TextConfig | None = None
    tools: list[Any] | None = None
    tool_choice: str | Json | None = None
    parallel_tool_calls: bool = True
    truncation: str = "disabled"
    include: list[str] | None = None
    background: bool = False
    previous_response_id: str | None = None
    conversation: str | Json | None = None
    prompt: Json | None = None
    max_tool_calls: int | None = None
    top_logprobs: int | None = None
    prompt_cache_options: Json | None = None
    stream_options: ResponseStreamOptions | None = None
    post_thinking: PostThinking | None = None
    stop_loops: bool | None = None


def read_responses(data: bytes) -> tuple[ResponsesRequest, Asked]:
    """A request and the chat it asks for.

    Raises:
        ApiError: 400, naming the field or item that cannot be honoured.
    """
    body, controls, warnings = read_body(ResponsesRequest, data, thinking=True)
    _refuse(body)
    turns = Turns()
    if body.instructions is not None:
        turns.add("instructions", "system", body.instructions)
    if isinstance(body.input, str):
        turns.add("input", "user", body.input)
    else:
        for number, item in enumerate(body.input):
            _read_item(turns, f"input[{number}]", item)
    if not body.input:
        raise bad_request("input is empty; give a text or at least one item", "input")
    own = {"messages": turns.messages, "parallel_tool_calls": body.parallel_tool_calls, **_answer_form(body)}
    own |= {"post_thinking": body.post_thinking, "stop_loops": body.stop_loops, **_tools(body)}
    own |= {
        "max_tokens": body.max_output_tokens,
        "stream_options": StreamOptions(include_usage=True) if body.stream else None,
    }
    chat = ChatRequest.model_validate(shared_fields(body) | own)
    warnings = [*warnings, *turns.warnings, *_without_effect(body, controls)]
    return body, Asked(chat, controls, warnings, turns.places, _FIELDS)


def _refuse(body: ResponsesRequest) -> None:
    """Raise ApiError for what asks for more than one reply to one conversation."""
    for name in ("previous_response_id", "conversation"):
        if getattr(body, name) is not None:
            raise bad_request(f"{name} is not supported: {_KEPT}", name, "unsupported_field")
    others = {
        "max_tokens": (body.max_tokens is not None, "use max_output_tokens"),
        "n": (body.n != 1, "a response is one reply; send several requests"),
        "background": (body.background, f"wait for the reply, or stream it: {_KEPT}"),
        "prompt": (body.prompt is not None, "stored prompts are OpenAI's; write it into instructions"),
        "truncation": (body.truncation != "disabled", "only disabled is served: what does not fit is an error"),
        "top_logprobs": (bool(body.top_logprobs), "log-probabilities are in /v1/chat/completions"),
        "include": ("message.output_text.logprobs" in (body.include or ()), "use /v1/chat/completions with logprobs"),
        "return_token_ids": (body.return_token_ids, "token ids are in /v1/chat/completions"),
    }
    for name, (given, instead) in others.items():
        if given:
            raise bad_request(f"{name} is not supported here; {instead}", name, "unsupported_field")


def _read_item(turns: Turns, where: str, item: Any) -> None:
    item = read_mapping(where, item)
    kind = item.get("type", "message")
    readers = {
        "message": _read_message,
        "reasoning": _read_thought,
        "function_call": _read_call,
        "function_call_output": _read_result,
    }
    if kind == "item_reference":
        raise bad_request(f"{where} refers to an earlier item; {_KEPT}", where, "unsupported_field")
    if kind not in readers:
        raise bad_request(f"{where} has the type {kind!r:.40}; use one of {', '.join(readers)}", where)
    readers[kind](turns, where, item)


def _read_message(turns: Turns, where: str, item: Mapping[str, Any]) -> None:
    turns.unread(where, item, _ITEM_KEYS)
    role = item.get("role")
    if role not in ("user", "assistant", "system", "developer"):
        raise bad_request(f"{where}.role is {role!r:.40}; use user, assistant, system or developer", f"{where}.role")
    text = read_text(f"{where}.content", item.get("content"), _TEXTS)
    if role != "assistant":
        turns.add(where, role, text)
        return
    if turns.spoken:
        turns.end_turn()
    turns.said(where, text)


def _read_thought(turns: Turns, where: str, item: Mapping[str, Any]) -> None:
    """A thought; of one that has only a summary, the summary is all there is to show."""
    turns.unread(where, item, _THOUGHT_KEYS)
    parts = item.get("content") or item.get("summary") or []
    turns.thought(where, read_text(f"{where}.content", parts, ("reasoning_text", "summary_text", "text")))


def _read_call(turns: Turns, where: str, item: Mapping[str, Any]) -> None:
    turns.unread(where, item, _CALL_KEYS)
    name, arguments = read_string(where, item, "name"), read_string(where, item, "arguments")
    turns.called(where, read_string(where, item, "call_id"), name, arguments)


def _read_result(turns: Turns, where: str, item: Mapping[str, Any]) -> None:
    turns.unread(where, item, _RESULT_KEYS)
    turns.result(where, read_string(where, item, "call_id"), read_text(f"{where}.output", item.get("output"), _TEXTS))


def _tools(body: ResponsesRequest) -> Json:
    """``tools`` and ``tool_choice`` as chats have them."""
    tools = body.tools or []
    for number, tool in enumerate(tools):
        kind = read_mapping(f"tools[{number}]", tool).get("type")
        if kind != "function":
            where = f"tools[{number}]"
            raise bad_request(f"{where} has the type {kind!r:.40}; only functions of the caller are served", where)
    made = [as_tool(f"tools[{number}]", tool, "parameters") for number, tool in enumerate(tools)]
    choice = body.tool_choice
    if isinstance(choice, dict):
        if choice.get("type") != "function":
            raise bad_request(f"tool_choice must be {_CHOICES}", "tool_choice")
        choice = named_tool(choice.get("name"), tools, "tool_choice.name")
    elif choice not in (None, "none", "auto", "required"):
        raise bad_request(f"tool_choice is {choice!r:.40}; it must be {_CHOICES}", "tool_choice")
    if not tools and choice == "auto":
        choice = None  # what clients send where there are none
    return {"tools": made or None, "tool_choice": choice}


def _answer_form(body: ResponsesRequest) -> Json:
    """``text.format`` as the ``response_format`` of chats."""
    form = body.text.format if body.text is not None else None
    if form is None:
        return {}
    kind = form.get("type")
    if kind not in ("text", "json_object", "json_schema"):
        raise bad_request(f"text.format.type is {kind!r:.40}; use text, json_object or json_schema", "text.format")
    if body.response_format is not None:
        raise bad_request("text.format and response_format are the same; keep text.format", "response_format")
    if kind != "json_schema":
        return {"response_format": {"type": kind}}
    schema = read_mapping("text.format.schema", form.get("schema"))
    return {
        "response_format": {"type": kind, "json_schema": {"name": str(form.get("name", "answer")), "schema": schema}}
    }


def _without_effect(body: ResponsesRequest, controls: Json) -> list[str]:
    """Warnings about fields that change nothing; takes out of ``controls`` what only other servers have."""
    found = [name for name in ("max_tool_calls", "prompt_cache_options") if getattr(body, name) is not None]
    found += [f"include {name!r}" for name in body.include or ()]
    if body.text is not None and body.text.verbosity not in (None, "medium"):
        found.append("text.verbosity")
    reasoning = controls.get("reasoning")
    if isinstance(reasoning, dict):
        own = {key: value for key, value in reasoning.items() if key not in ("summary", "generate_summary", "context")}
        found += [f"reasoning.{key}" for key in reasoning if key not in own and reasoning[key] is not None]
        if own.get("effort") == "max":
            own["effort"], own["enabled"] = None, True  # no limit but max_output_tokens
        controls["reasoning"] = own
    return [f"{name} has no effect here" for name in found]
