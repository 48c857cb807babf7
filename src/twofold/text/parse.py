"""Sampled tokens to reasoning, content and tool calls: one state machine, fed token by token.

Structure is read from token ids, never from text, so an answer that merely spells ``</think>`` stays an answer.
``parse`` is the same machine run to the end: streaming and whole-message results cannot differ. Not here: sampling,
stop strings, and the checking of call arguments against a tool's schema.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from twofold.base.records import Message, ToolCall
from twofold.text.tokenizer import StreamDecoder, Tokenizer

_State = Literal["start", "reasoning", "content", "call", "done"]


@dataclass(frozen=True, slots=True)
class Delta:
    """One increment of the message: text of the given kind, or a whole tool call."""

    kind: Literal["reasoning", "content", "tool_call"]
    text: str = ""
    call: ToolCall | None = None


@dataclass(frozen=True, slots=True)
class Parsed:
    """A finished message.

    reasoning: None if no think block was sampled (an empty one supplied by the prompt counts as none).
    content: never None. closed: a think block was closed, by the model or by the prompt. complete: an end-of-turn
    token was seen. errors: what the model did wrong, in order; empty for a well-formed message.
    """

    reasoning: str | None
    content: str
    tool_calls: tuple[ToolCall, ...]
    closed: bool
    complete: bool
    errors: tuple[str, ...]

    def message(self) -> Message:
        """The assistant turn, ready to go back into the conversation."""
        return Message("assistant", self.content, self.reasoning, self.tool_calls)


class _Text:
    """Text that drops leading newlines and holds trailing ones back until more text follows."""

    def __init__(self, leading: bool = True) -> None:
        self.text = ""
        self.held = ""
        self._leading = leading

    def add(self, text: str) -> str:
        """Take new text; return what can be shown now."""
        text = self.held + text
        if self._leading:
            text = text.lstrip("\n")
            self._leading = not text
        shown = text.rstrip("\n")
        self.held = text[len(shown) :]
        self.text += shown
        return shown

    def release(self) -> str:
        """Show the newlines that were held back."""
        shown, self.held = self.held, ""
        self.text += shown
        return shown


class StreamParser:
    """Incremental parser of one sampled turn.

    A turn is ``[<think> ... </think>] content <tool_call>...</tool_call>* end``. Deviations never lose text: a
    stray tag is kept as text and reported, a call inside a thought ends the thought, a malformed call is content.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = ()) -> None:
        """Start in the state in which the prompt ends: inside an open think block, after a closed one, or fresh."""
        self._tokenizer = tokenizer
        self._decoder = StreamDecoder(tokenizer)
        self._think_open, self._think_close = tokenizer.think_open, tokenizer.think_close
        self._call_open, self._call_close = tokenizer.control_id("<tool_call>"), tokenizer.control_id("</tool_call>")
        self._eos = {i for i in map(tokenizer.control_id, ("<|im_end|>", "<|endoftext|>")) if i is not None}
        self._state: _State = "start"
        self._content = _Text()
        self._reasoning: _Text | None = None
        self._raw_call = ""
        self._calls: list[ToolCall] = []
        self._errors: list[str] = []
        self._closed = self._cut = self._complete = self._after_call = False
        self._read_prompt(prompt_ids)

    @property
    def in_think(self) -> bool:
        """True while the next token belongs to an open think block."""
        return self._state == "reasoning"

    def feed(self, token_id: int) -> list[Delta]:
        """Take one sampled token; return what it adds. Tokens after the end of the turn are ignored."""
        if self._state == "done":
            return []
        if token_id in self._eos:
            deltas = self._end()
            self._complete, self._state = True, "done"
            return deltas
        if token_id == self._think_open:
            return self._on_think_open()
        if token_id == self._think_close:
            return self._on_think_close()
        if token_id == self._call_open:
            return self._on_call_open()
        if token_id == self._call_close:
            return self._on_call_close()
        if self._tokenizer.is_special(token_id):
            self._errors.append(f"control token {self._tokenizer.decode([token_id])} inside the reply was dropped")
            return self._write(self._decoder.flush())
        return self._write(self._decoder.feed(token_id))

    def finish(self) -> Parsed:
        """The whole message so far; unfinished calls are resolved. Feeding afterwards changes nothing."""
        if self._state != "done":
            self._end()
            self._state = "done"
        return Parsed(
            reasoning=self._reasoning.text if self._reasoning is not None else None,
            content=self._content.text,
            tool_calls=tuple(self._calls),
            closed=self._closed,
            complete=self._complete,
            errors=tuple(self._errors),
        )

    def end(self) -> list[Delta]:
        """Deltas still due when sampling stops without an end token (half a character, an unfinished call)."""
        if self._state == "done":
            return []
        deltas = self._end()
        self._state = "done"
        return deltas

    def _read_prompt(self, prompt_ids: Sequence[int]) -> None:
        turn_start = self._tokenizer.control_id("<|im_start|>")
        for index in range(len(prompt_ids) - 1, -1, -1):
            token = prompt_ids[index]
            if token == turn_start:
                return
            if token in (self._think_open, self._think_close):
                written = self._tokenizer.decode(prompt_ids[index + 1 :]).strip("\n") != ""
                if token == self._think_open:
                    self._state, self._reasoning = "reasoning", _Text(leading=not written)
                else:
                    self._state, self._closed = "content", True
                    self._content = _Text(leading=not written)
                return

    def _write(self, text: str) -> list[Delta]:
        if not text:
            return []
        if self._state == "call":
            self._raw_call += text
            return []
        if self._state == "reasoning" and self._reasoning is not None:
            return _deltas("reasoning", self._reasoning.add(text))
        shown = self._content.add(text)
        if shown:
            self._state, self._after_call = "content", False
        return _deltas("content", shown)

    def _literal(self, tag: str, error: str) -> list[Delta]:
        self._errors.append(error)
        return self._write(self._decoder.flush() + tag)

    def _on_think_open(self) -> list[Delta]:
        if self._state == "start":
            deltas = self._write(self._decoder.flush())
            if self._state == "start":
                self._state, self._reasoning, self._content = "reasoning", _Text(), _Text()
                return deltas
            return deltas + self._literal("<think>", "<think> after the answer had begun")
        where = {"reasoning": "inside a think block", "call": "inside a tool call"}.get(self._state, "in the answer")
        return self._literal("<think>", f"<think> {where}")

    def _on_think_close(self) -> list[Delta]:
        if self._state == "reasoning":
            deltas = self._write(self._decoder.flush())
            self._close_reasoning()
            self._state, self._closed = "content", True
            return deltas
        if self._state == "content" and self._cut and not self._closed:
            self._closed = True  # the thought that a tool call had cut off
            return self._write(self._decoder.flush())
        where = "inside a tool call" if self._state == "call" else "without an open think block"
        return self._literal("</think>", f"</think> {where}")

    def _on_call_open(self) -> list[Delta]:
        deltas = self._write(self._decoder.flush())
        if self._state == "call":
            deltas += self._finish_call("tool call not closed")
        elif self._state == "reasoning":
            self._close_reasoning()
            self._errors.append("tool call inside a think block")
            self._cut = True
        if self._content.text and not self._after_call and self._content.held:
            self._content.held = self._content.held[:-1]  # the newline the format puts before a call
            deltas += _deltas("content", self._content.release())
        self._content.held = ""
        self._state, self._raw_call = "call", ""
        return deltas

    def _on_call_close(self) -> list[Delta]:
        if self._state != "call":
            return self._literal("</tool_call>", "</tool_call> without an open tool call")
        return self._write(self._decoder.flush()) + self._finish_call(None)

    def _finish_call(self, problem: str | None) -> list[Delta]:
        """Leave the call: a call if its JSON is sound, content otherwise."""
        if problem is not None:
            self._errors.append(problem)
        self._state = "content"
        raw, self._raw_call = self._raw_call, ""
        call, fault = _read_call(raw)
        if call is not None:
            self._calls.append(call)
            self._after_call = True
            return [Delta("tool_call", call=call)]
        self._errors.append(f"malformed tool call: {fault}")
        return self._write(f"<tool_call>{raw}" + ("" if problem else "</tool_call>"))

    def _close_reasoning(self) -> None:
        if self._reasoning is not None:
            self._reasoning.held = ""

    def _end(self) -> list[Delta]:
        deltas = self._write(self._decoder.flush())
        if self._state == "call":
            deltas += self._finish_call("tool call not closed")
        elif self._state == "reasoning":
            self._close_reasoning()
            self._errors.append("think block not closed")
        if self._after_call:
            self._content.held = ""
        return deltas + _deltas("content", self._content.release())


def parse(tokenizer: Tokenizer, token_ids: Sequence[int], prompt_ids: Sequence[int] = ()) -> Parsed:
    """Parse a whole sampled turn; the same result as feeding a StreamParser."""
    parser = StreamParser(tokenizer, prompt_ids)
    for token_id in token_ids:
        parser.feed(token_id)
    return parser.finish()


def _deltas(kind: Literal["reasoning", "content"], text: str) -> list[Delta]:
    return [Delta(kind, text)] if text else []


def _read_call(raw: str) -> tuple[ToolCall | None, str]:
    """The call that the JSON text describes, or None and what is wrong with it."""
    try:
        body = json.loads(raw)
    except ValueError as error:
        return None, f"not JSON ({error})"
    except RecursionError:
        return None, "nested too deeply"
    if not isinstance(body, dict):
        return None, "not an object"
    name, arguments = body.get("name"), body.get("arguments")
    if not isinstance(name, str) or not name:
        return None, "no function name"
    if not isinstance(arguments, dict):
        return None, "arguments is not an object"
    return ToolCall(name=name, arguments=arguments), ""
