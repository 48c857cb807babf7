"""The parser: inverse of the renderer, equal however it is fed, and lossless on malformed output."""

from __future__ import annotations

import base64
import json
import tempfile
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from twofold.base.records import InputError, Message, ToolCall
from twofold.text.chat import Renderer
from twofold.text.parse import (
    Delta,
    Parsed,
    ParseOptions,
    Start,
    StreamParser,
    TextParser,
    parse,
    parse_text,
    start_state,
)
from twofold.text.tokenizer import ADDED_TOKENS, Tokenizer

Maker = Callable[..., tuple[list[Message], list[dict[str, Any]] | None]]
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
F = ToolCall("f", {"a": 1})


def read(tokenizer: Tokenizer, text: str, prompt: str = "<|im_start|>assistant\n") -> Parsed:
    return parse(tokenizer, tokenizer.encode_with_special(text), tokenizer.encode_with_special(prompt))


def check_stream(
    tokenizer: Tokenizer, ids: list[int], prompt: list[int], options: ParseOptions | None = None
) -> Parsed:
    """What was streamed is what is returned."""
    parser = StreamParser(tokenizer, prompt, options)
    deltas = [delta for token in ids for delta in parser.feed(token)]
    deltas += parser.end()
    parsed = parser.finish()
    assert parsed == parse(tokenizer, ids, prompt, options)
    check_deltas(deltas, parsed)
    return parsed


def check_deltas(deltas: list[Delta], parsed: Parsed) -> None:
    """The deltas put together are the message."""
    assert "".join(d.text for d in deltas if d.kind == "content") == parsed.content
    assert "".join(d.text for d in deltas if d.kind == "reasoning") == (parsed.reasoning or "")
    calls = [d for d in deltas if d.kind == "tool_call"]
    assert tuple(d.call for d in calls if d.call) == parsed.tool_calls
    for last in (d for d in calls if d.call):
        mine = [d for d in calls if d.call_index == last.call_index]
        assert [d.name for d in mine if d.name] == [last.call.name] and mine[0].name
        assert json.loads("".join(d.text for d in mine)) == last.call.arguments and not any(d.dropped for d in mine)


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
    assert parsed.tool_calls == () and parsed.content == "ok\n" + text
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


def test_a_prompt_that_ends_inside_the_turn_is_continued(tokenizer: Tokenizer) -> None:
    head = "<|im_start|>user\nq <think><|im_end|>\n<|im_start|>assistant\n"
    cases: list[tuple[str, Start]] = [
        (head, "before"),
        (head + "\n", "before"),
        (head + "<think>\n", "think"),
        (head + "<think>\nhalf", "think"),
        (head + "<think>\n\n</think>\n\n", "answer"),
        (head + "<think>\nx\n</think>\n\nThe ans", "answer"),
        (head + "The ans", "answer"),
        (head + '<tool_call>\n{"name": "f", ', "call"),
        (head + "done<|im_end|>\n", "before"),
        ("no turns at all", "before"),
        ("<think>\nno turns", "think"),
        ("<|im_start|>user\n<think>", "before"),
    ]
    for prompt, state in cases:
        assert start_state(tokenizer.encode_with_special(prompt), tokenizer) == state, prompt
    call = read(tokenizer, '"arguments": {"a": 1}}\n</tool_call><|im_end|>', cases[7][0])
    assert call == Parsed(None, "", (F,), False, True, ())
    assert read(tokenizer, "\nwer", cases[6][0]).content == "\nwer"
    assert read(tokenizer, "\nwer", cases[4][0]).content == "wer"


def test_a_call_that_is_none_stays_in_the_thought(tokenizer: Tokenizer) -> None:
    parsed = read(tokenizer, "<think>\nwrite <tool_call>like this</tool_call> or so\n</think>\n\nyes<|im_end|>")
    assert parsed.reasoning == "write <tool_call>like this</tool_call> or so" and parsed.content == "yes"
    assert parsed.closed and len(parsed.errors) == 2
    cut = read(tokenizer, '<think>\nhm <tool_call>{"name": "f", "argu')
    assert cut.reasoning == 'hm <tool_call>{"name": "f", "argu' and cut.content == "" and not cut.closed


def test_mended_calls_are_calls_and_reported(tokenizer: Tokenizer) -> None:
    parsed = read(tokenizer, "<tool_call>\n{'name': 'f', 'arguments': {'a': 1,}\n</tool_call><|im_end|>")
    assert parsed.tool_calls == (F,) and parsed.content == ""
    assert parsed.errors == ("tool call mended: single quotes, trailing comma, missing bracket",)


def test_calls_stream_in_the_openai_way(tokenizer: Tokenizer) -> None:
    options = ParseOptions(early_calls=True, call_id="call_{}".format)
    ids = tokenizer.encode_with_special(f"{CALL}\n<tool_call>\n{{oops\n</tool_call>\n{CALL}<|im_end|>")
    parser = StreamParser(tokenizer, (), options)
    deltas = [d for token in ids for d in parser.feed(token) if d.kind == "tool_call"]
    for index in (0, 1):
        mine = [d for d in deltas if d.call_index == index]
        assert [(d.id, d.name) for d in mine if d.id or d.name] == [(f"call_{index}", "f")] and mine[0].name == "f"
        assert json.loads("".join(d.text for d in mine)) == {"a": 1}
        assert [d.call for d in mine if d.call] == [ToolCall("f", {"a": 1}, f"call_{index}")] and mine[-1].call
        assert len(mine) > 3
    assert [call.id for call in parser.finish().tool_calls] == ["call_0", "call_1"]


def test_a_call_that_breaks_after_it_began_is_dropped_in_the_stream(tokenizer: Tokenizer) -> None:
    text = 'a\n<tool_call>{"name": "f", "arguments": {"a": 1 oops}}</tool_call>'
    ids = tokenizer.encode_with_special(text + CALL + "<|im_end|>")
    parser = StreamParser(tokenizer, (), ParseOptions(early_calls=True))
    deltas = [delta for token in ids for delta in parser.feed(token)]
    calls = [delta for delta in deltas if delta.kind == "tool_call"]
    assert [d.call_index for d in calls if d.dropped] == [0] and [d.call_index for d in calls if d.call] == [1]
    assert parser.finish() == parse(tokenizer, ids) and parser.finish().content == text
    assert "".join(d.text for d in deltas if d.kind == "content") == text


def test_stop_strings_end_the_answer_and_only_the_answer(tokenizer: Tokenizer) -> None:
    stop = ParseOptions(stop=("STOP", "\n\n", "ab"))
    prompt = tokenizer.encode_with_special("<|im_start|>assistant\nSTOP abs")
    ids = tokenizer.encode_with_special("<think>\nSTOP\n\nab\n</think>\n\nfine S TO STO\nSTOP and more<|im_end|>")
    parsed = parse(tokenizer, ids, (), stop)
    assert parsed == Parsed("STOP\n\nab", "fine S TO STO\n", (), True, True, (), "STOP")
    parser = StreamParser(tokenizer, (), stop)
    states = [parser.state for token in ids if parser.feed(token) or True]
    assert parser.finish() == parsed and states.index("done") < len(states) - 3
    assert parse(tokenizer, tokenizer.encode("x ab"), prompt, stop).content == "x "
    called = tokenizer.encode_with_special(f"A{CALL}\nS" + '<tool_call>{"name": "f", "arguments": {"x": "STOP"}}')
    assert parse(tokenizer, called, (), stop).tool_calls == (F, ToolCall("f", {"x": "STOP"}))
    assert parse(tokenizer, called, (), stop).content == "A\nS"


def test_budget_tools_stops_and_streaming_together(tokenizer: Tokenizer) -> None:
    renderer = Renderer(tokenizer)
    prompt = renderer.prompt_ids([Message("user", "q")], [{"name": "f"}])
    thought = tokenizer.encode_with_special("<think>\nlong and") + renderer.stop_ids
    ids = thought + tokenizer.encode_with_special(f"So\n{CALL}\n{CALL}<|im_end|>")
    for options in (ParseOptions(), ParseOptions(stop=("so",), early_calls=True)):
        parsed = check_stream(tokenizer, ids, prompt, options)
        assert parsed.content == "So" and parsed.tool_calls == (F, F) and parsed.closed and not parsed.errors
        assert parsed.reasoning is not None and parsed.reasoning.endswith("based on the thinking directly now.")


def test_text_of_another_server_is_read_by_its_tags() -> None:
    text = f"<think>\nt\n</think>\n\nhi 🙂\n{CALL}\n{CALL}<|im_end|>"
    assert parse_text(text) == Parsed("t", "hi 🙂", (F, F), True, True, ())
    assert parse_text("t\n</think>\n\na", "think") == Parsed("t", "a", (), True, False, ())
    assert parse_text("a", "answer") == Parsed(None, "a", (), True, False, ())
    assert parse_text('{"name": "f", "arguments": {"a": 1}}</tool_call>', "call").tool_calls == (F,)
    assert parse_text("a < b <thin <th").content == "a < b <thin <th"
    spelled = parse_text('<tool_call>{"name": "f", "arguments": {"a": "<think></think>"}}</tool_call>')
    assert spelled.tool_calls == (ToolCall("f", {"a": "<think></think>"}),) and not spelled.errors
    xml = parse_text("<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>")
    assert xml.tool_calls == (ToolCall("f", {"a": "1"}),) and xml.content == ""
    with pytest.raises(InputError, match="lone surrogate"):
        TextParser().feed("a\ud83d")


PIECES = st.one_of(
    st.sampled_from(["<think>", "</think>", "<tool_call>", "</tool_call>", "<|im_end|>", "<|im_start|>", CALL, "\n"]),
    st.sampled_from(
        ["<tool_call>{'name': 'f', 'arguments': {'a': 1,}</tool_call>", "<thi", "STOP", "<tool_call>{oops"]
    ),
    st.text(st.sampled_from('ab \n<>/é🙂{}"'), max_size=8),
)
STARTS: list[Start] = ["before", "think", "answer", "call"]
HEADS = ["", "<think>\n", "<think>\n\n</think>\n\n", "<tool_call>"]


@given(
    st.lists(PIECES, max_size=10),
    st.lists(st.integers(1, 9), min_size=1, max_size=12),
    st.integers(0, 3),
    st.booleans(),
)
@settings(max_examples=120, deadline=None)
def test_every_chunking_gives_the_same_message(parts: list[str], sizes: list[int], start: int, early: bool) -> None:
    options = ParseOptions(stop=("STOP", "aab"), early_calls=early)
    text = "".join(parts)
    whole = parse_text(text, STARTS[start], ParseOptions(stop=options.stop))
    for source in (text, text.encode()):
        parser, at, deltas = TextParser(STARTS[start], options), 0, []
        for turn in range(len(source)):
            step = sizes[turn % len(sizes)]
            deltas += parser.feed(source[at : at + step])
            at += step
        deltas += parser.end()
        assert parser.finish() == whole
        check_deltas(deltas, whole)
    tok = _shared()
    ids, prompt = tok.encode_with_special(text), tok.encode_with_special("<|im_start|>assistant\n" + HEADS[start])
    by_token = check_stream(tok, ids, prompt, options)
    stepped, at = StreamParser(tok, prompt, options), 0
    while at < len(ids):
        step = sizes[at % len(sizes)]
        stepped.feed_many(ids[at : at + step])
        at += step
    assert stepped.finish() == by_token
    if "<" not in text:  # no tags and nothing that spells one: ids and text must agree
        assert by_token == whole


@given(st.binary(max_size=60), st.integers(1, 5))
@settings(max_examples=100, deadline=None)
def test_any_bytes_in_any_chunks(data: bytes, size: int) -> None:
    parser = TextParser()
    for at in range(0, len(data), size):
        parser.feed(data[at : at + size])
    assert parser.finish() == parse_text(data)


def test_tags_without_a_token_are_read_from_their_spelling() -> None:
    plain = Tokenizer.train(["ab"], 282)
    kept = [token for token, _ in ADDED_TOKENS if "think" not in token and "tool" not in token]
    bare = without(plain, kept)
    assert bare.think_open is None and bare.im_end is not None
    prompt = bare.encode_with_special("<|im_start|>assistant\n<think>\n")
    ids = bare.encode_with_special(f"t\n</think>\n\na\n{CALL}<|im_end|>")
    assert start_state(prompt, bare) == "think"
    assert check_stream(bare, ids, prompt) == Parsed("t", "a", (F,), True, True, ())


def without(tokenizer: Tokenizer, kept: list[str]) -> Tokenizer:
    """A tokenizer of the same bytes with only some added tokens."""
    ranks = "".join(f"{base64.b64encode(tokenizer.token_bytes(i)).decode()} {i}\n" for i in range(256))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bytes.tiktoken"
        path.write_text(ranks)
        spec = json.loads(Tokenizer.from_tiktoken(path).to_json())
    spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] in kept]
    for index, token in enumerate(spec["added_tokens"]):
        token["id"] = 256 + index
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(spec)))


_CACHE: list[Tokenizer] = []


def _shared() -> Tokenizer:
    if not _CACHE:
        _CACHE.append(Tokenizer.train(['ab ab {"name": "f", "arguments": {"a": 1}} \n\n é🙂'] * 3, 330))
    return _CACHE[0]
