"""``/v1/responses`` by the official ``openai`` client, and reranking and tokens: against a server that really runs."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

from twofold.engine.embed import relevance
from twofold.text.retrieval import rerank_ids

Running = Any  # of conftest.py

CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "name": "weather", "parameters": CITY, "strict": True}


def ask(server: Running, stream: bool = False, **options: Any) -> Any:
    """The same request, whole or streamed: a random model ends early only where its end is made likely."""
    extra = {"seed": 7, **options.pop("extra_body", {})}
    given = {"model": server.name, "input": "sum E1", "max_output_tokens": 24, **options}
    if not stream:
        return server.client.responses.create(**given, extra_body=extra)
    with server.client.responses.stream(**given, extra_body=extra) as events:
        for _ in events:
            pass
        return events


def parts(response: Any) -> list[tuple[Any, ...]]:
    """What a response says, without ids."""
    found: list[tuple[Any, ...]] = []
    for item in response.output:
        if item.type == "function_call":
            found.append((item.type, item.status, item.name, item.arguments))
        else:
            found.append((item.type, item.status, "".join(part.text for part in item.content)))
    return found


@pytest.mark.parametrize("thinks", [True, False])
def test_whole_and_streamed_responses_are_the_same(request: pytest.FixtureRequest, thinks: bool) -> None:
    server = request.getfixturevalue("thinker" if thinks else "hybrid")
    tokenizer = server.service.llm.tokenizer
    extra: dict[str, Any] = {"thinking_budget": 6} if thinks else {"enable_thinking": False}
    extra |= {"seed": 7, "logit_bias": {str(tokenizer.im_end): -100, str(tokenizer.endoftext): -100}}
    given = {"input": "sum E1", "max_output_tokens": 48, "model": server.name, "extra_body": extra}
    whole = server.client.responses.create(**given)
    events = list(server.client.responses.create(**given, stream=True))
    last = events[-1].response
    assert parts(last) == parts(whole) and last.usage == whole.usage and last.output_text == whole.output_text
    assert whole.status == last.status == "incomplete" and whole.incomplete_details.reason == "max_output_tokens"
    assert events[0].type == "response.created" and events[-1].type == "response.incomplete"
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == whole.output_text
    thought = "".join(event.delta for event in events if event.type == "response.reasoning_text.delta")
    assert [item.type for item in whole.output] == (["reasoning", "message"] if thinks else ["message"])
    chat = server.chat(max_tokens=48, extra_body=extra).choices[0].message
    assert chat.content == whole.output_text and (chat.reasoning_content or "") == thought
    assert whole.usage.output_tokens == 48 and bool(whole.usage.output_tokens_details.reasoning_tokens) == thinks


def test_calls_and_their_results(hybrid: Running) -> None:
    options = {"tools": [WEATHER], "tool_choice": "required", "max_output_tokens": 200, "parallel_tool_calls": False}
    options["extra_body"] = {"enable_thinking": False, "logit_bias": {str(hybrid.service.llm.tokenizer.im_end): 30}}
    whole = ask(hybrid, **options)
    streamed = ask(hybrid, stream=True, **options).get_final_response()
    assert parts(whole) == parts(streamed) and whole.status == "completed"
    [call] = whole.output
    assert call.type == "function_call" and json.loads(call.arguments)["city"] in ("Rome", "Oslo")
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    items = [{"role": "user", "content": "weather"}, call.model_dump(), result]
    again = ask(hybrid, input=items, extra_body={"enable_thinking": False}, instructions="user")
    tokens = hybrid.service.llm.tokenizer.decode
    rows = [
        {"role": "system", "content": "user"},
        {"role": "user", "content": "weather"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"name": "weather", "arguments": json.loads(call.arguments)}],
        },
        {"role": "tool", "content": "rain"},
    ]
    asked = {"messages": rows, "enable_thinking": False, "return_token_strs": False}
    seen = httpx.post(f"{hybrid.base}/tokenize", json=asked).json()
    assert again.usage.input_tokens == seen["count"], tokens(seen["tokens"])


def test_a_form_of_the_answer(hybrid: Running) -> None:
    tight = {**CITY, "x-guidance": {"whitespace_pattern": ""}}
    form = {"format": {"type": "json_schema", "name": "place", "schema": tight, "strict": True}}
    extra = {"enable_thinking": False, "logit_bias": {str(hybrid.service.llm.tokenizer.im_end): 30}}
    reply = ask(hybrid, text=form, max_output_tokens=100, extra_body=extra)
    assert json.loads(reply.output_text)["city"] in ("Rome", "Oslo") and reply.text.format.type == "json_schema"


def test_what_is_refused(hybrid: Running) -> None:
    with pytest.raises(openai.BadRequestError, match="send the whole conversation") as caught:
        ask(hybrid, previous_response_id="resp_1")
    assert caught.value.param == "previous_response_id" and caught.value.code == "unsupported_field"
    with pytest.raises(openai.NotFoundError, match="is not served"):
        ask(hybrid, model="other")
    with pytest.raises(openai.BadRequestError, match=r"input\[0\]") as caught:
        ask(hybrid, input=[{"type": "function_call_output", "call_id": "c", "output": "x"}])
    assert caught.value.param.startswith("input[0]")
    assert httpx.get(f"{hybrid.base}/v1/responses").status_code == 405


def test_rerank(hybrid: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = ["Rome weather", {"text": "sum E1"}, "calc 37*48"]
    asked: dict[str, Any] = {"query": "weather", "documents": documents, "instruction": "sum"}
    other = httpx.post(f"{hybrid.base}/v1/rerank", json=asked)
    assert other.status_code == 400 and "reranking needs the tokenizer of Qwen3" in other.json()["error"]["message"]
    monkeypatch.setattr("twofold.serve.rerank.yes_no_ids", lambda tokenizer: (300, 301))
    whole = httpx.post(f"{hybrid.base}/v1/rerank", json=asked).json()
    scores = [result["relevance_score"] for result in whole["results"]]
    assert scores == sorted(scores, reverse=True) and {result["index"] for result in whole["results"]} == {0, 1, 2}
    texts = ["Rome weather", "sum E1", "calc 37*48"]
    llm = hybrid.service.llm
    questions = [rerank_ids(llm.tokenizer, "weather", text, "sum") for text in texts]
    wanted = relevance(llm.model, questions, 300, 301).tolist()
    assert [wanted[result["index"]] for result in whole["results"]] == pytest.approx(scores, abs=1e-5)
    assert all(result["document"]["text"] == texts[result["index"]] for result in whole["results"])
    first = httpx.post(f"{hybrid.base}/v2/rerank", json={**asked, "top_n": 1, "return_documents": False}).json()
    assert first["results"] == [{key: whole["results"][0][key] for key in ("index", "relevance_score")}]
    long = {**asked, "documents": ["sum " * 2000]}
    for bad, words in (
        (long, "maximum context length"),
        ({**asked, "truncate_prompt_tokens": 3}, "the query alone takes"),
        ({**asked, "documents": []}, "documents"),
        ({**asked, "documents": [""]}, r"documents[0] is empty"),
        ({**asked, "documents": [3]}, r"documents[0] must be an object"),
        ({**asked, "model": "other"}, "is not served"),
    ):
        answer = httpx.post(f"{hybrid.base}/rerank", json=bad)
        assert answer.status_code in (400, 404) and words in answer.json()["error"]["message"]
    cut = httpx.post(f"{hybrid.base}/rerank", json={**long, "truncate_prompt_tokens": -1}).json()
    assert len(cut["results"]) == 1 and cut["usage"]["prompt_tokens"] == 1024


def test_a_remote_tokenizer(hybrid: Running) -> None:
    """What lm-eval's remote tokenizer asks for."""
    info = httpx.get(f"{hybrid.base}/tokenizer_info").json()
    assert (
        info["eos_token"] == "<|im_end|>"
        and info["bos_token"] is None
        and "add_generation_prompt" in info["chat_template"]
    )
    post = {"prompt": info["eos_token"], "add_special_tokens": False}
    assert httpx.post(f"{hybrid.base}/tokenize", json=post).json()["tokens"] == [info["eos_token_id"]]
    rows = [{"role": "user", "content": "x"}]
    answer = httpx.post(f"{hybrid.base}/tokenize", json={"messages": rows, "add_special_tokens": True})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "add_special_tokens"
    assert (
        httpx.post(f"{hybrid.base}/tokenize", json={"messages": rows, "add_special_tokens": False}).status_code == 200
    )
