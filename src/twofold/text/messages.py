"""Checked conversations: validation, the OpenAI / Hugging Face dictionary form, and the soft switches.

Also the loss weights of turns and parts. Everything here works on text. Not here: tokens (``chat.py``), other file
formats (``formats.py``), calls in a message (``past_calls.py``), and reading what a model sampled (``parse.py``).
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from twofold.base.records import InputError, Message, Role
from twofold.text.past_calls import CALL_KEYS, calls_of, check_call
from twofold.text.plain import check_unicode, dump_json

Tools = Sequence[Mapping[str, Any]]

_ROLES: dict[str, Role] = {"system": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
_UNSUPPORTED = {  # what an assistant said, in fields that no template shows
    "function_call": "use tool_calls",
    "refusal": "write its text into content",
    "audio": "write its transcript into content",
}
_REASONING = ("reasoning_content", "reasoning")
_KEYS = ("role", "content", *_REASONING, *sorted(CALL_KEYS), "tool_call_id")
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
        message = f"weights must map message indices to weights, got {type(weights).__name__}"
        raise InputError(message, field="weights")
    spread = [TurnWeights()] * len(messages)
    for index, value in (weights or {}).items():
        if index not in range(len(messages)) or messages[index].role != "assistant":
            text = f"weights[{index}]: messages[{index}] is not an assistant turn; only those are trained"
            raise InputError(text, field=f"weights[{index}]")
        turn = value if isinstance(value, TurnWeights) else TurnWeights(value, value, value)
        for part in (turn.reasoning, turn.content, turn.calls):
            if not isinstance(part, int | float) or not 0 <= part <= sys.float_info.max:
                raise InputError(f"weights[{index}] must be numbers >= 0, got {part!r:.40}", field=f"weights[{index}]")
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
        raise InputError("messages is empty; give at least one message", field="messages")
    for index, message in enumerate(messages):
        _validate_message(index, message)
        if message.role == "tool" and all(earlier.role == "system" for earlier in messages[:index]):
            where = f"messages[{index}].role"
            raise InputError(f"{where} is 'tool' but nothing precedes it; put the call's turn first", field=where)


def validate_tools(tools: Tools | None) -> None:
    """Raise InputError unless every tool is a JSON object."""
    if not isinstance(tools, Sequence | None) or isinstance(tools, (str, bytes)):
        message = f"tools must be a list of objects, got {type(tools).__name__}; wrap a single tool in a list"
        raise InputError(message, field="tools")
    for index, tool in enumerate(tools or ()):
        if not isinstance(tool, Mapping):
            where = f"tools[{index}]"
            raise InputError(f"{where} must be an object, got {type(tool).__name__}", field=where)
        dump_json(tool, f"tools[{index}]")


def messages_from_openai(
    rows: Sequence[Mapping[str, Any]], *, inline_thinking: bool = True, notes: list[str] | None = None
) -> list[Message]:
    """Read chat messages as the OpenAI API and Hugging Face data sets write them.

    Accepts ``reasoning_content`` or ``reasoning``, of two the one that says something; a think block inside assistant
    content is split off (``split_thinking``). ``tool_calls`` may be nested (``{"function": {...}}``) or flat, with
    arguments as an object or as JSON text; JSON text is parsed, so it is rendered again in canonical spacing. Empty
    arguments are none. Content may be null (assistant, tool) or a list of text parts, which are joined. Role
    ``developer`` is read as ``system``. Keys that no template shows are left out.

    Rows to learn from are read strictly: a damaged call is an error, and so is a key that is nearly a field's name. A
    conversation that goes on is read with ``notes``: what others have left in it does not end it.

    Args:
        rows: the messages.
        inline_thinking: False leaves think tags in content as ordinary text, as templates without think blocks do.
        notes: where given, damaged calls are kept as text, and they and keys that are left out are noted here, a line
            each.

    Raises:
        InputError: naming the message index and the field.
    """
    if not isinstance(rows, Sequence) or isinstance(rows, (str, bytes)):
        raise InputError("messages must be a list of objects with role and content", field="messages")
    messages = [_from_openai(index, row, inline_thinking, notes) for index, row in enumerate(rows)]
    validate_messages(messages)
    if notes is not None:
        notes += _left_out(rows)
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
        text = f"{where} must be a Message, got {type(message).__name__}; see messages_from_openai"
        raise InputError(text, field=where)
    if message.role not in _ROLES:
        raise InputError(f"{where}.role is {message.role!r}; use one of {', '.join(_ROLES)}", field=f"{where}.role")
    for name, text, kind in (("content", message.content, str), ("reasoning", message.reasoning, str | None)):
        if not isinstance(text, kind):
            wanted = "a string" if kind is str else "a string or None"
            raise InputError(f"{where}.{name} must be {wanted}, got {type(text).__name__}", field=f"{where}.{name}")
        check_unicode(text or "", f"{where}.{name}")
    if message.role != "assistant" and message.reasoning is not None:
        text = f"{where}.reasoning is set on a {message.role} turn; only assistant turns have reasoning"
        raise InputError(text, field=f"{where}.reasoning")
    if message.role != "assistant" and message.tool_calls:
        text = f"{where}.tool_calls is set on a {message.role} turn; only assistant turns call tools"
        raise InputError(text, field=f"{where}.tool_calls")
    for number, call in enumerate(message.tool_calls):
        check_call(f"{where}.tool_calls[{number}]", call)


def _from_openai(index: int, row: Mapping[str, Any], inline_thinking: bool, notes: list[str] | None) -> Message:
    where = f"messages[{index}]"
    if not isinstance(row, Mapping):
        text = f"{where} must be an object with role and content, got {type(row).__name__}"
        raise InputError(text, field=where)
    name = row.get("role")
    role = _ROLES.get("system" if name == "developer" else name) if isinstance(name, str) else None
    if role is None:
        raise InputError(f"{where}.role is {name!r:.60}; use one of {', '.join(_ROLES)}", field=f"{where}.role")
    for key, instead in _UNSUPPORTED.items():
        if row.get(key):
            raise InputError(f"{where}.{key} is not supported; {instead}", field=f"{where}.{key}")
    if notes is None:
        for key in _unknown(row):
            if near := _nearest(key):
                text = f"{where}.{key} is not a field; did you mean {near!r}?"
                raise InputError(text, field=f"{where}.{key}")
    content = _content(where, role, row.get("content"))
    reasoning = _reasoning(where, row, role)
    if role == "assistant" and reasoning is None and inline_thinking:
        reasoning, content = split_thinking(content)
    return Message(
        role=role,
        content=content,
        reasoning=reasoning,
        tool_calls=calls_of(where, row, notes),
        tool_call_id=str(row.get("tool_call_id") or "") if role == "tool" else "",
    )


def _unknown(row: Mapping[str, Any]) -> list[str]:
    """Keys of a message that are none of ours; data sets and clients have keys of their own."""
    return [str(key) for key in row if key not in _KEYS and key not in _UNSUPPORTED]


def _nearest(key: str) -> str:
    """The field that a key is a misspelling of, or nothing."""
    return next(iter(difflib.get_close_matches(key, _KEYS, n=1, cutoff=0.8)), "")


def _left_out(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A note for each key that no template shows: its first place, and how many messages have it besides."""
    places: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        for key in _unknown(row):
            if row.get(key) not in (None, "", [], {}):
                places.setdefault(key, []).append(index)
    notes = []
    for key, found in places.items():
        more = f" (and in {len(found) - 1} more)" if len(found) > 1 else ""
        near = f"; did you mean {_nearest(key)!r}?" if _nearest(key) else ""
        notes.append(f"messages[{found[0]}].{key[:60]}{more} is not shown to the model{near}")
    return notes


def _reasoning(where: str, row: Mapping[str, Any], role: Role) -> str | None:
    """The value of ``reasoning_content`` or ``reasoning``; an empty one says that there is none."""
    given: dict[str, str] = {}
    for key in _REASONING:
        value = row.get(key)
        if value in (None, [], {}):
            continue
        if not isinstance(value, str):
            raise InputError(f"{where}.{key} must be a string, got {type(value).__name__}", field=f"{where}.{key}")
        given[key] = value
    filled = [value for value in given.values() if value.strip()]
    if len({value.strip() for value in filled}) > 1:
        text = f"{where}.reasoning_content and .reasoning differ; give one of them"
        raise InputError(text, field=f"{where}.reasoning")
    if filled:
        return filled[0]
    # On an assistant's turn "" also says that tags in its content are text (``messages_to_openai``).
    return next(iter(given.values()), None) if role == "assistant" else None


def _content(where: str, role: Role, content: Any) -> str:
    if isinstance(content, str):
        return content
    where += ".content"
    if content is None:
        if role in ("assistant", "tool"):
            return ""
        raise InputError(f"{where} is missing; a {role} turn needs a string", field=where)
    if isinstance(content, list):
        for number, part in enumerate(content):
            if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                place = f"{where}[{number}]"
                raise InputError(f"{place} is not a text part; only text is supported", field=place)
        return "".join(part["text"] for part in content)
    raise InputError(f"{where} must be a string or a list of text parts, got {type(content).__name__}", field=where)


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
                "function": {"name": c.name, "arguments": c.raw or c.arguments},
            }
            for c in message.tool_calls
        ]
    return row
