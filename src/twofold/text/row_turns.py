"""Turns of a row as messages in OpenAI's form: speakers by any common name, calls and results spelled in text.

A turn has ``role`` and ``content`` or, as ShareGPT writes it, ``from`` and ``value``. A template writes tool calls and
results between tags that are tokens; the same tags inside text would be ordinary characters, so they are read or
refused. Not here: columns of a row (``formats.py``), the checks of a conversation (``messages.py``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from twofold.base.records import InputError
from twofold.text.messages import Tools, TurnWeights, split_thinking
from twofold.text.padding import meant_arguments
from twofold.text.parse import ParseOptions, parse_text

SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "observation": "tool",
    "tool": "tool",
    "function": "tool",
    "tool_response": "tool",
}
_CALLERS = ("function_call", "tool_call")
_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_RESULT, _RESULT_END = "<tool_response>", "</tool_response>"
_UNREAD = {  # keys of a turn with something said in it, and where it belongs
    "thinking": "reasoning_content",
    "thought": "reasoning_content",
    "thoughts": "reasoning_content",
    "text": "content",
    "output": "content",
    "response": "content",
    "answer": "content",
}


class Reading(NamedTuple):
    """What is read from text: think blocks, calls and results between tags; and the tools that the row declares."""

    thinking: bool = True
    calls: bool = True
    tools: tuple[dict[str, Any], ...] | None = None


def read_turns(name: str, turns: Any, reading: Reading) -> Any:
    """Messages of the column ``name``, for ``messages_from_openai``, which checks what is left as it was.

    Raises:
        InputError: naming the turn.
    """
    if not isinstance(turns, list):
        return turns
    messages: list[Any] = []
    for index, turn in enumerate(turns):
        messages += _messages(f"{name}[{index}]", turn, reading, messages[-1] if messages else {})
    return messages


def speaker_of(turn: Any) -> str | None:
    """The role of a turn, None for a name that nobody knows."""
    name = turn.get("from", turn.get("role")) if isinstance(turn, Mapping) else None
    return SPEAKERS.get(name.strip().lower()) if isinstance(name, str) else None


def spells_call(text: str) -> bool:
    """Whether text has a tag of a tool call, which a template would write as a token."""
    return _OPEN in text or _CLOSE in text


def weight_of(where: str, message: Mapping[str, Any]) -> TurnWeights | None:
    """The turn's weights from ``weight`` (a number), ``train`` (true or false) or ``weights`` (by part)."""
    values = {key: message[key] for key in ("weight", "train", "weights") if message.get(key) is not None}
    if not values:
        return None
    if len(values) > 1:
        raise InputError(f"{where} has {' and '.join(values)}; give one of them")
    [(key, value)] = values.items()
    if message.get("role") != "assistant":
        if value:
            raise InputError(f"{where}.{key} is set on a {message.get('role')} turn; only assistant turns are trained")
        return None
    if key == "weights":
        if not isinstance(value, Mapping) or not set(value) <= {"reasoning", "content", "calls"}:
            raise InputError(f"{where}.weights must be an object with reasoning, content, calls")
        return TurnWeights(**{part: weight for part, weight in value.items() if weight is not None})
    if key == "train" and not isinstance(value, bool):
        raise InputError(f"{where}.train must be true or false, got {value!r}")
    weight = float(value) if isinstance(value, bool) else value
    return TurnWeights(weight, weight, weight)


def _messages(where: str, turn: Any, reading: Reading, before: Mapping[str, Any]) -> list[Any]:
    """One turn, which several results in one text make several messages. before: the message before it."""
    if not isinstance(turn, Mapping):
        raise InputError(f"{where} must be an object with role and content, got {type(turn).__name__}")
    message = {key: value for key, value in turn.items() if value is not None}
    speaker, role = message.get("from", message.get("role")), speaker_of(message)
    if "from" in message:
        message = _from_sharegpt(where, message, role)
    if role is not None:
        message["role"] = role
    for key, instead in _UNREAD.items():
        if isinstance(message.get(key), str) and message[key].strip() and message[key] != message.get("content"):
            raise InputError(f"{where}.{key} is not read; name it {instead}, or leave it out")
    text = _text(message.get("content"))
    if role == "assistant":
        if isinstance(speaker, str) and speaker.strip().lower() in _CALLERS:
            return [_caller(where, message, text, reading)]
        return [_assistant(where, message, text, reading)]
    answers = role == "tool" or (role == "user" and (before.get("role") == "tool" or bool(before.get("tool_calls"))))
    return _results(message, text) if reading.calls and text is not None and answers else [message]


def _from_sharegpt(where: str, turn: dict[str, Any], role: str | None) -> dict[str, Any]:
    if role is None:
        raise InputError(f"{where}.from is {turn['from']!r}; use one of {', '.join(SPEAKERS)}")
    value = turn.get("value", "" if turn.get("tool_calls") else None)
    if not isinstance(value, str):
        raise InputError(f"{where}.value must be a string, got {type(value).__name__}")
    return {**{key: inner for key, inner in turn.items() if key not in ("from", "value")}, "content": value}


def _text(content: Any) -> str | None:
    """The text of a turn, None where ``messages_from_openai`` has to look at it."""
    if isinstance(content, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
        texts = [part.get("text") for part in content]
        return "".join(texts) if all(isinstance(text, str) for text in texts) else None
    return content if isinstance(content, str) else None


def _caller(where: str, message: dict[str, Any], text: str | None, reading: Reading) -> dict[str, Any]:
    """A turn whose text is JSON: one call, or a list of them."""
    if text is not None and _OPEN in text:
        return _assistant(where, message, text, reading)
    reasoning, answer = _split(message, text or "", reading)
    try:
        calls = json.loads(answer)
    except (ValueError, RecursionError):
        raise InputError(f"{where} is a function_call but not JSON; give an object with name and arguments") from None
    listed = calls if isinstance(calls, list) else [calls]
    return {**message, "content": "", "reasoning_content": reasoning, "tool_calls": listed}


def _assistant(where: str, message: dict[str, Any], text: str | None, reading: Reading) -> dict[str, Any]:
    calls = message.get("tool_calls")
    if isinstance(calls, list):
        message["tool_calls"] = [_call(call, reading.tools) for call in calls]
    if not reading.calls or text is None:
        return message
    reasoning, answer = _split(message, text, reading)
    if isinstance(reasoning, str) and _CLOSE in reasoning.partition(_OPEN)[2]:
        raise InputError(f"{where}: a tool call stands inside the thought; move it behind </think>")
    if not spells_call(answer):
        return message
    if calls:
        raise InputError(f"{where} has tool_calls and spells a call in its text as well; leave one of them out")
    parsed = parse_text(answer, "answer", ParseOptions(tools=reading.tools))
    faults = [error for error in parsed.errors if not error.startswith("tool call mended")]
    if not faults and not parsed.complete and parsed.content.strip() != answer.partition(_OPEN)[0].strip():
        faults = ["text stands behind a call"]
    if faults or parsed.complete or not parsed.tool_calls:
        raise InputError(
            f"{where} spells a tool call that cannot be read ({faults[0] if faults else 'a control token ends it'}); "
            "mend the text, or give tool_calls"
        )
    found = [{"name": call.name, "arguments": call.arguments} for call in parsed.tool_calls]
    return {**message, "content": parsed.content, "reasoning_content": reasoning, "tool_calls": found}


def _split(message: Mapping[str, Any], text: str, reading: Reading) -> tuple[Any, str]:
    """The turn's thought, from its own key or from a block in the text, and the rest."""
    given = message.get("reasoning_content", message.get("reasoning"))
    if given is not None or not reading.thinking:
        return given, text
    return split_thinking(text)


def _call(call: Any, tools: Tools | None) -> Any:
    """A call of ``tool_calls`` with its arguments as they are meant; text is taken at its word."""
    body = call.get("function") or call if isinstance(call, Mapping) else None
    arguments = body.get("arguments") if isinstance(body, Mapping) else None
    if not isinstance(body, Mapping) or not isinstance(arguments, Mapping):
        return call
    meant = {**body, "arguments": meant_arguments(arguments, body.get("name", ""), tools)}
    return {**call, "function": meant} if body is not call else meant


def _results(message: dict[str, Any], text: str) -> list[dict[str, Any]]:
    """Tool results that stand between tags one after the other, a message each; other text as it is."""
    if not text.lstrip().startswith(_RESULT):
        return [message]
    *results, rest = text.split(_RESULT_END)
    bodies = [result.lstrip().removeprefix(_RESULT) for result in results]
    if rest.strip() or not all(result.lstrip().startswith(_RESULT) for result in results):
        return [message]
    return [{**message, "role": "tool", "content": body.removeprefix("\n").removesuffix("\n")} for body in bodies]
