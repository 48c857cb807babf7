"""Chunks of a chat become blocks and events, in the order that the protocols' clients rely on."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from twofold.serve.anthropic_reply import MessagesReply, error_body
from twofold.serve.errors import ApiError
from twofold.serve.responses import read_responses
from twofold.serve.responses_reply import ResponsesReply

USAGE = {
    "prompt_tokens": 10,
    "completion_tokens": 7,
    "total_tokens": 17,
    "completion_tokens_details": {"reasoning_tokens": 3},
    "prompt_tokens_details": {"cached_tokens": 4},
}
CALLS = [{"index": 0, "id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x"'}}]
REST = [
    {"index": 0, "function": {"arguments": ": 1}"}},
    {"index": 1, "id": "c2", "function": {"name": "g", "arguments": "{}"}},
]
DELTAS: list[dict[str, Any]] = [
    {"role": "assistant", "content": ""},
    {"reasoning_content": "h", "reasoning": "h"},
    {"reasoning_content": "m", "content": "a"},
    {"content": "b"},
    {"tool_calls": CALLS},
    {"tool_calls": REST},
]


class Told:
    """A reply of a chat that is known beforehand; ``breaks``: its stream ends with an error."""

    def __init__(
        self, finish: str = "tool_calls", stop: str | None = None, breaks: bool = False, most: int = 50
    ) -> None:
        self.service = SimpleNamespace(name="tiny")
        params = SimpleNamespace(temperature=0.5, top_p=0.9, max_tokens=most)
        self.prepared = SimpleNamespace(
            warnings=["w"], prompt_tokens=10, requests=[SimpleNamespace(params=params)], stream=True
        )
        self.finish, self.stop, self.breaks, self.deltas = finish, stop, breaks, DELTAS

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        for number, delta in enumerate(self.deltas):
            last = number == len(self.deltas) - 1
            choice = {
                "index": 0,
                "delta": delta,
                "finish_reason": self.finish if last else None,
                "stop_reason": self.stop,
            }
            if last and self.breaks:
                raise ApiError(503, "too late", "timeout")
            yield (
                {"choices": [choice]} | ({} if number else {"warnings": ["w"]}) | ({"warnings": ["x"]} if last else {})
            )
        yield {"choices": [], "usage": USAGE}

    async def whole(self) -> dict[str, Any]:
        functions = [{"name": "f", "arguments": '{"x": 1}'}, {"name": "g", "arguments": "{}"}]
        calls = [{"id": f"c{n + 1}", "type": "function", "function": f} for n, f in enumerate(functions)]
        message = {"role": "assistant", "content": "ab", "reasoning_content": "hm", "tool_calls": calls}
        if self.deltas is not DELTAS:
            message = {"role": "assistant", "content": "".join(delta.get("content", "") for delta in self.deltas)}
        choice = {"index": 0, "message": message, "finish_reason": self.finish, "stop_reason": self.stop}
        return {"choices": [choice], "usage": USAGE, "warnings": ["w", "x"]}


async def _events(reply: Any) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    try:
        async for event in reply.chunks():
            events.append(event)
    except ApiError as error:
        events.append(reply.failure(error))
    return events


def responses(told: Told) -> ResponsesReply:
    body, _ = read_responses(json.dumps({"input": "hi", "max_output_tokens": 50}).encode())
    return ResponsesReply(told, body)  # type: ignore[arg-type]


def messages(told: Told, stops: tuple[str, ...] = ()) -> MessagesReply:
    return MessagesReply(told, list(stops), 50)  # type: ignore[arg-type]


def test_events_of_a_response() -> None:
    events = asyncio.run(_events(responses(Told())))
    item, part = "response.output_item", "response.content_part"
    assert [event["type"] for event in events] == [
        "response.created", "response.in_progress",
        f"{item}.added", f"{part}.added", "response.reasoning_text.delta", "response.reasoning_text.delta",
        "response.reasoning_text.done", f"{part}.done", f"{item}.done",
        f"{item}.added", f"{part}.added", "response.output_text.delta", "response.output_text.delta",
        "response.output_text.done", f"{part}.done", f"{item}.done",
        f"{item}.added", "response.function_call_arguments.delta", "response.function_call_arguments.delta",
        "response.function_call_arguments.done", f"{item}.done",
        f"{item}.added", "response.function_call_arguments.delta",
        "response.function_call_arguments.done", f"{item}.done",
        "response.completed",
    ]  # fmt: skip
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    done = events[-1]["response"]
    assert events[0]["response"]["status"] == "in_progress" and events[0]["response"]["warnings"] == ["w"]
    assert done["status"] == "completed" and done["warnings"] == ["w", "x"] and done["incomplete_details"] is None
    assert [event["item"] for event in events if event["type"] == f"{item}.done"] == done["output"]
    assert [entry["type"] for entry in done["output"]] == ["reasoning", "message", "function_call", "function_call"]
    assert done["output"][0]["content"] == [{"type": "reasoning_text", "text": "hm"}]
    assert done["output"][1]["content"][0]["text"] == "ab" and done["output"][2]["arguments"] == '{"x": 1}'
    assert done["usage"]["input_tokens_details"]["cached_tokens"] == 4 and done["usage"]["total_tokens"] == 17
    added = [event["item"] for event in events if event["type"] == f"{item}.added"]
    assert [entry.get("content", entry.get("arguments")) for entry in added] == [[], [], "", ""]
    assert {entry["status"] for entry in added} == {"in_progress"}


def test_a_whole_response_is_its_stream() -> None:
    streamed = asyncio.run(_events(responses(Told())))[-1]["response"]
    whole = asyncio.run(responses(Told()).whole())
    for body in (streamed, whole):
        for entry in (body, *body["output"]):
            entry["id"] = ""
    assert streamed | {"created_at": 0, "completed_at": 0} == whole | {"created_at": 0, "completed_at": 0}


def test_a_response_that_is_cut_off_or_breaks() -> None:
    cut = asyncio.run(_events(responses(Told("length"))))
    assert cut[-1]["type"] == "response.incomplete" and cut[-2]["item"]["status"] == "incomplete"
    assert cut[-1]["response"]["incomplete_details"] == {"reason": "max_output_tokens"}
    assert [entry["status"] for entry in cut[-1]["response"]["output"]] == ["completed"] * 3 + ["incomplete"]
    broken = asyncio.run(_events(responses(Told(breaks=True))))[-1]
    assert broken["type"] == "response.failed" and broken["response"]["status"] == "failed"
    assert broken["response"]["error"] == {"code": "server_error", "message": "too late"}
    assert broken["response"]["output"][-1]["status"] == "incomplete"


def test_events_of_a_message() -> None:
    events = asyncio.run(_events(messages(Told())))
    block = "content_block"
    assert [event["type"] for event in events] == [
        "message_start",
        f"{block}_start", f"{block}_delta", f"{block}_delta", f"{block}_delta", f"{block}_stop",
        f"{block}_start", f"{block}_delta", f"{block}_delta", f"{block}_stop",
        f"{block}_start", f"{block}_delta", f"{block}_delta", f"{block}_stop",
        f"{block}_start", f"{block}_delta", f"{block}_stop",
        "message_delta", "message_stop",
    ]  # fmt: skip
    start = events[0]["message"]
    assert start["content"] == [] and start["stop_reason"] is None and start["usage"]["input_tokens"] == 10
    assert [event["index"] for event in events if event["type"] == f"{block}_start"] == [0, 1, 2, 3]
    deltas = [event["delta"] for event in events if event["type"] == f"{block}_delta"]
    assert [delta["type"] for delta in deltas] == [
        "thinking_delta", "thinking_delta", "signature_delta", "text_delta", "text_delta",
        "input_json_delta", "input_json_delta", "input_json_delta",
    ]  # fmt: skip
    assert json.loads("".join(delta["partial_json"] for delta in deltas[5:7])) == {"x": 1}
    assert events[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert events[-2]["usage"]["input_tokens"] == 6 and events[-2]["usage"]["cache_read_input_tokens"] == 4
    assert events[-2]["usage"]["output_tokens_details"] == {"thinking_tokens": 3} and events[-2]["warnings"] == ["x"]


def test_a_whole_message() -> None:
    whole = asyncio.run(messages(Told()).whole())
    assert whole["content"] == [
        {"type": "thinking", "thinking": "hm", "signature": "unsigned"},
        {"type": "text", "text": "ab"},
        {"type": "tool_use", "id": "c1", "name": "f", "input": {"x": 1}},
        {"type": "tool_use", "id": "c2", "name": "g", "input": {}},
    ]
    assert whole["stop_reason"] == "tool_use" and whole["warnings"] == ["w", "x"] and whole["role"] == "assistant"


@pytest.mark.parametrize(
    ("finish", "stop", "stops", "most", "reason", "sequence"),
    [
        ("stop", None, (), 50, "end_turn", None),
        ("stop", "x", ("x",), 50, "stop_sequence", "x"),
        ("stop", "x", (), 50, "end_turn", None),  # the checkpoint's own stop string
        ("length", None, (), 50, "max_tokens", None),
        ("length", None, (), 49, "model_context_window_exceeded", None),
    ],
)
def test_why_a_message_ended(
    finish: str, stop: str | None, stops: tuple[str, ...], most: int, reason: str, sequence: str | None
) -> None:
    whole = asyncio.run(messages(Told(finish, stop, most=most), stops).whole())
    assert (whole["stop_reason"], whole["stop_sequence"]) == (reason, sequence)
    delta = asyncio.run(_events(messages(Told(finish, stop, most=most), stops)))[-2]["delta"]
    assert delta == {"stop_reason": reason, "stop_sequence": sequence}


def test_an_empty_reply_has_no_blocks() -> None:
    told = Told("stop")
    told.deltas = [{"role": "assistant", "content": ""}, {}]
    assert asyncio.run(messages(told).whole())["content"] == []
    assert asyncio.run(responses(told).whole())["output"] == []
    names = [event["type"] for event in asyncio.run(_events(messages(told)))]
    assert names == ["message_start", "message_delta", "message_stop"]


def test_text_around_the_rest_of_a_call() -> None:
    """One chunk may carry the end of a call and text after it: the end belongs to the call."""
    told = Told()
    told.deltas = [*DELTAS[:5], {"content": "c", "tool_calls": REST[:1]}]
    output = asyncio.run(_events(responses(told)))[-1]["response"]["output"]
    assert [entry["type"] for entry in output] == ["reasoning", "message", "function_call", "message"]
    assert output[2]["arguments"] == '{"x": 1}'


def test_a_message_that_breaks() -> None:
    last = asyncio.run(_events(messages(Told(breaks=True))))[-1]
    shown = {"type": "overloaded_error", "message": "too late", "param": None, "code": "timeout"}
    assert last == {"type": "error", "error": shown}
    kinds = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 500: "api_error"}
    assert {status: error_body(ApiError(status, "x", "y"))["error"]["type"] for status in kinds} == kinds
