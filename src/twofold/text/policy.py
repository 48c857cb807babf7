"""What belongs to one checkpoint's chat format: its template family, its treatment of past thinking, its stop text.

A policy is written beside the chat template as ``chat_policy.json``, with the template and its hash, so that a
checkpoint served with another template than it was trained with is noticed. Not here: rendering (``chat.py``), and
working the family out from a foreign template (``families.py``).
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from twofold.base.files import read_json_object, write_json
from twofold.base.records import InputError
from twofold.text.xml_form import CODER, LATER, XmlTools

POLICY_FILE = "chat_policy.json"
STOP_TEXT = (
    "\n\nConsidering the limited time by the user, I have to give the solution based on the thinking directly now."
    "\n</think>\n\n"
)


@dataclass(frozen=True, slots=True)
class Family:
    """What distinguishes one family of templates; the rest of the format is common.

    thinks: assistant turns may hold a think block. prompt: what the generation prompt adds after the header:
    "plain" nothing, "switch" an empty block when thinking is off, "open" ``<think>``, "closed" always an empty block,
    "both" ``<think>``, or an empty block when thinking is off. tools: the template can show tools, calls and results.
    default_system: the system turn of chats without one. xml: calls have the XML form. trims: contents lose white
    space at their ends. every_block: all turns after the last query show a block, not only those with a thought.
    """

    thinks: bool
    prompt: Literal["plain", "switch", "open", "closed", "both"]
    tools: bool = True
    default_system: str | None = None
    xml: XmlTools | None = None
    trims: bool = False
    every_block: bool = False

    @property
    def switches(self) -> bool:
        """The prompt can turn thinking on and off."""
        return self.prompt in ("switch", "both")

    @property
    def opens(self) -> bool:
        """The opening tag of a thought stands in the prompt; the model never writes it."""
        return self.prompt in ("open", "both")


FAMILIES: dict[str, Family] = {
    "hybrid": Family(True, "switch"),  # Qwen3, April 2025
    "thinking": Family(True, "open"),  # Qwen3-Thinking-2507
    "nonthinking": Family(True, "closed"),  # the documentation's qwen3_nonthinking.jinja
    "qwen2.5": Family(
        False, "plain", default_system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    ),
    "instruct": Family(False, "plain"),  # Qwen3-Instruct-2507
    "chatml": Family(False, "plain", tools=False),  # Qwen1.5, SmolLM2 and other plain ChatML
    "coder": Family(False, "plain", xml=CODER),  # Qwen3-Coder
    "qwen3.5": Family(True, "both", xml=LATER, trims=True, every_block=True),
    "qwen3.6": Family(True, "both", xml=replace(LATER, spelling="json"), trims=True, every_block=True),
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
    trim_content: contents lose white space at their ends; None takes the family's.
    xml_tools: how tools and calls are written in the XML form; None takes the family's form, which may be JSON.
    """

    history_thinking: Literal["strip", "keep"] = "strip"
    empty_think_weight: float = 0.0
    stop_text: str = STOP_TEXT
    family: str = "hybrid"
    default_system: str | None = None
    trim_content: bool | None = None
    xml_tools: XmlTools | None = None

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
        if not isinstance(self.trim_content, bool | None):
            raise InputError(f"trim_content must be true, false or None, got {self.trim_content!r:.40}")
        if not isinstance(self.xml_tools, XmlTools | None):
            raise InputError(f"xml_tools must be XmlTools or None, got {type(self.xml_tools).__name__}")
        if self.xml_tools is not None and not self.spec.tools:
            raise InputError(f"family {self.family!r} cannot show tools; leave xml_tools out or use family='coder'")

    @property
    def spec(self) -> Family:
        """The family's description."""
        return FAMILIES[self.family]

    @property
    def system(self) -> str | None:
        """System turn of chats that bring none, or None."""
        return self.spec.default_system if self.default_system is None else self.default_system

    @property
    def trims(self) -> bool:
        """Contents and thoughts lose white space at their ends."""
        return self.spec.trims if self.trim_content is None else self.trim_content

    @property
    def xml(self) -> XmlTools | None:
        """The XML form of tools and calls; None where they are JSON."""
        return self.spec.xml if self.xml_tools is None else self.xml_tools

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
        if self.spec.prompt == "both":
            settings["opens_thought"] = True
        if self.spec.every_block:
            settings["every_block"] = True
        if self.trims:
            settings["trims"] = True
        if self.system is not None:
            settings["default_system"] = self.system
        if self.xml is not None:
            settings["xml"] = asdict(self.xml)
        parts = [
            "".join(
                f"{{%- set {name} = {json.dumps(value, ensure_ascii=False)} -%}}\n" for name, value in settings.items()
            )
        ]
        if self.trims:
            parts.append(_template("trim"))
        if not self.spec.tools:
            return "".join([*parts, _template("chatml")])
        form = "json" if self.xml is None else "xml"
        parts += [_template("start"), _template(f"{form}_calls"), _template("system"), _template(f"{form}_tools")]
        return "".join([*parts, _template("thinking" if self.spec.thinks else "instruct")])


def by_name(family: str | None) -> ChatPolicy | None:
    """The policy of a family that was chosen by hand; None where none was.

    Raises:
        InputError: no such family; lists them.
    """
    return ChatPolicy(family=family) if family else None


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
        if values.get("xml_tools") is not None:
            values["xml_tools"] = XmlTools(**values["xml_tools"])
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
