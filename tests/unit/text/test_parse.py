"""The parser: inverse of the renderer, equal however it is fed, and lossless on malformed output."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twofold.base.records import Message, ToolCall
from twofold.text.chat import Renderer
from twofold.text.parse import Delta, Parsed, StreamParser, parse
from twofold.text.tokenizer import ADDED_TOKENS, Tokenizer

Maker = Callable[..., tuple[list[Message], list[dict[str, Any]] | None]]
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
F = ToolCall("f", {"a": 1})


def read(tokenizer: Tokenizer, text: str, prompt: str = "<|im_start|>assistant\n") -> Parsed:
    return parse(tokenizer, tokenizer.encode_with_special(text), tokenizer.encode_with_special(prompt))


def stream(tokenizer: Tokenizer, ids: list[int], prompt: list[int]) -> tuple[list[Delta], Parsed]:
    parser = StreamParser(tokenizer, prompt)
    deltas = [delta for token in ids for delta in parser.feed(token)]
    deltas += parser.end()
    return deltas, parser.finish()


def check_stream(tokenizer: Tokenizer, ids: list[int], prompt: list[int]) -> Parsed:
    """What was streamed is what is returned."""
    deltas, parsed = stream(tokenizer, ids, prompt)
    assert parsed == parse(tokenizer, ids, prompt)
    assert "".join(d.text for d in deltas if d.kind == "content") == parsed.content
    assert "".join(d.text for d in deltas if d.kind == "reasoning") == (parsed.reasoning or "")
    assert tuple(d.call for d in deltas if d.call) == parsed.tool_calls
    return parsed


def nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def test_rendered_turns_parse_back(tokenizer: Tokenizer, make_conversation: Maker) -> None:
    renderer = Renderer(tokenizer)
    checked = 0
    for seed in range(200):
        messages, tools = make_conversation(seed, forged=seed % 2 == 0)
        turns = [m for m in messages if m.role == "assistant"]
        for trained in (False, True):
            views = renderer.views(messages, tools, empty_think_trained=trained)
            for message, view in zip(turns, views, strict=True):
                cut = view.weights.index(1.0)
                parsed = check_stream(tokenizer, view.token_ids[cut:], view.token_ids[:cut])
                thought = (message.reasoning or "").strip("\n")
                assert parsed.content == nfc(message.content.lstrip("\n")), seed
                assert parsed.reasoning == (nfc(thought) if thought or trained else None)
                assert parsed.tool_calls == message.tool_calls
                assert parsed.closed and parsed.complete and not parsed.errors
                assert parsed.message().role == "assistant"
                checked += 1
    assert checked > 400


TEXT = st.text(st.sampled_from('ab \n<>/é🙂{}"'), max_size=12)
ARGUMENTS = st.dictionaries(st.sampled_from(["x", "y"]), st.one_of(st.integers(-5, 5), TEXT), max_size=2)


@given(TEXT, st.one_of(st.none(), TEXT), st.lists(ARGUMENTS, max_size=3))
@settings(max_examples=120, deadline=None)
def test_round_trip_property(content: str, reasoning: str | None, arguments: list[dict[str, Any]]) -> None:
    renderer = Renderer(_shared())
    calls = tuple(ToolCall("f", a) for a in arguments)
    [view] = renderer.views([Message("user", "q"), Message("assistant", content, reasoning, calls)])
    cut = view.weights.index(1.0)
    parsed = check_stream(renderer.tokenizer, view.token_ids[cut:], view.token_ids[:cut])
    assert parsed.content == content.lstrip("\n")
    assert (parsed.reasoning or "") == (reasoning or "").strip("\n")
    assert parsed.tool_calls == calls and not parsed.errors


@given(st.lists(st.one_of(st.sampled_from([t for t, _ in ADDED_TOKENS]), TEXT, st.just(CALL)), max_size=12))
@settings(max_examples=150, deadline=None)
def test_any_output_streams_to_the_same_message_and_loses_no_letters(parts: list[str]) -> None:
    tok = _shared()
    ids = [i for part in parts for i in (tok.encode_with_special(part))]
    parsed = check_stream(tok, ids, [])
    eos = [n for n, i in enumerate(ids) if i in tok.eos_ids]
    assert parsed.complete == bool(eos)
    ids = ids[: eos[0]] if eos else ids
    letters = tok.decode(i for i in ids if i < tok.vocab_size - 26)
    got = (parsed.reasoning or "") + parsed.content
    if not parsed.tool_calls:
        assert all(got.count(char) >= letters.count(char) for char in "abé🙂{")


@given(st.lists(st.integers(0, 10_000), max_size=40), st.integers(0, 3))
@settings(max_examples=80, deadline=None)
def test_random_tokens_never_crash(ids: list[int], start: int) -> None:
    tok = _shared()
    prompts = ["", "<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n", "<think>\n\n</think>\n\n"]
    check_stream(tok, [i % tok.vocab_size for i in ids], tok.encode_with_special(prompts[start]))


def test_start_state_comes_from_the_prompt(tokenizer: Tokenizer) -> None:
    prefilled = read(tokenizer, "t\n</think>\n\na<|im_end|>", "<|im_start|>assistant\n<think>\n")
    assert prefilled == Parsed("t", "a", (), True, True, ())
    assert StreamParser(tokenizer, tokenizer.encode_with_special("<|im_start|>assistant\n<think>\n")).in_think
    hard = read(tokenizer, "a<|im_end|>", "<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert hard == Parsed(None, "a", (), True, True, ())
    old = "<|im_start|>assistant\n<think>\nx<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert read(tokenizer, "a<|im_end|>", old) == Parsed(None, "a", (), False, True, ())
    assert read(tokenizer, "\nb\n</think>a", "<|im_start|>assistant\n<think>\nhalf").reasoning == "\nb"


def test_non_thinking_content_is_never_null(tokenizer: Tokenizer) -> None:
    for text in ("", "<|im_end|>", "\n\n<|im_end|>"):
        parsed = read(tokenizer, text, "<|im_start|>assistant\n<think>\n\n</think>\n\n")
        assert parsed.content == "" and parsed.reasoning is None


def test_truncation_is_visible(tokenizer: Tokenizer) -> None:
    parsed = read(tokenizer, "<think>\nhalf a thou")
    assert parsed == Parsed("half a thou", "", (), False, False, ("think block not closed",))
    assert read(tokenizer, "<think>\nt\n</think>\n\nans") == Parsed("t", "ans", (), True, False, ())


def test_call_inside_a_thought_is_recovered_and_flagged(tokenizer: Tokenizer) -> None:
    parsed = read(tokenizer, f"<think>\nI should call\n{CALL}<|im_end|>")
    assert parsed.reasoning == "I should call" and parsed.tool_calls == (F,) and parsed.content == ""
    assert not parsed.closed and parsed.errors == ("tool call inside a think block",)
    late = read(tokenizer, f"<think>\nhm\n{CALL}\n</think>\n\ndone<|im_end|>")
    assert late.content == "done" and late.closed and late.tool_calls == (F,)


def test_text_before_between_and_after_calls(tokenizer: Tokenizer) -> None:
    parsed = read(tokenizer, f"<think>\nt\n</think>\n\nFirst\n{CALL}\n{CALL}\n\nlast<|im_end|>")
    assert parsed.tool_calls == (F, F) and parsed.content == "First\n\nlast" and not parsed.errors
    assert read(tokenizer, f"{CALL}\n<|im_end|>").content == ""


@pytest.mark.parametrize(
    ("raw", "fault"),
    [
        ("{oops", "not JSON"),
        ("[1]", "not an object"),
        ('{"arguments": {}}', "no function name"),
        ('{"name": "f"}', "arguments is not an object"),
        ('{"name": "f", "arguments": "x"}', "arguments is not an object"),
    ],
)
def test_malformed_call_is_reported_and_kept(tokenizer: Tokenizer, raw: str, fault: str) -> None:
    text = f"<tool_call>\n{raw}\n</tool_call>"
    parsed = read(tokenizer, f"ok\n{text}<|im_end|>")
    assert parsed.tool_calls == () and parsed.content == "ok" + text
    assert len(parsed.errors) == 1 and fault in parsed.errors[0]


def test_unclosed_calls(tokenizer: Tokenizer) -> None:
    whole = read(tokenizer, '<tool_call>\n{"name": "f", "arguments": {"a": 1}}<|im_end|>')
    assert whole.tool_calls == (F,) and whole.errors == ("tool call not closed",)
    half = read(tokenizer, '<tool_call>\n{"name": "f", "arg')
    assert half.tool_calls == () and half.content == '<tool_call>\n{"name": "f", "arg' and len(half.errors) == 2
    two = read(tokenizer, '<tool_call>\n{"name": "f", "arguments": {"a": 1}}' + CALL)
    assert two.tool_calls == (F, F) and two.errors == ("tool call not closed",)


def test_stray_tags_are_text_and_reported(tokenizer: Tokenizer) -> None:
    assert read(tokenizer, "a</think>b").content == "a</think>b"
    assert read(tokenizer, "a<think>b").content == "a<think>b"
    assert read(tokenizer, "a</tool_call>b").content == "a</tool_call>b"
    twice = read(tokenizer, "<think>\na<think>b\n</think>\n\nc</think>d")
    assert twice.reasoning == "a<think>b" and twice.content == "c</think>d" and len(twice.errors) == 2
    dropped = read(tokenizer, "a<|im_start|>b")
    assert dropped.content == "ab" and "<|im_start|>" in dropped.errors[0]


def test_spelled_tags_are_not_structure(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<think>a</think>" + CALL)
    parsed = parse(tokenizer, ids)
    assert parsed == Parsed(None, "<think>a</think>" + CALL, (), False, False, ())


def test_nothing_counts_after_the_end(tokenizer: Tokenizer) -> None:
    assert read(tokenizer, "a<|endoftext|>b<|im_end|>c").content == "a"
    parser = StreamParser(tokenizer)
    assert parser.feed(tokenizer.im_end) == [] and parser.feed(tokenizer.encode("x")[0]) == []
    assert parser.finish() == parser.finish() and parser.end() == []


_CACHE: list[Tokenizer] = []


def _shared() -> Tokenizer:
    if not _CACHE:
        _CACHE.append(Tokenizer.train(['ab ab {"name": "f", "arguments": {"a": 1}} \n\n é🙂'] * 3, 330))
    return _CACHE[0]
