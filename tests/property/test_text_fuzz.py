"""Hostile input to tokenizer, renderer, parser and formats: a correct result or an InputError, in reasonable time.

Random bytes, lone surrogates, megabyte messages, deep nesting and arbitrary JSON. Not here: what correct means in
detail; the unit tests of ``text`` say that.
"""

from __future__ import annotations

import json
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twofold.base.records import InputError, Message, ToolCall
from twofold.text.chat import Renderer, messages_from_openai
from twofold.text.formats import read_example
from twofold.text.parse import ParseOptions, StreamParser, TextParser, parse, parse_text
from twofold.text.tokenizer import StreamDecoder, Tokenizer
from twofold.text.view import view_file

MEGABYTE = 1_000_000
TOKENIZER = Tokenizer.train(['ab the {"name": "f", "arguments": {"a": 1}} \n\n é🙂'] * 3, 330)
RENDERER = Renderer(TOKENIZER)
CALL = '<tool_call>{"name": "f", "arguments": {'
LARGE: dict[str, Callable[[int], str]] = {
    "one word": lambda size: "a" * size,
    "spaces": lambda size: " " * size,
    "line breaks": lambda size: "\n" * size,
    "spaces before a letter": lambda size: (" " * 999 + "x") * (size // 1000),
    "emoji": lambda size: "🙂" * (size // 4),
    "combining marks": lambda size: "e" + "\u0301" * (size // 2),
    "tags": lambda size: "<think></think>" * (size // 15),
    "half tags": lambda size: "<think" * (size // 6),
    "brackets": lambda size: CALL + "{[" * (size // 2),
    "calls": lambda size: (CALL + "}}</tool_call>\n") * (size // 57),
    "one string": lambda size: CALL + '"a": "' + "x\n" * (size // 2) + '"}}</tool_call>',
    "one number": lambda size: CALL + '"a": ' + "9" * size + "}}</tool_call>",
    "gaps in a call": lambda size: '<tool_call>{"name": "f",' + " " * size + '"arguments": {}}</tool_call>',
}


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fails if the block takes more processor time: quadratic work on a megabyte takes minutes."""
    start = time.process_time()
    yield
    assert time.process_time() - start < seconds


def deep(depth: int) -> Any:
    """A schema-like object nested ``depth`` levels."""
    value: Any = {"type": "string"}
    for _ in range(depth):
        value = {"type": "object", "properties": {"a": value}}
    return value


def correct_or_refused(action: Callable[[], Any]) -> Any:
    """The result, or None if the input was refused with a message."""
    try:
        return action()
    except InputError as error:
        assert str(error)
        return None


@given(st.binary(max_size=80))
@settings(max_examples=150, deadline=None)
def test_random_bytes_as_text(data: bytes) -> None:
    for text in (
        data.decode("utf-8", "replace"),
        data.decode("utf-8", "surrogateescape"),
        data.decode("utf-16", "ignore"),
    ):
        ids = correct_or_refused(lambda text=text: TOKENIZER.encode(text))
        whole = all(not 0xD800 <= ord(char) <= 0xDFFF for char in text)
        assert (ids is not None) == whole
        rendered = correct_or_refused(lambda text=text: RENDERER.render([Message("user", text)]))
        assert (rendered is not None) == whole
        if ids is not None:
            assert TOKENIZER.decode(ids) == unicodedata.normalize("NFC", text)
            [view] = RENDERER.views([Message("user", text), Message("assistant", text.lstrip("\n"), text.strip("\n"))])
            cut = view.weights.index(1.0)
            parsed = parse(TOKENIZER, view.token_ids[cut:], view.token_ids[:cut])
            assert parsed.content == unicodedata.normalize("NFC", text.lstrip("\n"))
        correct_or_refused(lambda text=text: parse_text(text))


@given(st.lists(st.integers(-3, TOKENIZER.vocab_size + 3), max_size=60), st.booleans())
@settings(max_examples=150, deadline=None)
def test_random_token_ids(ids: list[int], early: bool) -> None:
    known = all(0 <= token < TOKENIZER.vocab_size for token in ids)
    assert (correct_or_refused(lambda: TOKENIZER.decode(ids)) is not None) == known
    parser = StreamParser(TOKENIZER, (), ParseOptions(early_calls=early, stop=("the", "\n")))
    fed = correct_or_refused(lambda: [parser.feed(token) for token in ids])
    assert fed is not None or not known
    assert isinstance(parser.finish().content, str)
    decoder = StreamDecoder(TOKENIZER)
    if known:
        pieces = [*map(decoder.feed, ids), decoder.flush()]
        assert "".join(pieces) == TOKENIZER.decode(ids) == decoder.feed_many(ids) + decoder.flush()


@pytest.mark.parametrize("size", [20_000, pytest.param(MEGABYTE, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", LARGE)
def test_a_large_message(name: str, size: int) -> None:
    text = LARGE[name](size)
    with within(2 + size * 3e-5):
        ids = TOKENIZER.encode(text)
        assert TOKENIZER.decode(ids) == unicodedata.normalize("NFC", text)
        rendered = RENDERER.render([Message("user", text), Message("assistant", "b", "x" + text + "x")])
        assert len(rendered.token_ids) > 2 * len(ids)
        whole = parse_text(text)
        parser = TextParser("before", ParseOptions(early_calls=True, stop=("no such", "text")))
        for at in range(0, len(text), 40):
            parser.feed(text[at : at + 40])
        assert parser.finish() == whole
        assert parse(TOKENIZER, ids).content == unicodedata.normalize("NFC", text).lstrip("\n")
        stream = StreamParser(TOKENIZER)
        for token in TOKENIZER.encode_with_special(text):
            stream.feed(token)
        assert isinstance(stream.finish().content, str)


@pytest.mark.parametrize("depth", [20, 400, 5_000, 20_000])
def test_deep_nesting(depth: int, tmp_path: Path) -> None:
    schema, user = deep(depth), Message("user", "q")
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    results = [
        correct_or_refused(lambda: RENDERER.render([user], [tool])),
        correct_or_refused(lambda: RENDERER.render([user, Message("assistant", "", None, (ToolCall("f", schema),))])),
        correct_or_refused(
            lambda: messages_from_openai([{"role": "assistant", "tool_calls": [{"name": "f", "arguments": schema}]}])
        ),
    ]
    raw = '{"a":' * depth + "1" + "}" * depth
    row = f'{{"role": "assistant", "tool_calls": [{{"name": "f", "arguments": {json.dumps(raw)}}}]}}'
    results.append(correct_or_refused(lambda: messages_from_openai([json.loads(row)])))
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"messages": [{{"role": "user", "content": "q"}}], "tools": [{raw}]}}\n')
    results.append(correct_or_refused(lambda: view_file(path, RENDERER)))
    assert depth > 20 or None not in results
    for nested in (raw, "[" * depth, '{"name": "f", "arguments": ' + raw + "}"):
        parsed = parse_text(f"<tool_call>{nested}</tool_call>")
        assert parsed.tool_calls or (parsed.content.startswith("<tool_call>") and nested in parsed.content)
        assert correct_or_refused(lambda parsed=parsed: RENDERER.render([user, parsed.message()])) is not None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "name", "arguments", "function", "tool_calls", "text", "x"]),
            inner | st.sampled_from(["user", "assistant", "tool", "\ud800"]),
            max_size=4,
        )
    ),
    max_leaves=12,
)
ROW = st.dictionaries(
    st.sampled_from(
        ["messages", "conversations", "instruction", "output", "prompt", "completion", "text", "tools", "x"]
    ),
    JSON
    | st.lists(
        st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "tool"]), "content": JSON}), max_size=3
    ),
    max_size=4,
)


@given(ROW)
@settings(max_examples=100, deadline=None)
def test_arbitrary_rows(row: dict[str, Any]) -> None:
    example = correct_or_refused(lambda: read_example(row))
    if example is not None and example.messages:
        correct_or_refused(lambda: RENDERER.views(example.messages, example.tools))
        correct_or_refused(lambda: RENDERER.render(example.messages, example.tools))
    elif example is not None:
        correct_or_refused(lambda: RENDERER.render_text(example.segments))


@given(st.lists(JSON, max_size=3), st.lists(JSON, max_size=2))
@settings(max_examples=60, deadline=None)
def test_arbitrary_messages_and_tools(messages: list[Any], tools: list[Any]) -> None:
    read = correct_or_refused(lambda: messages_from_openai(messages))
    correct_or_refused(lambda: RENDERER.render(read or [Message("user", "q")], tools))
