"""Replies and errors of ``/v1/messages``: a thought, a text or a call is a content block, and a stream is their events.

Thoughts are not signed; a block carries a fixed word in the place of a signature, which nobody checks when it comes
back. Not here: requests (``anthropic.py``), and when a block begins and ends (``dialect.py``).
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from typing import Any

from twofold.base.records import InputError
from twofold.serve.anthropic import CountTokensRequest
from twofold.serve.asked import Asked
from twofold.serve.dialect import Block, Dialect
from twofold.serve.errors import ApiError, from_input_error
from twofold.serve.service import Reply, Service
from twofold.serve.tokens import chat_ids

Json = dict[str, Any]
SIGNATURE = "unsigned"
_STOPS = {"stop": "end_turn", "tool_calls": "tool_use", "length": "max_tokens"}
_ERRORS = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class MessagesReply(Dialect):
    """A reply on its way as a message and its events. stops: the caller's stop sequences. most: its ``max_tokens``."""

    def __init__(self, reply: Reply, stops: list[str], most: int) -> None:
        super().__init__(reply)
        self._stops, self._most = stops, most
        self._id = f"msg_{secrets.token_hex(12)}"

    def opening(self) -> Iterator[Json]:
        prompt = self.prepared.prompt_tokens
        usage = {"input_tokens": prompt, "output_tokens": 0, "cache_creation_input_tokens": 0}
        ending = {"stop_reason": None, "stop_sequence": None}
        start = self._message([], ending, usage | {"cache_read_input_tokens": 0}, self.prepared.warnings)
        yield {"type": "message_start", "message": start}

    def begin(self, block: Block) -> Iterator[Json]:
        empty = _content(block) | ({"signature": ""} if block.kind == "thought" else {})
        yield {"type": "content_block_start", "index": block.index, "content_block": empty}

    def more(self, block: Block, text: str) -> Json:
        deltas = {
            "thought": {"type": "thinking_delta", "thinking": text},
            "text": {"type": "text_delta", "text": text},
            "call": {"type": "input_json_delta", "partial_json": text},
        }
        return _delta(block, deltas[block.kind])

    def end(self, block: Block) -> Iterator[Json]:
        if block.kind == "thought":
            yield _delta(block, {"type": "signature_delta", "signature": SIGNATURE})
        yield {"type": "content_block_stop", "index": block.index}

    def closing(self) -> Iterator[Json]:
        event = {"type": "message_delta", "delta": self._ending(), "usage": _usage(self.usage)}
        later = [warning for warning in self.warnings if warning not in self.prepared.warnings]
        yield event | ({"warnings": later} if later else {})
        yield {"type": "message_stop"}

    def body(self) -> Json:
        for block in self.blocks:
            if block.kind == "call" and _input(block) is None:
                self.warnings.append(f"the call of {block.name!r} was cut off, so its input is empty")
        content = [_content(block) for block in self.blocks]
        return self._message(content, self._ending(), _usage(self.usage), self.warnings)

    def failure(self, error: ApiError) -> Json:
        return error_body(error)

    def _message(self, content: list[Json], ending: Json, usage: Json, warnings: list[str]) -> Json:
        message: Json = {"id": self._id, "type": "message", "role": "assistant", "model": self.reply.service.name}
        message |= {"content": content, **ending, "usage": usage}
        return message | ({"warnings": list(warnings)} if warnings else {})

    def _ending(self) -> Json:
        reason = _STOPS[self.finish_reason or "stop"]
        sequence = self.stop_reason if self.stop_reason in self._stops else None
        if reason == "end_turn" and sequence is not None:
            return {"stop_reason": "stop_sequence", "stop_sequence": sequence}
        if reason == "max_tokens" and self.prepared.requests[0].params.max_tokens < self._most:
            reason = "model_context_window_exceeded"
        return {"stop_reason": reason, "stop_sequence": None}


def counted(service: Service, body: CountTokensRequest, asked: Asked) -> Json:
    """The tokens of a request, as ``/v1/messages/count_tokens`` tells them.

    Raises:
        ApiError: it could not be answered either.
    """
    service.check_model(body.model)
    try:
        ids, _ = chat_ids(service, asked.chat, asked.controls)
        return {"input_tokens": len(ids)}
    except InputError as error:
        raise asked.located(from_input_error(error)) from None
    except ApiError as error:
        raise asked.located(error) from None


def error_body(error: ApiError) -> Json:
    """An error in Anthropic's shape; the field and the code of ours are beside it."""
    kind = _ERRORS.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    shown = {"type": kind, "message": error.message, "param": error.param, "code": error.code}
    return {"type": "error", "error": shown}


def _content(block: Block) -> Json:
    if block.kind == "thought":
        return {"type": "thinking", "thinking": block.text, "signature": SIGNATURE}
    if block.kind == "text":
        return {"type": "text", "text": block.text}
    return {"type": "tool_use", "id": block.id, "name": block.name, "input": _input(block) or {}}


def _input(block: Block) -> Json | None:
    """The arguments of a call; None where they are no object, because the reply ended in the middle."""
    try:
        made = json.loads(block.text)
    except ValueError:
        return None
    return made if isinstance(made, dict) else None


def _delta(block: Block, delta: Json) -> Json:
    return {"type": "content_block_delta", "index": block.index, "delta": delta}


def _usage(usage: Json) -> Json:
    """Tokens as Anthropic counts them: those that came from the cache are not in ``input_tokens``."""
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return {
        "input_tokens": usage["prompt_tokens"] - cached,
        "output_tokens": usage["completion_tokens"],
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens_details": {"thinking_tokens": usage["completion_tokens_details"]["reasoning_tokens"]},
    }
