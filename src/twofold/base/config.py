"""Frozen, typed configuration: a pydantic base with three habits.

An unknown key is an error that names the nearest known key; ``override`` sets dotted leaves from the command
line (``pretrain.s1.tokens=2e6``); ``digest`` is a hash that does not depend on field order, process or machine.
Not here: any actual configuration. Recipes and models declare theirs where they are used. Imports no torch.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Collection, Iterable, Sequence
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError


class ConfigError(ValueError):
    """A configuration cannot be used; the message names the key and what would be accepted."""


class Config(BaseModel):
    """Base of every configuration: immutable, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    def override(self, assignments: Iterable[str]) -> Self:
        """Return a copy with dotted leaves replaced.

        Args:
            assignments: strings ``a.b.c=value``; values are read as JSON where possible (``2e6`` is accepted
                for integer fields when it is whole), otherwise as plain text. Where text is wanted, ``2024``,
                ``1e5`` and ``null`` are text; a JSON string is what its quotes hold.

        Raises:
            ConfigError: unknown key, malformed assignment, or a value of the wrong type.
        """
        pairs = []
        for assignment in assignments:
            path, separator, text = assignment.partition("=")
            if not separator or not path:
                raise ConfigError(f"--set takes KEY=VALUE, got {assignment!r}")
            pairs.append((path, text))
        try:
            try:
                return type(self).model_validate(self._with(pairs, ()))
            except ValidationError as error:
                as_text = [path for path, _ in pairs if _wants_text(path, error)]
                if not as_text:
                    raise
            return type(self).model_validate(self._with(pairs, as_text))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ConfigError(f"{where}: {first['msg']} (got {first['input']!r})") from None

    def _with(self, pairs: Sequence[tuple[str, str]], as_text: Collection[str]) -> dict[str, Any]:
        """The values as a tree, with leaves replaced; those named in ``as_text`` are not read as JSON."""
        tree = self.model_dump()
        for path, text in pairs:
            _set_leaf(tree, self, path, text if path in as_text else parse_value(text))
        return tree

    def digest(self) -> str:
        """Stable hash of the values: 16 hex digits of SHA-256 over canonical JSON."""
        return digest(self.model_dump(mode="json"))


def digest(value: Any) -> str:
    """Stable 16-digit hash of any JSON-able value (dictionary order does not matter)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def parse_value(text: str) -> Any:
    """A value from the command line: JSON where possible, a whole number as 2e6 too, otherwise plain text."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # no JSON; or a number or nesting that Python refuses
        return text
    if isinstance(value, float) and value.is_integer() and any(mark in text for mark in "eE"):
        return int(value)  # 2e6 names a count; pydantic turns it back into a float where one is wanted
    return value


def _wants_text(path: str, error: ValidationError) -> bool:
    """Whether the value at ``path`` was refused because it is no text (a union's branch may follow in the place)."""
    keys = tuple(path.split("."))
    for found in error.errors():
        where, branch = found["loc"][: len(keys)], found["loc"][len(keys) :]
        of_value = not branch or (len(branch) == 1 and branch[0] == "str")
        if found["type"] == "string_type" and where == keys and of_value:
            return True
    return False


def _set_leaf(tree: dict[str, Any], config: Config, path: str, value: Any) -> None:
    keys = path.split(".")
    node: Any = tree
    for depth, key in enumerate(keys):
        if not isinstance(node, dict) or key not in node:
            known = sorted(node) if isinstance(node, dict) else []
            near = difflib.get_close_matches(key, known, n=1)
            where = ".".join(keys[:depth]) or type(config).__name__
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known) or 'none'}"
            raise ConfigError(f"unknown key {path!r}: {where} has no {key!r}{hint}")
        if depth == len(keys) - 1:
            if isinstance(node[key], dict) and not isinstance(value, dict):
                raise ConfigError(f"{path!r} is a group, not a value; its keys: {', '.join(sorted(node[key]))}")
            node[key] = value
        node = node[key]
