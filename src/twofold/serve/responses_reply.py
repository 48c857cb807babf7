"""Replies of ``/v1/responses``: a thought, a message or a call is an item, and a stream is numbered events about items.

The thought itself is shown, as ``reasoning_text``; there are no summaries of it. Not here: requests (``responses.py``),
and when an item begins and ends (``dialect.py``).
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from typing import Any

from twofold.serve.dialect import Block, Dialect
from twofold.serve.errors import ApiError
from twofold.serve.responses import ResponsesRequest
from twofold.serve.service import Reply

Json = dict[str, Any]
_PREFIXES = {"thought": "rs", "text": "msg", "call": "fc"}
_NAMES = {"thought": "reasoning_text", "text": "output_text", "call": "function_call_arguments"}
_ECHOED = ("instructions", "max_output_tokens", "parallel_tool_calls", "truncation")


class ResponsesReply(Dialect):
    """A reply on its way as a response object and its events."""

    def __init__(self, reply: Reply, body: ResponsesRequest) -> None:
        super().__init__(reply)
        self._request = body
        self._id, self._created = f"resp_{secrets.token_hex(12)}", int(time.time())
        self._ids: list[str] = []
        self._events = 0
        self._error: Json | None = None

    def opening(self) -> Iterator[Json]:
        for name in ("created", "in_progress"):
            yield self._event(name, response=self._response("in_progress", self.prepared.warnings))

    def begin(self, block: Block) -> Iterator[Json]:
        self._ids.append(f"{_PREFIXES[block.kind]}_{secrets.token_hex(12)}")
        empty = self._item(block) | ({} if block.kind == "call" else {"content": []})
        yield self._event("output_item.added", output_index=block.index, item=empty)
        if block.kind != "call":
            yield self._event("content_part.added", **self._place(block), part=_part(block))

    def more(self, block: Block, text: str) -> Json:
        fields = self._place(block) | {"delta": text} | ({"logprobs": []} if block.kind == "text" else {})
        return self._event(f"{_NAMES[block.kind]}.delta", **fields)

    def end(self, block: Block) -> Iterator[Json]:
        said: Json = {"arguments": block.text, "name": block.name} if block.kind == "call" else {"text": block.text}
        said |= {"logprobs": []} if block.kind == "text" else {}
        yield self._event(f"{_NAMES[block.kind]}.done", **self._place(block), **said)
        if block.kind != "call":
            yield self._event("content_part.done", **self._place(block), part=_part(block))
        yield self._event("output_item.done", output_index=block.index, item=self._item(block))

    def closing(self) -> Iterator[Json]:
        body = self.body()
        yield self._event(body["status"], response=body)

    def body(self) -> Json:
        return self._response("incomplete" if self.finish_reason == "length" else "completed", self.warnings)

    def failure(self, error: ApiError) -> Json:
        if self.blocks and self.blocks[-1].status == "in_progress":
            self.blocks[-1].status = "incomplete"
        code = "invalid_prompt" if error.status < 500 else "server_error"
        self._error = {"code": code, "message": error.message}
        return self._event("failed", response=self._response("failed", self.warnings))

    def _event(self, kind: str, **fields: Any) -> Json:
        number, self._events = self._events, self._events + 1
        return {"type": f"response.{kind}", "sequence_number": number, **fields}

    def _place(self, block: Block) -> Json:
        place: Json = {"item_id": self._ids[block.index], "output_index": block.index}
        return place if block.kind == "call" else place | {"content_index": 0}

    def _item(self, block: Block) -> Json:
        item: Json = {"id": self._ids[block.index], "status": block.status}
        if block.kind == "call":
            call = {"call_id": block.id, "name": block.name, "arguments": block.text}
            return {"type": "function_call", **item, **call}
        if block.kind == "text":
            return {"type": "message", **item, "role": "assistant", "content": [_part(block)]}
        return {"type": "reasoning", **item, "summary": [], "content": [_part(block)], "encrypted_content": None}

    def _response(self, status: str, warnings: list[str]) -> Json:
        request, params = self._request, self.prepared.requests[0].params
        body = {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "error": self._error,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "model": self.reply.service.name,
            "output": [self._item(block) for block in self.blocks],
            **{name: getattr(request, name) for name in _ECHOED},
            "previous_response_id": None,
            "store": False,
            "background": False,
            "metadata": {},
            "temperature": params.temperature,
            "top_p": params.top_p,
            "text": {"format": (request.text and request.text.format) or {"type": "text"}},
            "tool_choice": request.tool_choice or "auto",
            "tools": request.tools or [],
            "usage": _usage(self.usage) if self.usage else None,
        }
        return body | ({"warnings": list(warnings)} if warnings else {})


def _part(block: Block) -> Json:
    if block.kind == "text":
        return {"type": "output_text", "text": block.text, "annotations": [], "logprobs": []}
    return {"type": "reasoning_text", "text": block.text}


def _usage(usage: Json) -> Json:
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {
            "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
            "cache_write_tokens": 0,
        },
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": usage["completion_tokens_details"]["reasoning_tokens"]},
        "total_tokens": usage["total_tokens"],
    }
