"""Choices as they are made: tokens of the engine in, pieces of a reply and at last the whole reply out.

A whole reply is its pieces put together, so streamed and whole replies cannot differ. ``ChatChoice`` reads thoughts,
content and calls with the one parser; ``TextChoice`` is plain text. Not here: HTTP, the engine's thread, envelopes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

from twofold.base.records import Completion
from twofold.engine.request import Event
from twofold.text.parse import Delta, ParseOptions, StreamParser
from twofold.text.stops import StopMatcher
from twofold.text.tokenizer import StreamDecoder, Tokenizer

Json = dict[str, Any]
LOWEST = -9999.0  # JSON has no minus infinity


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a reply is to show, and where it ends.

    top_logprobs: None for no log-probabilities, else how many alternatives. stop_ids: tokens of the caller that end it
    and are not shown. hidden: leave thoughts out. parse: how a chat is read.
    """

    top_logprobs: int | None = None
    token_ids: bool = False
    stop: tuple[str, ...] = ()
    stop_ids: frozenset[int] = frozenset()
    hidden: bool = False
    parse: ParseOptions = field(default_factory=ParseOptions)


class Choice(ABC):
    """What both kinds of choices share: counting, log-probabilities, and why it ended."""

    def __init__(self, index: int, tokenizer: Tokenizer, wanted: Wanted) -> None:
        self.index, self.tokenizer, self.wanted = index, tokenizer, wanted
        self.tokens = 0  # of the completion, up to the one that completed a stop string
        self.stop_reason: str | int | None = None
        self.finish_reason: str | None = None
        self.completion: Completion | None = None
        self.warnings: list[str] = []
        self._new_ids: list[int] = []
        self._new_logprobs: list[Event] = []

    @property
    def stopped(self) -> bool:
        """A stop string has ended the text, whatever the engine still makes."""
        return isinstance(self.stop_reason, str)

    def take(self, event: Event) -> bool:
        """Read one event. True when its token completed a stop string: the engine should stop too."""
        done = event.completion
        before = self.stopped
        if event.token_id is not None and not before:
            self.tokens += 1
            ended_by_own = done is not None and done.finish_reason == "stop" and event.token_id in self.wanted.stop_ids
            if ended_by_own:
                self.stop_reason = event.token_id
            visible = self._feed(event.token_id, shown=not ended_by_own)
            if visible and self.wanted.top_logprobs is not None:
                self._new_logprobs.append(event)
            if visible and self.wanted.token_ids:
                self._new_ids.append(event.token_id)
        if done is not None:
            self.completion = done
            self._end(done)
        return self.stopped and not before and done is None

    @abstractmethod
    def delta(self) -> Json | None:
        """What has come since the last call, as an entry of a chunk's ``choices``; None: nothing to show."""

    @abstractmethod
    def whole(self) -> Json:
        """The finished choice of a reply that was not streamed."""

    @abstractmethod
    def _feed(self, token_id: int, shown: bool) -> bool:
        """Read a token; False if it belongs to what the caller does not want to see."""

    @abstractmethod
    def _end(self, done: Completion) -> None:
        """The engine's last word."""

    def _taken_ids(self) -> list[int]:
        taken, self._new_ids = self._new_ids, []
        return taken

    def _taken_events(self) -> list[Event]:
        taken, self._new_logprobs = self._new_logprobs, []
        return taken


class ChatChoice(Choice):
    """One reply of a chat."""

    def __init__(self, index: int, tokenizer: Tokenizer, wanted: Wanted, prompt_ids: list[int]) -> None:
        super().__init__(index, tokenizer, wanted)
        self._parser = StreamParser(tokenizer, prompt_ids, wanted.parse)
        self._message: Json = {"role": "assistant", "content": ""}
        self._calls: list[Json] = []
        self._reasoning: str | None = None
        self._logprobs: list[Json] = []
        self._ids: list[int] = []
        self._delta: Json = {}
        self._closed = True

    def delta(self) -> Json | None:
        if not self._delta and self.finish_reason is None:
            return None
        shown, self._delta = self._delta, {}
        out: Json = {"index": self.index, "delta": shown, "logprobs": None, "finish_reason": self.finish_reason}
        if self.wanted.top_logprobs is not None:
            entries = [self._entry(event) for event in self._taken_events()]
            self._logprobs += entries
            out["logprobs"] = {"content": entries, "refusal": None}
        if self.wanted.token_ids:
            out["token_ids"] = self._taken_ids()
            self._ids += out["token_ids"]
        if self.finish_reason is not None:
            out |= {"stop_reason": self.stop_reason, "thinking": self._thinking()}
        return out

    def whole(self) -> Json:
        self.delta()
        message = dict(self._message)
        if not self.wanted.hidden:
            message["reasoning_content"] = message["reasoning"] = self._reasoning
        if self._calls:
            message["tool_calls"] = [{k: v for k, v in call.items() if k != "index"} for call in self._calls]
        out: Json = {"index": self.index, "message": message, "logprobs": None, "finish_reason": self.finish_reason}
        if self.wanted.top_logprobs is not None:
            out["logprobs"] = {"content": self._logprobs, "refusal": None}
        if self.wanted.token_ids:
            out["token_ids"] = self._ids
        return out | {"stop_reason": self.stop_reason, "thinking": self._thinking()}

    def _feed(self, token_id: int, shown: bool) -> bool:
        inside = self._parser.in_think
        if shown:
            self._add(self._parser.feed(token_id))
        if self._parser.state == "done" and self.stop_reason is None:
            self.stop_reason = self._parser.finish().stop
        return not (self.wanted.hidden and (inside or self._parser.in_think))

    def _end(self, done: Completion) -> None:
        self._add(self._parser.end(), cut=done.finish_reason != "stop")
        parsed = self._parser.finish()
        self.stop_reason = self.stop_reason or parsed.stop
        self.warnings += parsed.errors
        self._closed = parsed.closed or parsed.reasoning is None
        stopped = done.finish_reason == "stop" or self.stopped
        self.finish_reason = ("tool_calls" if self._calls else "stop") if stopped else "length"

    def _add(self, deltas: list[Delta], cut: bool = False) -> None:
        """Note deltas. ``cut``: the reply ends here; a call cut off in the middle stays the beginning of a call."""
        for delta in deltas:
            if delta.kind == "tool_call":
                if delta.dropped and cut:
                    return
                self._add_call(delta)
            elif delta.kind == "content":
                self._message["content"] += delta.text
                self._delta["content"] = self._delta.get("content", "") + delta.text
            else:
                self._reasoning = (self._reasoning or "") + delta.text
                if not self.wanted.hidden:
                    text = self._delta.get("reasoning_content", "") + delta.text
                    self._delta["reasoning_content"] = self._delta["reasoning"] = text

    def _add_call(self, delta: Delta) -> None:
        fragments = self._delta.setdefault("tool_calls", [])
        if delta.name:
            call = {"index": len(self._calls), "id": delta.id, "type": "function"}
            self._calls.append({**call, "function": {"name": delta.name, "arguments": delta.text}})
            fragments.append({**call, "function": {"name": delta.name, "arguments": delta.text}})
            return
        self._calls[-1]["function"]["arguments"] += delta.text
        if fragments and fragments[-1]["index"] == len(self._calls) - 1:
            fragments[-1]["function"]["arguments"] += delta.text
        else:
            fragments.append({"index": len(self._calls) - 1, "function": {"arguments": delta.text}})

    def _entry(self, event: Event) -> Json:
        assert event.token_id is not None
        return {
            **_token(self.tokenizer, event.token_id, event.logprob),
            "top_logprobs": [_token(self.tokenizer, *pair) for pair in event.top],
            "token_id": event.token_id,
            "forced": event.forced,
        }

    def _thinking(self) -> Json:
        done = self.completion
        assert done is not None
        return {
            "tokens": done.thinking_tokens,
            "forced": any(done.forced),
            "looped": done.looped,
            "closed": self._closed,
        }


class TextChoice(Choice):
    """One continuation of a plain prompt."""

    def __init__(
        self, index: int, tokenizer: Tokenizer, wanted: Wanted, prompt_ids: list[int], echo: Echo | None = None
    ) -> None:
        super().__init__(index, tokenizer, wanted)
        self._decoder, self._matcher = StreamDecoder(tokenizer), StopMatcher(wanted.stop)
        self._text = self._new_text = echo.text if echo else ""
        self._at, self._places = 0, StreamDecoder(tokenizer)  # where the next token's text begins, for text_offset
        self._prompt_ids, self._begun = prompt_ids, False
        self._logprobs: Json = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        self._ids: list[int] = []
        self._scores = echo.scores if echo and wanted.top_logprobs is not None else []

    def delta(self) -> Json | None:
        if not self._new_text and self.finish_reason is None:
            return None
        text, self._new_text = self._new_text, ""
        out: Json = {"index": self.index, "text": text, "logprobs": None, "finish_reason": self.finish_reason}
        if self.wanted.top_logprobs is not None:
            out["logprobs"] = self._table()
            for name, values in out["logprobs"].items():
                self._logprobs[name] += values
        if self.wanted.token_ids:
            out["token_ids"] = self._taken_ids()
            self._ids += out["token_ids"]
            if not self._begun:
                out["prompt_token_ids"] = self._prompt_ids
        self._begun = True
        if self.finish_reason is not None:
            out["stop_reason"] = self.stop_reason
        return out

    def whole(self) -> Json:
        self.delta()
        out: Json = {"index": self.index, "text": self._text, "logprobs": None, "finish_reason": self.finish_reason}
        if self.wanted.top_logprobs is not None:
            out["logprobs"] = self._logprobs
        if self.wanted.token_ids:
            out |= {"token_ids": self._ids, "prompt_token_ids": self._prompt_ids}
        return out | {"stop_reason": self.stop_reason}

    def finish(self, reason: str) -> None:
        """End a choice for which nothing is made (max_tokens 0)."""
        self.finish_reason = reason

    def _feed(self, token_id: int, shown: bool) -> bool:
        if shown and not self.tokenizer.is_special(token_id):
            self._show(self._matcher.feed(self._decoder.feed(token_id)))
            self.stop_reason = self._matcher.matched
        return True

    def _end(self, done: Completion) -> None:
        if not self.stopped:
            self._show(self._matcher.feed(self._decoder.flush()) + self._matcher.flush())
        self.finish_reason = "stop" if done.finish_reason == "stop" or self.stopped else "length"

    def _show(self, text: str) -> None:
        self._text += text
        self._new_text += text

    def _table(self) -> Json:
        """Log-probabilities of what is new, in the form of the old completions API."""
        table: Json = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        scores, self._scores = self._scores, []
        self._fill(table, scores)
        self._at += len(self._places.flush()) if scores else 0  # the prompt's text is whole in itself
        new = self._taken_events()
        self._fill(table, [Score(e.token_id, e.logprob, e.top) for e in new if e.token_id is not None])
        return table

    def _fill(self, table: Json, rows: list[Score]) -> None:
        for row in rows:
            best = {token_name(self.tokenizer, token): max(value, LOWEST) for token, value in row.top}
            table["tokens"].append(token_name(self.tokenizer, row.token_id))
            table["token_logprobs"].append(None if row.logprob is None else max(row.logprob, LOWEST))
            table["top_logprobs"].append(None if row.logprob is None else best)
            table["text_offset"].append(self._at)
            self._at += 0 if self.tokenizer.is_special(row.token_id) else len(self._places.feed(row.token_id))


@dataclass(frozen=True, slots=True)
class Score:
    """A token of the prompt with its log-probability (None for the first) and the likeliest tokens in its place."""

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Echo:
    """The prompt at the head of its continuation: its text, and its scores if they are wanted."""

    text: str
    scores: list[Score] = field(default_factory=list)


def token_name(tokenizer: Tokenizer, token_id: int) -> str:
    """A token as text, or as escaped bytes where it is only part of characters; padded rows have a number."""
    if token_id >= tokenizer.vocab_size:
        return f"<row {token_id}>"
    text = tokenizer.token_text(token_id)
    if text is not None:
        return text
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in tokenizer.token_bytes(token_id))


def _token(tokenizer: Tokenizer, token_id: int, logprob: float) -> Json:
    return {
        "token": token_name(tokenizer, token_id),
        "logprob": max(logprob, LOWEST),
        "bytes": list(tokenizer.token_bytes(token_id)) if token_id < tokenizer.vocab_size else None,
    }
