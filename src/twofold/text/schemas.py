"""JSON Schemas of tools: where a function's arguments are described, and what a reference leads to.

Not here: types of values (``xml_calls.py``), what may be null (``padding.py``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def parameters_of(name: str, tools: Sequence[Mapping[str, Any]] | None) -> Mapping[str, Any]:
    """The schema of a function's arguments, in OpenAI's form or Anthropic's; empty where there is none."""
    for tool in tools or ():
        function = tool.get("function", tool)
        if isinstance(function, Mapping) and function.get("name") == name:
            found = function.get("parameters", function.get("input_schema"))
            return found if isinstance(found, Mapping) else {}
    return {}


def referred(reference: str, schema: Mapping[str, Any]) -> Any:
    """What a ``$ref`` inside the schema points to; None where nothing is there."""
    place: Any = schema
    for step in reference.removeprefix("#").split("/")[1:]:
        place = place.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(place, Mapping) else None
    return place
