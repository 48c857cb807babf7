"""Requests to ``/v1/messages``, Anthropic's form, read as chats: content blocks become messages, thoughts and calls.

As that protocol has it, there is no thought where ``thinking`` does not ask for one, if the model can be switched: its
clients read the first block as the answer. Not here: the reply (``anthropic_reply.py``), and what a chat means
(``prepare.py``).
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
from twofold.text.policy import Family

Json = dict[str, Any]
_IDLE = (
    "cache_control",
    "context_management",
    "diagnostics",
    "inference_geo",
    "speed",
    "user_profile_id",
    "workspace_id",
)
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_BLOCK_KEYS = {
    "text": {"type", "text", "cache_control", "citations"},
    "thinking": {"type", "thinking", "signature"},
    "redacted_thinking": {"type"},
    "tool_use": {"type", "id", "name", "input", "cache_control", "caller"},
    "tool_result": {"type", "tool_use_id", "content", "cache_control"},
}
_TOOL_KEYS = {"type", "name", "description", "input_schema", "strict", "cache_control", "eager_input_streaming"}
_FIELDS = {"stop": "stop_sequences", "response_format": "output_config.format"}


class OutputConfig(Body):
    """``format``: a JSON schema of the answer. ``effort``: the share of ``max_tokens`` for an adaptive thought."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: Json | None = None


class CountTokensRequest(SamplingFields):
    """``POST /v1/messages/count_tokens``, and what messages share with it; further sampling is that of chats."""

    messages: list[Any]
    system: str | list[Any] | None = None
    tools: list[Any] | None = None
    tool_choice: Json | None = None
    output_config: OutputConfig | None = None
    stop_sequences: list[str] | None = None
    post_thinking: PostThinking | None = None
    stop_loops: bool | None = None
    cache_control: Any = None
    context_management: Any = None
    diagnostics: Any = None
    inference_geo: Any = None
    speed: Any = None
    user_profile_id: Any = None
    workspace_id: Any = None


class MessagesRequest(CountTokensRequest):
    """``POST /v1/messages``."""

    max_tokens: int = Field(ge=1)


def read_messages(data: bytes, family: Family, counting: bool = False) -> tuple[CountTokensRequest, Asked]:
    """A request and the chat it asks for.

    Args:
        data: the body. family: of the model. counting: only tokens are to be counted.

    Raises:
        ApiError: 400, naming the field or block that cannot be honoured.
    """
    kind = CountTokensRequest if counting else MessagesRequest
    body, controls, warnings = read_body(kind, data, thinking=True)
    _refuse(body)
    turns = Turns()
    if body.system:
        turns.add("system", "system", _texts(turns, "system", body.system))
    for number, message in enumerate(body.messages):
        _read_message(turns, f"messages[{number}]", message)
    if not turns.messages:
        raise bad_request("messages is empty; give at least one message", "messages")
    own = {"messages": turns.messages, "stop": body.stop_sequences, **_tools(turns, body), **_answer_form(body)}
    own |= {"post_thinking": body.post_thinking, "stop_loops": body.stop_loops}
    own |= {"stream_options": StreamOptions(include_usage=True) if body.stream else None}
    own["continue_final_message"] = turns.messages[-1]["role"] == "assistant"
    chat = ChatRequest.model_validate(shared_fields(body) | own)
    found = [*_thinking(body, controls, family), *(name for name in _IDLE if getattr(body, name) is not None)]
    warnings = [*warnings, *(f"{name} has no effect here" for name in found), *dict.fromkeys(turns.warnings)]
    return body, Asked(chat, controls, warnings, turns.places, _FIELDS)


def _refuse(body: CountTokensRequest) -> None:
    others = {
        "n": (body.n != 1, "a message is one reply; send several requests"),
        "stop": (body.stop is not None, "use stop_sequences"),
        "response_format": (body.response_format is not None, "use output_config.format"),
        "stream_options": (body.stream_options is not None, "usage is in every stream"),
        "return_token_ids": (body.return_token_ids, "token ids are in /v1/chat/completions"),
    }
    for name, (given, instead) in others.items():
        if given:
            raise bad_request(f"{name} is not supported here; {instead}", name, "unsupported_field")


def _read_message(turns: Turns, where: str, message: Any) -> None:
    message = read_mapping(where, message)
    turns.unread(where, message, ("role", "content"))
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant", "system"):
        raise bad_request(f"{where}.role is {role!r:.40}; use user, assistant or system", f"{where}.role")
    turns.end_turn()
    place = f"{where}.content"
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise bad_request(f"{place} must be a text or a list of blocks", place)
    if role == "assistant":
        for number, block in enumerate(content):
            _read_said(turns, f"{place}[{number}]", _block(turns, f"{place}[{number}]", block))
        turns.end_turn()
    else:
        _read_heard(turns, where, role, content)


def _read_heard(turns: Turns, where: str, role: str, content: list[Any]) -> None:
    """Blocks of a user or system message: texts beside each other are one message, every result is its own."""
    texts: list[str] = []
    results = False
    for number, given in enumerate(content):
        place = f"{where}.content[{number}]"
        block = _block(turns, place, given)
        if block["type"] == "text":
            texts.append(read_string(place, block, "text"))
            continue
        if block["type"] != "tool_result" or role != "user":
            raise bad_request(f"{place} has the type {block['type']!r}; a {role} message cannot have it", place)
        if texts:
            turns.add(where, role, "".join(texts))
        texts, results = [], True
        text = _texts(turns, f"{place}.content", block.get("content") or "")
        turns.result(place, read_string(place, block, "tool_use_id"), text)
    if texts or not results:
        turns.add(where, role, "".join(texts))


def _read_said(turns: Turns, where: str, block: Mapping[str, Any]) -> None:
    """A block of an assistant message."""
    kind = block["type"]
    if kind == "text":
        turns.said(where, read_string(where, block, "text"))
    elif kind == "thinking":
        turns.thought(where, read_string(where, block, "thinking"))
    elif kind == "tool_use":
        arguments = read_mapping(f"{where}.input", block.get("input"))
        turns.called(where, read_string(where, block, "id"), read_string(where, block, "name"), dict(arguments))
    elif kind != "redacted_thinking":  # whose data nobody here can read: unread has said so
        raise bad_request(f"{where} has the type {kind!r}; an assistant message cannot have it", where)


def _block(turns: Turns, where: str, given: Any) -> Mapping[str, Any]:
    block = read_mapping(where, given)
    kind = block.get("type")
    if kind not in _BLOCK_KEYS:
        raise bad_request(f"{where} has the type {kind!r:.40}; use one of {', '.join(_BLOCK_KEYS)}", where)
    turns.unread(where, block, _BLOCK_KEYS[kind])
    if block.get("cache_control"):
        turns.warnings.append("cache_control has no effect here")
    return block


def _texts(turns: Turns, where: str, given: Any) -> str:
    """A text or text blocks."""
    if isinstance(given, list):
        for number, block in enumerate(given):
            _block(turns, f"{where}[{number}]", block)
    return read_text(where, given, ("text",))


def _tools(turns: Turns, body: CountTokensRequest) -> Json:
    """``tools`` and ``tool_choice`` as chats have them."""
    tools = body.tools or []
    for number, tool in enumerate(tools):
        where = f"tools[{number}]"
        kind = read_mapping(where, tool).get("type") or "custom"
        if kind != "custom":
            raise bad_request(f"{where} has the type {kind!r:.40}; only tools of the caller are served", where)
        turns.unread(where, tool, _TOOL_KEYS)
        if tool.get("cache_control"):
            turns.warnings.append("cache_control has no effect here")
    made: Json = {"tools": [as_tool(f"tools[{n}]", tool, "input_schema") for n, tool in enumerate(tools)] or None}
    if body.tool_choice is None:
        return made
    kind = body.tool_choice.get("type")
    if kind == "tool":
        made["tool_choice"] = named_tool(body.tool_choice.get("name"), tools, "tool_choice.name")
    elif kind not in _CHOICES:
        raise bad_request(f"tool_choice.type is {kind!r:.40}; use auto, any, tool or none", "tool_choice")
    elif tools or kind == "any":
        made["tool_choice"] = _CHOICES[kind]
    made["parallel_tool_calls"] = body.tool_choice.get("disable_parallel_tool_use") is not True
    return made


def _answer_form(body: CountTokensRequest) -> Json:
    """``output_config.format`` as the ``response_format`` of chats."""
    form = body.output_config.format if body.output_config is not None else None
    if form is None:
        return {}
    if form.get("type") != "json_schema":
        raise bad_request("output_config.format.type can only be 'json_schema'", "output_config.format")
    schema = read_mapping("output_config.format.schema", form.get("schema"))
    return {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}


def _thinking(body: CountTokensRequest, controls: Json, family: Family) -> list[str]:
    """Put ``thinking`` and ``output_config.effort`` into the controls of chats; returns what has no effect."""
    effort = body.output_config.effort if body.output_config is not None else None
    if not controls and family.prompt == "switch":
        controls["thinking"] = {"type": "disabled"}
    thinking = controls.get("thinking")
    if isinstance(thinking, dict) and "display" in thinking:
        thinking = {key: value for key, value in thinking.items() if key != "display"}
        shown = controls["thinking"]["display"]
        if shown not in (None, "summarized", "omitted"):
            raise bad_request(f"thinking.display is {shown!r:.40}; use summarized or omitted", "thinking.display")
        controls["thinking"] = thinking
        if shown == "omitted":
            controls["include_reasoning"] = False
    if effort is None:
        return []
    bounded = isinstance(thinking, dict) and (thinking.get("type") == "disabled" or "budget_tokens" in thinking)
    if bounded or not family.thinks:
        return ["output_config.effort without an adaptive thought"]
    if effort != "max":  # which is no limit but max_tokens
        controls["reasoning_effort"] = effort
    return []
