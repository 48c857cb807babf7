"""Tool plans and grammars of answers and calls."""

from __future__ import annotations

import json
from typing import Any

import pytest

from twofold.base.records import Grammar, InputError
from twofold.engine.grammar import Grammars
from twofold.serve.constraints import ToolPlan, answer_grammar, call_grammar, forbidden_calls, plan_tools
from twofold.serve.errors import ApiError
from twofold.serve.protocol import ChatRequest, read_body
from twofold.text.tokenizer import Tokenizer

SCHEMA = {"type": "object", "properties": {"x": {"enum": [1, 2]}}, "required": ["x"], "additionalProperties": False}
ADD = {"type": "function", "function": {"name": "add", "parameters": SCHEMA}}
NOW = {"type": "function", "function": {"name": "now"}}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["some text 123"] * 3, 320)


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    pytest.importorskip("llguidance")
    return Grammars(tokenizer, tokenizer.eos_ids)


def ask(**fields: Any) -> ChatRequest:
    return read_body(ChatRequest, json.dumps({"messages": [], **fields}).encode())[0]


def accepts(grammars: Grammars, grammar: Grammar | None, text: str, tokenizer: Tokenizer) -> bool:
    """Whether the whole text and the end of the turn after it are within the grammar."""
    assert grammar is not None
    grammars.check(grammar)
    matcher = grammars._compiled[grammar].deep_copy()
    ids = tokenizer.encode_with_special(text + "<|im_end|>")
    return matcher.validate_tokens(ids) == len(ids)


def call(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def test_plans() -> None:
    assert plan_tools(ask()) == ToolPlan()
    assert plan_tools(ask(tools=[ADD, NOW])) == ToolPlan((ADD, NOW), "auto", ("add", "now"))
    assert plan_tools(ask(tools=[ADD], tool_choice="none")) == ToolPlan(forbidden=True)
    named = {"type": "function", "function": {"name": "now"}}
    plan = plan_tools(ask(tools=[ADD, NOW], tool_choice=named))
    assert plan.names == ("now",) and plan.strict and not plan.parallel and plan.shown == (ADD, NOW)
    strict = {"type": "function", "function": {**ADD["function"], "strict": True}}
    assert plan_tools(ask(tools=[strict])).strict


@pytest.mark.parametrize("name", ["", "a b", "x" * 65, 'a"', None, 3])
def test_names_of_tools(name: object) -> None:
    with pytest.raises(ApiError, match=r"tools\[0\].function.name is"):
        plan_tools(ask(tools=[{"type": "function", "function": {"name": name}}]))


def test_required_calls(grammars: Grammars, tokenizer: Tokenizer) -> None:
    grammar = call_grammar(plan_tools(ask(tools=[ADD, NOW], tool_choice="required")), tokenizer, None)
    good, other = call("add", '{"x": 1}'), call("now", "{}")
    for text, ok in (
        (good, True), (other, True), (good + "\n" + other, True), ("", False), ("text", False), (good + "text", False),
        (call("add", '{"x": 3}'), False), (call("add", '{"x":1}'), False), (call("sub", "{}"), False),
        (good.replace("</tool_call>", ""), False),
    ):  # fmt: skip
        assert accepts(grammars, grammar, text, tokenizer) == ok, text
    one = call_grammar(plan_tools(ask(tools=[ADD], tool_choice="required", parallel_tool_calls=False)), tokenizer, None)
    assert accepts(grammars, one, good, tokenizer) and not accepts(grammars, one, good + good, tokenizer)


def test_required_calls_in_the_xml_form(grammars: Grammars, tokenizer: Tokenizer) -> None:
    """A model that learnt the XML form is not forced into JSON."""
    fields = {"n": {"$ref": "#/$defs/n"}, "text": {"type": "string"}, "any": {"type": "boolean"}}
    fields["unit"] = {"type": "string", "enum": ["C", "F"]}
    schema = {"type": "object", "properties": fields, "required": ["n", "text"], "$defs": {"n": {"type": "integer"}}}
    tool = {"type": "function", "function": {"name": "say", "parameters": schema}}
    grammar = call_grammar(plan_tools(ask(tools=[tool, NOW], tool_choice="required")), tokenizer, None, xml=True)

    def xml(name: str, **values: str) -> str:
        body = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
        return f"<tool_call>\n<function={name}>\n{body}</function>\n</tool_call>"

    for text, ok in (
        (xml("say", n="5", text="a <b> </parameter> c\n\nd"), True),
        (xml("now"), True),
        (xml("say", n="5", text="", any="true", unit="C") + "\n" + xml("now"), True),
        (xml("say", n="five", text="a"), False),
        (xml("say", n="5"), False),
        (xml("say", n="5", text="", unit="K"), False),
        (xml("sub"), False),
        (call("now", "{}"), False),
        ("text", False),
    ):
        assert accepts(grammars, grammar, text, tokenizer) == ok, text


def test_strict_tools_leave_text_free(grammars: Grammars, tokenizer: Tokenizer) -> None:
    strict = {"type": "function", "function": {**ADD["function"], "strict": True}}
    grammar = call_grammar(plan_tools(ask(tools=[strict])), tokenizer, None)
    for text, ok in (
        ("hello", True), ("", True), ("hello\n" + call("add", '{"x": 2}'), True), (call("add", '{"x": 3}'), False),
    ):  # fmt: skip
        assert accepts(grammars, grammar, text, tokenizer) == ok, text


def test_an_answer_or_a_call(grammars: Grammars, tokenizer: Tokenizer) -> None:
    request = ask(tools=[ADD], response_format={"type": "json_schema", "json_schema": {"schema": SCHEMA}})
    grammar = call_grammar(plan_tools(request), tokenizer, answer_grammar(request))
    for text, ok in (
        ('{"x": 1}', True), ('{\n "x": 1\n}', True), (call("add", '{"x": 2}'), True), ("text", False),
        ('{"x": 3}', False), ('{"x": 1}' + call("add", '{"x": 2}'), False),
    ):  # fmt: skip
        assert accepts(grammars, grammar, text, tokenizer) == ok, text


def test_answers(grammars: Grammars, tokenizer: Tokenizer) -> None:
    assert answer_grammar(ask(response_format={"type": "text"})) is None
    assert answer_grammar(ask(response_format={"type": "json_object"})) == Grammar("json")
    assert answer_grammar(ask(guided_json=json.dumps(SCHEMA))) == Grammar("json_schema", json.dumps(SCHEMA))
    assert answer_grammar(ask(structured_outputs={"regex": "a+"})) == Grammar("regex", "a+")
    choice = answer_grammar(ask(guided_choice=['say "x"\n', "ü.*"]))
    assert accepts(grammars, choice, "ü.*", tokenizer) and accepts(grammars, choice, 'say "x"\n', tokenizer)
    assert not accepts(grammars, choice, "üaa", tokenizer)
    with pytest.raises(ApiError, match="guided_json and guided_regex both constrain"):
        answer_grammar(ask(guided_json=SCHEMA, guided_regex="a"))
    for empty in ({}, {"json": None}):
        with pytest.raises(ApiError, match="structured_outputs is empty; give json,"):
            answer_grammar(ask(structured_outputs=empty))
    with pytest.raises(ApiError, match="not JSON"):
        answer_grammar(ask(guided_json="{"))
    with pytest.raises(ApiError, match="JSON formats only"):
        call_grammar(plan_tools(ask(tools=[ADD])), tokenizer, Grammar("regex", "a"))


def test_calls_can_be_forbidden(tokenizer: Tokenizer) -> None:
    assert forbidden_calls(tokenizer) == {tokenizer.control_id("<tool_call>"): -100.0}


@pytest.mark.parametrize(
    "function", [{}, {"parameters": None}, {"parameters": {}}, {"parameters": {"type": "object", "properties": {}}}]
)
def test_a_tool_without_parameters_gets_none(
    grammars: Grammars, tokenizer: Tokenizer, function: dict[str, Any]
) -> None:
    tool = {"type": "function", "function": {"name": "now", **function}}
    named = {"type": "function", "function": {"name": "now"}}
    for choice in ("required", named):
        grammar = call_grammar(plan_tools(ask(tools=[tool], tool_choice=choice)), tokenizer, None)
        assert accepts(grammars, grammar, call("now", "{}"), tokenizer)
        assert not accepts(grammars, grammar, call("now", '{"a": 1}'), tokenizer)
    free = {
        "type": "function",
        "function": {"name": "now", "parameters": {"type": "object", "additionalProperties": True}},
    }
    grammar = call_grammar(plan_tools(ask(tools=[free], tool_choice="required")), tokenizer, None)
    assert accepts(grammars, grammar, call("now", '{"a": 1}'), tokenizer)


def test_no_tools_and_no_wish_for_them() -> None:
    assert plan_tools(ask(tools=[], tool_choice="auto")) == plan_tools(ask(tool_choice="none")) == ToolPlan()
    with pytest.raises(ApiError, match="needs tools"):
        plan_tools(ask(tools=[], tool_choice="required"))


@pytest.mark.parametrize(
    "fields", [{"guided_regex": ""}, {"guided_grammar": ""}, {"guided_json": "5"}, {"guided_json": '{"a": 1e400}'}]
)
def test_formats_that_say_nothing_are_named(fields: dict[str, Any]) -> None:
    with pytest.raises((ApiError, InputError)) as caught:
        answer_grammar(ask(**fields))
    facts = caught.value
    assert [facts.param if isinstance(facts, ApiError) else facts.field] == list(fields)
