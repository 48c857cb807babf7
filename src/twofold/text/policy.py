"""What belongs to one checkpoint's chat format: its template family, its treatment of past thinking, its stop text.

A policy is written beside the chat template as ``chat_policy.json``, with the template and its hash, so that a
checkpoint served with another template than it was trained with is noticed. Not here: rendering (``chat.py``), and
working the family out from a foreign template (``families.py``).
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from twofold.base.files import read_json_object, write_json
from twofold.base.records import InputError

POLICY_FILE = "chat_policy.json"
STOP_TEXT = (
    "\n\nConsidering the limited time by the user, I have to give the solution based on the thinking directly now."
    "\n</think>\n\n"
)


@dataclass(frozen=True, slots=True)
class Family:
    """What distinguishes one family of templates; the rest of the format is common.

    thinks: assistant turns may hold a think block. prompt: what the generation prompt adds after the header:
    "plain" nothing, "switch" an empty block when thinking is off, "open" ``<think>``, "closed" always an empty block.
    tools: the template can show tools, calls and results. default_system: the system turn of chats without one.
    """

    thinks: bool
    prompt: Literal["plain", "switch", "open", "closed"]
    tools: bool = True
    default_system: str | None = None


FAMILIES: dict[str, Family] = {
    "hybrid": Family(True, "switch"),  # Qwen3, April 2025
    "thinking": Family(True, "open"),  # Qwen3-Thinking-2507
    "nonthinking": Family(True, "closed"),  # the documentation's qwen3_nonthinking.jinja
    "qwen2.5": Family(
        False, "plain", default_system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    ),
    "instruct": Family(False, "plain"),  # Qwen3-Instruct-2507
    "chatml": Family(False, "plain", tools=False),  # Qwen1.5, SmolLM2 and other plain ChatML
}


@dataclass(frozen=True, slots=True)
class ChatPolicy:
    """How one model's chats are written; it belongs to the checkpoint.

    history_thinking: "strip" removes thinking from turns before the last real user query (the official rule);
        "keep" writes a think block, empty if need be, in every assistant turn, so conversations only grow.
    empty_think_weight: loss weight of an empty think block that the template supplies.
    stop_text: what is forced when the thinking budget runs out; it must close the think block.
    family: a key of ``FAMILIES``.
    default_system: system turn of chats without one; None takes the family's.
    """

    history_thinking: Literal["strip", "keep"] = "strip"
    empty_think_weight: float = 0.0
    stop_text: str = STOP_TEXT
    family: str = "hybrid"
    default_system: str | None = None

    def __post_init__(self) -> None:
        if self.history_thinking not in ("strip", "keep"):
            raise InputError(f"history_thinking is {self.history_thinking!r}; use 'strip' or 'keep'")
        weight = self.empty_think_weight
        if not isinstance(weight, int | float) or not 0 <= weight < math.inf:
            raise InputError(f"empty_think_weight must be a number >= 0, got {weight!r}")
        if not isinstance(self.stop_text, str) or self.stop_text.count("</think>") != 1:
            raise InputError("stop_text must contain </think> exactly once, or the answer would never begin")
        if self.family not in FAMILIES:
            raise InputError(f"family is {self.family!r}; use one of {', '.join(FAMILIES)}")
        if self.history_thinking == "keep" and not self.spec.thinks:
            raise InputError(f"family {self.family!r} has no think blocks to keep; use history_thinking='strip'")
        if not isinstance(self.default_system, str | None):
            raise InputError(f"default_system must be a string or None, got {type(self.default_system).__name__}")

    @property
    def spec(self) -> Family:
        """The family's description."""
        return FAMILIES[self.family]

    @property
    def system(self) -> str | None:
        """System turn of chats that bring none, or None."""
        return self.spec.default_system if self.default_system is None else self.default_system

    @property
    def template(self) -> str:
        """The Jinja template that renders the same text, in a restricted Jinja that calls no methods of strings."""
        settings: dict[str, Any] = {}
        if self.history_thinking == "keep":
            settings["preserve_thinking"] = True
        if self.spec.prompt == "open":
            settings["thinking_only"] = True
        if self.spec.prompt == "closed":
            settings["enable_thinking"] = False
        if self.system is not None:
            settings["default_system"] = self.system
        head = "".join(
            f"{{%- set {name} = {json.dumps(value, ensure_ascii=False)} -%}}\n" for name, value in settings.items()
        )
        if not self.spec.tools:
            return head + _template("chatml")
        return head + _template("start") + _template("thinking" if self.spec.thinks else "instruct")


def template_hash(template: str) -> str:
    """SHA-256 of a template's UTF-8 text, as 64 hex digits."""
    return hashlib.sha256(template.encode()).hexdigest()


def write_chat_policy(folder: Path, policy: ChatPolicy, template: str | None = None) -> None:
    """Write ``chat_policy.json``: the policy, the template the checkpoint is trained with and its hash.

    Args:
        folder: the model folder.
        policy: what the renderer followed.
        template: text of the ``chat_template.jinja`` beside it; None means the policy's own.
    """
    text = policy.template if template is None else template
    write_json(Path(folder) / POLICY_FILE, {**asdict(policy), "template_sha256": template_hash(text), "template": text})


def read_chat_policy(folder: Path) -> tuple[ChatPolicy, str] | None:
    """The policy of a folder and the template it was trained with; None if the folder has no ``chat_policy.json``.

    Raises:
        InputError: the file is damaged, has unknown keys, or its template does not have the hash it states.
    """
    path = Path(folder) / POLICY_FILE
    if not path.is_file():
        return None
    values = read_json_object(path, "is not a chat policy ({}); save the checkpoint again")
    try:
        template, stated = values.pop("template"), values.pop("template_sha256")
        policy = ChatPolicy(**values)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is not a chat policy ({error}); save the checkpoint again") from None
    if not isinstance(template, str) or template_hash(template) != stated:
        raise InputError(f"{path}: template does not have the hash template_sha256; save the checkpoint again")
    return policy, template


def _template(name: str) -> str:
    return resources.files("twofold.text").joinpath(f"template_{name}.jinja").read_text(encoding="utf-8")
