"""Calls in the XML form: values typed by the schema, closing tags inside values, every cut of a stream."""

from __future__ import annotations

from typing import Any

import pytest

from twofold.base.records import ToolCall
from twofold.text.parse import ParseOptions, TextParser, parse_text
from twofold.text.xml_calls import is_xml_call, read_xml_call, typed


def test_xml_calls_take_their_types_from_the_schema() -> None:
    raw = (
        "\n<function=search>\n<parameter=query>\nlong\ntext\n</parameter>\n<parameter=limit>\n5\n</parameter>\n"
        "<parameter=tags>\n[1,]\n</parameter>\n<parameter=odd>\nnot a number\n</parameter>\n</function>\n"
    )
    kinds = {"query": "string", "limit": "integer", "tags": "array", "odd": "number"}
    properties = {key: {"type": kind} for key, kind in kinds.items()}
    tools = [{"type": "function", "function": {"name": "search", "parameters": {"properties": properties}}}]
    assert is_xml_call(raw) and not is_xml_call('{"name": "f"}')
    untyped = {"query": "long\ntext", "limit": "5", "tags": "[1,]", "odd": "not a number"}
    assert read_xml_call(raw, None) == ToolCall("search", untyped)
    assert read_xml_call(raw, tools) == ToolCall("search", untyped | {"limit": 5})
    assert read_xml_call("<function=now>\n</function>", tools) == ToolCall("now", {})
    assert read_xml_call("<function=f><parameter=a>1", None) == "not a whole <function=NAME> … </function>"
    assert read_xml_call("<function=f>x<parameter=a>1</parameter></function>", None) == "text between the parameters"
    assert "function name" in str(read_xml_call('<function=a"b></function>', None))
    for odd in ([{"name": "search", "parameters": 3}], [{"function": 7}], [{"name": "search"}]):
        assert read_xml_call(raw, odd) == ToolCall("search", untyped)


SCHEMA: dict[str, Any] = {
    "$defs": {"count": {"type": "integer"}, "loop": {"$ref": "#/$defs/loop"}, "a/b": {"type": "array"}}
}


@pytest.mark.parametrize(
    ("field", "value", "want"),
    [
        ({"type": "string"}, "007", "007"),
        ({"type": "string"}, "true", "true"),
        ({"type": "string"}, '{"a": 1}', '{"a": 1}'),
        ({"type": "boolean"}, "true", True),
        ({"type": "boolean"}, "True", True),  # what templates that write values by Python's str() have taught
        ({"type": "boolean"}, "yes", "yes"),
        ({"type": "integer"}, " 30\n", 30),
        ({"type": "integer"}, "3.0", 3),
        ({"type": "integer"}, "3.5", "3.5"),
        ({"type": "integer"}, "True", "True"),
        ({"type": "number"}, "1e3", 1000.0),
        ({"type": "number"}, "NaN", "NaN"),
        ({"type": "number"}, "1e999", "1e999"),
        ({"type": ["string", "null"]}, "null", None),
        ({"type": ["string", "null"]}, "None", None),
        ({"type": ["string", "null"], "enum": ["None", "All", None]}, "None", "None"),
        ({"type": ["string", "null"]}, "5", "5"),
        ({"type": "object"}, "{'a': True, 'b': None, 'c': [1]}", {"a": True, "b": None, "c": [1]}),
        ({"type": "object"}, "[1]", "[1]"),
        ({"type": "array"}, '[{"a": 1}]', [{"a": 1}]),
        ({"type": "array"}, "[1,]", "[1,]"),
        ({"type": "array"}, "[" * 200 + "]" * 200, "[" * 200 + "]" * 200),
        ({"type": "list"}, "[1]", [1]),
        ({"type": "str"}, "1", "1"),
        ({"type": "int"}, "1", 1),
        ({"type": "a type of my own"}, "1", 1),
        ({"anyOf": [{"type": "integer"}, {"type": "string"}]}, "5", 5),
        ({"oneOf": [{"type": "null"}, {"$ref": "#/$defs/count"}]}, "5", 5),
        ({"allOf": [{"type": ["integer", "string"]}, {"type": "string"}]}, "5", "5"),
        ({"$ref": "#/$defs/count"}, "5", 5),
        ({"$ref": "#/$defs/a~1b"}, "[5]", [5]),
        ({"$ref": "#/$defs/loop"}, "5", 5),
        ({"$ref": "#/nowhere"}, "x", "x"),
        ({"enum": ["1", "2"]}, "1", "1"),
        ({"enum": [1, 2]}, "1", 1),
        ({}, "5", 5),
        ({}, "five", "five"),
        (True, "5", 5),
        ({"type": "integer"}, "1, 2", "1, 2"),
        ({"type": "boolean"}, 'True, "y": 2', 'True, "y": 2'),
        ({}, "1}, {", "1}, {"),
    ],
)
def test_values_have_the_type_that_the_schema_names(field: Any, value: str, want: Any) -> None:
    got = typed(value, field, SCHEMA)
    assert got == want and type(got) is type(want)


@pytest.mark.parametrize(
    "value",
    [
        "echo $HOME; echo ID=$ID\nsecond line",
        "\n\nblank lines at both ends\n\n",
        "    indented\n        code\n",
        "<b>x</b> & <parameter> </param>",
        "print('</parameter>')\nx = '</function>'",
        "",
    ],
)
def test_text_comes_back_as_it_was(value: str) -> None:
    raw = f"<function=run>\n<parameter=cmd>\n{value}\n</parameter>\n<parameter=x>\n1\n</parameter>\n</function>"
    assert read_xml_call(raw, None) == ToolCall("run", {"cmd": value, "x": "1"})
    text = f"Done.\n\n<tool_call>\n{raw}\n</tool_call>"
    parser = TextParser(options=ParseOptions())
    for char in text:
        parser.feed(char)
    parsed = parser.finish()
    assert parsed == parse_text(text)
    assert parsed.content == "Done."
    assert [call.arguments for call in parsed.tool_calls] == [{"cmd": value, "x": "1"}]


def test_what_is_not_clear_is_no_call() -> None:
    ambiguous = "<function=f><parameter=a>1</parameter>between<parameter=b>2</parameter></function>"
    assert read_xml_call(ambiguous, None) == "text between the parameters"
    assert read_xml_call("<function=f><parameter=a>1</function>", None) == "a parameter is not closed"
