"""The XML form of Qwen3-Coder and its successors, as it is written: tools on offer and calls.

A call is ``<function=NAME>`` with one ``<parameter=KEY>`` element for each argument; values have no types. Templates
differ in the words of the offer, in how it describes a tool and in how a value is spelled: ``XmlTools`` says how. Not
here: reading such calls (``xml_calls.py``), their place in a conversation (``pieces.py``), and finding the form of a
foreign template (``families.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from twofold.base.records import InputError, ToolCall
from twofold.text.plain import dump_json

Schemas = Literal["json", "xml"]
Spelling = Literal["json", "scalars", "text"]
SCHEMAS: tuple[Schemas, ...] = ("json", "xml")
SPELLINGS: tuple[Spelling, ...] = ("scalars", "json", "text")
_CHOICES: dict[str, tuple[str, ...]] = {
    "schemas": SCHEMAS,
    "system": ("first", "last"),
    "spelling": SPELLINGS,
    "gap": ("\n\n", "\n", ""),
    "result_end": ("", "\n"),
}
_RULES = (
    "\n\nIf you choose to call a function ONLY reply in the following format with NO suffix:\n\n<tool_call>\n"
    "<function=example_function_name>\n<parameter=example_parameter_1>\nvalue_1\n</parameter>\n"
    "<parameter=example_parameter_2>\nThis is the value for the second parameter\nthat can span\nmultiple lines\n"
    "</parameter>\n</function>\n</tool_call>\n\n<IMPORTANT>\nReminder:\n- Function calls MUST follow the specified "
    "format: an inner <function=...></function> block must be nested within <tool_call></tool_call> XML tags\n"
    "- Required parameters MUST be specified\n- You may provide optional reasoning for your function call in natural "
    "language BEFORE the function call, but NOT after\n- If there is no function call available, answer the question "
    "like normal with your current knowledge and do not tell the user about function calls\n</IMPORTANT>"
)
_HEAD = "# Tools\n\nYou have access to the following functions:\n\n<tools>"


@dataclass(frozen=True, slots=True)
class XmlTools:
    """How one template writes tools and calls in the XML form.

    head, tail: the text before the first tool and after the last. schemas: a tool is one line of JSON, or XML elements.
    system: whether the system prompt stands before the tools or after them; default_system: the system prompt of chats
    that have tools and no prompt of their own. spelling: what is no string is spelled as JSON; only lists and objects
    are ("scalars": ``True``, ``None``); or nothing is ("text"). gap: between content and the first call.
    result_end: between the last result and the end of its turn.
    """

    head: str
    tail: str
    schemas: Schemas = "json"
    system: Literal["first", "last"] = "last"
    default_system: str = ""
    spelling: Spelling = "scalars"
    gap: str = "\n\n"
    result_end: str = ""

    def __post_init__(self) -> None:
        for name in ("head", "tail", "default_system"):
            if not isinstance(getattr(self, name), str):
                raise InputError(f"xml_tools.{name} must be a string, got {type(getattr(self, name)).__name__}")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise InputError(f"xml_tools.{name} is {getattr(self, name)!r}; use one of {choices}")


CODER = XmlTools(
    "\n\n" + _HEAD,
    "\n</tools>" + _RULES,
    schemas="xml",
    system="first",
    default_system="You are Qwen, a helpful AI assistant that can interact with a computer to solve tasks.",
    result_end="\n",
)  # Qwen3-Coder
LATER = XmlTools(_HEAD, "\n</tools>" + _RULES)  # Qwen3.5; Qwen3.6 spells all values as JSON


def tool_text(tool: Mapping[str, Any], form: XmlTools, where: str) -> str:
    """One tool on offer, after its newline.

    Raises:
        InputError: the tool is not JSON; ``where`` names it.
    """
    if form.schemas == "json":
        return "\n" + dump_json(tool, where)
    function = tool["function"] if isinstance(tool.get("function"), Mapping) else tool
    lines = ["<function>", f"<name>{function.get('name', '')}</name>"]
    if "description" in function:
        lines.append(f"<description>{str(function['description']).strip()}</description>")
    lines.append("<parameters>")
    parameters = function.get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
    for name, field in (properties if isinstance(properties, Mapping) else {}).items():
        lines += ["<parameter>", f"<name>{name}</name>"]
        known = field if isinstance(field, Mapping) else {}
        if "type" in known:
            lines.append(f"<type>{known['type']}</type>")
        if "description" in known:
            lines.append(f"<description>{str(known['description']).strip()}</description>")
        lines += [*_elements(known, ("name", "type", "description"), where), "</parameter>"]
    lines += [*_elements(parameters, ("type", "properties"), where), "</parameters>"]
    lines += [*_elements(function, ("type", "name", "description", "parameters"), where), "</function>"]
    return "".join("\n" + line for line in lines)


def call_text(call: ToolCall, form: XmlTools, where: str) -> str:
    """One call between its tags.

    Raises:
        InputError: an argument is not JSON; ``where`` names the call.
    """
    if call.raw:  # a call that was cut off or damaged comes back as it was written
        return f"\n<function={call.name}>\n{call.raw}\n</function>\n"
    values = {key: _value(value, form.spelling, f"{where}.arguments") for key, value in call.arguments.items()}
    body = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    return f"\n<function={call.name}>\n{body}</function>\n"


def _elements(values: Any, written: tuple[str, ...], where: str) -> list[str]:
    """What a schema says beyond the elements already written; containers as JSON."""
    rest = values.items() if isinstance(values, Mapping) else ()
    return [f"<{key}>{_value(value, 'scalars', where)}</{key}>" for key, value in rest if key not in written]


def _value(value: Any, spelled: Spelling, where: str) -> str:
    if isinstance(value, str):
        return value
    as_json = spelled == "json" or (spelled == "scalars" and isinstance(value, Mapping | list | tuple))
    return dump_json(value, where) if as_json else str(value)
