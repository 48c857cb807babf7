"""Short conversations that tell chat templates apart, and what a template makes of them.

Each differs from the others in one thing that templates treat in different ways. Not here: which family the renderings
belong to (``families.py``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from twofold.base.records import InputError

Template = Callable[..., str]

_GENERATION_TAGS = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")


@dataclass(frozen=True, slots=True)
class Probe:
    """A conversation in OpenAI's form, with or without a tool, and the template variables it is rendered with.

    core: a template that is to be chatted with must render it as the family does.
    """

    name: str
    rows: list[dict[str, Any]]
    tools: bool = False
    flags: dict[str, Any] = field(default_factory=dict)
    core: bool = False

    @property
    def calls(self) -> bool:
        """Some turn calls a tool."""
        return any("tool_calls" in row for row in self.rows)

    def bare(self) -> Probe:
        """The same without tools and calls."""
        rows = [{key: value for key, value in row.items() if key != "tool_calls"} for row in self.rows]
        return replace(self, rows=rows, tools=False)


SYSTEM = "Be brief."
CONTENT = "I add."
ARGUMENTS = {"a": 2, "text": "é\n ", "sure": True, "none": None, "items": [{"x": "y"}], "map": {}}
_S = {"role": "system", "content": SYSTEM}
_U = {"role": "user", "content": "What is 2 + 2?"}
_A = {"role": "assistant", "content": "Four."}
_THOUGHT = {"role": "assistant", "content": "Four.", "reasoning_content": "2 + 2 is 4."}
_INLINE = {"role": "assistant", "content": "<think>\n2 + 2 is 4.\n</think>\n\nFour."}
_CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
_RICH_CALL = {"type": "function", "function": {"name": "add", "arguments": ARGUMENTS}}
_CALLS = {"role": "assistant", "content": CONTENT, "tool_calls": [_CALL, _CALL]}
_BARE_CALL = {"role": "assistant", "content": "", "reasoning_content": "I add.", "tool_calls": [_CALL]}
_RESULT = {"role": "tool", "content": "4"}
_PARAMETERS = {
    "type": "object",
    "properties": {
        "a": {"type": "integer", "description": " first "},
        "b": {"type": ["integer", "null"], "enum": [1, 2], "default": None},
    },
    "required": ["a"],
}
TOOL = {"type": "function", "function": {"name": "add", "description": "a + b, é", "parameters": _PARAMETERS}}
_ASK = {"add_generation_prompt": True}
_ON, _OFF = {**_ASK, "enable_thinking": True}, {**_ASK, "enable_thinking": False}


def _spaced(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "content": f" {row['content']}\n"}


USER, PROMPT, ON, OFF, SPACED, OFFER, SYSTEM_OFFER, CALLS = (
    Probe("a user turn", [_U], core=True),
    Probe("a generation prompt", [_U], flags=_ASK, core=True),
    Probe("thinking switched on", [_U], flags=_ON),
    Probe("thinking switched off", [_U], flags=_OFF),
    Probe("white space around a user turn", [_spaced(_U)], flags=_ASK),
    Probe("a tool", [_U], True, _ASK),
    Probe("tools and a system turn", [_S, _U], True),
    Probe("tool calls and results", [_U, {**_CALLS, "tool_calls": [_RICH_CALL, _CALL]}, _RESULT, _RESULT, _A]),
)
PROBES = (
    USER,
    PROMPT,
    Probe("an answer in the past", [_U, _A, _U], flags=_ASK, core=True),
    Probe("a system turn", [_S, _U], flags=_ASK),
    ON,
    OFF,
    SPACED,
    Probe("white space around other turns", [_spaced(_S), _U, _spaced(_A), _U], flags=_ASK),
    Probe("an answer at the end", [_U, _A]),
    Probe("reasoning at the end", [_U, _THOUGHT]),
    Probe("inline reasoning at the end", [_U, _INLINE]),
    Probe("reasoning in the past", [_U, _THOUGHT, _U], flags=_ASK),
    Probe("inline reasoning in the past", [_U, _INLINE, _U]),
    Probe("two answers in a row", [_U, _A, _A]),
    Probe("a system turn in the middle", [_U, _A, _S, _U]),
    OFFER,
    SYSTEM_OFFER,
    CALLS,
    Probe("a call without tools on offer", [_U, _CALLS, _RESULT, _A]),
    Probe("tools, calls and results", [_U, _CALLS, _RESULT, _RESULT, _A], True),
    Probe("reasoning before a call", [_U, _BARE_CALL, _RESULT], True, _ASK),
    Probe("calls in the past", [_U, _CALLS, _RESULT, _A, _U], True),
)


def compile_template(template: str) -> Template:
    """A function from template variables to text, with the Jinja settings of Hugging Face, in a sandbox.

    Raises:
        InputError: the template is not Jinja.
    """
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    try:
        compiled = environment.from_string(_GENERATION_TAGS.sub("", template))
    except jinja2.TemplateError as error:
        raise InputError(f"the chat template is not valid Jinja ({error}); check chat_template.jinja") from None
    return compiled.render


def rendered(compiled: Template, probe: Probe, tokens: dict[str, str]) -> str | None:
    """What the template makes of a probe; None if it refuses it. ``tokens``: special tokens that it may name."""
    flags = {"add_generation_prompt": False, **tokens, **probe.flags}
    try:
        return compiled(messages=probe.rows, tools=[TOOL] if probe.tools else None, **flags)
    except Exception:  # whatever a foreign template trips over: it does not render this conversation
        return None


def _tojson(value: Any, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
