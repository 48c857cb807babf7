"""Reading calls in the XML form of Qwen3-Coder and its successors, with values typed by the tool's schema.

The form has no types: ``5`` may be a number or a text. A value is text unless the schema names another type and the
value is one of that type, spelled as JSON or as Python (templates write ``True`` and ``None`` in past turns). Not here:
writing the form (``xml_form.py``), where calls begin and end (``parse.py``), and checking arguments against a schema.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from twofold.base.records import ToolCall
from twofold.text.calls import CallReader, name_fault
from twofold.text.schemas import parameters_of, referred

_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>(.*)</function>\s*", re.DOTALL)
_PARAMETER = re.compile(r"\s*<parameter=([^>\n]+)>\n?")
_CLOSE = "</parameter>"
_NEXT = re.compile(r"\s*(?:<parameter=[^>\n]+>|\Z)")
_MAX_REFERENCES = 20
_PYTHON_SPELLINGS = {"Python constant", "single quotes"}
_NAMES = {  # of types in schemas that were written for people or by Python programs
    "str": "string", "text": "string", "int": "integer", "float": "number", "double": "number", "bool": "boolean",
    "dict": "object", "list": "array", "tuple": "array", "none": "null",
}  # fmt: skip
_TYPES: dict[str, tuple[type, ...]] = {
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
    "object": (dict,),
    "array": (list,),
}
_EVERY = frozenset({"string", *_TYPES})


def is_xml_call(raw: str) -> bool:
    """Whether the text between the tags of a call is in this form."""
    return raw.lstrip().startswith("<function=")


def read_xml_call(raw: str, tools: Sequence[Mapping[str, Any]] | None) -> ToolCall | str:
    """``<function=NAME><parameter=KEY>value</parameter>…</function>`` as a call; a fault as text.

    A value may spell ``</parameter>``: it ends where the next parameter or the end of the call follows.

    Args:
        raw: the text between the tags. tools: schemas that name the types of values; without them all are text.
    """
    match = _FUNCTION.fullmatch(raw)
    if match is None:
        return "not a whole <function=NAME> … </function>"
    name, body = match.group(1).strip(), match.group(2)
    schema = parameters_of(name, tools)
    properties = schema.get("properties")
    fields = properties if isinstance(properties, Mapping) else {}
    arguments: dict[str, Any] = {}
    at = 0
    while opening := _PARAMETER.match(body, at):
        end = _value_end(body, opening.end())
        if end is None:
            return "text between the parameters" if _CLOSE in body[opening.end() :] else "a parameter is not closed"
        key, value = opening.group(1).strip(), body[opening.end() : end].removesuffix("\n")
        arguments[key] = typed(value, fields[key], schema) if key in fields else value
        at = end + len(_CLOSE)
    if body[at:].strip():
        return "text between the parameters"
    return name_fault(name) or ToolCall(name, arguments)


def typed(value: str, field: Any, schema: Mapping[str, Any]) -> Any:
    """A value as the type that its field of ``schema`` names; the text itself where it is of no other type named."""
    listed = field.get("enum") if isinstance(field, Mapping) else None
    if isinstance(listed, list) and value in listed:
        return value
    types = field_types(field, schema)
    if types <= {"string"}:
        return value
    known, found = _literal(value.strip())
    fits = known and any(_is(found, _TYPES[name]) for name in types if name in _TYPES)
    if fits and "integer" in types and "number" not in types and isinstance(found, float):
        return int(found)
    return found if fits else value


def _value_end(body: str, at: int) -> int | None:
    """Where the value that begins at ``at`` ends, before its closing tag; None if that is not clear."""
    end = first = body.find(_CLOSE, at)
    while end >= 0:
        if _NEXT.match(body, end + len(_CLOSE)):
            return end if end == first or "<parameter=" not in body[at:end] else None
        end = body.find(_CLOSE, end + 1)
    return None


def field_types(field: Any, schema: Mapping[str, Any]) -> frozenset[str]:
    """JSON Schema's names of the types that a field of ``schema`` may have; all of them where it does not say."""
    return _types(field, schema, _MAX_REFERENCES)


def _types(field: Any, schema: Mapping[str, Any], references: int) -> frozenset[str]:
    if not isinstance(field, Mapping):
        return _EVERY
    reference = field.get("$ref")
    if isinstance(reference, str):
        target = referred(reference, schema) if references else None
        return _types(target, schema, references - 1)
    for word in ("anyOf", "oneOf", "allOf"):
        if isinstance(field.get(word), list):
            found = [_types(part, schema, references - 1) for part in field[word]] if references > 0 else []
            if found:
                return frozenset.intersection(*found) if word == "allOf" else frozenset.union(*found)
    said = frozenset(_names(field.get("type")))
    if not said and isinstance(field.get("enum"), list):
        said = frozenset(name for name, kinds in _TYPES.items() if any(_is(v, kinds) for v in field["enum"]))
        return said | {"string"}
    return said or _EVERY


def _names(value: Any) -> Iterator[str]:
    for name in value if isinstance(value, list) else [value]:
        if isinstance(name, str):
            name = _NAMES.get(name.lower(), name.lower())
            yield from (name,) if name in _EVERY else _EVERY


def _is(value: Any, kinds: tuple[type, ...]) -> bool:
    if kinds == (int,) and isinstance(value, float):
        return value.is_integer()  # JSON Schema: 5.0 is an integer
    return isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))


def _literal(text: str) -> tuple[bool, Any]:
    """Whether the text is one JSON value, or the same in Python's spelling, and the value."""
    reader = CallReader()
    reader.feed('{"name": "x", "arguments": {"x": [' + text + "]}}")
    call = reader.close(tagged=False)
    # Too deep, not finite, half a character: no value. Text that closes and opens brackets is none either.
    if call is None or list(call.arguments) != ["x"] or len(call.arguments["x"]) != 1:
        return False, None
    try:
        return True, json.loads(text)
    except (ValueError, RecursionError):
        python = bool(reader.repairs) and reader.repairs.keys() <= _PYTHON_SPELLINGS
        return python, call.arguments["x"][0]
