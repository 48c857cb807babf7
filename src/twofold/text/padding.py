"""Nulls that Arrow pads into rows, told from nulls that a row means.

Arrow stores a column of objects as structs with the keys of all rows; a key that an object lacks comes back as null. So
in tools and in the arguments of calls a null is no value, unless the tool's schema allows it there. Items of lists are
never padded, and JSON that comes as text was never a struct: its nulls stay. Not here: the rest of a row
(``formats.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from twofold.text.messages import Tools
from twofold.text.schemas import parameters_of, referred

Schemas = list[Mapping[str, Any]]

_CHOICES = ("anyOf", "oneOf", "allOf")
_TYPED = ("type", "enum", "const", "$ref", "properties", "items", *_CHOICES)


def meant_tool(tool: Any) -> Any:
    """A tool without padded nulls. ``default`` and ``const`` stay null where the schema beside them allows null.

    A parameter that must be given has no default, so a null there is padding.
    """
    return _without_padding(tool, must=False)


def meant_arguments(arguments: Mapping[str, Any], name: str, tools: Tools | None) -> dict[str, Any]:
    """A call's arguments without padded nulls, at any depth.

    Args:
        arguments: as an object; keys that the tool does not declare are padding where they are null.
        name: of the function; its schema decides, by its types (``null``, ``nullable``, ``enum`` ...), or, for a
            field without a type, by whether it must be given.
        tools: what the row declares, already without padding.
    """
    schema = parameters_of(name, tools)
    return dict(_meant(arguments, list(_alternatives(schema, schema, ())), schema))


def holds_null(value: Any) -> bool:
    """Whether an object somewhere in a value has a null, which could be taken for padding."""
    if isinstance(value, Mapping):
        return any(inner is None or holds_null(inner) for inner in value.values())
    return isinstance(value, list | tuple) and any(map(holds_null, value))


def _without_padding(value: Any, must: bool) -> Any:
    """must: this is the schema of a field that has to be given."""
    if isinstance(value, list):
        return [_without_padding(item, False) for item in value]
    if not isinstance(value, Mapping):
        return value
    kept = {}
    for key, inner in value.items():
        if inner is not None:
            kept[key] = _fields(value, inner) if key == "properties" else _without_padding(inner, False)
        elif (key == "default" and not must and _says_null(value)) or (key == "const" and not _is_typed(value)):
            kept[key] = None
    return kept


def _fields(owner: Mapping[str, Any], fields: Any) -> Any:
    if not isinstance(fields, Mapping):
        return _without_padding(fields, False)
    needed = _needed(owner)
    return {
        name: _without_padding(field, name in needed)
        for name, field in fields.items()
        if field is not None  # a parameter of another tool
    }


def _meant(value: Any, schemas: Schemas, root: Mapping[str, Any]) -> Any:
    """The value without padding. schemas: what may stand here. root: where ``$ref`` leads to."""
    if isinstance(value, list):
        items = [item for schema in schemas for item in _alternatives(schema.get("items"), root, ())]
        return [_meant(item, items, root) for item in value]
    if not isinstance(value, Mapping):
        return value
    kept = {}
    for key, inner in value.items():
        fields = [f for schema in schemas for f in _alternatives(_field(schema, key), root, ())]
        needed = any(key in _needed(schema) for schema in schemas)
        if inner is not None or any(_says_null(f) or (needed and not _is_typed(f)) for f in fields):
            kept[key] = _meant(inner, fields, root)
    return kept


def _field(schema: Mapping[str, Any], key: str) -> Any:
    declared = schema.get("properties")
    if isinstance(declared, Mapping) and key in declared:
        return declared[key]
    return schema.get("additionalProperties")


def _alternatives(schema: Any, root: Mapping[str, Any], seen: tuple[str, ...]) -> Iterator[Mapping[str, Any]]:
    """The schema and what it refers to or offers to choose from. seen: references on the way here."""
    if schema is True:  # anything
        yield {}
    if not isinstance(schema, Mapping):
        return
    yield schema
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#/") and reference not in seen:
        yield from _alternatives(referred(reference, root), root, (*seen, reference))
    for choice in _CHOICES:
        offered = schema.get(choice)
        for option in offered if isinstance(offered, list) else ():
            yield from _alternatives(option, root, seen)


def _says_null(schema: Mapping[str, Any]) -> bool:
    """Whether a schema names null among what it allows."""
    kinds = schema.get("type")
    allowed = schema.get("enum")
    return (
        kinds == "null"
        or (isinstance(kinds, list) and "null" in kinds)
        or (isinstance(allowed, list) and None in allowed)
        or schema.get("nullable") is True
        or ("const" in schema and schema["const"] is None and not _is_typed(schema, but="const"))
        or any(_says_null(option) for key in _CHOICES[:2] for option in _offered(schema, key))
    )


def _offered(schema: Mapping[str, Any], key: str) -> Sequence[Mapping[str, Any]]:
    offered = schema.get(key)
    return [option for option in offered if isinstance(option, Mapping)] if isinstance(offered, list) else []


def _is_typed(schema: Mapping[str, Any], but: str = "") -> bool:
    """Whether a schema says anything about the kind of a value."""
    return any(schema.get(key) is not None for key in _TYPED if key != but)


def _needed(schema: Mapping[str, Any]) -> Sequence[Any]:
    needed = schema.get("required")
    return needed if isinstance(needed, list) else ()
