"""Routes beside chats, what goes over the wire, clients that go away, metrics: against a server that really runs."""

from __future__ import annotations

import base64
import importlib
import json
import struct
import threading
import time
from typing import Any

import httpx
import openai
import pytest

Running = Any  # of conftest.py

TOOL = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}


def test_another_model_and_unknown_routes(hybrid: Running) -> None:
    with pytest.raises(openai.NotFoundError, match="is not served") as caught:
        hybrid.client.chat.completions.create(model="other", messages=[{"role": "user", "content": "x"}])
    assert caught.value.code == "model_not_found" and caught.value.param == "model"
    for method, path, status in (
        ("GET", "/v1/nothing", 404),
        ("POST", "/v1/nothing", 404),
        ("GET", "/v1/embeddings", 405),
        ("GET", "/v1/chat/completions", 405),
        ("POST", "/v1/models/tiny-model", 405),
        ("GET", "/nowhere", 404),
    ):
        answer = httpx.request(method, hybrid.base + path)
        assert answer.status_code == status and set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_completions(hybrid: Running) -> None:
    create = hybrid.client.completions.create
    asked = {"model": hybrid.name, "prompt": [[300, 301], [302]], "max_tokens": 6, "seed": 1, "n": 2}
    asked["extra_body"] = {"ignore_eos": True}
    whole = create(**asked, logprobs=2)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3] and whole.usage.completion_tokens == 24
    texts = [""] * 4
    for chunk in create(**asked, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]
    table = whole.choices[0].logprobs
    assert len(table.tokens) == len(table.token_logprobs) == len(table.top_logprobs) == len(table.text_offset) == 6
    echoed = create(model=hybrid.name, prompt="sum E1", max_tokens=0, echo=True, logprobs=1).choices[0]
    assert echoed.text == "sum E1" and echoed.logprobs.token_logprobs[0] is None
    [scores] = hybrid.service.llm.score([hybrid.service.llm.tokenizer.encode("sum E1")])
    assert echoed.logprobs.token_logprobs[1:] == pytest.approx(scores.tolist(), abs=1e-4)
    both = create(model=hybrid.name, prompt="sum E1", max_tokens=4, echo=True, seed=1).choices[0].text
    assert both == "sum E1" + create(model=hybrid.name, prompt="sum E1", max_tokens=4, seed=1).choices[0].text
    best = create(model=hybrid.name, prompt="sum", max_tokens=4, n=1, best_of=5, seed=2, logprobs=0)
    each = [create(model=hybrid.name, prompt="sum", max_tokens=4, seed=2 + i, logprobs=0).choices[0] for i in range(5)]
    assert best.choices[0].text == max(each, key=lambda c: sum(c.logprobs.token_logprobs)).text
    for bad, words in (
        ({"prompt": "x", "max_tokens": 0}, "only with echo"),
        ({"prompt": []}, "empty prompt"),
        ({"prompt": "x", "best_of": 1, "n": 2}, "best_of must be at least n"),
        ({"prompt": "x", "suffix": "y"}, "suffix is not supported"),
        ({"prompt": [10**6]}, "token 1000000 is none"),
        ({"prompt": "", "echo": True, "logprobs": 1, "max_tokens": 0}, "empty prompt"),
        ({"prompt": [hybrid.service.llm.tokenizer.vocab_size], "echo": True}, "outside"),
        ({"prompt": "x", "logit_bias": {"1" * 5000: 1}}, "keys are token ids"),
        ({"prompt": "x", "extra_body": {"structured_outputs": {}}}, "structured_outputs is empty"),
        ({"prompt": "x", "extra_body": {"thinking_budget": 3}}, "belongs to chats"),
    ):
        with pytest.raises(openai.BadRequestError, match=words):
            create(model=hybrid.name, **{"max_tokens": 2, **bad})


def test_every_choice_has_the_ids_of_its_own_prompt(hybrid: Running) -> None:
    asked: dict[str, Any] = {"prompt": [[300, 301], [302]], "max_tokens": 3, "n": 2, "return_token_ids": True}
    wanted = [[300, 301], [300, 301], [302], [302]]
    whole = httpx.post(f"{hybrid.base}/v1/completions", json=asked).json()
    assert "prompt_token_ids" not in whole
    assert [choice["prompt_token_ids"] for choice in whole["choices"]] == wanted
    found: dict[int, list[int]] = {}
    text = httpx.post(f"{hybrid.base}/v1/completions", json={**asked, "stream": True}).text
    for event in text.split("\n\n")[:-2]:
        for choice in json.loads(event[6:])["choices"]:
            found.setdefault(choice["index"], []).extend(choice.get("prompt_token_ids", []))
    assert [found[index] for index in range(4)] == wanted


def test_embeddings(hybrid: Running) -> None:
    create = hybrid.client.embeddings.create
    reply = create(model=hybrid.name, input=["sum", "mod"], dimensions=8)
    vectors = [entry.embedding for entry in reply.data]
    assert [len(vector) for vector in vectors] == [8, 8] and sum(x * x for x in vectors[0]) == pytest.approx(
        1, abs=1e-5
    )
    plain = httpx.post(f"{hybrid.base}/v1/embeddings", json={"input": "sum", "dimensions": 8}).json()
    assert plain["data"][0]["embedding"] == pytest.approx(vectors[0], abs=1e-6)
    coded = httpx.post(
        f"{hybrid.base}/v1/embeddings", json={"input": "sum", "dimensions": 8, "encoding_format": "base64"}
    )
    raw = base64.b64decode(coded.json()["data"][0]["embedding"])
    assert struct.unpack("<8f", raw) == pytest.approx(vectors[0], abs=1e-6)
    tokens = create(
        model=hybrid.name, input=[hybrid.service.llm.tokenizer.encode("sum") + [hybrid.service.llm.tokenizer.endoftext]]
    )
    assert tokens.data[0].embedding[:2] != []
    for bad in ({"input": []}, {"input": ""}, {"input": "x", "dimensions": 999}, {"input": [[10**6]]}):
        with pytest.raises(openai.BadRequestError):
            create(model=hybrid.name, **bad)


TEXTS = [f"sum {number} " * 120 for number in range(12)]  # each fills a batch


def slow(monkeypatch: pytest.MonkeyPatch, server: Running, place: str) -> list[int]:
    """Have a function that runs in the engine's thread take 50 ms more; the steps made before each of its calls."""
    module, _, name = place.rpartition(".")
    function, steps = getattr(importlib.import_module(module), name), []

    def slowed(*given: Any) -> Any:
        steps.append(server.service.loop.steps)
        time.sleep(0.05)
        return function(*given)

    monkeypatch.setattr(place, slowed)
    return steps


def test_replies_go_on_between_batches_of_inputs(hybrid: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = httpx.post(f"{hybrid.base}/v1/embeddings", json={"input": TEXTS}).json()
    steps = slow(monkeypatch, hybrid, "twofold.serve.embedding.embed")
    with hybrid.chat(stream=True, max_tokens=900, extra_body={"ignore_eos": True}) as stream:
        next(iter(stream))
        beside = httpx.post(f"{hybrid.base}/v1/embeddings", json={"input": TEXTS}).json()
    assert beside == alone and len(steps) == len(TEXTS) and len(set(steps)) > len(TEXTS) // 2
    hybrid.wait_until_idle()


@pytest.mark.parametrize(
    ("path", "place", "body"),
    [
        ("embeddings", "twofold.serve.embedding.embed", {"input": TEXTS}),
        (
            "completions",
            "twofold.serve.service.score_prompt",
            {"prompt": TEXTS, "echo": True, "logprobs": 0, "max_tokens": 0},
        ),
    ],
)
def test_a_client_that_goes_away_ends_what_is_computed_for_it(
    hybrid: Running, monkeypatch: pytest.MonkeyPatch, path: str, place: str, body: dict[str, Any]
) -> None:
    steps, before = slow(monkeypatch, hybrid, place), aborted(hybrid)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{hybrid.base}/v1/{path}", json=body, timeout=0.2)
    end = time.monotonic() + 5
    while aborted(hybrid) == before:
        assert time.monotonic() < end
        time.sleep(0.01)
    time.sleep(0.2)
    assert 0 < len(steps) < len(TEXTS)


def test_tokens_and_back(hybrid: Running) -> None:
    ask = [{"role": "user", "content": "sum"}]
    tokens = httpx.post(f"{hybrid.base}/tokenize", json={"messages": ask, "enable_thinking": False}).json()
    assert tokens["tokens"] == hybrid.service.llm.renderer.prompt_ids(ask, thinking=False)
    assert tokens["count"] == len(tokens["tokens"]) and tokens["max_model_len"] == 1024
    text = httpx.post(f"{hybrid.base}/detokenize", json={"tokens": tokens["tokens"]}).json()["prompt"]
    assert text.endswith("<think>\n\n</think>\n\n")
    plain = httpx.post(f"{hybrid.base}/tokenize", json={"prompt": "a<think>", "return_token_strs": True}).json()
    assert plain["token_strs"] == ["a", "<think>"]
    for body in ({}, {"prompt": "a", "messages": ask}, {"prompt": "a", "tools": [TOOL]}):
        assert httpx.post(f"{hybrid.base}/tokenize", json=body).status_code == 400
    assert httpx.post(f"{hybrid.base}/detokenize", json={"tokens": [10**6]}).status_code == 400


def test_events_on_the_wire(hybrid: Running) -> None:
    body = {"messages": [{"role": "user", "content": "sum"}], "stream": True, "max_tokens": 3}
    answer = httpx.post(f"{hybrid.base}/v1/chat/completions", json=body, headers={"X-Request-Id": "abc-1"})
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["x-request-id"] == "abc-1"
    events = answer.text.split("\n\n")
    assert events.pop() == "" and events.pop() == "data: [DONE]"
    assert all(event.startswith("data: {") for event in events)
    assert json.loads(events[0][6:])["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    other = httpx.post(f"{hybrid.base}/v1/chat/completions", json={}, headers={"X-Request-Id": "a b"})
    assert other.status_code == 400 and len(other.headers["x-request-id"]) == 32


def aborted(server: Running) -> float:
    """How many clients have gone away."""
    lines = httpx.get(f"{server.base}/metrics").text.splitlines()
    return float(next(line for line in lines if line.startswith("twofold:aborted_requests_total")).split()[-1])


def test_a_client_that_goes_away_ends_its_request(hybrid: Running) -> None:
    before = aborted(hybrid)
    with hybrid.chat(stream=True, max_tokens=900, extra_body={"ignore_eos": True}) as stream:
        for _ in zip(range(3), stream, strict=False):
            pass
        assert not hybrid.idle()
    hybrid.wait_until_idle(5)
    with pytest.raises(openai.APITimeoutError):  # not a stream: the connection closes while the reply is being made
        hybrid.client.with_options(timeout=0.2).chat.completions.create(
            model=hybrid.name, messages=[{"role": "user", "content": "x"}], max_tokens=900, n=8,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
    hybrid.wait_until_idle(5)
    assert aborted(hybrid) == before + 2


def test_metrics(hybrid: Running) -> None:
    hybrid.chat(max_tokens=3)
    text = httpx.get(f"{hybrid.base}/metrics").text
    for name in (
        "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc",
        "vllm:prompt_tokens_total", "vllm:generation_tokens_total", "vllm:time_to_first_token_seconds_bucket",
        "vllm:inter_token_latency_seconds_bucket", "vllm:e2e_request_latency_seconds_bucket",
        "vllm:request_decode_time_seconds_bucket", "vllm:request_queue_time_seconds_bucket",
        "vllm:request_prefill_time_seconds_bucket",
        "vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total", "vllm:num_preemptions_total",
        "vllm:request_success_total", "twofold:thinking_tokens_total", "twofold:forced_stops_total",
        "twofold:loops_total", "twofold:unclosed_thoughts_total", "twofold:parser_recoveries_total",
    ):  # fmt: skip
        assert f"\n{name}{{" in text, name
    assert 'finished_reason="length",model_name="tiny-model"' in text
    first, queue, prefill = (
        float(text.split(f"\nvllm:{name}_seconds_sum{{")[1].split("}")[1].split()[0])
        for name in ("time_to_first_token", "request_queue_time", "request_prefill_time")
    )
    assert queue > 0 and prefill > 0 and queue + prefill == pytest.approx(first)
    assert httpx.get(f"{hybrid.base}/health").json() == {"status": "ok"}
    assert "version" in httpx.get(f"{hybrid.base}/version").json()
    assert "<html" in httpx.get(f"{hybrid.base}/").text


def test_many_clients_get_their_own_answers(hybrid: Running) -> None:
    """What a request gets does not depend on its batch mates: each greedy answer equals the one it gets alone."""
    prompts = [f"sum {n} mod E{n}" for n in range(12)]
    alone = [hybrid.chat(text, temperature=0, max_tokens=12).choices[0].message.content for text in prompts]
    together: dict[int, str] = {}

    def ask(number: int) -> None:
        chunks = hybrid.chat(prompts[number], temperature=0, max_tokens=12, stream=True)
        together[number] = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[number] for number in range(len(prompts))] == alone
    assert len(set(alone)) > 6
    hybrid.wait_until_idle()


def test_every_chunk_but_the_one_with_usage_has_a_choice(hybrid: Running) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}, "user": "me", "max_tokens": 3}
    for chunks in (
        list(
            hybrid.client.completions.create(
                model=hybrid.name, prompt="sum", extra_body={"return_token_ids": True}, **options
            )
        ),
        list(hybrid.chat(**options)),
    ):
        assert all(chunk.choices for chunk in chunks[:-1]) and not chunks[-1].choices and chunks[-1].usage
        assert [getattr(chunk, "warnings", None) for chunk in chunks] == [
            ["user has no effect here"], *[None] * (len(chunks) - 1)
        ]  # fmt: skip


@pytest.mark.parametrize(
    ("route", "body", "param"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "E1 B5 " * 900}]}, "messages"),
        ("/v1/completions", {"prompt": [[5], [5] * 2000], "stream": True}, "prompt"),
        ("/v1/completions", {"prompt": "E1 B5 " * 900, "echo": True, "max_tokens": 0}, "prompt"),
        ("/v1/embeddings", {"input": "E1 B5 " * 900}, "input"),
        ("/v1/embeddings", {"input": [5] * 2000}, "input"),
    ],
)
def test_too_long_a_text_is_said_alike_everywhere(hybrid: Running, route: str, body: Any, param: str) -> None:
    reply = httpx.post(hybrid.base + route, json=body)
    error = reply.json()["error"]
    assert (reply.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", param)
    assert "this model's maximum context length is 1024 tokens" in error["message"]


def test_ids_that_no_machine_word_holds(hybrid: Running) -> None:
    for route, body in (
        ("/detokenize", {"tokens": [2**70]}),
        ("/v1/completions", {"prompt": [2**70]}),
        ("/v1/embeddings", {"input": [-(2**70)]}),
        ("/v1/completions", {"prompt": "a", "stop_token_ids": [2**64]}),
    ):
        assert httpx.post(hybrid.base + route, json=body).status_code == 400, body
