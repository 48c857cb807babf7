"""The official ``openai`` client against a server that really runs, with a tiny random model behind it."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

Running = Any  # of conftest.py

CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "now": {"type": "boolean"}},
    "required": ["city", "now"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": CITY}}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {**CITY, "required": ["city"]}}}
OFF = {"enable_thinking": False}
TIGHT = {**CITY, "x-guidance": {"whitespace_pattern": ""}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "place", "schema": TIGHT}}


def answer(server: Running, **options: Any) -> Any:
    """A chat with thinking off and an end that is likely where a grammar allows it: a random model rarely ends."""
    extra = {"enable_thinking": False, **options.pop("extra_body", {})}
    bias = {str(server.service.llm.tokenizer.im_end): 30, **options.pop("logit_bias", {})}
    return server.chat(extra_body=extra, logit_bias=bias, **options)


def put_together(chunks: Any) -> dict[str, Any]:
    """The message that a stream's deltas add up to, as a client adds them."""
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "reasoning": "", "calls": {}}
    message |= {"finish": None, "logprobs": [], "ids": [], "roles": 0, "warnings": []}
    for chunk in chunks:
        message["warnings"] += getattr(chunk, "warnings", [])
        for choice in chunk.choices:
            delta = choice.delta
            message["roles"] += delta.role == "assistant"
            for name in ("content", "reasoning_content", "reasoning"):
                message[name] += getattr(delta, name, None) or ""
            for call in delta.tool_calls or []:
                known = message["calls"].setdefault(call.index, {"id": None, "name": None, "arguments": "", "parts": 0})
                if call.id:
                    assert known["id"] is None and call.type == "function"
                    known["id"], known["name"] = call.id, call.function.name
                known["arguments"] += call.function.arguments or ""
                known["parts"] += 1
            message["finish"] = choice.finish_reason or message["finish"]
            message["logprobs"] += choice.logprobs.content if choice.logprobs else []
            message["ids"] += getattr(choice, "token_ids", None) or []
    return message


def same(whole: Any, streamed: dict[str, Any]) -> None:
    """A whole reply and a streamed one are the same."""
    choice = whole.choices[0]
    assert choice.message.content == streamed["content"]
    assert (choice.message.reasoning_content or "") == streamed["reasoning_content"] == streamed["reasoning"]
    assert choice.message.reasoning == choice.message.reasoning_content
    assert choice.finish_reason == streamed["finish"] and streamed["roles"] == 1
    calls = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls or []]
    assert calls == [(call["name"], call["arguments"]) for call in streamed["calls"].values()]
    assert getattr(whole, "warnings", []) == streamed["warnings"]


def test_the_model_is_listed(hybrid: Running) -> None:
    [card] = hybrid.client.models.list().data
    assert card.id == hybrid.name == "tiny-model" and card.max_model_len == 1024
    assert card.capabilities["thinking_budget"] and card.capabilities["tools"]
    assert hybrid.client.models.retrieve("tiny-model").id == card.id
    with pytest.raises(openai.NotFoundError, match="is not served; this is 'tiny-model'"):
        hybrid.client.models.retrieve("gpt-9")


@pytest.mark.parametrize(
    "options",
    [
        {"seed": 1},
        {"seed": 2, "temperature": 0, "max_tokens": 60},
        {"seed": 3, "stop": ["n", "a"], "max_tokens": 100},
        {"seed": 4, "tools": [WEATHER, CLOCK], "tool_choice": "required", "max_tokens": 100, "extra_body": OFF},
        {"seed": 5, "tools": [WEATHER], "tool_choice": "required", "max_tokens": 30, "extra_body": OFF},  # cut off
        {"seed": 6, "response_format": SCHEMA, "max_tokens": 100, "extra_body": OFF},
        {"seed": 7, "extra_body": OFF},
    ],
    ids=lambda options: "-".join(options),
)
def test_a_stream_is_the_whole_reply_in_pieces(hybrid: Running, options: dict[str, Any]) -> None:
    same(hybrid.chat(**options), put_together(hybrid.chat(stream=True, **options)))


@pytest.mark.parametrize(
    "options",
    [
        {"seed": 1, "max_tokens": 100, "extra_body": {"thinking_budget": 6}},
        {"seed": 2, "max_tokens": 30},  # cut off in the thought
        {"seed": 3, "max_tokens": 100, "extra_body": {"thinking_budget": 0}, "response_format": SCHEMA},
        {
            "seed": 4, "max_tokens": 100, "extra_body": {"thinking_budget": 9}, "tools": [WEATHER],
            "tool_choice": {"type": "function", "function": {"name": "weather"}},
        },
    ],
    ids=["budget", "cut", "schema", "tool"],
)  # fmt: skip
def test_so_it_is_with_thoughts(thinker: Running, options: dict[str, Any]) -> None:
    whole = thinker.chat(**options)
    same(whole, put_together(thinker.chat(stream=True, **options)))
    if "extra_body" in options:
        budget = options["extra_body"]["thinking_budget"]
        assert whole.usage.completion_tokens_details.reasoning_tokens == budget
        assert whole.choices[0].thinking == {"tokens": budget, "forced": True, "looped": False, "closed": True}
        assert "enough" in whole.choices[0].message.reasoning_content
    else:
        assert whole.choices[0].thinking["closed"] is False and "think block not closed" in whole.warnings


def test_budget_schema_stream_and_tools_work_together(thinker: Running) -> None:
    """T27: the answer is bound only after the thought, whatever else is asked for."""
    tokenizer = thinker.service.llm.tokenizer
    bias = {str(tokenizer.im_end): 30, str(tokenizer.control_id("<tool_call>")): 20}
    seen = set()
    for seed in range(4):
        bias[str(tokenizer.control_id("<tool_call>"))] *= -1
        got = put_together(
            thinker.chat(
                seed=seed, stream=True, tools=[WEATHER], response_format=SCHEMA, max_tokens=100, logit_bias=bias,
                extra_body={"thinking_budget": 4},
            )
        )  # fmt: skip
        assert got["reasoning"]
        if got["calls"]:
            assert got["finish"] == "tool_calls"
            assert all(json.loads(call["arguments"])["city"] in ("Rome", "Oslo") for call in got["calls"].values())
        else:
            assert got["finish"] == "stop" and json.loads(got["content"])["city"] in ("Rome", "Oslo")
        seen.add(bool(got["calls"]))
    assert seen == {True, False}


def test_tool_calls_have_ids_and_come_in_fragments(hybrid: Running) -> None:
    asked = {"tools": [WEATHER, CLOCK], "tool_choice": "required", "max_tokens": 100}
    got = put_together(answer(hybrid, seed=11, stream=True, **asked))
    assert got["finish"] == "tool_calls" and got["calls"]
    assert len({call["id"] for call in got["calls"].values()}) == len(got["calls"])
    assert all(call["id"].startswith("call_") and call["parts"] > 2 for call in got["calls"].values())
    one = answer(hybrid, seed=11, parallel_tool_calls=False, **asked).choices[0]
    assert len(one.message.tool_calls) == 1 and one.message.content == ""
    assert json.loads(one.message.tool_calls[0].function.arguments)["city"] in ("Rome", "Oslo")


def test_tool_choice(hybrid: Running) -> None:
    opening = str(hybrid.service.llm.tokenizer.control_id("<tool_call>"))
    named = {"type": "function", "function": {"name": "clock"}}
    for seed in range(4):
        [call] = answer(
            hybrid, seed=seed, tools=[WEATHER, CLOCK], tool_choice=named, max_tokens=100
        ).choices[0].message.tool_calls  # fmt: skip
        assert call.function.name == "clock"
    never = hybrid.chat(seed=1, tools=[WEATHER], tool_choice="none", logit_bias={opening: 50}, max_tokens=40)
    assert never.choices[0].message.tool_calls is None
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
    free = answer(hybrid, seed=1, tools=[strict], parallel_tool_calls=False, logit_bias={opening: 60}, max_tokens=60)
    free = free.choices[0]
    assert json.loads(free.message.tool_calls[0].function.arguments).keys() == {"city", "now"}
    for bad, words in (
        ({"tool_choice": "required"}, "tool_choice needs tools"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice must be"),
        ({"tools": [WEATHER, WEATHER]}, "has 'weather' twice"),
        ({"tools": [{"type": "function"}]}, r"tools\[0\] must look like"),
        ({"tools": [WEATHER], "tool_choice": "required", "response_format": SCHEMA}, "has no effect"),
    ):
        with pytest.raises(openai.BadRequestError, match=words):
            answer(hybrid, **bad)


def test_a_conversation_with_calls_goes_on(hybrid: Running) -> None:
    """The reply's own message, reasoning fields included, is accepted as history."""
    first = answer(hybrid, seed=4, tools=[WEATHER], tool_choice="required", max_tokens=100).choices[0].message
    messages = [{"role": "user", "content": "sum"}, first.model_dump(exclude_none=True)]
    messages += [{"role": "tool", "tool_call_id": call.id, "content": "9"} for call in first.tool_calls]
    again = answer(hybrid, messages=messages, tools=[WEATHER], max_tokens=5)
    assert again.usage.completion_tokens >= 1 and not hasattr(again, "warnings")


def test_json_in_every_spelling(hybrid: Running) -> None:
    for options in (
        {"response_format": SCHEMA},
        {"extra_body": {"guided_json": TIGHT}},
        {"extra_body": {"structured_outputs": {"json": json.dumps(TIGHT)}}},
    ):
        text = answer(hybrid, seed=3, max_tokens=100, **options).choices[0].message.content
        assert json.loads(text).keys() == {"city", "now"}
    choice = answer(hybrid, seed=3, extra_body={"guided_choice": ['a "b"', "ü"]}, max_tokens=40).choices[0]
    assert choice.message.content in ('a "b"', "ü") and choice.finish_reason == "stop"
    digits = answer(hybrid, seed=3, extra_body={"structured_outputs": {"regex": "[0-9]{3}"}}).choices[0].message.content
    assert len(digits) == 3 and digits.isdecimal()
    lark = answer(hybrid, seed=3, extra_body={"guided_grammar": 'start: "ab" "c"+'}).choices[0].message.content
    assert lark.startswith("abc")
    loose = answer(hybrid, seed=3, response_format={"type": "json_object"}, max_tokens=30).choices[0].message.content
    assert loose.startswith("{")
    for bad, words in (
        ({"response_format": SCHEMA, "extra_body": {"guided_regex": "a"}}, "both constrain the answer"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema goes with"),
        ({"extra_body": {"guided_regex": "("}}, "grammar"),
        ({"extra_body": {"guided_json": {"type": "nonsense"}}}, "grammar"),
    ):
        with pytest.raises(openai.BadRequestError, match=words):
            answer(hybrid, **bad)


def test_n_seeds_and_log_probabilities(hybrid: Running) -> None:
    asked = {"seed": 5, "n": 3, "logprobs": True, "top_logprobs": 3, "max_tokens": 10}
    many = hybrid.chat(**asked, extra_body={"return_token_ids": True})
    assert [choice.index for choice in many.choices] == [0, 1, 2]
    assert len({tuple(choice.token_ids) for choice in many.choices}) == 3
    assert many.prompt_token_ids == hybrid.service.llm.renderer.prompt_ids([{"role": "user", "content": "sum E1"}])
    for number, choice in enumerate(many.choices):
        alone = hybrid.chat(seed=5 + number, max_tokens=10, extra_body={"return_token_ids": True}).choices[0]
        assert alone.token_ids == choice.token_ids
        entries = choice.logprobs.content
        assert [entry.token_id for entry in entries] == choice.token_ids
        assert all(len(entry.top_logprobs) == 3 and entry.logprob <= 0 for entry in entries)
        assert all(bytes(entry.bytes) == hybrid.service.llm.tokenizer.token_bytes(entry.token_id) for entry in entries)
    streamed = put_together(hybrid.chat(**{**asked, "n": 1}, stream=True, extra_body={"return_token_ids": True}))
    assert streamed["ids"] == many.choices[0].token_ids
    for mine, other in zip(streamed["logprobs"], many.choices[0].logprobs.content, strict=True):
        assert (mine.token, mine.token_id) == (other.token, other.token_id)
        assert mine.logprob == pytest.approx(other.logprob, abs=1e-4)  # batches of other sizes round otherwise
    greedy = [hybrid.chat(temperature=0, seed=seed).choices[0].message.content for seed in (1, 2)]
    assert greedy[0] == greedy[1]
    assert (
        hybrid.chat(max_tokens=20).choices[0].message.content != hybrid.chat(max_tokens=20).choices[0].message.content
    )


def test_streams_of_several_choices_do_not_mix(hybrid: Running) -> None:
    whole = hybrid.chat(seed=9, n=3, max_tokens=15, stop=["zz"])
    texts = ["", "", ""]
    chunks = list(hybrid.chat(seed=9, n=3, max_tokens=15, stop=["zz"], stream=True))
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]


def test_stop_strings_and_tokens(hybrid: Running) -> None:
    free = hybrid.chat(seed=3, max_tokens=60, extra_body={"return_token_ids": True}).choices[0]
    text = free.message.content
    stop = text[10:12]
    cut = hybrid.chat(seed=3, max_tokens=60, stop=stop)
    assert cut.choices[0].message.content == text[: text.index(stop)]
    assert (cut.choices[0].finish_reason, cut.choices[0].stop_reason) == ("stop", stop)
    assert cut.usage.completion_tokens < 60
    token = free.token_ids[20]
    at = free.token_ids.index(token)
    by_id = hybrid.chat(seed=3, max_tokens=60, extra_body={"stop_token_ids": [token], "return_token_ids": True})
    assert by_id.choices[0].token_ids == free.token_ids[: at + 1] and by_id.choices[0].stop_reason == token
    three = hybrid.chat(seed=3, n=3, max_tokens=60, stop=stop)
    assert three.choices[0].message.content == text[: text.index(stop)]
    hybrid.wait_until_idle()


def test_usage(hybrid: Running) -> None:
    long, to_the_end = "sum mod 10 " * 20, {"ignore_eos": True}
    first, second = (hybrid.chat(long, max_tokens=4, extra_body=to_the_end) for _ in range(2))
    assert second.usage.prompt_tokens == first.usage.prompt_tokens > 64
    assert second.usage.prompt_tokens_details.cached_tokens >= 32
    assert second.usage.total_tokens == second.usage.prompt_tokens + 4
    asked = {"include_usage": True}
    *chunks, last = hybrid.chat(max_tokens=4, stream=True, stream_options=asked, extra_body=to_the_end)
    assert last.choices == [] and last.usage.completion_tokens == 4
    assert all(chunk.usage is None for chunk in chunks)
    running_totals = hybrid.chat(stream=True, stream_options={"continuous_usage_stats": True}, extra_body=to_the_end)
    counts = [chunk.usage.completion_tokens for chunk in running_totals if chunk.usage]
    assert counts == sorted(counts) and counts[-1] == 24


def test_thoughts_can_be_hidden_and_sampling_can_change_after_them(thinker: Running) -> None:
    hidden = thinker.chat(
        seed=1, max_tokens=60, logprobs=True, extra_body={"reasoning": {"exclude": True, "max_tokens": 5}}
    )
    assert not hasattr(hidden.choices[0].message, "reasoning")
    assert hidden.usage.completion_tokens_details.reasoning_tokens == 5
    assert len(hidden.choices[0].logprobs.content) < hidden.usage.completion_tokens - 5
    streamed = list(
        thinker.chat(seed=1, max_tokens=60, stream=True, extra_body={"include_reasoning": False, "thinking_budget": 5})
    )
    assert all(not getattr(c.delta, "reasoning", None) for chunk in streamed for c in chunk.choices)
    answers = {
        thinker.chat(
            seed=seed, max_tokens=60, temperature=1.5,
            extra_body={"thinking_budget": 0, "post_thinking": {"temperature": 0}},
        ).choices[0].message.content
        for seed in range(3)
    }  # fmt: skip
    assert len(answers) == 1
    with pytest.raises(openai.BadRequestError, match="this model always thinks"):
        thinker.chat(extra_body={"enable_thinking": False})


def test_a_share_of_the_reply_may_be_thought(thinker: Running) -> None:
    low = thinker.chat(seed=1, max_tokens=100, reasoning_effort="low")
    assert low.usage.completion_tokens_details.reasoning_tokens == 20


def test_non_thinking_replies_are_content(hybrid: Running) -> None:
    """T26: never null, never filed under reasoning."""
    off = hybrid.chat(seed=1, extra_body={"chat_template_kwargs": {"enable_thinking": False}}).choices[0].message
    assert isinstance(off.content, str) and off.content and off.reasoning_content is None


def test_an_answer_can_be_continued(hybrid: Running) -> None:
    messages = [{"role": "user", "content": "sum"}, {"role": "assistant", "content": "E1 B"}]
    got = hybrid.chat(messages=messages, extra_body={"continue_final_message": True, "return_token_ids": True})
    prompt = hybrid.service.llm.tokenizer.decode(got.prompt_token_ids)
    assert prompt.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\nE1 B")
    assert got.choices[0].message.reasoning_content is None
    with pytest.raises(openai.BadRequestError, match="needs an assistant message at the end"):
        hybrid.chat(extra_body={"continue_final_message": True})


def test_what_has_no_effect_is_said(hybrid: Running) -> None:
    messages = [{"role": "user", "content": "sum", "name": "ann"}]
    got = hybrid.chat(messages=messages, user="me", max_tokens=5000)
    assert got.warnings[0] == "user has no effect here"
    assert got.warnings[1] == "messages[0].name is not shown to the model"
    assert "max_tokens is" in got.warnings[2] and "not 5000" in got.warnings[2]


@pytest.mark.parametrize(
    ("options", "words", "param"),
    [
        ({"extra_body": {"temprature": 1}}, "did you mean 'temperature'", "temprature"),
        ({"temperature": -1}, "temperature: ", "temperature"),
        ({"messages": []}, "messages is empty", "messages"),
        ({"messages": [{"role": "ghost", "content": "x"}]}, r"messages\[0\].role is 'ghost'", "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "only text", "messages[0].content[0]"),
        ({"n": 10_000}, "at most 128 choices", "n"),
        ({"logit_bias": {"999999": 1}}, "token 999999", None),
        ({"logit_bias": {"x": 1}}, "keys are token ids", "logit_bias"),
        ({"top_logprobs": 2}, "top_logprobs needs logprobs", "top_logprobs"),
        ({"max_completion_tokens": 3, "max_tokens": 4}, "differ; keep one", "max_tokens"),
        ({"stop": ""}, "empty string", "stop"),
        ({"stream_options": {"include_usage": True}}, "needs stream: true", "stream_options"),
        (
            {"extra_body": {"enable_thinking": False, "thinking_budget": 3}},
            "has no effect because enable_thinking",
            None,
        ),
        ({"extra_body": {"min_tokens": 30}}, "min_tokens is 30, more than max_tokens", None),
    ],
)
def test_bad_requests_are_named(hybrid: Running, options: dict[str, Any], words: str, param: str | None) -> None:
    with pytest.raises(openai.BadRequestError, match=words) as caught:
        hybrid.chat(**options)
    assert caught.value.type == "invalid_request_error"
    if param is not None:
        assert caught.value.param == param


def test_text_that_is_no_unicode(hybrid: Running) -> None:
    for body in (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', b'{"messages": [], "a\\ud800": 1}'):
        reply = httpx.post(f"{hybrid.base}/v1/chat/completions", content=body)
        assert reply.status_code == 400 and reply.json()["error"]["type"] == "invalid_request_error"


def test_a_prompt_that_does_not_fit(hybrid: Running) -> None:
    with pytest.raises(openai.BadRequestError, match="this model's maximum context length is 1024 tokens") as caught:
        hybrid.chat("E1 B5 " * 400)
    assert caught.value.code == "context_length_exceeded"
