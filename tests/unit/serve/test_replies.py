"""Choices: however events are batched, the pieces put together are the whole; what is hidden stays hidden."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twofold.base.records import Completion
from twofold.engine.request import Event
from twofold.serve.replies import LOWEST, ChatChoice, Echo, Score, TextChoice, Wanted, token_name
from twofold.text.parse import ParseOptions
from twofold.text.tokenizer import Tokenizer

CALL = '<tool_call>\n{"name": "calc", "arguments": {"expression": "37*48"}}\n</tool_call>'
REPLIES = {
    "thought": "<think>\nE1 is ü 😀\n</think>\n\n6 ü😀<|im_end|>",
    "calls": f"<think>\nuse it\n</think>\n\nlet me see\n{CALL}\n{CALL}<|im_end|>",
    "broken": '<tool_call>\n{"name": "calc", "arguments": {"a": \n</tool_call> after<|im_end|>',
    "cut": '<tool_call>\n{"name": "calc", "arguments": {"expression": "37',
    "stopped": "<think>\nHALT\n</think>\n\nbefore HALT after<|im_end|>",
    "open": "<think>\nnever en",
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["sum mod 10: E1 B5 expression 37*48"] * 3, 320)


def events(tokenizer: Tokenizer, text: str) -> list[Event]:
    """A sample that writes the text."""
    ids = tokenizer.encode_with_special(text)
    ended = text.endswith("<|im_end|>")
    done = Completion(0, 0, ids, [-1.0] * len(ids), [False] * len(ids), finish_reason="stop" if ended else "length")
    done.thinking_tokens = 3
    made = [Event(0, 0, token, logprob=-0.5, top=((token, -0.5), (5, -float("inf")))) for token in ids[:-1]]
    return [*made, Event(0, 0, ids[-1], logprob=-0.5, completion=done)]


def wanted(**options: Any) -> Wanted:
    parse = {"stop": ("HALT",), "early_calls": True, "call_id": lambda index: f"call_{index}"}
    return Wanted(stop=("HALT",), parse=ParseOptions(**{**parse, **options.pop("parse", {})}), **options)


def add(message: dict[str, Any], delta: dict[str, Any]) -> None:
    """What a client does with a chunk's choice."""
    for name in ("content", "reasoning", "reasoning_content"):
        message[name] = message.get(name, "") + delta["delta"].get(name, "")
    for call in delta["delta"].get("tool_calls", []):
        calls = message.setdefault("calls", {})
        if "id" in call:
            calls[call["index"]] = [call["id"], call["function"]["name"], call["function"]["arguments"]]
        else:
            calls[call["index"]][2] += call["function"]["arguments"]


@given(name=st.sampled_from(sorted(REPLIES)), sizes=st.lists(st.integers(1, 7), min_size=60, max_size=60))
def test_every_cut_of_the_stream_gives_the_same_message(tokenizer: Tokenizer, name: str, sizes: list[int]) -> None:
    """T24."""
    early = name != "broken"
    whole = ChatChoice(0, tokenizer, wanted(parse={"early_calls": early}), [])
    for event in events(tokenizer, REPLIES[name]):
        whole.take(event)
    choice, streamed, waiting = ChatChoice(0, tokenizer, wanted(parse={"early_calls": early}), []), {}, list(sizes)
    made = events(tokenizer, REPLIES[name])
    while made:
        size = waiting.pop() if waiting else len(made)
        for event in made[:size]:
            choice.take(event)
        del made[:size]
        if (delta := choice.delta()) is not None:
            add(streamed, delta)
    message = whole.whole()["message"]
    assert message["content"] == streamed["content"] and (message["reasoning"] or "") == streamed["reasoning"]
    assert streamed["reasoning"] == streamed["reasoning_content"]
    calls = [[c["id"], c["function"]["name"], c["function"]["arguments"]] for c in message.get("tool_calls", [])]
    assert calls == list(streamed.get("calls", {}).values())
    assert choice.finish_reason == whole.finish_reason


def finished(tokenizer: Tokenizer, name: str, **options: Any) -> tuple[dict[str, Any], ChatChoice]:
    choice = ChatChoice(0, tokenizer, wanted(**options), [])
    for event in events(tokenizer, REPLIES[name]):
        choice.take(event)
    return choice.whole(), choice


def test_what_each_reply_becomes(tokenizer: Tokenizer) -> None:
    thought, _ = finished(tokenizer, "thought")
    assert thought["message"] == {
        "role": "assistant", "content": "6 ü😀", "reasoning_content": "E1 is ü 😀", "reasoning": "E1 is ü 😀",
    }  # fmt: skip
    assert thought["finish_reason"] == "stop" and thought["thinking"]["closed"]
    calls, _ = finished(tokenizer, "calls")
    assert calls["finish_reason"] == "tool_calls" and calls["message"]["content"] == "let me see"
    assert [call["id"] for call in calls["message"]["tool_calls"]] == ["call_0", "call_1"]
    assert json.loads(calls["message"]["tool_calls"][1]["function"]["arguments"]) == {"expression": "37*48"}
    broken, choice = finished(tokenizer, "broken", parse={"early_calls": False})
    assert "tool_calls" not in broken["message"] and "<tool_call>" in broken["message"]["content"]
    assert any("malformed tool call" in warning for warning in choice.warnings)
    cut, _ = finished(tokenizer, "cut")
    assert cut["finish_reason"] == "length" and cut["message"]["content"] == ""
    assert cut["message"]["tool_calls"][0]["function"]["arguments"].startswith('{"expression": "37')
    open_, _ = finished(tokenizer, "open")
    assert open_["finish_reason"] == "length" and not open_["thinking"]["closed"] and open_["message"]["content"] == ""


def test_a_stop_string_ends_the_count_and_asks_for_an_abort(tokenizer: Tokenizer) -> None:
    choice = ChatChoice(0, tokenizer, wanted(), [])
    asked = [choice.take(event) for event in events(tokenizer, REPLIES["stopped"])]
    assert asked.count(True) == 1 and choice.tokens == asked.index(True) + 1
    whole = choice.whole()
    assert (whole["message"]["content"], whole["finish_reason"], whole["stop_reason"]) == ("before ", "stop", "HALT")
    assert whole["message"]["reasoning"] == "HALT"  # thoughts are not searched


def test_hidden_thoughts_leave_no_trace(tokenizer: Tokenizer) -> None:
    hidden, _ = finished(tokenizer, "thought", hidden=True, top_logprobs=1, token_ids=True)
    assert hidden["message"] == {"role": "assistant", "content": "6 ü😀"}
    shown = tokenizer.decode(hidden["token_ids"])
    assert "E1" not in shown and shown.endswith("6 ü😀<|im_end|>")
    assert [entry["token_id"] for entry in hidden["logprobs"]["content"]] == hidden["token_ids"]
    assert hidden["thinking"]["tokens"] == 3


def test_log_probabilities_are_json(tokenizer: Tokenizer) -> None:
    whole, _ = finished(tokenizer, "thought", top_logprobs=2)
    json.dumps(whole, allow_nan=False)
    entry = whole["logprobs"]["content"][0]
    assert entry["top_logprobs"][1]["logprob"] == LOWEST and entry["bytes"] == list(b"<think>")
    assert token_name(tokenizer, tokenizer.encode("é")[0]) in ("é", "bytes:\\xc3")
    assert token_name(tokenizer, 10**6) == "<row 1000000>"


def test_plain_text(tokenizer: Tokenizer) -> None:
    echo = Echo("ab", [Score(1, None), Score(2, -2.0, ((2, -2.0),))])
    choice = TextChoice(0, tokenizer, wanted(top_logprobs=1), [1, 2], echo)
    pieces = []
    for event in events(tokenizer, "x<think>HALT y<|im_end|>"):
        choice.take(event)
        if (delta := choice.delta()) is not None:
            pieces.append(delta)
    whole = choice.whole()
    assert whole["text"] == "".join(piece["text"] for piece in pieces) == "abx<think>"
    assert whole["stop_reason"] == "HALT" and whole["logprobs"]["token_logprobs"][:2] == [None, -2.0]
    assert sum(len(piece["logprobs"]["tokens"]) for piece in pieces) == len(whole["logprobs"]["tokens"])


def test_offsets_are_those_of_the_text_where_tokens_are_parts_of_characters(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("é好x")
    assert len(ids) == 6, "a token a byte"
    scores = [Score(token, -1.0 if place else None) for place, token in enumerate([*ids, ids[0]])]
    choice = TextChoice(0, tokenizer, wanted(top_logprobs=0), [], Echo("é好x\ufffd", scores))
    for token in ids:
        choice.take(Event(0, 0, token, logprob=-1.0))
        choice.delta()
    choice.take(Event(0, 0, None, completion=Completion(0, 0, ids, finish_reason="length")))
    whole = choice.whole()
    assert whole["text"] == "é好x\ufffdé好x"
    assert whole["logprobs"]["text_offset"] == [0, 0, 1, 1, 1, 2, 3, 4, 4, 5, 5, 5, 6]


def test_a_plain_choice_has_the_ids_of_its_prompt_once(tokenizer: Tokenizer) -> None:
    choice, pieces = TextChoice(0, tokenizer, wanted(token_ids=True), [7, 8]), []
    for event in events(tokenizer, "x y<|im_end|>"):
        choice.take(event)
        if (delta := choice.delta()) is not None:
            pieces.append(delta)
    assert len(pieces) > 1 and [piece.get("prompt_token_ids") for piece in pieces[:2]] == [[7, 8], None]
    assert choice.whole()["prompt_token_ids"] == [7, 8]
