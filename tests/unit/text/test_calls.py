"""The call reader: sound JSON unchanged, safe repairs, faults for the rest, the same for every cut; XML calls."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twofold.base.records import ToolCall
from twofold.text.calls import MAX_DEPTH, CallReader

JSON_VALUE = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(10**9), 10**9), st.floats(allow_nan=False, allow_infinity=False))
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab'\"\n{", max_size=3), inner, max_size=3),
    max_leaves=8,
)


def read(text: str, tagged: bool = True, cut: int = 0) -> tuple[ToolCall | None, CallReader, str]:
    """The call, its reader, and the argument text as it was streamed in pieces of ``cut`` characters."""
    reader, streamed = CallReader(), ""
    for at in range(0, len(text), cut or len(text) or 1):
        reader.feed(text[at : at + cut] if cut else text)
        streamed += reader.take()
    call = reader.close(tagged)
    return call, reader, streamed + (reader.take() if call else "")


@given(st.dictionaries(st.text("xyz\n\"'é", max_size=3), JSON_VALUE, max_size=3), st.integers(0, 7), st.booleans())
@settings(max_examples=80, deadline=None)
def test_sound_calls_are_read_as_they_are(arguments: dict[str, Any], cut: int, ascii_only: bool) -> None:
    raw = "\n" + json.dumps({"name": "f", "arguments": arguments, "more": [1]}, ensure_ascii=ascii_only) + "\n"
    call, reader, streamed = read(raw, tagged=False, cut=cut)
    assert call == ToolCall("f", arguments) and not reader.repairs and not reader.fault
    assert json.loads(streamed) == arguments
    first = json.dumps({"arguments": arguments, "name": "f"}, indent=2)
    call, _, streamed = read(first, cut=cut)
    assert call == ToolCall("f", arguments) and json.loads(streamed) == arguments


@pytest.mark.parametrize(
    ("raw", "arguments", "repair"),
    [
        ('{"name": "f", "arguments": {"a": [1, 2,], },}', {"a": [1, 2]}, "trailing comma"),
        ("{'name': 'f', 'arguments': {'a': 'say \"x\"'}}", {"a": 'say "x"'}, "single quotes"),
        ("{'name': 'f', 'arguments': {'a': 'it\\'s'}}", {"a": "it's"}, "escaped single quote"),
        ('{"name": "f", "arguments": {"a": "x\ny"}}', {"a": "x\ny"}, "line break in a string"),
        ('{"name": "f", "arguments": {"a": "x\ty"}}', {"a": "x\ty"}, "control character in a string"),
        ('{"name": "f", "arguments": {"a": [True, False, None]}}', {"a": [True, False, None]}, "Python constant"),
        ('{"name": "f", "arguments": {"a": [1, {"b": 2', {"a": [1, {"b": 2}]}, "missing bracket"),
        ('{"name": "f", "arguments": {"a": 1,', {"a": 1}, "missing bracket"),
        ('{"name": "f", "arguments": {', {}, "missing bracket"),
        ('{"name": "f", "arguments": {"a": 1}}}\n}', {"a": 1}, "extra bracket"),
    ],
)
def test_what_has_one_reading_is_mended(raw: str, arguments: dict[str, Any], repair: str) -> None:
    for cut in range(8):
        call, reader, streamed = read(raw, cut=cut)
        assert call == ToolCall("f", arguments), cut
        assert repair in reader.repairs and json.loads(streamed) == arguments


@pytest.mark.parametrize(
    ("raw", "fault"),
    [
        ("", "breaks off"),
        ("nonsense", "not an object"),
        ("@", "not JSON"),
        ('{"name": "f", "arguments": {"a": "half', "string is not closed"),
        ('{"name": "f", "arguments": {"a": 1], "b": 2}}', "unexpected ']'"),
        ('{"name": "f", "arguments": {"a"', "breaks off"),
        ('{"name": "f", "arguments": {"a":', "breaks off"),
        ('{"name": "f", "arguments": {"a" 1}}', "no colon"),
        ('{"name": "f", "arguments": {"a": 1 "b": 2}}', "unexpected"),
        ('{"name": "f", "arguments": {"a": 1,, "b": 2}}', "not in quotes"),
        ('{"name": "f", "arguments": {"a": [1,, 2]}}', "unexpected ','"),
        ('{"name": "f", "arguments": {"a": [,]}}', "unexpected ','"),
        ("{'name': 'f', 'arguments': {'a': 'it's'}}", "unexpected 's'"),
        ('{"name": "f", "arguments": {a: 1}}', "not in quotes"),
        ('{"name": "f", "arguments": {"a": 01}}', "'01'"),
        ('{"name": "f", "arguments": {"a": NaN}}', "'NaN'"),
        ('{"name": "f", "arguments": {"a": 1e999}}', "'1e999'"),
        ('{"name": "f", "arguments": {"a": ' + "9" * 5000 + "}}", "unexpected"),
        ('{"name": "f", "arguments": {"a": "\\d"}}', "unknown escape"),
        ('{"name": "f", "arguments": {"a": "\\ud800"}}', "lone surrogate"),
        ('{"name": "\\ud800", "arguments": {}}', "function name"),
        ('{"name": "a\\"b", "arguments": {}}', "function name"),
        ('{"name": "", "arguments": {}}', "no function name"),
        ('{"name": 1, "arguments": {}}', "no function name"),
        ('{"name": "f", "name": "g", "arguments": {}}', "given twice"),
        ('{"name": "f", "arguments": {}, "arguments": {"a": 1}}', "given twice"),
        ('{"name": "f", "arguments": {}} {"name"', "after the object"),
        ('{"name": "f", "arguments": ' + '{"a":' * MAX_DEPTH, "nested too deeply"),
    ],
)
def test_the_rest_is_a_fault_however_it_is_cut(raw: str, fault: str) -> None:
    for cut in range(6):
        call, reader, _ = read(raw, cut=cut)
        assert call is None and fault in reader.fault, (cut, reader.fault)


def test_missing_brackets_need_a_marked_end() -> None:
    call, reader, _ = read('{"name": "f", "arguments": {"a": 1}', tagged=False)
    assert call is None and "brackets are not closed" in reader.fault
    call, _, _ = read('{"name": "f", "arguments": {"a": 1}}', tagged=False)
    assert call == ToolCall("f", {"a": 1})


def test_arguments_stream_before_the_call_is_whole() -> None:
    reader = CallReader()
    reader.feed('{"arguments": {"text": "be')
    assert reader.take() == ""  # no name yet
    reader.feed('gin"}, "name": "wri')
    assert reader.take() == ""
    reader.feed('te"')
    assert reader.name == "write" and reader.take() == '{"text": "begin"}' and reader.take() == ""
    late = CallReader()
    late.feed('{"name": "write", "arguments": {"text": "one ')
    assert late.take() == '{"text": "one '
    late.feed("two\\u00e")
    assert late.take() == "two"
    late.feed('9",}}')
    assert late.take() == '\\u00e9"}'


@given(st.text(st.sampled_from("{}[]\"':,\\u0a1 \ntrue"), max_size=40), st.integers(1, 5), st.booleans())
@settings(max_examples=150, deadline=None)
def test_any_text_gives_the_same_result_for_every_cut(tail: str, cut: int, tagged: bool) -> None:
    for raw in (tail, '{"name": "f", "arguments": {' + tail):
        whole, whole_reader, text = read(raw, tagged)
        call, reader, streamed = read(raw, tagged, cut)
        assert call == whole and reader.fault == whole_reader.fault and reader.repairs == whole_reader.repairs
        if call:
            assert json.loads(streamed) == json.loads(text) == call.arguments
