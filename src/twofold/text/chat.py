"""The one renderer: messages to token ids, per-token loss weights and labels, in the Qwen3 chat format.

Training, rollouts, evaluation and serving all render here, and the text equals the official hybrid template.
Structure is written by the renderer and may be control tokens; everything that came from outside is data and
cannot forge structure. Not here: reading what a model sampled (``parse.py``), reading chat files (``messages.py``).
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, Literal

from twofold.base.records import InputError, Message
from twofold.text.messages import (
    dump_json,
    last_flag,
    messages_from_openai,
    messages_to_openai,
    validate_messages,
    validate_tools,
)
from twofold.text.tokenizer import Tokenizer

__all__ = [
    "CHAT_TEMPLATE",
    "ChatPolicy",
    "Rendered",
    "Renderer",
    "last_flag",
    "messages_from_openai",
    "messages_to_openai",
]

CHAT_TEMPLATE: str = resources.files("twofold.text").joinpath("chat_template.jinja").read_text(encoding="utf-8")

STOP_TEXT = (
    "\n\nConsidering the limited time by the user, I have to give the solution based on the thinking directly now."
    "\n</think>\n\n"
)

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

Tools = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class ChatPolicy:
    """How one model treats thinking; it belongs to the checkpoint.

    history_thinking: "strip" removes thinking from turns before the last real user query (the official rule);
        "keep" writes a think block, empty if need be, in every assistant turn, so conversations only grow.
    empty_think_weight: loss weight of an empty think block that the template supplies.
    stop_text: what is forced when the thinking budget runs out; it must close the think block.
    """

    history_thinking: Literal["strip", "keep"] = "strip"
    empty_think_weight: float = 0.0
    stop_text: str = STOP_TEXT

    def __post_init__(self) -> None:
        if self.history_thinking not in ("strip", "keep"):
            raise InputError(f"history_thinking is {self.history_thinking!r}; use 'strip' or 'keep'")
        if self.empty_think_weight < 0:
            raise InputError(f"empty_think_weight must be >= 0, got {self.empty_think_weight}")
        if self.stop_text.count("</think>") != 1:
            raise InputError("stop_text must contain </think> exactly once, or the answer would never begin")


@dataclass(slots=True)
class Rendered:
    """A rendered conversation; the four lists run in step, one entry a token.

    weights: loss weight of predicting the token. roles: whose turn ("system", "user", "assistant", "tool").
    parts: "header" (role names, newlines between turns), "reasoning", "empty_think", "content", "call", "eot"
    (``<|im_end|>``), "text" (system, user and tool content). ``text`` is the whole string that was encoded.
    """

    token_ids: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    roles: list[str] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)
    text: str = ""


@dataclass(frozen=True, slots=True)
class _Piece:
    """A stretch of text with one role, part and weight; ``control`` marks a single control token of the template."""

    text: str
    role: str
    part: str
    weight: float = 0.0
    control: bool = False


class Renderer:
    """Messages to tokens for one tokenizer and one policy."""

    def __init__(self, tokenizer: Tokenizer, policy: ChatPolicy | None = None) -> None:
        """Raises InputError when the tokenizer has no chat tokens."""
        for token in ("<|im_start|>", "<|im_end|>"):
            if tokenizer.control_id(token) is None:
                raise InputError(f"the tokenizer has no control token {token}; chats need a Qwen-style tokenizer")
        self.tokenizer = tokenizer
        self.policy = policy or ChatPolicy()

    def render(
        self,
        messages: Sequence[Message],
        tools: Tools | None = None,
        *,
        thinking: bool = True,
        add_generation_prompt: bool = False,
        empty_think_trained: bool = False,
    ) -> Rendered:
        """Render a whole conversation once, as the official template does.

        Weight 1 goes to what the assistant writes in turns that carry a think block: thinking with its tags,
        content, calls and one ``<|im_end|>``. Turns rendered without a block (stripped history) never look like
        that when they are sampled, so they have weight 0; train those through ``views``. An empty block counts
        as supplied by the template (weight ``policy.empty_think_weight``) unless ``empty_think_trained``.

        Args:
            messages: the conversation; reasoning and content are data, whatever they spell.
            tools: JSON-able tool descriptions, dumped as given.
            thinking: False appends the closed empty think block to the generation prompt (the hard switch).
            add_generation_prompt: end with the header of a new assistant turn.
            empty_think_trained: the model itself is to write empty blocks (``/no_think`` training).

        Raises:
            InputError: naming the message index and field, or the tool.
        """
        validate_messages(messages)
        validate_tools(tools)
        pieces = self._conversation(messages, tools, self._empty_weight(empty_think_trained))
        if add_generation_prompt:
            pieces += self._generation_prompt(thinking)
        return self._encode(pieces)

    def views(
        self, messages: Sequence[Message], tools: Tools | None = None, *, empty_think_trained: bool = False
    ) -> list[Rendered]:
        """One training example per assistant turn: the prompt as it will be served, then the turn.

        The prompt part equals ``prompt_ids(messages before the turn)`` and has weight 0; each view ends with
        ``<|im_end|>``. A turn without reasoning is a non-thinking sample (block in the prompt), or, with
        ``empty_think_trained``, a thinking-mode sample whose empty block the model writes.
        """
        validate_messages(messages)
        validate_tools(tools)
        views = []
        for index, message in enumerate(messages):
            if message.role == "assistant":
                supplied = not empty_think_trained and not (message.reasoning or "").strip("\n")
                empty_weight = self._empty_weight(empty_think_trained)
                prompt = _silenced(self._conversation(messages[:index], tools, 0.0))
                prompt += self._generation_prompt(not supplied, empty_weight)
                reply = _think_block(message, empty_weight) if not supplied else []
                reply += _reply(message, message.content.lstrip("\n"), 1.0)
                # Encoded apart: at inference the prompt's last token is fixed before the reply's first is chosen.
                views.append(_joined(self._encode(prompt), self._encode(reply)))
        return views

    def prompt_ids(
        self, messages: Sequence[Message], tools: Tools | None = None, *, thinking: bool = True
    ) -> list[int]:
        """Token ids of the conversation and the header of the next assistant turn."""
        return self.render(messages, tools, thinking=thinking, add_generation_prompt=True).token_ids

    def tool_result_ids(self, results: Sequence[str], *, thinking: bool = True) -> list[int]:
        """Tokens that follow an assistant turn ended by ``<|im_end|>``: its tools' results and the next header.

        Appending them to a sampled trajectory gives the prompt of the next turn without re-encoding anything.
        """
        pieces = [_Piece("\n", "assistant", "header")]
        for index, result in enumerate(results):
            pieces += _tool_result(Message("tool", result), index == 0, index == len(results) - 1)
        return self._encode(pieces + self._generation_prompt(thinking)).token_ids

    @property
    def stop_ids(self) -> list[int]:
        """Tokens of ``policy.stop_text``; InputError when the tokenizer has no think tokens."""
        if self.tokenizer.think_close is None or self.tokenizer.think_open is None:
            raise InputError("a thinking budget needs <think> and </think> in the tokenizer; this one lacks them")
        return self.tokenizer.encode_with_special(self.policy.stop_text)

    @property
    def chat_template(self) -> str:
        """The Jinja template that renders the same text under this policy; to be saved with the checkpoint."""
        if self.policy.history_thinking == "keep":
            return "{%- set preserve_thinking = true -%}\n" + CHAT_TEMPLATE
        return CHAT_TEMPLATE

    def _empty_weight(self, trained: bool) -> float:
        return 1.0 if trained else self.policy.empty_think_weight

    def _conversation(self, messages: Sequence[Message], tools: Tools | None, empty_weight: float) -> list[_Piece]:
        pieces = _system_block(messages, tools)
        query = _last_query(messages)
        for index, message in enumerate(messages):
            if message.role == "assistant":
                block = self.policy.history_thinking == "keep" or (
                    index > query and (index == len(messages) - 1 or bool(message.reasoning))
                )
                pieces += _header("assistant", "assistant")
                if block:
                    pieces += _think_block(message, empty_weight)
                    pieces += _reply(message, message.content.lstrip("\n"), 1.0)
                else:
                    pieces += _reply(message, message.content, 0.0)
                pieces.append(_Piece("\n", "assistant", "header"))
            elif message.role == "tool":
                first = index == 0 or messages[index - 1].role != "tool"
                last = index == len(messages) - 1 or messages[index + 1].role != "tool"
                pieces += _tool_result(message, first, last)
            elif message.role == "user" or index > 0:
                pieces += _header(message.role, message.role)
                pieces.append(_Piece(message.content, message.role, "text"))
                pieces += _turn_end(message.role)
        return pieces

    def _generation_prompt(self, thinking: bool, empty_weight: float = 0.0) -> list[_Piece]:
        pieces = _header("assistant", "assistant")
        if not thinking:
            pieces += _template(_EMPTY_BLOCK, "assistant", "empty_think", empty_weight)
        return pieces

    def _encode(self, pieces: Sequence[_Piece]) -> Rendered:
        """Encode runs of text between control tokens as one string, so tokens may cross pieces as in plain text."""
        rendered = Rendered(text="".join(piece.text for piece in pieces))
        run: list[_Piece] = []
        for piece in pieces:
            control = self.tokenizer.control_id(piece.text) if piece.control else None
            if control is None:
                run.append(piece)
                continue
            self._encode_run(run, rendered)
            run = []
            _append(rendered, [control], [piece])
        self._encode_run(run, rendered)
        return rendered

    def _encode_run(self, run: Sequence[_Piece], rendered: Rendered) -> None:
        run = [piece for piece in run if piece.text]
        if not run:
            return
        ids, starts = self.tokenizer.encode_with_offsets("".join(piece.text for piece in run))
        begins = [0]
        for piece in run[:-1]:
            begins.append(begins[-1] + len(piece.text))
        # A token that crosses a border belongs to the piece it begins in: supplied text is never trained.
        _append(rendered, ids, [run[bisect_right(begins, start) - 1] for start in starts])


def _append(rendered: Rendered, ids: Sequence[int], owners: Sequence[_Piece]) -> None:
    rendered.token_ids.extend(ids)
    rendered.weights.extend(owner.weight for owner in owners)
    rendered.roles.extend(owner.role for owner in owners)
    rendered.parts.extend(owner.part for owner in owners)


def _joined(first: Rendered, second: Rendered) -> Rendered:
    return Rendered(
        first.token_ids + second.token_ids,
        first.weights + second.weights,
        first.roles + second.roles,
        first.parts + second.parts,
        first.text + second.text,
    )


def _silenced(pieces: Sequence[_Piece]) -> list[_Piece]:
    return [_Piece(p.text, p.role, p.part, 0.0, p.control) for p in pieces]


def _last_query(messages: Sequence[Message]) -> int:
    """Index of the last user turn that is not a wrapped tool result; the last index if there is none."""
    for index in range(len(messages) - 1, -1, -1):
        content = messages[index].content
        wrapped = content.startswith("<tool_response>") and content.endswith("</tool_response>")
        if messages[index].role == "user" and not wrapped:
            return index
    return len(messages) - 1


def _template(text: str, role: str, part: str, weight: float = 0.0) -> list[_Piece]:
    """Pieces of text the template itself writes: spellings of control tokens are control tokens."""
    split = [fragment for fragment in _CONTROLS.split(text) if fragment]
    return [_Piece(s, role, part, weight, _CONTROLS.fullmatch(s) is not None) for s in split]


def _header(name: str, role: str) -> list[_Piece]:
    return _template(f"<|im_start|>{name}\n", role, "header")


def _turn_end(role: str, weight: float = 0.0) -> list[_Piece]:
    return [_Piece("<|im_end|>", role, "eot", weight, control=True), _Piece("\n", role, "header")]


def _system_block(messages: Sequence[Message], tools: Tools | None) -> list[_Piece]:
    system = messages[0].content if messages and messages[0].role == "system" else None
    if not tools and system is None:
        return []
    pieces = _header("system", "system")
    if system is not None:
        pieces.append(_Piece(system, "system", "text"))
    if tools:
        gap = "\n\n" if system is not None else ""
        pieces += _template(gap + _TOOLS_HEAD, "system", "text")
        dumps = [dump_json(tool, f"tools[{index}]") for index, tool in enumerate(tools)]
        pieces.append(_Piece("".join("\n" + dump for dump in dumps), "system", "text"))
        pieces += _template(_TOOLS_TAIL, "system", "text")
    return pieces + _turn_end("system")


def _think_block(message: Message, empty_weight: float) -> list[_Piece]:
    thought = (message.reasoning or "").strip("\n")
    if not thought:
        return _template(_EMPTY_BLOCK, "assistant", "empty_think", empty_weight)
    opening = _template("<think>\n", "assistant", "reasoning", 1.0)
    closing = _template("\n</think>\n\n", "assistant", "reasoning", 1.0)
    return [*opening, _Piece(thought, "assistant", "reasoning", 1.0), *closing]


def _reply(message: Message, content: str, weight: float) -> list[_Piece]:
    """Content, calls and ``<|im_end|>`` of an assistant turn."""
    pieces = [_Piece(content, "assistant", "content", weight)]
    for number, call in enumerate(message.tool_calls):
        # The template asks whether the content is non-empty before it strips leading newlines from it.
        gap = "\n" if number or message.content else ""
        arguments = dump_json(call.arguments, f"tool_calls[{number}].arguments")
        pieces += _template(gap + "<tool_call>", "assistant", "call", weight)
        body = f'\n{{"name": "{call.name}", "arguments": {arguments}}}\n'
        pieces.append(_Piece(body, "assistant", "call", weight))
        pieces += _template("</tool_call>", "assistant", "call", weight)
    pieces.append(_Piece("<|im_end|>", "assistant", "eot", weight, control=True))
    return pieces


def _tool_result(message: Message, first: bool, last: bool) -> list[_Piece]:
    pieces = _template("<|im_start|>user", "tool", "header") if first else []
    pieces += _template("\n<tool_response>\n", "tool", "header")
    pieces.append(_Piece(message.content, "tool", "text"))
    pieces += _template("\n</tool_response>", "tool", "header")
    return pieces + (_turn_end("tool") if last else [])
