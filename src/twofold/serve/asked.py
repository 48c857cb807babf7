"""A chat asked for in the words of another protocol: the one internal request, and where its parts came from.

``Turns`` puts thoughts, texts, calls and results in the order given into messages, as chat completions take them.
``Asked`` remembers the caller's names of places, so that an error of a lower layer names what the caller wrote. Not
here: any protocol's own words (``responses.py``, ``anthropic.py``), and replies (``dialect.py``).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from twofold.serve.errors import ApiError, bad_request
from twofold.serve.protocol import ChatRequest, SamplingFields

Json = dict[str, Any]
_PLACE = re.compile(r"(messages\[\d+\])(\.tool_calls\[\d+\])?|(tools\[\d+\])\.function\b")


@dataclass(frozen=True, slots=True)
class Asked:
    """What was asked for.

    chat, controls, warnings: as ``read_body`` gives them for a chat. places: messages and calls of ``chat``, such as
    ``messages[2].tool_calls[0]``, to the caller's names for them; fields: the same for fields of other names.
    """

    chat: ChatRequest
    controls: Json = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    places: Mapping[str, str] = field(default_factory=dict)
    fields: Mapping[str, str] = field(default_factory=dict)

    def located(self, error: ApiError) -> ApiError:
        """The error with the caller's own names of places."""
        message = self._renamed(error.message)
        param = None if error.param is None else self._renamed(error.param)
        return ApiError(error.status, message, error.code, param, error.retry_after)

    def _renamed(self, text: str) -> str:
        first, space, rest = text.partition(" ")
        text = self.fields.get(first, first) + space + rest
        return _PLACE.sub(lambda found: self._place(*found.groups()), text)

    def _place(self, message: str | None, call: str | None, tool: str | None) -> str:
        if message is None:
            return tool or ""
        known = self.places.get(message, message)
        return known if call is None else self.places.get(message + call, known + call)


class Turns:
    """Messages in the making: ``thought``, ``said`` and ``called`` add to one assistant turn until it ends.

    warnings: about what the model is not shown.
    """

    def __init__(self) -> None:
        self.messages: list[Json] = []
        self.places: dict[str, str] = {}
        self.warnings: list[str] = []
        self._turn: Json | None = None

    @property
    def spoken(self) -> bool:
        """The assistant turn that is open has text, and no call after it."""
        return self._turn is not None and "content" in self._turn and "tool_calls" not in self._turn

    def end_turn(self) -> None:
        """What comes next does not belong to the assistant turn that is open."""
        self._turn = None

    def add(self, where: str, role: str, text: str) -> None:
        """A message of somebody else than the assistant."""
        self.end_turn()
        self._append(where, {"role": role, "content": text})

    def result(self, where: str, call_id: str, text: str) -> None:
        """What a tool gave back."""
        self.end_turn()
        self._append(where, {"role": "tool", "tool_call_id": call_id, "content": text})

    def thought(self, where: str, text: str) -> None:
        """A thought; after text or calls it begins another turn. One of which nothing was shown is none."""
        if not text:
            return
        if self._turn is not None and self._turn.keys() & {"content", "tool_calls"}:
            self.end_turn()
        turn = self._assistant(where)
        turn["reasoning_content"] = turn.get("reasoning_content", "") + text

    def said(self, where: str, text: str) -> None:
        """Text of the assistant."""
        turn = self._assistant(where)
        turn["content"] = turn.get("content", "") + text

    def called(self, where: str, call_id: str, name: Any, arguments: Any) -> None:
        """A call of a tool, with arguments as an object or as JSON text."""
        calls = self._assistant(where).setdefault("tool_calls", [])
        self.places[f"messages[{len(self.messages) - 1}].tool_calls[{len(calls)}]"] = where
        calls.append({"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}})

    def unread(self, where: str, given: Mapping[str, Any], known: Collection[str]) -> None:
        """Warn of keys of an item that nobody reads."""
        self.warnings += [
            f"{where}.{key} is not shown to the model" for key in given if key not in known and given[key]
        ]

    def _assistant(self, where: str) -> Json:
        if self._turn is None:
            self._turn = {"role": "assistant"}
            self._append(where, self._turn)
        return self._turn

    def _append(self, where: str, message: Json) -> None:
        self.places[f"messages[{len(self.messages)}]"] = where
        self.messages.append(message)


def read_text(where: str, given: Any, kinds: Collection[str]) -> str:
    """A text, or text parts of the given types put together as they stand.

    Raises:
        ApiError: 400 for anything else; pictures and files are named.
    """
    if isinstance(given, str):
        return given
    if not isinstance(given, Sequence):
        raise bad_request(f"{where} must be a text or a list of text parts", where)
    for number, part in enumerate(given):
        place = f"{where}[{number}]"
        kind = read_mapping(place, part).get("type")
        if kind not in kinds:
            raise bad_request(f"{place} has the type {kind!r:.40}; only text is served: {', '.join(kinds)}", place)
        read_string(place, part, "text")
    return "".join(part["text"] for part in given)


def read_mapping(where: str, given: Any) -> Mapping[str, Any]:
    """``given``, which must be an object (ApiError 400)."""
    if not isinstance(given, Mapping):
        raise bad_request(f"{where} must be an object, got {given!r:.40}", where)
    return given


def read_string(where: str, item: Mapping[str, Any], key: str) -> str:
    """A field of an item, which must be text (ApiError 400)."""
    value = item.get(key)
    if not isinstance(value, str):
        raise bad_request(f"{where}.{key} must be a text, got {value!r:.40}", f"{where}.{key}")
    return value


def shared_fields(body: SamplingFields, but: Collection[str] = ()) -> Json:
    """The sampling fields that a body gives, for the chat it becomes."""
    given = [name for name in SamplingFields.model_fields if name in body.model_fields_set and name not in but]
    return {name: getattr(body, name) for name in given}


def as_tool(where: str, tool: Any, schema: str) -> Json:
    """A function as chat completions take it, from an object with the name inside; ``schema``: key of its parameters.

    Raises:
        ApiError: 400 for what is not an object.
    """
    tool = read_mapping(where, tool)
    given = {"name": tool.get("name"), "description": tool.get("description"), "parameters": tool.get(schema)}
    given["strict"] = tool.get("strict")
    return {"type": "function", "function": {key: value for key, value in given.items() if value is not None}}


def named_tool(name: Any, tools: Sequence[Mapping[str, Any]], where: str) -> Json:
    """The choice of one tool as chat completions take it.

    Raises:
        ApiError: 400 unless it is one of ``tools``.
    """
    names = [tool.get("name") for tool in tools if isinstance(tool, Mapping)]
    if name not in names:
        raise bad_request(f"{where} is {name!r:.60}, which is none of tools", "tool_choice")
    return {"type": "function", "function": {"name": name}}
