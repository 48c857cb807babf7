"""One assistant turn as a state machine: text and tags in; reasoning, content and tool calls out, as deltas.

Both front ends of ``parse.py`` drive it, and a whole message is this machine run to its end, so streaming and
whole-message results cannot differ. Not here: tokens, the search for tags in text (``parse.py``), and the JSON of calls
(``calls.py``).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from twofold.base.records import Message, ToolCall
from twofold.text.calls import CallReader
from twofold.text.messages import Tools
from twofold.text.stops import StopMatcher
from twofold.text.xml_calls import is_xml_call, read_xml_call

Start = Literal["before", "think", "answer", "call"]
State = Literal["before", "think", "answer", "call", "done"]

STRUCTURE = ("<think>", "</think>", "<tool_call>", "</tool_call>")
ENDS = ("<|im_end|>", "<|endoftext|>")
TURN_START = "<|im_start|>"


class Delta(NamedTuple):
    """One increment of the message.

    Reasoning and content carry ``text``. A tool call carries ``call_index`` (0, 1, … within the turn) in every delta;
    its ``id`` and ``name`` come once, ``text`` is a further fragment of its arguments as JSON, and the last delta has
    the whole ``call``. With ``early_calls`` a call that has begun may turn out malformed: then its last delta is
    ``dropped``, its text follows as ordinary text, and its index is not used again.
    """

    kind: Literal["reasoning", "content", "tool_call"]
    text: str = ""
    call: ToolCall | None = None
    call_index: int = 0
    id: str = ""
    name: str = ""
    dropped: bool = False


@dataclass(frozen=True, slots=True)
class Parsed:
    """A finished message.

    reasoning: None if no think block was sampled (an empty one supplied by the prompt counts as none).
    content: never None. closed: a think block was closed, by the model or by the prompt. complete: an end-of-turn
    token or a stop string was seen. errors: what the model did wrong, in order, mended calls included; empty for a
    well-formed message. stop: the stop string that ended the answer; it is not part of ``content``.
    """

    reasoning: str | None
    content: str
    tool_calls: tuple[ToolCall, ...]
    closed: bool
    complete: bool
    errors: tuple[str, ...]
    stop: str | None = None

    def message(self) -> Message:
        """The assistant turn, ready to go back into the conversation."""
        return Message("assistant", self.content, self.reasoning, self.tool_calls)


@dataclass(frozen=True, slots=True)
class ParseOptions:
    """How a reply is read.

    stop: strings that end the answer; thoughts and calls are not searched (they may mention them). tools: schemas,
    used only for the types in calls of Qwen3-Coder's XML form. early_calls: stream arguments before the call is known
    to be sound. call_id: index of a call -> its id; without it ids are empty.
    """

    stop: Sequence[str] = ()
    tools: Tools | None = None
    early_calls: bool = False
    call_id: Callable[[int], str] | None = None


class _Text:
    """Text that drops leading newlines, ends at a stop string, and holds trailing newlines back until more follows."""

    __slots__ = ("held", "leading", "matcher", "parts")

    def __init__(self, leading: bool = True, stop: Sequence[str] = ()) -> None:
        self.parts: list[str] = []
        self.held = 0
        self.leading = leading
        self.matcher = StopMatcher(stop) if stop else None

    @property
    def text(self) -> str:
        """Everything shown so far."""
        return "".join(self.parts)

    def add(self, text: str) -> str:
        """Take new text, not empty; return what can be shown now."""
        if not (self.leading or self.held or self.matcher) and text[-1] != "\n":  # nearly every token
            self.parts.append(text)
            return text
        if self.leading:
            text = text.lstrip("\n")
            self.leading = not text
        return self._show(text if self.matcher is None else self.matcher.feed(text))

    def settle(self) -> str:
        """Show what was held back as the possible beginning of a stop string."""
        return self._show(self.matcher.flush()) if self.matcher is not None else ""

    def release(self) -> str:
        """Show the newlines that were held back."""
        shown, self.held = "\n" * self.held, 0
        if shown:
            self.parts.append(shown)
        return shown

    def _show(self, text: str) -> str:
        if not text:
            return ""
        if self.held or text[-1] == "\n":
            shown = text.rstrip("\n")
            held = len(text) - len(shown)
            if not shown:
                self.held += held
                return ""
            text, self.held = "\n" * self.held + shown, held
        self.parts.append(text)
        return text


class Turn:
    """The state machine: text and tags of one assistant turn in, deltas out.

    A turn is ``[<think> ... </think>] content <tool_call>...</tool_call>* end``. Deviations never lose text: a
    stray tag is kept as text and reported, a call inside a thought ends the thought, a malformed call is text.
    """

    def __init__(self, options: ParseOptions) -> None:
        self.options = options
        self.state: State = "before"
        self._stop: Sequence[str] = ()  # none before ``begin``
        self._content = _Text()
        self._reasoning: _Text | None = None
        self._call = CallReader()
        self._raw: list[str] = []
        self._gap = ""
        self._announced = False
        self._index = 0
        self._calls: list[ToolCall] = []
        self._errors: list[str] = []
        self._closed = self._cut = self._complete = self._after_call = self._call_in_think = self._spare = False
        self._on_tag: dict[str, Callable[[], list[Delta]]] = {
            "<think>": self._think_open,
            "</think>": self._think_close,
            "<tool_call>": self._call_open,
            "</tool_call>": self._call_close,
        }

    @property
    def done(self) -> bool:
        """The turn is over."""
        return self.state == "done"

    def text(self, text: str) -> list[Delta]:
        """Ordinary text, not empty."""
        state = self.state
        if state == "think":
            assert self._reasoning is not None
            shown = self._reasoning.add(text)
            return [Delta("reasoning", shown)] if shown else []
        if state == "call":
            return self._call_text(text)
        if state == "done":
            return []
        content = self._content
        shown = content.add(text)
        if not content.leading:
            self.state = "answer"
        if shown:
            self._after_call = False
        if content.matcher is not None and content.matcher.matched is not None:
            return _content(shown) + self.end(complete=True)
        return [Delta("content", shown)] if shown else []

    def tag(self, tag: str) -> list[Delta]:
        """A structural tag, the end of the turn, or another control token (dropped and reported)."""
        if self.state == "done":
            return []
        if tag in ENDS:
            return self.end(complete=True)
        action = self._on_tag.get(tag)
        if action is not None:
            return action()
        self._errors.append(f"control token {tag} inside the reply was dropped")
        return []

    def end(self, complete: bool) -> list[Delta]:
        """The turn is over; deltas still due."""
        if self.state == "done":
            return []
        deltas = []
        if self.state == "call":
            deltas += self._finish_call("tool call not closed")
        if self.state == "think":
            self._errors.append("think block not closed")
        if not self.done:  # text of a malformed call may have met a stop string
            deltas += self._settle()
            if self._after_call:
                self._content.held = 0
            deltas += _content(self._content.release())
            self._complete, self.state = complete, "done"
        return deltas

    def parsed(self) -> Parsed:
        """The message read so far."""
        return Parsed(
            reasoning=self._reasoning.text if self._reasoning is not None else None,
            content=self._content.text,
            tool_calls=tuple(self._calls),
            closed=self._closed,
            complete=self._complete,
            errors=tuple(self._errors),
            stop=self._content.matcher.matched if self._content.matcher is not None else None,
        )

    def begin(self) -> None:
        """What was read so far was the prompt: keep the state, drop the text, calls and errors."""
        self._stop = self.options.stop
        self._content = _Text(self._content.leading, self._stop)
        self._reasoning = _Text(self._reasoning.leading) if self.state == "think" and self._reasoning else None
        self._calls, self._errors, self._index = [], [], 0
        self._spare = False

    def _settle(self) -> list[Delta]:
        shown = self._content.settle()
        if shown:
            self._after_call = False
        return _content(shown)

    def _literal(self, tag: str, error: str) -> list[Delta]:
        self._errors.append(error)
        return self.text(tag)

    def _think_open(self) -> list[Delta]:
        if self.state == "before":
            self.state, self._reasoning, self._content = "think", _Text(), _Text(stop=self._stop)
            return []
        where = {"think": "inside a think block", "call": "inside a tool call"}.get(self.state, "in the answer")
        return self._literal("<think>", f"<think> {where}")

    def _think_close(self) -> list[Delta]:
        if self.state == "think":
            self.state, self._closed = "answer", True
            return []
        if self.state == "answer" and self._cut and not self._closed:
            self._closed = True  # the thought that a tool call had cut off
            return []
        where = "inside a tool call" if self.state == "call" else "without an open think block"
        return self._literal("</think>", f"</think> {where}")

    def _call_open(self) -> list[Delta]:
        deltas = []
        if self.state == "call":
            deltas += self._finish_call("tool call not closed")
            if self.done:
                return deltas
        self._call_in_think = self.state == "think"
        if self._call_in_think:
            self._errors.append("tool call inside a think block")
            self._cut = True
        deltas += self._settle()
        content = self._content
        if content.held and not self._after_call:
            # The format puts one newline before a call; in the XML form it is two, which shows when the call is read.
            self._gap, self._spare = "\n" * min(content.held, 2), content.held > 1
            content.held -= len(self._gap)
            deltas += _content(content.release())
        else:
            self._gap, content.held, self._spare = "\n" * content.held, 0, False
        self.state, self._raw, self._call, self._announced = "call", [], CallReader(), False
        return deltas

    def _call_text(self, text: str) -> list[Delta]:
        self._raw.append(text)
        if not self.options.early_calls:
            return []
        self._call.feed(text)
        if not self._call.name or self._call.fault:
            return []
        name, call_id = ("", "") if self._announced else (self._call.name, self._id())
        fragment = self._call.take()
        if not fragment and self._announced:
            return []
        self._announced = True
        return [*self._spare_newline(), Delta("tool_call", fragment, None, self._index, call_id, name)]

    def _call_close(self) -> list[Delta]:
        if self.state != "call":
            return self._literal("</tool_call>", "</tool_call> without an open tool call")
        return self._finish_call(None)

    def _finish_call(self, problem: str | None) -> list[Delta]:
        """Leave the call: a call if it is sound, content otherwise."""
        if problem is not None:
            self._errors.append(problem)
        self.state = "answer"
        raw, self._raw = "".join(self._raw), []
        call, fault = self._read_call(raw, tagged=problem is None)
        if call is not None:
            name, call_id = ("", "") if self._announced else (call.name, self._id())
            in_xml = is_xml_call(raw)
            text = json.dumps(call.arguments, ensure_ascii=False) if in_xml else self._call.take()
            deltas = [] if in_xml else self._spare_newline()
            deltas.append(Delta("tool_call", text, call, self._index, call_id, name))
            self._calls.append(call)
            self._index += 1
            self._after_call = True
            return deltas
        self._errors.append(f"malformed tool call: {fault}")
        deltas = []
        if self._announced:
            deltas.append(Delta("tool_call", call_index=self._index, dropped=True))
            self._index += 1
        literal = f"<tool_call>{raw}" + ("" if problem else "</tool_call>")
        if self._call_in_think:  # a thought about calls, not a call: it goes on
            self.state, self._cut = "think", False
            return deltas + self.text(literal)
        return deltas + self.text(self._gap + literal)

    def _spare_newline(self) -> list[Delta]:
        """The second newline before a call that is JSON: the content's own."""
        if not self._spare:
            return []
        self._spare, self._gap = False, "\n"
        self._content.parts.append("\n")
        return _content("\n")

    def _read_call(self, raw: str, tagged: bool) -> tuple[ToolCall | None, str]:
        if is_xml_call(raw):
            result = read_xml_call(raw, self.options.tools)
            call, fault = (None, result) if isinstance(result, str) else (result, "")
        else:
            if not self.options.early_calls:
                self._call.feed(raw)
            call, fault = self._call.close(tagged), self._call.fault
            if call is not None and self._call.repairs:
                self._errors.append(f"tool call mended: {', '.join(self._call.repairs)}")
        return (replace(call, id=self._id()) if call is not None else None), fault

    def _id(self) -> str:
        return self.options.call_id(self._index) if self.options.call_id is not None else ""


def _content(text: str) -> list[Delta]:
    return [Delta("content", text)] if text else []
