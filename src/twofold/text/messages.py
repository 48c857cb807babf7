"""Checked conversations: validation, the OpenAI / Hugging Face dictionary form, and the soft switches.

Also the loss weights of turns and parts. Everything here works on text. Not here: tokens (``chat.py``), other file
formats (``formats.py``), and the parsing of what a model sampled (``parse.py``).
"""

from __future__ import annotations

import difflib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from twofold.base.records import InputError, Message, Role, ToolCall
from twofold.text.calls import name_fault

Tools = Sequence[Mapping[str, Any]]

_ROLES: dict[str, Role] = {"system": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
_UNSUPPORTED = {  # what an assistant said, in fields that no template shows
    "function_call": "use tool_calls",
    "refusal": "write its text into content",
    "audio": "write its transcript into content",
}
_KEYS = ("role", "content", "reasoning_content", "reasoning", "tool_calls", "tool_call_id")
_SOFT_SWITCH = re.compile(r"(?<!\S)/(no_think|think)(?=[.,;:!?)\"']*(?:\s|$))")


@dataclass(frozen=True, slots=True)
class TurnWeights:
    """Loss weights of one assistant turn by part; the tags and newlines of a part go with it."""

    reasoning: float = 1.0
    content: float = 1.0
    calls: float = 1.0

    def end(self, message: Message) -> float:
        """Weight of the end token: that of the part it follows most weightily; 0 means the turn is not trained."""
        parts = [self.content]
        if message.reasoning:
            parts.append(self.reasoning)
        if message.tool_calls:
            parts.append(self.calls)
        return max(parts)


Weights = Mapping[int, float | TurnWeights]


def turn_weights(messages: Sequence[Message], weights: Weights | None) -> list[TurnWeights]:
    """Loss weights for every message: 1 where ``weights`` says nothing.

    Args:
        messages: the conversation.
        weights: message index to one weight for the whole turn, or to weights by part.

    Raises:
        InputError: an index that is not an assistant turn, or a weight that is not a finite number >= 0.
    """
    if not isinstance(weights, Mapping | None):
        raise InputError(f"weights must map message indices to weights, got {type(weights).__name__}")
    spread = [TurnWeights()] * len(messages)
    for index, value in (weights or {}).items():
        if index not in range(len(messages)) or messages[index].role != "assistant":
            raise InputError(f"weights[{index}]: messages[{index}] is not an assistant turn; only those are trained")
        turn = value if isinstance(value, TurnWeights) else TurnWeights(value, value, value)
        for part in (turn.reasoning, turn.content, turn.calls):
            if not isinstance(part, int | float) or not 0 <= part <= sys.float_info.max:
                raise InputError(f"weights[{index}] must be numbers >= 0, got {part!r:.40}")
        spread[index] = turn
    return spread


def split_thinking(content: str) -> tuple[str | None, str]:
    """Reasoning and answer of assistant text with an inline think block; no block gives (None, content).

    A block begins the text, or its opening tag was in the prompt and only ``</think>`` is there. Everything after
    the first ``</think>`` is the answer, further tags included. Text before ``<think>`` means that the tags are not
    a block, and the content stays as it is: in both cases the official template would lose text.
    """
    before, tag, after = content.partition("</think>")
    begun = before.lstrip()
    if not tag or ("<think>" in before and not begun.startswith("<think>")):
        return None, content
    thought = begun.removeprefix("<think>") if begun.startswith("<think>") else before
    return thought.strip("\n"), after.lstrip("\n")


def validate_messages(messages: Sequence[Message]) -> None:
    """Raise InputError, naming the message index and the field, unless the conversation can be rendered."""
    if not messages:
        raise InputError("messages is empty; give at least one message")
    for index, message in enumerate(messages):
        _validate_message(index, message)
        if message.role == "tool" and all(earlier.role == "system" for earlier in messages[:index]):
            raise InputError(f"messages[{index}].role is 'tool' but nothing precedes it; put the call's turn first")


def validate_tools(tools: Tools | None) -> None:
    """Raise InputError unless every tool is a JSON object."""
    if not isinstance(tools, Sequence | None) or isinstance(tools, (str, bytes)):
        raise InputError(f"tools must be a list of objects, got {type(tools).__name__}; wrap a single tool in a list")
    for index, tool in enumerate(tools or ()):
        if not isinstance(tool, Mapping):
            raise InputError(f"tools[{index}] must be an object, got {type(tool).__name__}")
        dump_json(tool, f"tools[{index}]")


def dump_json(value: Any, where: str) -> str:
    """One-line JSON as the chat template writes it; InputError names ``where`` if the value is not JSON."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"{where} is not JSON ({error}); use only objects, lists, strings and numbers") from None
    except RecursionError:
        raise InputError(f"{where} is nested too deeply; flatten it") from None
    check_unicode(text, where)
    return text


def messages_from_openai(rows: Sequence[Mapping[str, Any]], *, inline_thinking: bool = True) -> list[Message]:
    """Read chat messages as the OpenAI API and Hugging Face data sets write them.

    Accepts ``reasoning_content`` or ``reasoning``; a think block inside assistant content is split off
    (``split_thinking``). ``tool_calls`` may be nested (``{"function": {...}}``) or flat, with arguments as an
    object or as JSON text; JSON text is parsed, so it is rendered again in canonical spacing. Content may be null
    (assistant, tool) or a list of text parts, which are joined. Role ``developer`` is read as ``system``. Keys that no
    template shows are left out; one that is nearly a field's name is an error.

    Args:
        rows: the messages.
        inline_thinking: False leaves think tags in content as ordinary text, as templates without think blocks do.

    Raises:
        InputError: naming the message index and the field.
    """
    if not isinstance(rows, Sequence) or isinstance(rows, (str, bytes)):
        raise InputError("messages must be a list of objects with role and content")
    messages = [_from_openai(index, row, inline_thinking) for index, row in enumerate(rows)]
    validate_messages(messages)
    return messages


def messages_to_openai(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Dictionary form for ``apply_chat_template`` and for data files; ``arguments`` stay objects.

    Content that spells ``</think>`` is accompanied by an empty ``reasoning_content``, so that no reader splits it.
    """
    return [_to_openai(message) for message in messages]


def last_flag(messages: Sequence[Message]) -> Literal["think", "no_think"] | None:
    """The last soft switch (``/think`` or ``/no_think`` standing alone) in user and system turns, in order."""
    flag: Literal["think", "no_think"] | None = None
    for message in messages:
        if message.role in ("user", "system"):
            for match in _SOFT_SWITCH.finditer(message.content):
                flag = "think" if match.group(1) == "think" else "no_think"
    return flag


def _validate_message(index: int, message: Message) -> None:
    where = f"messages[{index}]"
    if not isinstance(message, Message):
        raise InputError(f"{where} must be a Message, got {type(message).__name__}; see messages_from_openai")
    if message.role not in _ROLES:
        raise InputError(f"{where}.role is {message.role!r}; use one of {', '.join(_ROLES)}")
    if not isinstance(message.content, str):
        raise InputError(f"{where}.content must be a string, got {type(message.content).__name__}")
    if message.reasoning is not None and not isinstance(message.reasoning, str):
        raise InputError(f"{where}.reasoning must be a string or None, got {type(message.reasoning).__name__}")
    if message.role != "assistant" and message.reasoning is not None:
        raise InputError(f"{where}.reasoning is set on a {message.role} turn; only assistant turns have reasoning")
    if message.role != "assistant" and message.tool_calls:
        raise InputError(f"{where}.tool_calls is set on a {message.role} turn; only assistant turns call tools")
    check_unicode(message.content, f"{where}.content")
    if message.reasoning is not None:
        check_unicode(message.reasoning, f"{where}.reasoning")
    for number, call in enumerate(message.tool_calls):
        _validate_call(f"{where}.tool_calls[{number}]", call)


def check_unicode(text: str, where: str) -> None:
    """Raise InputError, naming ``where``, for a string that UTF-8 cannot hold."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where} is not valid Unicode at character {error.start}; remove lone surrogates") from None


def _validate_call(where: str, call: ToolCall) -> None:
    if not isinstance(call, ToolCall):
        raise InputError(f"{where} must be a ToolCall, got {type(call).__name__}")
    if not isinstance(call.name, str) or name_fault(call.name):
        raise InputError(f"{where}.name is {call.name!r}; use a non-empty name without quotes or control characters")
    if not isinstance(call.arguments, dict):
        raise InputError(f"{where}.arguments must be an object, got {type(call.arguments).__name__}")
    dump_json(call.arguments, f"{where}.arguments")


def _from_openai(index: int, row: Mapping[str, Any], inline_thinking: bool) -> Message:
    where = f"messages[{index}]"
    if not isinstance(row, Mapping):
        raise InputError(f"{where} must be an object with role and content, got {type(row).__name__}")
    name = row.get("role")
    role = _ROLES.get("system" if name == "developer" else name) if isinstance(name, str) else None
    if role is None:
        raise InputError(f"{where}.role is {name!r}; use one of {', '.join(_ROLES)}")
    for key, instead in _UNSUPPORTED.items():
        if row.get(key):
            raise InputError(f"{where}.{key} is not supported; {instead}")
    for key in row.keys() - {*_KEYS, *_UNSUPPORTED}:  # data sets carry keys of their own; a misspelled one is none
        if near := difflib.get_close_matches(str(key), _KEYS, n=1, cutoff=0.8):
            raise InputError(f"{where}.{key} is not a field; did you mean {near[0]!r}?")
    content = _content(where, role, row.get("content"))
    reasoning = _reasoning(where, row)
    if role == "assistant" and reasoning is None and inline_thinking:
        reasoning, content = split_thinking(content)
    calls = row.get("tool_calls") or ()
    if not isinstance(calls, Sequence) or isinstance(calls, (str, bytes)):
        raise InputError(f"{where}.tool_calls must be a list")
    return Message(
        role=role,
        content=content,
        reasoning=reasoning,
        tool_calls=tuple(_call_from_openai(f"{where}.tool_calls[{i}]", call) for i, call in enumerate(calls)),
        tool_call_id=str(row.get("tool_call_id") or "") if role == "tool" else "",
    )


def _reasoning(where: str, row: Mapping[str, Any]) -> str | None:
    """The value of ``reasoning_content`` or ``reasoning``; both only if they agree."""
    given = [row[key] for key in ("reasoning_content", "reasoning") if row.get(key) is not None]
    for value in given:
        if not isinstance(value, str):
            raise InputError(f"{where}.reasoning_content must be a string, got {type(value).__name__}")
    if len(set(given)) > 1:
        raise InputError(f"{where}.reasoning_content and .reasoning differ; give one of them")
    return given[0] if given else None


def _content(where: str, role: Role, content: Any) -> str:
    if isinstance(content, str):
        return content
    if content is None:
        if role in ("assistant", "tool"):
            return ""
        raise InputError(f"{where}.content is missing; a {role} turn needs a string")
    if isinstance(content, list):
        for number, part in enumerate(content):
            if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise InputError(f"{where}.content[{number}] is not a text part; only text is supported")
        return "".join(part["text"] for part in content)
    raise InputError(f"{where}.content must be a string or a list of text parts, got {type(content).__name__}")


def _call_from_openai(where: str, call: Any) -> ToolCall:
    body = call.get("function") or call if isinstance(call, Mapping) else None
    if not isinstance(body, Mapping) or "name" not in body:
        raise InputError(f"{where} must be an object with a function name and arguments")
    arguments = body.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            raise InputError(f"{where}.arguments is text but not JSON; give a JSON object") from None
    if not isinstance(arguments, dict):
        raise InputError(f"{where}.arguments must be a JSON object, got {type(arguments).__name__}")
    return ToolCall(name=body["name"], arguments=arguments, id=str(call.get("id") or ""))


def _to_openai(message: Message) -> dict[str, Any]:
    row: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning is not None:
        row["reasoning_content"] = message.reasoning
    elif message.role == "assistant" and "</think>" in message.content:
        row["reasoning_content"] = ""
    if message.tool_call_id:
        row["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        row["tool_calls"] = [
            {
                "type": "function",
                **({"id": c.id} if c.id else {}),
                "function": {"name": c.name, "arguments": c.arguments},
            }
            for c in message.tool_calls
        ]
    return row
