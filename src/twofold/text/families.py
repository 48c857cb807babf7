"""Which template family a foreign chat template belongs to, found by rendering probes, not by reading its text.

Official templates exist in several revisions, and fine-tunes re-wrap them; what counts is what they render. A
template that renders every probe as one of our families does is that family; any other is refused, with the nearest
family and where it differs. Not here: the families themselves (``policy.py``, ``pieces.py``).
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from twofold.base.records import InputError
from twofold.text.messages import messages_from_openai, turn_weights
from twofold.text.pieces import conversation, generation_prompt, text_of
from twofold.text.policy import FAMILIES, ChatPolicy

Template = Callable[..., str]

_GENERATION_TAGS = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")


class _Probe(NamedTuple):
    name: str
    rows: list[dict[str, Any]]
    tools: bool = False
    flags: dict[str, Any] | None = None


_S = {"role": "system", "content": " Be brief.\n"}  # white space shows a template that trims
_U = {"role": "user", "content": " What is 2 + 2?\n"}
_A = {"role": "assistant", "content": "Four."}
_THOUGHT = {"role": "assistant", "content": "Four.", "reasoning_content": "2 + 2 is 4."}
_INLINE = {"role": "assistant", "content": "<think>\n2 + 2 is 4.\n</think>\n\nFour."}
_CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
_CALLS = {"role": "assistant", "content": "I add.", "tool_calls": [_CALL, _CALL]}
_BARE_CALL = {"role": "assistant", "content": "", "reasoning_content": "I add.", "tool_calls": [_CALL]}
_RESULT = {"role": "tool", "content": "4"}
_TOOL = {"type": "function", "function": {"name": "add", "description": "a + b, é", "parameters": {"type": "object"}}}
_ASK = {"add_generation_prompt": True}
_PROBES = (
    _Probe("a user turn", [_U]),
    _Probe("a generation prompt", [_U], flags=_ASK),
    _Probe("a system turn", [_S, _U], flags=_ASK),
    _Probe("thinking switched off", [_U], flags={**_ASK, "enable_thinking": False}),
    _Probe("an answer in the past", [_S, _U, _A, _U], flags=_ASK),
    _Probe("an answer at the end", [_U, _A]),
    _Probe("reasoning at the end", [_U, _THOUGHT]),
    _Probe("inline reasoning at the end", [_U, _INLINE]),
    _Probe("reasoning in the past", [_U, _THOUGHT, _U], flags=_ASK),
    _Probe("inline reasoning in the past", [_U, _INLINE, _U]),
    _Probe("two answers in a row", [_U, _A, _A]),
    _Probe("a system turn in the middle", [_U, _A, _S, _U]),
    _Probe("a tool", [_U], True, _ASK),
    _Probe("tools and a system turn", [_S, _U], True),
    _Probe("tool calls and results", [_U, _CALLS, _RESULT, _RESULT, _A], True),
    _Probe("reasoning before a call", [_U, _BARE_CALL, _RESULT], True, _ASK),
    _Probe("calls in the past", [_U, _CALLS, _RESULT, _A, _U], True),
)


def recognise(template: str, bos: str | None = None) -> ChatPolicy:
    """The policy under which our renderer writes what the template renders.

    Args:
        template: its text. bos: the token that templates know as ``bos_token``; no family of ours writes one.

    Raises:
        InputError: the template cannot be read, or is none of our families; says how to choose one by hand.
    """
    compiled = compile_template(template)
    tokens = {} if bos is None else {"bos_token": bos}
    wanted = {probe.name: _render(compiled, probe, tokens) for probe in _PROBES}
    default = _default_system(wanted["a user turn"])
    nearest, fewest, where = "", len(_PROBES) + 1, ""
    for policy in _candidates(default):
        differing = [probe.name for probe in _PROBES if _shown(policy, probe) not in (None, wanted[probe.name])]
        if not differing:
            return policy
        if len(differing) < fewest:
            nearest, fewest, where = policy.family, len(differing), differing[0]
    raise InputError(
        f"the chat template is none of the families {', '.join(FAMILIES)} (nearest: {nearest}, differs at {where}); "
        f"to use one all the same, give Renderer(tokenizer, ChatPolicy(family={nearest!r}))"
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


def template_difference(trained: str, found: str) -> str:
    """Unified diff from the template a checkpoint was trained with to the one found beside it; empty if equal."""
    lines = difflib.unified_diff(
        trained.splitlines(), found.splitlines(), "trained with", "found in the folder", lineterm=""
    )
    return "\n".join(lines)


def _candidates(default_system: str | None) -> Iterator[ChatPolicy]:
    for name, spec in FAMILIES.items():
        if default_system != spec.default_system and default_system is None:
            continue  # the template has no default system turn, the family has
        given = None if default_system == spec.default_system else default_system
        yield ChatPolicy(family=name, default_system=given)
        if spec.thinks:
            yield ChatPolicy(family=name, default_system=given, history_thinking="keep")


def _default_system(text: str | None) -> str | None:
    head, tail = "<|im_start|>system\n", "<|im_end|>\n<|im_start|>user\n"
    if text is None or not text.startswith(head) or tail not in text:
        return None
    return text[len(head) : text.index(tail)]


def _render(compiled: Template, probe: _Probe, tokens: dict[str, str]) -> str | None:
    """What the template makes of a probe; None if it refuses it."""
    flags = {"add_generation_prompt": False, **tokens, **(probe.flags or {})}
    try:
        return compiled(messages=probe.rows, tools=[_TOOL] if probe.tools else None, **flags)
    except Exception:  # whatever a foreign template trips over: it does not render this conversation
        return None


def _shown(policy: ChatPolicy, probe: _Probe) -> str | None:
    """What our renderer makes of a probe; None if the family has no place for it."""
    if probe.tools and not policy.spec.tools:
        return None
    messages = messages_from_openai(probe.rows, inline_thinking=policy.spec.thinks)
    weights = turn_weights(messages, None)
    pieces = conversation(policy, messages, [_TOOL] if probe.tools else None, weights, 0.0)
    flags = probe.flags or {}
    if flags.get("add_generation_prompt"):
        off = flags.get("enable_thinking") is False and policy.spec.prompt == "switch"
        pieces += generation_prompt(policy, not off)
    return text_of(pieces)


def _tojson(value: Any, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
