"""A conversation as stretches of text, each with its role, part and loss weight, for every template family.

This is the chat format itself, and it needs no tokenizer: the text of the pieces in order is the rendered text.
Structure that may become control tokens is marked; everything from outside is data. Not here: encoding and loss
weights token by token (``chat.py``), and checking conversations (``messages.py``).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from twofold.base.records import InputError, Message
from twofold.text.messages import Tools, TurnWeights
from twofold.text.past_calls import arguments_text
from twofold.text.plain import dump_json
from twofold.text.policy import ChatPolicy
from twofold.text.xml_form import XmlTools, call_text, tool_text

_CONTROLS = re.compile(r"(<\|im_start\|>|<\|im_end\|>|</?think>|</?tool_call>|</?tool_response>)")
_EMPTY_BLOCK = "<think>\n\n</think>\n\n"
_TOOLS_HEAD = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
_TOOLS_TAIL = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments "
    "within <tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)
SILENT = TurnWeights(0.0, 0.0, 0.0)


class Piece(NamedTuple):
    """A stretch of text with one role, part and weight; ``control`` marks a single control token of the template."""

    text: str
    role: str
    part: str
    weight: float = 0.0
    control: bool = False


def text_of(pieces: Sequence[Piece]) -> str:
    """The rendered text."""
    return "".join([piece.text for piece in pieces])


def check_fits(policy: ChatPolicy, messages: Sequence[Message], tools: Tools | None) -> None:
    """Raise InputError if the family has no place for something the conversation brings."""
    if policy.spec.tools:
        return
    if tools:
        raise InputError(f"tools: template family {policy.family!r} cannot show tools; leave them out", field="tools")
    for index, message in enumerate(messages):
        if message.tool_calls:
            raise InputError(
                f"messages[{index}].tool_calls: template family {policy.family!r} cannot show calls; "
                "write them into content, or choose another family",
                field=f"messages[{index}].tool_calls",
            )


def conversation(
    policy: ChatPolicy,
    messages: Sequence[Message],
    tools: Tools | None,
    weights: Sequence[TurnWeights],
    empty_weight: float,
) -> list[Piece]:
    """Every turn, as the template shows it.

    Args:
        policy, messages, tools: what is shown; ``messages`` have been checked.
        weights: one for each message (those of assistant turns count).
        empty_weight: loss weight of empty think blocks in turns whose reasoning has weight 1.
    """
    messages = [_trimmed(policy, message) for message in messages]
    pieces = _system_block(policy, messages, tools)
    query = _last_query(messages) if policy.spec.thinks else -1
    last = len(messages) - 1
    for index, message in enumerate(messages):
        if message.role == "assistant":
            pieces += _header("assistant", "assistant")
            pieces += _shown_turn(policy, message, index > query, index == last, weights[index], empty_weight)
            pieces.append(Piece("\n", "assistant", "header"))
        elif message.role == "tool" and policy.spec.tools:
            first = index == 0 or messages[index - 1].role != "tool"
            pieces += _tool_result(policy, message.content, first, index == last or messages[index + 1].role != "tool")
        elif message.role != "system" or index > 0:
            pieces += _header(message.role, message.role)
            pieces.append(Piece(message.content, message.role, "text"))
            pieces += _turn_end(message.role)
    return pieces


def generation_prompt(policy: ChatPolicy, thinking: bool, empty_weight: float = 0.0) -> list[Piece]:
    """The header of a new assistant turn, with what the family supplies of its think block.

    Raises:
        InputError: thinking is to be off in a family that always thinks, or is not a truth value.
    """
    if not isinstance(thinking, bool):
        raise InputError(f"thinking must be True or False, got {thinking!r}", field="thinking")
    pieces = list(_header("assistant", "assistant"))
    prompt = policy.spec.prompt
    if policy.spec.prompt == "open" and not thinking:
        message = "this model always thinks, so thinking cannot be off; use a hybrid or an instruct model"
        raise InputError(message, field="thinking")
    if policy.spec.opens and thinking:
        pieces += _template("<think>\n", "assistant", "reasoning")
    elif prompt == "closed" or (not thinking and policy.spec.switches):
        pieces += _template(_EMPTY_BLOCK, "assistant", "empty_think", empty_weight)
    return pieces


def view(
    policy: ChatPolicy,
    messages: Sequence[Message],
    tools: Tools | None,
    index: int,
    weights: TurnWeights,
    empty_weight: float,
    empty_trained: bool,
) -> tuple[list[Piece], list[Piece]]:
    """The prompt that a server would see before turn ``index``, and the turn as the model would write it.

    Raises:
        InputError: the turn has reasoning, which a prompt of this family leaves no room for.
    """
    message, spec = _trimmed(policy, messages[index]), policy.spec
    thought = (message.reasoning or "").strip("\n")
    if thought and spec.prompt in ("plain", "closed"):
        raise InputError(
            f"messages[{index}].reasoning: template family {policy.family!r} has no think block to train; "
            "leave the reasoning out, or choose the family 'hybrid' or 'thinking'"
        )
    prompt = conversation(policy, messages[:index], tools, [SILENT] * index, 0.0)
    writes_block = spec.prompt == "open" or (spec.switches and (empty_trained or bool(thought)))
    prompt += generation_prompt(policy, writes_block, empty_weight * weights.reasoning)
    reply = _think_block(policy, thought, weights.reasoning, empty_weight) if writes_block else []
    if spec.opens:
        reply = reply[2:]  # the prompt has the opening tag and its newline
    content = message.content.lstrip("\n") if spec.thinks else message.content
    return prompt, reply + _reply(policy, message, content, weights)


def tool_results(policy: ChatPolicy, results: Sequence[str]) -> list[Piece]:
    """Tool results as one user turn."""
    pieces: list[Piece] = []
    for index, result in enumerate(results):
        shown = result.strip() if policy.trims else result
        pieces += _tool_result(policy, shown, index == 0, index == len(results) - 1)
    return pieces


def _trimmed(policy: ChatPolicy, message: Message) -> Message:
    if not policy.trims:
        return message
    thought = message.reasoning
    return replace(message, content=message.content.strip(), reasoning=thought.strip() if thought else thought)


def _last_query(messages: Sequence[Message]) -> int:
    """Index of the last user turn that is not a wrapped tool result; the last index if there is none."""
    for index in range(len(messages) - 1, -1, -1):
        if messages[index].role == "user":
            content = messages[index].content
            if not (content.startswith("<tool_response>") and content.endswith("</tool_response>")):
                return index
    return len(messages) - 1


@lru_cache(maxsize=1024)
def _template(text: str, role: str, part: str, weight: float = 0.0) -> tuple[Piece, ...]:
    """Pieces of text the template itself writes: spellings of control tokens are control tokens."""
    split = [fragment for fragment in _CONTROLS.split(text) if fragment]
    return tuple(Piece(s, role, part, weight, _CONTROLS.fullmatch(s) is not None) for s in split)


def _header(name: str, role: str) -> tuple[Piece, ...]:
    return _template(f"<|im_start|>{name}\n", role, "header")


def _turn_end(role: str) -> tuple[Piece, ...]:
    return (Piece("<|im_end|>", role, "eot", 0.0, True), Piece("\n", role, "header"))


def _system_block(policy: ChatPolicy, messages: Sequence[Message], tools: Tools | None) -> list[Piece]:
    system = messages[0].content if messages and messages[0].role == "system" else policy.system
    if not tools and system is None:
        return []
    pieces = list(_header("system", "system"))
    if not tools:
        pieces.append(Piece(system or "", "system", "text"))
    elif policy.xml is not None:
        pieces += _xml_offer(policy.xml, system, tools)
    else:
        if system is not None:
            pieces.append(Piece(system, "system", "text"))
        gap = "\n\n" if system is not None else ""
        pieces += _template(gap + _TOOLS_HEAD, "system", "text")
        dumps = [dump_json(tool, f"tools[{index}]") for index, tool in enumerate(tools)]
        pieces.append(Piece("".join("\n" + dump for dump in dumps), "system", "text"))
        pieces += _template(_TOOLS_TAIL, "system", "text")
    pieces += _turn_end("system")
    return pieces


def _xml_offer(form: XmlTools, system: str | None, tools: Tools) -> list[Piece]:
    """System prompt and tools in the XML form; ``system`` is the chat's own prompt or the template's, if any."""
    shown = "".join([tool_text(tool, form, f"tools[{index}]") for index, tool in enumerate(tools)])
    head = form.head
    pieces: list[Piece] = []
    if form.system == "first":
        if system is None and not form.default_system:
            head = head.removeprefix("\n\n")
        pieces.append(Piece(form.default_system if system is None else system, "system", "text"))
    pieces += [*_template(head, "system", "text"), Piece(shown, "system", "text")]
    pieces += _template(form.tail, "system", "text")
    if form.system == "last" and system:
        pieces.append(Piece("\n\n" + system, "system", "text"))
    return pieces


def _shown_turn(
    policy: ChatPolicy, message: Message, after_query: bool, last: bool, weights: TurnWeights, empty_weight: float
) -> list[Piece]:
    """An assistant turn of a rendered conversation, after its header."""
    if not policy.spec.thinks:
        return _reply(policy, message, message.content, weights)
    keep = policy.history_thinking == "keep"
    if keep or (after_query and (last or policy.spec.every_block or bool(message.reasoning))):
        thought = (message.reasoning or "").strip("\n")
        block = _think_block(policy, thought, weights.reasoning, empty_weight)
        return block + _reply(policy, message, message.content.lstrip("\n"), weights)
    # Sampled, this turn would have had a block: trained like this it would teach what never happens.
    return _reply(policy, message, message.content, SILENT)


def _think_block(policy: ChatPolicy, thought: str, weight: float, empty_weight: float) -> list[Piece]:
    if not thought:
        if not policy.spec.opens:
            return list(_template(_EMPTY_BLOCK, "assistant", "empty_think", empty_weight * weight))
        head = _template("<think>\n", "assistant", "empty_think")
        return [*head, *_template("\n</think>\n\n", "assistant", "empty_think", empty_weight * weight)]
    if policy.spec.prompt == "closed":
        weight = 0.0  # no prompt of this family leaves room for a thought
    opening = 0.0 if policy.spec.opens else weight
    return [
        *_template("<think>\n", "assistant", "reasoning", opening),
        Piece(thought, "assistant", "reasoning", weight),
        *_template("\n</think>\n\n", "assistant", "reasoning", weight),
    ]


def _reply(policy: ChatPolicy, message: Message, content: str, weights: TurnWeights) -> list[Piece]:
    """Content, calls and ``<|im_end|>`` of an assistant turn."""
    form = policy.xml
    if form is not None and message.tool_calls:
        content = content.strip()
    pieces = [Piece(content, "assistant", "content", weights.content)]
    for number, call in enumerate(message.tool_calls):
        where = f"tool_calls[{number}]"
        if form is None:
            # The template asks whether the content is non-empty before it strips leading newlines from it.
            gap = "\n" if number or message.content else ""
            arguments = arguments_text(call, f"{where}.arguments")
            body = f'\n{{"name": "{call.name}", "arguments": {arguments}}}\n'
        else:
            gap = "\n" if number else form.gap if content else ""
            body = call_text(call, form, where)
        pieces += _template(gap + "<tool_call>", "assistant", "call", weights.calls)
        pieces.append(Piece(body, "assistant", "call", weights.calls))
        pieces += _template("</tool_call>", "assistant", "call", weights.calls)
    pieces.append(Piece("<|im_end|>", "assistant", "eot", weights.end(message), True))
    return pieces


def _tool_result(policy: ChatPolicy, content: str, first: bool, last: bool) -> list[Piece]:
    pieces = list(_template("<|im_start|>user", "tool", "header")) if first else []
    pieces += _template("\n<tool_response>\n", "tool", "header")
    pieces.append(Piece(content, "tool", "text"))
    end = policy.xml.result_end if last and policy.xml is not None else ""
    pieces += _template("\n</tool_response>" + end, "tool", "header")
    if last:
        pieces += _turn_end("tool")
    return pieces
