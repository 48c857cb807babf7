"""``/v1/messages`` by the official ``anthropic`` client and over the wire, against a server that really runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

Running = Any  # of conftest.py

CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = {"name": "weather", "description": "of a city", "input_schema": CITY, "strict": True}
HI = [{"role": "user", "content": "sum E1"}]


def client(server: Running, key: str = "unused") -> Any:
    """The official client; a test that needs it is skipped where it is not installed."""
    anthropic = pytest.importorskip("anthropic")
    return anthropic.Anthropic(base_url=server.base, api_key=key, max_retries=0, timeout=60)


def both(server: Running, **options: Any) -> Any:
    """The same request, whole and streamed: the same message comes; returns it."""
    extra = {"seed": 7, **options.pop("extra_body", {})}
    given = {"model": server.name, "messages": HI, "max_tokens": 24, **options}
    messages = client(server).messages
    whole = messages.create(**given, extra_body=extra)
    with messages.stream(**given, extra_body=extra) as events:
        streamed = events.get_final_message()
    kept = [block.model_dump(exclude={"id", "parsed_output"}) for block in whole.content]
    assert [block.model_dump(exclude={"id", "parsed_output"}) for block in streamed.content] == kept
    assert (streamed.stop_reason, streamed.stop_sequence) == (whole.stop_reason, whole.stop_sequence)
    assert streamed.usage.output_tokens == whole.usage.output_tokens
    return whole


def test_messages_without_a_thought(hybrid: Running) -> None:
    message = both(hybrid)
    [block] = message.content
    chat = hybrid.chat(seed=7, extra_body={"enable_thinking": False})
    assert block.type == "text" and block.text == chat.choices[0].message.content
    assert message.stop_reason == "max_tokens" and message.usage.output_tokens == 24
    usage = message.usage
    assert usage.input_tokens + usage.cache_read_input_tokens == chat.usage.prompt_tokens


def test_thinking_blocks_have_a_budget(thinker: Running) -> None:
    tokenizer = thinker.service.llm.tokenizer
    extra = {"logit_bias": {str(tokenizer.im_end): -100, str(tokenizer.endoftext): -100}}
    message = both(thinker, thinking={"type": "enabled", "budget_tokens": 6}, max_tokens=48, extra_body=extra)
    thought, text = message.content
    assert (thought.type, text.type) == ("thinking", "text") and thought.signature
    chat = thinker.chat(seed=7, max_tokens=48, extra_body=extra | {"thinking_budget": 6}).choices[0].message
    assert (thought.thinking, text.text) == (chat.reasoning_content, chat.content)
    assert message.usage.output_tokens_details.thinking_tokens > 0
    rows = [*HI, {"role": "assistant", "content": [b.model_dump() for b in message.content]}, *HI]
    assert client(thinker).messages.create(model=thinker.name, messages=rows, max_tokens=4).content


def test_tool_use_and_its_result(hybrid: Running) -> None:
    bias = {str(hybrid.service.llm.tokenizer.im_end): 30}
    choice = {"type": "any", "disable_parallel_tool_use": True}
    message = both(hybrid, tools=[WEATHER], tool_choice=choice, max_tokens=200, extra_body={"logit_bias": bias})
    [block] = message.content
    assert block.type == "tool_use" and block.input["city"] in ("Rome", "Oslo") and message.stop_reason == "tool_use"
    result = {"type": "tool_result", "tool_use_id": block.id, "content": [{"type": "text", "text": "rain"}]}
    rows = [*HI, {"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
    again = client(hybrid).messages.create(
        model=hybrid.name, messages=rows, max_tokens=4, tools=[WEATHER], system="user"
    )
    counted = client(hybrid).messages.count_tokens(model=hybrid.name, messages=rows, tools=[WEATHER], system="user")
    assert counted.input_tokens == again.usage.input_tokens + again.usage.cache_read_input_tokens


def test_an_answer_that_was_begun_goes_on(hybrid: Running) -> None:
    rows = [*HI, {"role": "assistant", "content": "mod 10"}]
    message = both(hybrid, messages=rows)
    chat = hybrid.chat(messages=rows, seed=7, extra_body={"enable_thinking": False, "continue_final_message": True})
    assert message.content[0].text == chat.choices[0].message.content


def test_errors_in_the_shape_of_the_protocol(hybrid: Running) -> None:
    anthropic = pytest.importorskip("anthropic")
    create = client(hybrid).messages.create
    with pytest.raises(anthropic.BadRequestError, match="conflicting_controls") as caught:
        create(model=hybrid.name, messages=HI, max_tokens=4, thinking={"type": "disabled", "budget_tokens": 5})
    assert caught.value.body["type"] == "error" and caught.value.body["error"]["type"] == "invalid_request_error"
    with pytest.raises(anthropic.NotFoundError, match="is not served"):
        create(model="other", messages=HI, max_tokens=4)


def test_over_the_wire(hybrid: Running) -> None:
    """Names of events stand before their data, as both official clients need it; errors need no client."""
    asked = {"messages": HI, "max_tokens": 3, "stream": True, "stop_sequences": ["zzz"]}
    text = httpx.post(f"{hybrid.base}/v1/messages", json=asked).text
    frames = [frame.split("\n") for frame in text.rstrip("\n").split("\n\n")]
    assert all(name == f"event: {json.loads(data[6:])['type']}" for name, data in frames) and "[DONE]" not in text
    assert [frames[0][0], frames[-1][0]] == ["event: message_start", "event: message_stop"]
    for path, body, status, kind in (
        ("/v1/messages", {"messages": HI}, 400, "invalid_request_error"),
        ("/v1/messages", {"messages": HI, "max_tokens": 3, "model": "x"}, 404, "not_found_error"),
        ("/v1/messages/count_tokens", {"messages": []}, 400, "invalid_request_error"),
        ("/v1/messages/batches", {}, 404, "not_found_error"),
    ):
        answer = httpx.post(hybrid.base + path, json=body)
        assert answer.status_code == status and answer.json()["type"] == "error"
        assert answer.json()["error"]["type"] == kind
    counted = httpx.post(f"{hybrid.base}/v1/messages/count_tokens", json={"messages": HI}).json()
    rendered = httpx.post(f"{hybrid.base}/tokenize", json={"messages": HI, "enable_thinking": False}).json()
    assert counted == {"input_tokens": rendered["count"]}


def test_keys(served_folder: Path, serving: Any) -> None:
    with serving(served_folder, api_keys=("first",)) as server:
        body = {"messages": HI, "max_tokens": 2}
        for headers, status in (
            ({"x-api-key": "first"}, 200),
            ({"Authorization": "Bearer first"}, 200),
            ({"x-api-key": "other"}, 401),
            ({"x-api-key": ""}, 401),
            ({}, 401),
        ):
            answer = httpx.post(f"{server.base}/v1/messages", json=body, headers=headers)
            assert answer.status_code == status
            if status == 401:
                assert answer.json()["error"]["type"] == "authentication_error"
        for path in ("/rerank", "/v2/rerank", "/v1/responses", "/tokenizer_info"):
            assert httpx.post(server.base + path, json={}).status_code == 401
