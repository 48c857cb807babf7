"""Bodies: strict values, fields without effect, fields that are refused, and the literal extra_body."""

from __future__ import annotations

import json
from typing import Any

import pytest

from twofold.serve.errors import ApiError
from twofold.serve.protocol import ChatRequest, CompletionRequest, StreamOptions, count_texts, read_body

HI = {"messages": [{"role": "user", "content": "hi"}]}


def chat(**fields: Any) -> tuple[ChatRequest, dict[str, Any], list[str]]:
    return read_body(ChatRequest, json.dumps({**HI, **fields}).encode(), thinking=True)


def test_fields_arrive() -> None:
    body, controls, warnings = chat(temperature=1, n=2, stop="x", stream_options={"include_usage": True}, think=True)
    assert (body.temperature, body.n, body.stop, body.stream_options) == (1, 2, "x", StreamOptions(include_usage=True))
    assert controls == {"think": True} and warnings == []


def test_a_literal_extra_body_is_merged() -> None:
    body, controls, _ = chat(top_p=0.5, extra_body={"top_k": 3, "top_p": 0.5, "enable_thinking": False})
    assert body.top_k == 3 and controls == {"enable_thinking": False}
    with pytest.raises(ApiError, match=r"top_p and extra_body\.top_p differ"):
        chat(top_p=0.5, extra_body={"top_p": 0.6})


def test_special_tokens_before_a_text_are_a_choice_and_in_a_chat_the_templates() -> None:
    for value in (True, False):
        body, _, warnings = read_body(
            CompletionRequest, json.dumps({"prompt": "a", "add_special_tokens": value}).encode()
        )
        assert body.add_special_tokens is value and warnings == []
    assert chat(add_special_tokens=False)[2] == []
    with pytest.raises(ApiError, match="add_special_tokens can only be false"):
        chat(add_special_tokens=True)


def test_null_is_absent_and_what_has_no_effect_is_said() -> None:
    body, _, warnings = chat(temperature=None, frobnicate=None, user="me", metadata={}, skip_special_tokens=True)
    assert body.temperature is None
    assert warnings == ["metadata has no effect here", "user has no effect here"]


@pytest.mark.parametrize(
    ("fields", "words", "param"),
    [
        ({"temprature": 1}, "unknown field 'temprature'; did you mean 'temperature'", "temprature"),
        ({"enable_thinkin": True}, "did you mean 'enable_thinking'", "enable_thinkin"),
        ({"qwerty": 1}, "unknown field 'qwerty'; leave it out", "qwerty"),
        ({"functions": [{}]}, "functions is not supported; use tools", "functions"),
        ({"modalities": ["audio"]}, r'modalities can only be \["text"\]', "modalities"),
        ({"temperature": "1"}, "temperature: .*number, got '1'", "temperature"),
        ({"temperature": -1}, "temperature: .*greater than or equal to 0, got -1", "temperature"),
        ({"n": 1.5}, "n: .*integer", "n"),
        ({"n": True}, "n: .*integer", "n"),
        ({"top_logprobs": 21}, "top_logprobs: .*less than or equal to 20", "top_logprobs"),
        ({"stop": [1]}, "stop", "stop"),
        ({"logit_bias": {"5": "x"}}, "logit_bias", "logit_bias"),
        ({"stream_options": {"usage": True}}, "stream_options.usage is not a field", "stream_options"),
        ({"response_format": {"type": "xml"}}, "response_format.type: .*'json_object'", "response_format"),
        ({"extra_body": 3}, "extra_body must be an object", "extra_body"),
        ({"messages": "hi"}, "messages: .*list", "messages"),
    ],
)
def test_mistakes_are_named(fields: dict[str, Any], words: str, param: str) -> None:
    with pytest.raises(ApiError, match=words) as caught:
        chat(**fields)
    assert (caught.value.status, caught.value.param) == (400, param)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[1]", b"3", b"[" * 100_000, b'{"messages": NaN}'])
def test_what_is_no_json_object(data: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        read_body(ChatRequest, data)
    assert caught.value.status == 400


def test_a_missing_field_and_numbers_that_are_none() -> None:
    with pytest.raises(ApiError, match="messages is missing"):
        read_body(ChatRequest, b"{}")
    with pytest.raises(ApiError, match="temperature"):
        read_body(ChatRequest, b'{"messages": [], "temperature": Infinity}')


def test_completions_have_no_think_block() -> None:
    with pytest.raises(ApiError, match="enable_thinking belongs to chats"):
        read_body(CompletionRequest, b'{"prompt": "x", "enable_thinking": true}')
    body, _, _ = read_body(CompletionRequest, b'{"prompt": [[1, 2], [3]], "max_tokens": 0, "echo": true}')
    assert body.prompt == [[1, 2], [3]] and body.max_tokens == 0


@pytest.mark.parametrize(
    ("given", "count"), [("", 1), ("ab", 1), ([1, 2, 3], 1), (["a", "b"], 2), ([[1], [2], [3]], 3), ([], 0)]
)
def test_texts_are_counted(given: Any, count: int) -> None:
    assert count_texts(given) == count


@pytest.mark.parametrize(
    "fields",
    [
        {"verbosity": "medium"}, {"functions": []}, {"function_call": "none"}, {"modalities": ["text"]}, {"tools": []},
        {"tools": [], "tool_choice": "auto"}, {"stream_options": {"include_obfuscation": False}}, {"stop": []},
        {"stream_options": {"include_usage": None}}, {"logprobs": False, "top_logprobs": 0}, {"logit_bias": {}},
        {"response_format": {"type": "text", "json_schema": None}}, {"post_thinking": {"top_p": None}}, {"suffix": ""},
    ],
)  # fmt: skip
def test_neutral_values_of_documented_fields_are_accepted_without_a_word(fields: dict[str, Any]) -> None:
    assert chat(**fields)[2] == []


def test_a_schema_may_be_left_out() -> None:
    form = chat(response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": None}})[
        0
    ].response_format
    assert form is not None and form.json_schema is not None and form.json_schema.model_schema == {"type": "object"}


@pytest.mark.parametrize("fields", [{"verbosity": "low"}, {"functions": [{}]}, {"function_call": {"name": "f"}}])
def test_other_values_of_them_are_refused_with_a_way_out(fields: dict[str, Any]) -> None:
    with pytest.raises(ApiError, match="is not supported; ") as caught:
        chat(**fields)
    assert (caught.value.code, [caught.value.param]) == ("unsupported_field", list(fields))


def test_every_error_has_a_code() -> None:
    for data in (
        b"",
        b"[]",
        b"{}",
        b'{"messages": 3}',
        b'{"messages": [], "n": 0}',
        b'{"messages": [], "extra_body": 3}',
    ):
        with pytest.raises(ApiError) as caught:
            read_body(ChatRequest, data)
        assert caught.value.code
