"""Thinking controls: every spelling that clients use, read into one typed field.

``SPELLINGS`` is the whole list. Two spellings that say different things are an error, and so is a control that cannot
do anything (a budget with thinking off). Not here: how a budget is enforced (``engine``), what a mode looks like
(``text``), and ``/think`` or ``/no_think`` inside messages, which are text that the model follows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from twofold.serve.errors import bad_request

# Share of max_tokens that may be spent on thinking, by level of effort, as OpenRouter documents it.
EFFORTS: dict[str, float] = {"minimal": 0.1, "low": 0.2, "medium": 0.5, "high": 0.8, "xhigh": 0.95}

Facts = dict[str, Any]
"""What one spelling says: some of the fields of ``Thinking``."""


@dataclass(frozen=True, slots=True)
class Thinking:
    """What a request wants of the think block.

    enabled: True or False as the hard switch, None leaves it to the model. budget: most thinking tokens. share: the
    same as a part of max_tokens. hidden: think, but leave the thoughts out of the reply. keep_history: show the
    thoughts of earlier turns to the model (None: as the checkpoint's policy says).
    """

    enabled: bool | None = None
    budget: int | None = None
    share: float | None = None
    hidden: bool = False
    keep_history: bool | None = None

    def tokens(self, max_tokens: int) -> int | None:
        """The budget in tokens for a reply of at most ``max_tokens``; None is no limit."""
        return self.budget if self.share is None else max(1, int(self.share * max_tokens))


@dataclass(frozen=True, slots=True)
class Spelling:
    """One way to say something: where it stands in the request, how it is read, and who uses it."""

    path: str
    read: Callable[[str, Any], Facts]
    users: str


def _switch(path: str, value: Any) -> Facts:
    return {"enabled": _boolean(path, value)}


def _shown(path: str, value: Any) -> Facts:
    return {"hidden": not _boolean(path, value)}


def _hidden(path: str, value: Any) -> Facts:
    return {"hidden": _boolean(path, value)}


def _history(path: str, value: Any) -> Facts:
    return {"keep_history": _boolean(path, value)}


def _budget(path: str, value: Any) -> Facts:
    if isinstance(value, bool) or not isinstance(value, int) or value < -1:
        raise bad_request(f"{path} is {value!r:.40}; give a number of tokens >= 0, or -1 for no limit", path)
    return {} if value == -1 else {"budget": value}


def _effort(path: str, value: Any) -> Facts:
    if value == "none":
        return {"enabled": False}
    if not isinstance(value, str) or value not in EFFORTS:
        raise bad_request(f"{path} is {value!r:.40}; use none, {', '.join(EFFORTS)}", path)
    return {"enabled": True, "share": EFFORTS[value]}


def _switch_or_effort(path: str, value: Any) -> Facts:
    return _effort(path, value) if isinstance(value, str) else _switch(path, value)


def _kind(path: str, value: Any) -> Facts:
    kinds: dict[str, Facts] = {"enabled": {"enabled": True}, "disabled": {"enabled": False}, "adaptive": {}, "auto": {}}
    if not isinstance(value, str) or value not in kinds:
        raise bad_request(f"{path} is {value!r:.40}; use one of {', '.join(kinds)}", path)
    return kinds[value]


SPELLINGS: tuple[Spelling, ...] = (
    Spelling("enable_thinking", _switch, "DashScope, SiliconFlow"),
    Spelling("chat_template_kwargs.enable_thinking", _switch, "vLLM, SGLang, llama.cpp with Qwen3's template"),
    Spelling("chat_template_kwargs.thinking", _switch, "vLLM with DeepSeek's template"),
    Spelling("open_thinking", _switch, "MiniMind"),
    Spelling("think", _switch_or_effort, "Ollama"),
    Spelling("thinking", _switch, "short form"),
    Spelling("thinking.type", _kind, "Anthropic, DeepSeek, GLM"),
    Spelling("thinking.budget_tokens", _budget, "Anthropic"),
    Spelling("thinking_budget", _budget, "DashScope"),
    Spelling("thinking_token_budget", _budget, "vLLM"),
    Spelling("thinking_budget_tokens", _budget, "llama.cpp"),
    Spelling("reasoning_budget", _budget, "llama.cpp"),
    Spelling("chat_template_kwargs.thinking_budget", _budget, "templates with a budget"),
    Spelling("reasoning_effort", _effort, "OpenAI"),
    Spelling("chat_template_kwargs.reasoning_effort", _effort, "Qwen3.8 and gpt-oss templates"),
    Spelling("reasoning.effort", _effort, "OpenRouter"),
    Spelling("reasoning.max_tokens", _budget, "OpenRouter"),
    Spelling("reasoning.enabled", _switch, "OpenRouter"),
    Spelling("reasoning.exclude", _hidden, "OpenRouter"),
    Spelling("include_reasoning", _shown, "OpenRouter, vLLM"),
    Spelling("preserve_thinking", _history, "short form"),
    Spelling("chat_template_kwargs.preserve_thinking", _history, "Qwen3.6 and later templates"),
)
ROOTS = frozenset(spelling.path.split(".")[0] for spelling in SPELLINGS)
_LEAVES = {spelling.path: spelling for spelling in SPELLINGS}


def read_thinking(given: Mapping[str, Any]) -> Thinking:
    """The one meaning of all thinking controls in a request.

    Args:
        given: fields of the request under the names in ``ROOTS``; null counts as absent.

    Raises:
        ApiError: 400 for a value that a spelling does not take, an unknown key inside an object, and for controls
            that contradict each other; both are named.
    """
    said: dict[str, tuple[Any, str]] = {}
    for path, value in _flat(given):
        for name, fact in _LEAVES[path].read(path, value).items():
            known, earlier = said.setdefault(name, (fact, path))
            if known != fact:
                raise _conflict(f"{earlier} and {path} say different things about thinking", path)
    _check_sense(said)
    return Thinking(**{name: fact for name, (fact, _) in said.items()})


def about_thoughts(given: Mapping[str, Any]) -> list[str]:
    """The controls in a request that say whether thoughts are shown, to the reader or to the model."""
    return [path for path, _ in _flat(given) if _LEAVES[path].read in (_shown, _hidden, _history)]


def places(given: Mapping[str, Any]) -> dict[str, str]:
    """Which control of a request says what lower layers call ``thinking`` and ``thinking_budget``."""
    fields = {"enabled": "thinking", "budget": "thinking_budget", "share": "thinking_budget"}
    found: dict[str, str] = {}
    for path, value in _flat(given):
        for name in _LEAVES[path].read(path, value):
            if name in fields:
                found.setdefault(fields[name], path)
    return found


def _flat(given: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """(path, value) of every control, objects taken apart."""
    pairs: list[tuple[str, Any]] = []
    for name, value in given.items():
        if value is None:
            continue
        if isinstance(value, Mapping):
            leaves = [path for path in _LEAVES if path.startswith(name + ".")]
            for key, inner in value.items():
                path = f"{name}.{key}"
                if path not in leaves:
                    known = ", ".join(leaf.removeprefix(name + ".") for leaf in leaves)
                    raise bad_request(f"{path} is not supported; {name} takes {known or 'no object'}", path)
                if inner is not None:
                    pairs.append((path, inner))
        elif name in _LEAVES:
            pairs.append((name, value))
        else:
            raise bad_request(f"{name} must be an object, got {value!r:.40}", name)
    return pairs


def _check_sense(said: Mapping[str, tuple[Any, str]]) -> None:
    """Refuse combinations of which one part would have no effect."""
    enabled, switch = said.get("enabled", (None, ""))
    for name in ("budget", "share"):
        if name in said and enabled is False and said[name][0] != 0:
            raise _conflict(f"{said[name][1]} has no effect because {switch} turns thinking off", said[name][1])
    if "budget" in said and "share" in said:
        raise _conflict(f"{said['budget'][1]} and {said['share'][1]} both limit thinking", said["share"][1])


def _conflict(what: str, path: str) -> Exception:
    return bad_request(f"{what}; keep one of them", path, "conflicting_controls")


def _boolean(path: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise bad_request(f"{path} is {value!r:.40}; use true or false", path)
    return value
