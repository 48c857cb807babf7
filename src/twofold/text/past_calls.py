"""Tool calls of earlier turns as clients send them back, sound or damaged.

A call may have been cut off, by ``max_tokens`` or by another server, and the conversation must go on all the same: its
text is kept as it is, as the official template keeps arguments that are text. Not here: the calls that a model is
writing (``calls.py``), and the rest of a message (``messages.py``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from twofold.base.records import InputError, ToolCall
from twofold.text.calls import name_fault
from twofold.text.plain import check_unicode, dump_json

_ARGUMENTS = ("arguments", "args")  # "args" is LangChain's
_LISTS = ("tool_calls", "invalid_tool_calls")
CALL_KEYS = frozenset(_LISTS)
"""Keys of a message that hold calls; ``invalid_tool_calls`` are those that LangChain could not read."""


def calls_of(where: str, row: Mapping[str, Any], notes: list[str] | None) -> tuple[ToolCall, ...]:
    """The calls of a message in dictionary form.

    Args:
        where: place of the message. row: the message. notes: where given, a damaged call is kept as text and noted
            here; else it is an error.

    Raises:
        InputError: naming the call.
    """
    calls: list[ToolCall] = []
    for key in _LISTS:
        listed = row.get(key) or ()
        if not isinstance(listed, Sequence) or isinstance(listed, (str, bytes)):
            raise InputError(f"{where}.{key} must be a list", field=f"{where}.{key}")
        known = {call.id for call in calls} - {""}  # some clients list a damaged call under both keys
        read = [_call(f"{where}.{key}[{number}]", call, notes) for number, call in enumerate(listed)]
        calls += [call for call in read if call.id not in known]
    return tuple(calls)


def check_call(where: str, call: ToolCall) -> None:
    """Raise InputError, naming the field, unless the call can be rendered."""
    if not isinstance(call, ToolCall):
        raise InputError(f"{where} must be a ToolCall, got {type(call).__name__}", field=where)
    nameless = call.name == "" and bool(call.raw)  # it was cut off before its name, or damaged there
    if not isinstance(call.name, str) or (name_fault(call.name) and not nameless):
        message = f"{where}.name is {call.name!r}; use a non-empty name without quotes or control characters"
        raise InputError(message, field=f"{where}.name")
    place = f"{where}.arguments"
    if not isinstance(call.arguments, dict):
        raise InputError(f"{place} must be an object, got {type(call.arguments).__name__}", field=place)
    if not isinstance(call.raw, str) or (call.raw and call.arguments):
        raise InputError(f"{place}: raw text stands instead of arguments; give one of them", field=place)
    check_unicode(call.raw, place)
    dump_json(call.arguments, place)


def arguments_text(call: ToolCall, where: str) -> str:
    """The arguments as the chat format writes them: JSON, or the raw text of a damaged call."""
    return call.raw or dump_json(call.arguments, where)


def _call(where: str, call: Any, notes: list[str] | None) -> ToolCall:
    body = call.get("function") or call if isinstance(call, Mapping) else None
    if not isinstance(body, Mapping) or ("name" not in body and notes is None):
        raise InputError(f"{where} must be an object with a function name and arguments", field=where)
    given = next((body[key] for key in _ARGUMENTS if body.get(key) is not None), None)
    name, place = body.get("name"), f"{where}.arguments"
    try:
        arguments, raw = _arguments(given, place), ""
    except InputError:
        if notes is None:
            raise
        arguments, raw = {}, given if isinstance(given, str) else dump_json(given, place)
        notes.append(f"{place} is no JSON object; it is shown to the model as it is")
    if name in (None, "") and notes is not None:
        name, arguments, raw = "", {}, raw or dump_json(arguments, place)
        notes.append(f"{where} has no name; it is shown to the model as it is")
    return ToolCall(name, arguments, str(call.get("id") or ""), raw)  # type: ignore[arg-type]


def _arguments(given: Any, where: str) -> dict[str, Any]:
    """Arguments as an object, from an object or its JSON; nothing, blanks and null say that there are none."""
    for _ in range(2):  # some clients write the JSON of a text that is JSON
        if isinstance(given, str):
            try:
                given = json.loads(given) if given.strip() else None
            except (ValueError, RecursionError):
                raise InputError(f"{where} is text but not JSON; give a JSON object", field=where) from None
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise InputError(f"{where} must be a JSON object, got {type(given).__name__}", field=where)
    dump_json(given, where)
    return given
