"""Whatever JSON is sent to whichever route: no 5xx, no hang, and every error says what it is as data.

Bodies are made from a seed: fields with sound values, with values of other fields, with values that have broken
servers, nested where objects are taken, and bytes that are no JSON. Not here: what sound requests answer (tests/e2e).
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from twofold.engine.engine import EngineOptions
from twofold.llm import LLM
from twofold.model.config import ModelConfig
from twofold.model.qwen3 import Qwen3
from twofold.recipes.pretrain import save_model
from twofold.serve.app import create_app
from twofold.serve.config import ServeConfig
from twofold.serve.service import Service
from twofold.text.chat import CHAT_TEMPLATE
from twofold.text.tokenizer import Tokenizer

CONTEXT = 400
HUGE = [2**31, 2**63, 2**64, 2**70, -(2**70), 10**400, 1e308, -1, 0, 1, 2, 0.5]
TEXTS = [
    "", " ", "hi", "null", "none", "auto", "required", "{", "{}", "[1]", '{"type": "object"}', "\ud800", "a\udfffb",
    "é😀", "(", "a+", "(a{100}){100}", "start: start", 'start: "a"', "<|im_end|>", "</think>", "<tool_call>", "\0",
    "x" * 3000, "/no_think", "0", "5",
]  # fmt: skip
ODD: list[Any] = [None, True, False, [], {}, [[]], [{}], [None], {"": None}, {"a": {"b": [1]}}, *HUGE, *TEXTS]
FUNCTION = {"name": "now", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}}
TOOLS: list[Any] = [
    [], [{"type": "function", "function": FUNCTION}], [{"type": "function", "function": {"name": "now"}}],
    [{"type": "function", "function": {"name": "now", "parameters": {"type": "nothing"}}}],
    [{"type": "function", "function": {"name": "now", "parameters": {"$ref": "#/a"}, "strict": True}}],
]  # fmt: skip
SCHEMAS: list[Any] = [
    {}, {"type": "object"}, {"type": "string", "pattern": "("}, {"enum": []}, {"$ref": "#"}, {"x-guidance": 5},
    "5", "[]", {"type": "array", "minItems": 2**70}, {"anyOf": []}, {"enum": ["\ud800"]},
    '{"enum": ["\\ud800"]}', {"minimum": 1e400},
]  # fmt: skip
CALLS: list[Any] = [
    {"id": "c", "type": "function", "function": {"name": "now", "arguments": text}}
    for text in (*TEXTS[:12], None, {}, [1], 3, {"x": 2**70})
]
CONTENTS: list[Any] = [
    "hi",
    "",
    None,
    [{"type": "text", "text": "hi", "cache_control": {}}],
    [{"type": "image_url"}],
    3,
]
SOUND: dict[str, list[Any]] = {
    "temperature": [0, 1, 0.7], "top_p": [0.5, 1], "top_k": [-1, 3], "min_p": [0, 0.2], "n": [1, 2], "seed": [1, -5],
    "stop": ["a", ["a", "b"], []], "stop_token_ids": [[5], [10**30]], "logit_bias": [{}, {"5": 1}, {"9" * 20: 1}],
    "presence_penalty": [1], "frequency_penalty": [-1], "repetition_penalty": [1.1], "min_tokens": [0, 2],
    "ignore_eos": [True], "speculate": [0, 3, 2**31], "stream": [True, False], "return_token_ids": [True],
    "stream_options": [{"include_usage": True}, {"include_obfuscation": True}, {"include_usage": None}, {}],
    "response_format": [{"type": kind} for kind in ("text", "json_object", "json_schema")]
    + [{"type": "json_schema", "json_schema": {"name": "a", "schema": schema}} for schema in (None, *SCHEMAS)],
    "structured_outputs": [{"json": schema} for schema in SCHEMAS] + [{"regex": ""}, {"choice": [""]}, {"grammar": ""}],
    "guided_json": SCHEMAS, "guided_regex": TEXTS, "guided_choice": [["a"], [""], ["\ud800"]], "guided_grammar": TEXTS,
    "user": ["me"], "model": ["m", "other"], "metadata": [{}], "verbosity": ["medium", "low"], "functions": [[], [{}]],
    "extra_body": [{"top_k": 3}], "skip_special_tokens": [True], "suffix": [""], "modalities": [["text"]],
}  # fmt: skip
CHAT: dict[str, list[Any]] = SOUND | {
    "tools": TOOLS, "parallel_tool_calls": [True, False], "max_completion_tokens": [1, 4], "logprobs": [True],
    "tool_choice": ["none", "auto", "required", {"type": "function", "function": {"name": "now"}}],
    "top_logprobs": [0, 3], "add_generation_prompt": [True, False], "continue_final_message": [True],
    "post_thinking": [{"temperature": 0.1}], "stop_loops": [True], "enable_thinking": [True, False],
    "thinking_budget": [0, 3, -1], "reasoning_effort": ["low", "none", "medium"], "thinking": [{"type": "auto"}],
    "preserve_thinking": [True], "chat_template_kwargs": [{"enable_thinking": False}], "reasoning": [{"exclude": True}],
}  # fmt: skip
PROMPTS: list[Any] = ["hi", "", ["a", "b"], [5, 6], [[5], [6]], [10**30], [[-1]], "x y " * 500, [5] * 500, ["\ud800"]]
ROUTES: dict[str, dict[str, list[Any]]] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": SOUND | {"echo": [True], "logprobs": [0, 3], "best_of": [1, 2], "add_special_tokens": [False]},
    "/v1/embeddings": {
        "dimensions": [1, 8, 2**70], "encoding_format": ["float", "base64"], "instruction": ["find"], "user": ["me"],
        "model": ["m", "other"],
    },
    "/tokenize": {
        "add_special_tokens": [True], "tools": TOOLS, "return_token_strs": [True], "enable_thinking": [False],
        "continue_final_message": [True], "add_generation_prompt": [True],
    },
    "/detokenize": {"model": ["m"]},
}  # fmt: skip


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    tokenizer = Tokenizer.train(["sum mod user assistant 0123456789 true false name", CHAT_TEMPLATE] * 4, 500)
    model = Qwen3(
        ModelConfig(
            vocab_size=tokenizer.vocab_size + 6, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=1, num_key_value_heads=1, head_dim=16, rms_norm_eps=1e-6, rope_theta=1e4,
            max_position_embeddings=CONTEXT, tie_word_embeddings=True, initializer_range=0.3,
        )
    )  # fmt: skip
    model.init_weights(4)
    folder: Path = tmp_path_factory.mktemp("served") / "m"
    save_model(model, tokenizer, folder)
    llm = LLM(folder, max_rows=16, options=EngineOptions(kv_bytes=2**22, entropies=False))
    service = Service(llm, ServeConfig(request_seconds=60, max_choices=4, max_samples=8))  # a hang is a 503
    with TestClient(create_app(service), raise_server_exceptions=False) as client:
        yield client


def pick(draw: random.Random, sound: list[Any]) -> Any:
    return draw.choice(sound if draw.random() < 0.75 else ODD)


def messages(draw: random.Random) -> Any:
    """A conversation: most of them could have been held."""
    made: list[Any] = []
    for _ in range(draw.randint(0, 3)):
        made.append({"role": "user", "content": pick(draw, CONTENTS)})
        turn: dict[str, Any] = {"role": "assistant", "content": pick(draw, CONTENTS)}
        if draw.random() < 0.4:
            turn[draw.choice(["tool_calls", "invalid_tool_calls"])] = pick(draw, [[call] for call in CALLS])
            made += [turn, {"role": "tool", "content": "1", "tool_call_id": pick(draw, ["c"])}]
        else:
            turn[draw.choice(["reasoning", "reasoning_content", "reasoning_details", "name"])] = pick(draw, ["", "r"])
            made.append(turn)
    made.append({"role": draw.choice(["user", "user", "system", "tool", "ghost"]), "content": "hi"})
    return made if draw.random() < 0.95 else pick(draw, [[{}], [3], "hi"])


def body(draw: random.Random, route: str) -> Any:
    fields = ROUTES[route]
    made: dict[str, Any] = {}
    if draw.random() < 0.95:
        if route == "/v1/chat/completions" or (route == "/tokenize" and draw.random() < 0.6):
            made["messages"] = messages(draw)
        else:
            name = {"/v1/embeddings": "input", "/detokenize": "tokens"}.get(route, "prompt")
            made[name] = pick(draw, PROMPTS)
    if "temperature" in fields:
        made["max_tokens"] = draw.choice([1, 2, 3, 8, 0, *HUGE[1:6]] if draw.random() < 0.2 else [1, 2, 3])
    for name in draw.sample(sorted(fields), min(len(fields), draw.choice([0, 1, 1, 2, 3, 5]))):
        made[name] = pick(draw, fields[name])
    if draw.random() < 0.05:
        made[draw.choice(["temprature", "x", "\ud800", "messages ", ""])] = pick(draw, ["v"])
    return made if draw.random() < 0.97 else draw.choice(ODD)


def sent(draw: random.Random, route: str) -> bytes:
    """The bytes of a body; a few are cut off, nested without end, or no text."""
    data = json.dumps(body(draw, route)).encode()
    chance = draw.random()
    if chance < 0.02:
        return data[: draw.randint(0, len(data))]
    if chance < 0.03:
        return b'{"messages": ' + b"[" * draw.choice([150, 900, 50_000])
    if chance < 0.04:
        return b'{"tools": ' + b'[{"a":' * 90 + b"1" + b"}]" * 90 + b"}"
    return bytes(draw.randrange(256) for _ in range(20)) if chance < 0.05 else data


def check_error(error: dict[str, Any], data: bytes) -> None:
    assert set(error) == {"message", "type", "param", "code"}, (error, data[:500])
    assert all(isinstance(error[name], str) and error[name] for name in ("message", "type", "code")), (
        error,
        data[:500],
    )
    assert error["param"] is None or isinstance(error["param"], str), (error, data[:500])


def check_reply(http: TestClient, route: str, data: bytes) -> int:
    reply = http.post(route, content=data)
    assert reply.status_code < 500, (route, reply.status_code, reply.text[:300], data[:1000])
    if reply.status_code >= 400:
        check_error(reply.json()["error"], data)
    elif reply.headers["content-type"].startswith("text/event-stream"):
        lines = [line[6:] for line in reply.text.split("\n") if line.startswith("data: ")]
        assert lines.pop() == "[DONE]", data[:500]
        for chunk in map(json.loads, lines):
            if "error" in chunk:
                assert chunk["error"]["type"] != "server_error", (chunk, data[:1000])
                check_error(chunk["error"], data)
            else:
                assert chunk["choices"] or set(chunk) >= {"usage"}, (chunk, data[:500])
    else:
        assert reply.json()
    return reply.status_code


def send_many(http: TestClient, route: str, seed: int, count: int) -> None:
    draw = random.Random(f"{route} {seed}")
    codes = [check_reply(http, route, sent(draw, route)) for _ in range(count)]
    assert 200 in codes and 400 in codes
    assert http.get("/health").status_code == 200


@pytest.mark.parametrize("route", ROUTES)
def test_no_body_breaks_a_route(http: TestClient, route: str) -> None:
    send_many(http, route, 0, 60)


@pytest.mark.slow
@pytest.mark.parametrize("route", ROUTES)
def test_no_body_of_thousands_breaks_a_route(http: TestClient, route: str) -> None:
    send_many(http, route, 1, 5000)


@pytest.mark.parametrize("value", [*SCHEMAS, *TEXTS], ids=lambda value: repr(value)[:20])
def test_no_grammar_breaks_the_engine(http: TestClient, value: Any) -> None:
    """Every odd schema, expression and grammar by itself, by its name: chance alone meets few of them."""
    names = ["guided_json"] if isinstance(value, dict) else ["guided_json", "guided_regex", "guided_grammar"]
    for name in names:
        data = json.dumps({"prompt": "a", "max_tokens": 2, name: value}).encode()
        check_reply(http, "/v1/completions", data)
    assert http.get("/health").status_code == 200
