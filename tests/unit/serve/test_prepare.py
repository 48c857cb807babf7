"""Checked bodies become engine requests: every field arrives, and what cannot be honoured is refused."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from twofold.base.records import AnswerSampling, Grammar
from twofold.llm import LLM
from twofold.model.config import ModelConfig
from twofold.serve.errors import ApiError
from twofold.serve.prepare import Prepared, prepare_chat, prepare_completion
from twofold.serve.protocol import ChatRequest, CompletionRequest, read_body
from twofold.text.chat import ChatPolicy, Renderer
from twofold.text.tokenizer import Tokenizer

HI = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["some text 123 hi"] * 3, 320)


def model(tokenizer: Tokenizer, family: str = "hybrid", **generation: Any) -> LLM:
    """An LLM without weights: preparing a request needs none."""
    llm = LLM.__new__(LLM)
    config = ModelConfig.model_construct(max_position_embeddings=500, vocab_size=tokenizer.vocab_size, context=None)
    llm._tokenizer, llm._generation = tokenizer, generation
    llm._renderer = Renderer(tokenizer, ChatPolicy(family=family))
    llm.model = SimpleNamespace(config=config)  # type: ignore[assignment]
    return llm


def chat(llm: LLM, **fields: Any) -> Prepared:
    body = json.dumps({"messages": HI, "max_tokens": 100, **fields}).encode()
    return prepare_chat(llm, *read_body(ChatRequest, body, thinking=True))


def test_every_sampling_field_arrives(tokenizer: Tokenizer) -> None:
    fields = {
        "temperature": 0.3, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "max_tokens": 50, "n": 2, "seed": 9,
        "presence_penalty": 0.5, "frequency_penalty": -0.5, "repetition_penalty": 1.1, "min_tokens": 3,
        "ignore_eos": True, "stop_token_ids": [4, 5], "stop_loops": True, "speculate": 4, "thinking_budget": 6,
    }  # fmt: skip
    [request] = chat(model(tokenizer), **fields, logit_bias={"5": 2}, logprobs=True, top_logprobs=3).requests
    for name, value in fields.items():
        assert getattr(request.params, name) == (tuple(value) if isinstance(value, list) else value), name
    assert request.params.logit_bias == ((5, 2.0),) and request.params.top_logprobs == 3
    post = chat(model(tokenizer), temperature=0.9, top_k=5, post_thinking={"temperature": 0.1, "top_k": -1}).requests[0]
    assert post.params.post_thinking == AnswerSampling(0.1, 0.95, 0, 0.0)
    form = {"response_format": {"type": "json_object"}}
    assert chat(model(tokenizer), **form).requests[0].params.grammar == Grammar("json")


def test_the_mode_decides_the_prompt_and_the_defaults(tokenizer: Tokenizer) -> None:
    llm = model(tokenizer)
    on, off = chat(llm).requests[0], chat(llm, enable_thinking=False).requests[0]
    assert (on.params.temperature, on.params.top_p) == (0.6, 0.95) and not on.after_think
    assert (off.params.temperature, off.params.top_p) == (0.7, 0.8) and off.after_think
    instruct = model(tokenizer, "instruct")
    assert chat(instruct).requests[0].params.top_p == 0.8
    assert chat(instruct, enable_thinking=False).requests[0].params.thinking_budget is None
    spellings = {"enable_thinking": True, "thinking_budget": 4, "reasoning_effort": "low", "preserve_thinking": True}
    for controls in ({name: value} for name, value in spellings.items()):
        with pytest.raises(ApiError, match="this model does not think"):
            chat(instruct, **controls)
    always = model(tokenizer, "thinking")
    assert chat(always).requests[0].in_think
    with pytest.raises(ApiError, match="this model always thinks"):
        chat(always, think=False)


def test_past_thoughts_are_shown_on_request(tokenizer: Tokenizer) -> None:
    past = [*HI, {"role": "assistant", "content": "a", "reasoning": "deep"}, *HI]
    shown, gone = (
        tokenizer.decode(chat(model(tokenizer), messages=past, preserve_thinking=keep).requests[0].prompt_ids)
        for keep in (True, False)
    )
    assert "deep" in shown and "deep" not in gone


def test_stop_strings_take_choices_apart(tokenizer: Tokenizer) -> None:
    joined, apart = chat(model(tokenizer), n=3, seed=5), chat(model(tokenizer), n=3, seed=5, stop="x")
    assert len(joined.requests) == 1 and joined.parts == [0, 0, 0]
    assert [request.params.seed for request in apart.requests] == [5, 6, 7] and apart.parts == [0, 1, 2]
    assert apart.prompt_tokens == joined.prompt_tokens == len(joined.prompts[0])


def test_a_checkpoint_s_stop_strings_count_where_a_request_has_none(tokenizer: Tokenizer) -> None:
    llm = model(tokenizer, stop_strings=["END"])
    own, given, none = chat(llm), chat(llm, stop="x"), chat(llm, stop=[])
    assert [prepared.wanted.stop for prepared in (own, given, none)] == [("END",), ("x",), ()]
    assert own.wanted.parse.stop == ("END",)


def test_without_a_seed_replies_vary_and_with_any_seed_they_are_made(tokenizer: Tokenizer) -> None:
    llm = model(tokenizer)
    assert len({chat(llm).requests[0].params.seed for _ in range(8)}) == 8
    assert chat(llm, seed=-1).requests[0].params.seed >= 0
    assert chat(llm, seed=2**80).requests[0].params.seed < 2**62


def test_a_limit_beyond_the_context_is_said(tokenizer: Tokenizer) -> None:
    got = chat(model(tokenizer), max_tokens=9000)
    room = 500 - len(got.prompts[0])
    assert got.requests[0].params.max_tokens == room and f"max_tokens is {room}, not 9000" in got.warnings[0]
    assert chat(model(tokenizer, max_new_tokens=33), max_tokens=None).requests[0].params.max_tokens == 33


def test_plain_prompts(tokenizer: Tokenizer) -> None:
    def completion(**fields: Any) -> Prepared:
        body, _, warnings = read_body(CompletionRequest, json.dumps({"max_tokens": 9, **fields}).encode())
        return prepare_completion(model(tokenizer), body, warnings)

    got = completion(prompt=["hi", "text"], n=2, user="me")
    assert len(got.requests) == 2 and got.parts == [0, 0, 1, 1] and got.per_prompt == 2
    assert got.warnings == ["user has no effect here"]
    assert completion(prompt="<|im_end|>").prompts == [[tokenizer.im_end]]
    assert completion(prompt="hi", best_of=4).requests[0].params.n == 4
    for bad in ({"prompt": [""]}, {"prompt": [[]]}, {"prompt": "x", "best_of": 2, "stream": True}):
        with pytest.raises(ApiError):
            completion(**bad)
    with pytest.raises(ApiError, match="empty prompt"):
        completion(prompt="", echo=True, logprobs=1, max_tokens=0)


def test_what_is_said_of_thoughts_where_there_are_none_is_named(tokenizer: Tokenizer) -> None:
    hybrid, instruct = model(tokenizer), model(tokenizer, "instruct")
    loops = "stop_loops has no effect: there is no thought to stop"
    assert chat(hybrid, stop_loops=True).warnings == chat(hybrid, stop_loops=False, think=False).warnings == []
    assert chat(hybrid, stop_loops=True, think=False).warnings == [loops]
    assert chat(hybrid, include_reasoning=False, preserve_thinking=True).warnings == []
    got = chat(instruct, stop_loops=True, include_reasoning=False, chat_template_kwargs={"preserve_thinking": False})
    assert got.warnings == [
        loops,
        "chat_template_kwargs.preserve_thinking has no effect: this model does not think",
        "include_reasoning has no effect: this model does not think",
    ]


def test_keys_of_logit_bias_are_token_ids(tokenizer: Tokenizer) -> None:
    for key in ("x", "-1", "", "9" * 21, "1" * 5000):
        with pytest.raises(ApiError, match="keys are token ids") as caught:
            chat(model(tokenizer), logit_bias={key: 1})
        assert caught.value.status == 400 and len(caught.value.message) < 120


def test_what_others_left_in_a_conversation_is_said_and_goes_on(tokenizer: Tokenizer) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": "x'}}
    past = [*HI, {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_contents": "r"}]
    got = chat(model(tokenizer), messages=[*past, {"role": "tool", "content": "1", "tool_call_id": "c"}])
    assert '"arguments": {"a": "x}' in tokenizer.decode(got.requests[0].prompt_ids)
    assert got.warnings == [
        "messages[1].tool_calls[0].arguments is no JSON object; it is shown to the model as it is",
        "messages[1].reasoning_contents is not shown to the model; did you mean 'reasoning_content'?",
    ]


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"messages": [{"role": "user", "content": "x " * 900}]}, "messages", "context_length_exceeded"),
        ({"logit_bias": {"99999": 1}}, "logit_bias", "invalid_value"),
        ({"stop_token_ids": [2**70]}, "stop_token_ids", "invalid_value"),
        ({"thinking": {"budget_tokens": 2**70}}, "thinking.budget_tokens", "invalid_value"),
        ({"max_tokens": None, "max_completion_tokens": 2**70}, "max_completion_tokens", "invalid_value"),
        ({"min_tokens": 101}, "min_tokens", "invalid_value"),
        ({"enable_thinking": False, "thinking_budget": 3}, "thinking_budget", "conflicting_controls"),
        ({"messages": [{"role": "ghost"}]}, "messages[0].role", "invalid_value"),
    ],
)
def test_errors_name_the_field_as_the_request_does(
    tokenizer: Tokenizer, fields: dict[str, Any], param: str, code: str
) -> None:
    with pytest.raises(ApiError) as caught:
        chat(model(tokenizer), **fields)
    assert (caught.value.status, caught.value.param, caught.value.code) == (400, param, code)
