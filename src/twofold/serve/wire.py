"""Bytes of a request's body to a JSON object that every part behind it can hold.

What no model could read is refused here, once for all routes: bytes that are not Unicode, half a character, nesting
without end. Not here: which fields there are (``protocol.py``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from twofold.serve.errors import bad_request
from twofold.text.plain import surrogate_in

MAX_DEPTH = 200  # of lists and objects inside each other; Python's own readers and writers give up at about 1,000
_HALF = re.compile(r"\\u[dD][89a-fA-F]")  # the only way in which half a character comes in UTF-8


def read_object(data: bytes) -> dict[str, Any]:
    """The JSON object in a body.

    Raises:
        ApiError: 400 for what is no JSON object, a text with half a surrogate pair (the place is named), or more than
            ``MAX_DEPTH`` levels.
    """
    try:
        text = data.decode(json.detect_encoding(data))
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise bad_request(f"the body is not JSON: {error}"[:200], code="invalid_json") from None
    if not isinstance(value, dict):
        raise bad_request("the body must be a JSON object", code="invalid_json")
    deep = text.count("[") + text.count("{") > MAX_DEPTH
    if deep or _HALF.search(text):
        _check(value)
    return value


def _check(body: dict[str, Any]) -> None:
    waiting: list[tuple[str, int, Any]] = [("", 1, body)]
    while waiting:
        place, depth, value = waiting.pop()
        if depth > MAX_DEPTH:
            root = re.split(r"[.\[]", place)[0]
            raise bad_request(f"{root} is nested too deeply (more than {MAX_DEPTH} levels); flatten it", root)
        for inner, item in _items(place, value):
            if isinstance(item, dict | list):
                waiting.append((inner, depth + 1, item))
            elif isinstance(item, str) and surrogate_in(item) is not None:
                raise bad_request(f"{inner} is not valid Unicode; remove lone surrogates", inner)


def _items(place: str, value: Any) -> Iterator[tuple[str, Any]]:
    """What a container holds, and where."""
    if isinstance(value, list):
        yield from ((f"{place}[{index}]", item) for index, item in enumerate(value))
        return
    for key, item in value.items():
        if surrogate_in(key) is not None:
            where = place or "the body"
            raise bad_request(f"a key in {where} is not valid Unicode; remove lone surrogates", place or None)
        yield f"{place}.{key}" if place else key, item
