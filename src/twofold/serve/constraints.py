"""What an answer must look like: response formats and tool choices as grammars for the engine.

The engine applies a grammar after the think block only. Calls are JSON or have the XML form, as the template family
writes them. Not here: how grammars mask logits (``engine``), and how calls are read (``text``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from twofold.base.records import Grammar, GrammarKind
from twofold.serve.errors import bad_request
from twofold.serve.protocol import ChatRequest, SamplingFields
from twofold.text.plain import dump_json
from twofold.text.tokenizer import Tokenizer
from twofold.text.xml_calls import field_types

Json = dict[str, Any]
_NAME = re.compile(r"[a-zA-Z0-9_.:-]{1,64}")
_FORBID = -100.0
# llguidance's options: arguments are spaced as the template writes them, answers as the model likes, within limits.
_TIGHT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_VALUE_END = "\n</parameter>\n"
_AIRY = {"whitespace_pattern": r"[ \n\t]{1,32}"}


@dataclass(frozen=True, slots=True)
class ToolPlan:
    """What the tools of a request come to.

    shown: tools for the prompt. mode: whether calls are impossible, possible or required; names: those that may be
    called. strict: calls are written under a grammar, so that they can be streamed before they are whole. forbidden:
    there are tools, and they must not be called.
    """

    shown: tuple[Json, ...] = ()
    mode: Literal["none", "auto", "required"] = "none"
    names: tuple[str, ...] = ()
    strict: bool = False
    parallel: bool = True
    forbidden: bool = False


def plan_tools(request: ChatRequest) -> ToolPlan:
    """Read ``tools``, ``tool_choice`` and ``parallel_tool_calls``.

    Raises:
        ApiError: 400 for a tool without a usable name, or a choice that names no tool on offer.
    """
    tools = tuple(request.tools or ())
    names = tuple(_tool_name(index, tool) for index, tool in enumerate(tools))
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise bad_request(f"tools has {twice!r} twice; give every tool a name of its own", "tools")
    choice = request.tool_choice if request.tool_choice is not None else ("auto" if tools else "none")
    parallel = request.parallel_tool_calls
    if choice == "none" or (choice == "auto" and not tools):
        return ToolPlan(forbidden=bool(tools))
    if not tools:
        raise bad_request("tool_choice needs tools; give them, or leave tool_choice out", "tool_choice")
    if choice == "auto":
        strict = any(tool["function"].get("strict") is True for tool in tools)
        return ToolPlan(tools, "auto", names, strict, parallel)
    if choice == "required":
        return ToolPlan(tools, "required", names, True, parallel)
    wanted = choice.get("function", {}) if isinstance(choice, dict) and choice.get("type") == "function" else None
    if not isinstance(wanted, dict) or wanted.get("name") not in names:
        raise bad_request(
            "tool_choice must be none, auto, required or "
            f'{{"type": "function", "function": {{"name": one of {", ".join(names)}}}}}',
            "tool_choice",
        )
    return ToolPlan(tools, "required", (wanted["name"],), True, parallel=False)


def answer_grammar(request: SamplingFields) -> Grammar | None:
    """The grammar of ``response_format``, ``structured_outputs`` or a ``guided_`` field.

    Raises:
        ApiError: 400 for more than one of them, or a schema that is not JSON.
    """
    found = [(name, grammar) for name, grammar in _answer_grammars(request) if grammar is not None]
    if len(found) > 1:
        both = " and ".join(name for name, _ in found[:2])
        raise bad_request(f"{both} both constrain the answer; keep one of them", found[1][0], "conflicting_controls")
    return found[0][1] if found else None


def grammar_field(request: SamplingFields) -> str:
    """The field of a request from which a grammar comes, for errors about it."""
    return next((name for name, grammar in _answer_grammars(request) if grammar is not None), "tools")


def call_grammar(plan: ToolPlan, tokenizer: Tokenizer, answer: Grammar | None, xml: bool = False) -> Grammar | None:
    """The grammar of an answer in which tools may or must be called.

    Args:
        plan: the tools. tokenizer: the checkpoint's. answer: constrains what is no call. xml: calls have the XML form.

    Raises:
        ApiError: 400 for an answer constraint that cannot be joined with calls.
    """
    if plan.mode == "none" or (plan.mode == "auto" and answer is None and not plan.strict):
        return answer
    calls = "call (SEP call)*" if plan.parallel else "call"
    rules: list[str] = []
    if plan.mode == "required":
        if answer is not None:
            message = "the answer must be a call, so response_format has no effect; leave it out"
            raise bad_request(message, "response_format", "conflicting_controls")
        rules.append(f"start: {calls}")
    elif answer is None:
        rules.append(f"start: TEXT ({calls})?")
    else:
        if answer.kind not in ("json", "json_schema"):
            raise bad_request("tools can be combined with JSON formats only; leave one of them out", "tools")
        rules.append(f"start: answer | {calls}")
        rules.append(f"answer: %json {_schema(json.loads(answer.text or '{}'), _AIRY)}")
    rules.append(_call_rule(plan, tokenizer))
    for number, tool in enumerate(plan.shown):
        function = tool["function"]
        if function["name"] in plan.names:
            rules += (_xml_rules if xml else _json_rules)(f"tool{number}", function)
    if xml:
        rules.append(f"value[suffix={json.dumps(_VALUE_END)}]: /(.|\\n)*/")
    rules += ["SEP: /\\n{0,2}/", "TEXT: /(.|\\n)*/"]
    return Grammar("lark", "\n".join(rules))


def forbidden_calls(tokenizer: Tokenizer) -> dict[int, float]:
    """Logit bias under which no call begins."""
    opening = tokenizer.control_id("<tool_call>")
    return {} if opening is None else {opening: _FORBID}


def _schema(schema: Json, options: Json) -> str:
    """A schema of objects as a grammar takes it; options of its own stay."""
    return json.dumps({"type": "object", "x-guidance": options, **schema})


def _parameters(function: Json) -> Json:
    """The schema of a function's arguments; one that names no parameter takes none, as OpenAI documents it."""
    schema: Json = function.get("parameters") or {}
    open_ended = schema.keys() - {"type", "properties", "required", "title", "description", "$schema"}
    if open_ended or schema.get("properties") or schema.get("required"):
        return schema
    return {"type": "object", "properties": {}, "additionalProperties": False}


def _json_rules(rule: str, function: Json) -> list[str]:
    """One call as a JSON object."""
    head = json.dumps(f'{{"name": {json.dumps(function["name"])}, "arguments": ')
    schema = _schema(_parameters(function), _TIGHT)
    return [f'{rule}: {head} {rule}arguments "}}"', f"{rule}arguments: %json {schema}"]


def _xml_rules(rule: str, function: Json) -> list[str]:
    """One call in the XML form: parameters in the schema's order, values that may be text free up to their end."""
    schema = function.get("parameters") or {}
    shared = {name: schema[name] for name in ("$defs", "definitions") if name in schema}
    required, names, rules = schema.get("required") or (), [], []
    for number, (key, field) in enumerate((schema.get("properties") or {}).items()):
        name = f"{rule}p{number}"
        names.append(name if key in required else f"{name}?")
        opening = json.dumps(f"<parameter={key}>\n", ensure_ascii=False)
        listed = field.get("enum") if isinstance(field, dict) else None
        if listed and all(isinstance(option, str) for option in listed):
            options = " | ".join(json.dumps(option, ensure_ascii=False) for option in listed)
            rules.append(f"{name}: {opening} ({options}) {json.dumps(_VALUE_END)}")
            continue
        if "string" in field_types(field, schema):
            rules.append(f"{name}: {opening} value")
            continue
        inner = json.dumps({**field, **shared, "x-guidance": _TIGHT})
        rules += [f"{name}: {opening} {name}v {json.dumps(_VALUE_END)}", f"{name}v: %json {inner}"]
    head = json.dumps(f"<function={function['name']}>\n")
    return [f'{rule}: {" ".join([head, *names])} "</function>"', *rules]


def _call_rule(plan: ToolPlan, tokenizer: Tokenizer) -> str:
    tags = []
    for tag in ("<tool_call>", "</tool_call>"):
        tags.append(json.dumps(tag) if tokenizer.control_id(tag) is None else tag)  # outside quotes: the token
    names = [tool["function"]["name"] for tool in plan.shown]
    tools = " | ".join(f"tool{number}" for number, name in enumerate(names) if name in plan.names)
    return f'call: {tags[0]} "\\n" ({tools}) "\\n" {tags[1]}'


def _tool_name(index: int, tool: Json) -> str:
    function = tool.get("function")
    if tool.get("type") != "function" or not isinstance(function, dict):
        raise bad_request(
            f'tools[{index}] must look like {{"type": "function", "function": {{"name": ...}}}}', f"tools[{index}]"
        )
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        where = f"tools[{index}].function.name"
        raise bad_request(f"{where} is {name!r:.60}; use up to 64 letters, digits and . _ : -", where)
    if parameters is not None and not isinstance(parameters, dict):
        where = f"tools[{index}].function.parameters"
        raise bad_request(f"{where} must be a JSON schema, an object", where)
    return name


def _answer_grammars(request: SamplingFields) -> Sequence[tuple[str, Grammar | None]]:
    given: list[tuple[str, Grammar | None]] = []
    if (form := request.response_format) is not None:
        if (form.type == "json_schema") != (form.json_schema is not None):
            raise bad_request("response_format.json_schema goes with the type json_schema", "response_format")
        schema = form.json_schema.model_schema if form.json_schema is not None else None
        made = _json("response_format", schema) if form.type != "text" else None
        given.append(("response_format", made))
    if (inner := request.structured_outputs) is not None:
        place = "structured_outputs"
        if not inner.model_dump(exclude_none=True):
            raise bad_request(f"{place} is empty; give json, json_object, regex, choice or grammar", place)
        given.append((f"{place}.json_object", _json(place, None) if inner.json_object else None))
        given += _texts(f"{place}.", inner.json_, inner.regex, inner.choice, inner.grammar)
    return given + _texts(
        "guided_", request.guided_json, request.guided_regex, request.guided_choice, request.guided_grammar
    )


def _texts(
    prefix: str, schema: Json | str | None, regex: str | None, choice: Sequence[str] | None, grammar: str | None
) -> list[tuple[str, Grammar | None]]:
    """The four ways that ``structured_outputs`` and the ``guided_`` fields share."""
    return [
        (f"{prefix}json", None if schema is None else _json(f"{prefix}json", schema)),
        (f"{prefix}regex", None if regex is None else _written(f"{prefix}regex", "regex", regex)),
        (f"{prefix}choice", None if choice is None else _choice(choice)),
        (f"{prefix}grammar", None if grammar is None else _written(f"{prefix}grammar", "lark", grammar)),
    ]


def _written(name: str, kind: GrammarKind, text: str) -> Grammar:
    if not text:
        raise bad_request(f"{name} is empty, which no answer could follow; leave it out", name)
    return Grammar(kind, text)


def _json(name: str, schema: Json | str | None) -> Grammar:
    if schema is None:
        return Grammar("json", "")
    try:
        read = json.loads(schema) if isinstance(schema, str) else schema
    except (ValueError, RecursionError):
        raise bad_request(f"{name} is text but not JSON; give a JSON object", name) from None
    if not isinstance(read, dict):
        raise bad_request(f"{name} is JSON but no object; give a JSON schema as an object", name)
    return Grammar("json_schema", dump_json(read, name))


def _choice(options: Sequence[str]) -> Grammar:
    return Grammar("lark", "start: " + " | ".join(json.dumps(option, ensure_ascii=False) for option in options))
