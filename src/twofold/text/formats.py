"""Rows of chat data sets to checked conversations, and back: OpenAI, ShareGPT, Alpaca, prompt/completion, text.

A row's format is told by its keys. What a format cannot hold exactly is not written in it: ``write_example`` reads
its own row back and refuses if anything changed. Not here: rendering, files, and preference pairs.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from twofold.base.records import InputError, Message, ToolCall
from twofold.text.columns import check_columns
from twofold.text.messages import TurnWeights, messages_from_openai, messages_to_openai, turn_weights, validate_tools
from twofold.text.padding import holds_null, meant_tool
from twofold.text.row_turns import Reading, read_turns, speaker_of, spells_call, weight_of

Format = Literal["openai", "sharegpt", "alpaca", "prompt_completion", "text"]

_WRITTEN = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}
_KNOWN = (
    "messages (OpenAI), conversations (ShareGPT), instruction and output (Alpaca), prompt and completion (TRL), "
    "prompt alone, or text"
)
_EXTRAS = ("system", "tools", "chat_template_kwargs")
_READ = {  # the columns of each format
    "openai": ("messages", *_EXTRAS),
    "sharegpt": ("conversations", *_EXTRAS),
    "alpaca": ("instruction", "input", "output", "history", *_EXTRAS),
    "prompt_completion": ("prompt", "completion", *_EXTRAS),
    "strings": ("prompt", "completion"),
    "text": ("text",),
}
_RENDERED = re.compile(r"<\|im_start\|>\s*(?:system|user|assistant|tool)\b")


@dataclass(frozen=True, slots=True)
class Example:
    """One row, normalised: a conversation, or plain text in ``segments``; one of the two is empty.

    weights: loss weights of assistant turns that are not 1, by message index (for ``Renderer.render`` and ``views``).
    thinking: the row's ``enable_thinking``, None if it says nothing. segments: (text, loss weight), for
    ``Renderer.render_text``. ignored: columns that were not used.
    """

    format: Format
    messages: tuple[Message, ...] = ()
    tools: tuple[dict[str, Any], ...] | None = None
    weights: dict[int, TurnWeights] = field(default_factory=dict)
    thinking: bool | None = None
    segments: tuple[tuple[str, float], ...] = ()
    ignored: tuple[str, ...] = field(default=(), compare=False)


def read_example(row: Mapping[str, Any], *, inline_thinking: bool = True, inline_calls: bool = True) -> Example:
    """Read one row of a chat data set.

    Args:
        row: columns by name; columns that are None (or NaN, as pandas writes it) count as absent. Nulls that Arrow pads
            into tools and arguments are left out (``padding.py``).
        inline_thinking: split ``<think>`` blocks off assistant text (False: models without think blocks).
        inline_calls: read ``<tool_call>`` in assistant text as calls (False: models without tools).

    Raises:
        InputError: an unknown format, a bad field, or a column that may hold part of the conversation and that the
            format does not read (``columns.py``); it is named.
    """
    if not isinstance(row, Mapping):
        raise InputError(f"a row must be an object, got {type(row).__name__}")
    row = {key: value for key, value in row.items() if not _is_absent(value)}
    if "chosen" in row or "rejected" in row:
        raise InputError("a row with chosen and rejected is a preference pair, not one conversation; read each apart")
    if "completion" in row and isinstance(row.get("label"), bool):
        raise InputError("a row with completion and label says whether the reply is good; keep the good, without label")
    try:
        return _read(row, inline_thinking, inline_calls)
    except RecursionError:
        raise InputError("the row is nested too deeply; flatten it") from None


def _read(row: dict[str, Any], thinking: bool, calls: bool) -> Example:
    column = next((key for key in ("messages", "conversations", "instruction", "prompt", "text") if key in row), None)
    if column is None:
        raise InputError(f"unknown row with keys {', '.join(map(str, row)) or '(none)'}; known are {_KNOWN}")
    for key in ("messages", "conversations", "history"):
        if isinstance(row.get(key), str) and row[key].lstrip().startswith("["):
            row[key] = _from_text(row, key)
    kind: str = {"messages": "openai", "conversations": "sharegpt", "instruction": "alpaca"}.get(column, column)
    if kind == "prompt":
        kind = "strings" if isinstance(row["prompt"], str) else "prompt_completion"
    ignored = check_columns(row, _READ[kind], kind not in ("strings", "text"), _is_answered(row, kind))
    reading = Reading(thinking, calls, _tools(row) if kind not in ("strings", "text") else None)
    if kind == "text":
        example = Example("text", segments=((_string(row, "text"), 1.0),))
    elif kind == "alpaca":
        example = _read_alpaca(row, reading)
    elif column == "prompt":
        example = _read_prompt(row, reading)
    else:
        example = _read_chat(row, column, reading)
    _check_segments(example, calls)
    return replace(example, ignored=ignored)


def _is_absent(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _is_answered(row: Mapping[str, Any], kind: str) -> bool:
    """Whether the row brings the reply where its format has it."""
    if kind in ("openai", "sharegpt"):
        turns = row["messages" if kind == "openai" else "conversations"]
        return isinstance(turns, list) and bool(turns) and speaker_of(turns[-1]) == "assistant"
    return ("output" if kind == "alpaca" else "completion") in row


def write_example(example: Example, format: Format) -> dict[str, Any]:
    """The example as a row of the given format.

    Raises:
        InputError: the format cannot hold it exactly (calls in Alpaca, weights by part outside OpenAI's, ...).
    """
    writers = {
        "openai": _write_openai,
        "sharegpt": _write_sharegpt,
        "alpaca": _write_alpaca,
        "prompt_completion": _write_prompt,
        "text": _write_text,
    }
    if format not in writers:
        raise InputError(f"format is {format!r}; use one of {', '.join(writers)}")
    row = writers[format](example)
    if row is None or _comparable(read_example(row)) != _comparable(example):
        raise InputError(f"format {format!r} cannot hold this example exactly; write 'openai' or 'text'")
    return row


def _comparable(example: Example) -> tuple[Any, ...]:
    """What must survive: all but the format's name, call ids, and no block against an empty one around tags."""
    messages = tuple(
        replace(
            message,
            reasoning=(message.reasoning or None) if "</think>" in message.content else message.reasoning,
            tool_calls=tuple(replace(call, id="") for call in message.tool_calls),
        )
        for message in example.messages
    )
    weights = {index: turn for index, turn in example.weights.items() if turn != TurnWeights()}
    return messages, example.tools, weights, example.thinking, example.segments


def _read_openai(row: Mapping[str, Any], rows: Any, reading: Reading) -> Example:
    """rows: messages in OpenAI's form."""
    messages = messages_from_openai(rows, inline_thinking=reading.thinking)
    weights = {}
    for index, message in enumerate(rows):
        weight = weight_of(f"messages[{index}]", message)
        if weight is not None:
            weights[index] = weight
    return _checked(Example("openai", tuple(messages), reading.tools, weights, _thinking(row)))


def _read_chat(row: Mapping[str, Any], column: str, reading: Reading) -> Example:
    turns = row[column]
    if column == "conversations" and not isinstance(turns, list):
        raise InputError(f"conversations must be a list, got {type(turns).__name__}")
    sharegpt = column == "conversations" and not (turns and isinstance(turns[0], Mapping) and "role" in turns[0])
    example = _read_openai(row, _with_system(row, read_turns(column, turns, reading)), reading)
    return replace(example, format="sharegpt") if sharegpt else example


def _with_system(row: Mapping[str, Any], rows: Any) -> Any:
    """The rows after a system turn from the row's own column, if that has one; "" says that there is none."""
    if not row.get("system") or not isinstance(rows, list):
        return rows
    return [{"role": "system", "content": _string(row, "system")}, *rows]


def _read_alpaca(row: Mapping[str, Any], reading: Reading) -> Example:
    rows = []
    history = row.get("history") or []
    if not isinstance(history, list):
        raise InputError(f"history must be a list of pairs, got {type(history).__name__}")
    for number, pair in enumerate(history):
        if not isinstance(pair, Sequence) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise InputError(f"history[{number}] must be a pair of strings, question and answer")
        rows += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    question = _string(row, "instruction")
    if row.get("input"):
        question += "\n" + _string(row, "input")
    rows += [{"role": "user", "content": question}, {"role": "assistant", "content": _string(row, "output")}]
    turns = _with_system(row, read_turns("turns", rows, reading))
    return replace(_read_openai(row, turns, reading), format="alpaca")


def _read_prompt(row: Mapping[str, Any], reading: Reading) -> Example:
    """TRL's rows: strings are plain text, lists are messages of which only the completion's are trained."""
    prompt, completion = row["prompt"], row.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str | None):
        segments = ((prompt, 0.0),) if completion is None else ((prompt, 0.0), (completion, 1.0))
        return Example("prompt_completion", segments=segments)
    if not isinstance(prompt, list) or not isinstance(completion, list | None):
        raise InputError("prompt and completion must both be strings or both be lists of messages")
    count = len(_with_system(row, read_turns("prompt", prompt, reading)))
    # Read as one conversation: a result at the beginning of the completion answers a call at the end of the prompt.
    turns = _with_system(row, read_turns("messages", [*prompt, *(completion or [])], reading))
    example = _read_openai(row, turns, reading)
    asked = [index for index, message in enumerate(example.messages[:count]) if message.role == "assistant"]
    silent = dict.fromkeys(asked, TurnWeights(0.0, 0.0, 0.0))
    return replace(example, format="prompt_completion", weights={**example.weights, **silent})


def _tools(row: Mapping[str, Any]) -> tuple[dict[str, Any], ...] | None:
    """The tools without padded nulls; JSON as text, of all or of one, is taken at its word."""
    tools = row.get("tools")
    if isinstance(tools, str) and tools:
        tools = _from_text(row, "tools")
    elif isinstance(tools, list):
        tools = [_tool(index, tool) for index, tool in enumerate(tools)]
    if not tools:
        return None
    validate_tools(tools)
    return tuple(tools)


def _tool(index: int, tool: Any) -> Any:
    if isinstance(tool, str) and tool.lstrip().startswith("{"):
        return _from_text({f"tools[{index}]": tool}, f"tools[{index}]")
    return meant_tool(tool)


def _from_text(row: Mapping[str, Any], key: str) -> Any:
    try:
        return json.loads(row[key])
    except (ValueError, RecursionError):
        raise InputError(f"{key} is text but not JSON; give a list of objects") from None


def _check_segments(example: Example, calls: bool) -> None:
    """Refuse plain text that spells a chat: what a template writes as tokens would be ordinary characters."""
    for text, _ in example.segments:
        if _RENDERED.search(text):
            raise InputError("the text is a rendered chat, whose tags are no tokens here; give its turns as messages")
        if calls and spells_call(text):
            raise InputError(
                "the text spells a tool call, whose tags are no tokens here; give messages with tool_calls"
            )


def _thinking(row: Mapping[str, Any]) -> bool | None:
    options = row.get("chat_template_kwargs") or {}
    if not isinstance(options, Mapping):
        raise InputError(f"chat_template_kwargs must be an object, got {type(options).__name__}")
    for key, value in options.items():
        if key != "enable_thinking" and value is not None:
            raise InputError(f"chat_template_kwargs.{key} is not supported; only enable_thinking is")
    value = options.get("enable_thinking")
    if not isinstance(value, bool | None):
        raise InputError(f"chat_template_kwargs.enable_thinking must be true or false, got {value!r}")
    return value


def _checked(example: Example) -> Example:
    turn_weights(example.messages, example.weights)
    if example.thinking is False:
        for index, message in enumerate(example.messages):
            if message.reasoning and index not in example.weights:
                raise InputError(
                    f"messages[{index}].reasoning: the row says enable_thinking is false; drop one of the two"
                )
    return example


def _string(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise InputError(f"{key} must be a string, got {type(value).__name__}")
    return value


def _write_openai(example: Example) -> dict[str, Any] | None:
    if example.segments:
        return None
    rows = _message_rows(example.messages)
    for index, turn in example.weights.items():
        if turn.reasoning == turn.content == turn.calls:
            rows[index]["weight"] = turn.content
        else:
            rows[index]["weights"] = {"reasoning": turn.reasoning, "content": turn.content, "calls": turn.calls}
    return {"messages": rows, **_extras(example)}


def _message_rows(messages: Sequence[Message]) -> list[dict[str, Any]]:
    rows = messages_to_openai(messages)
    for call in (call for row in rows for call in row.get("tool_calls", ())):
        if holds_null(call["function"]["arguments"]):  # as text, so that nobody takes a null for padding
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    return rows


def _extras(example: Example) -> dict[str, Any]:
    extras: dict[str, Any] = {}
    if example.tools:
        tools = list(example.tools)
        extras["tools"] = json.dumps(tools, ensure_ascii=False) if holds_null(tools) else tools
    if example.thinking is not None:
        extras["chat_template_kwargs"] = {"enable_thinking": example.thinking}
    return extras


def _inline(message: Message) -> str:
    """Assistant text with its think block in front."""
    if message.reasoning is None:
        return message.content
    return f"<think>\n{message.reasoning}\n</think>\n\n{message.content}"


def _calls_text(calls: Sequence[ToolCall]) -> str:
    bodies = [{"name": call.name, "arguments": call.arguments} for call in calls]
    return json.dumps(bodies if len(bodies) > 1 else bodies[0], ensure_ascii=False)


def _write_sharegpt(example: Example) -> dict[str, Any] | None:
    turns: list[dict[str, Any]] = []
    for index, message in enumerate(example.messages):
        if message.tool_calls:
            if message.content:
                return None
            call = replace(message, content=_calls_text(message.tool_calls))
            turns.append({"from": "function_call", "value": _inline(call)})
        else:
            turns.append({"from": _WRITTEN[message.role], "value": _inline(message)})
        if index in example.weights:
            turns[-1]["weight"] = example.weights[index].content
    return {"conversations": turns, **_extras(example)} if turns else None


def _write_alpaca(example: Example) -> dict[str, Any] | None:
    messages = list(example.messages)
    system = messages.pop(0).content if messages and messages[0].role == "system" else ""
    roles = [message.role for message in messages]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        return None
    texts = [_inline(message) for message in messages]
    pairs = [[texts[index], texts[index + 1]] for index in range(0, len(texts), 2)]
    row = {"instruction": pairs[-1][0], "input": "", "output": pairs[-1][1]}
    return {**row, "system": system, "history": pairs[:-1], **_extras(example)}


def _write_prompt(example: Example) -> dict[str, Any] | None:
    if example.segments:
        texts = [text for text, _ in example.segments]
        return dict(zip(("prompt", "completion"), texts, strict=False)) if len(texts) <= 2 else None
    rows = _message_rows(example.messages)
    trained = [i for i, m in enumerate(example.messages) if m.role == "assistant" and i not in example.weights]
    start = trained[0] if trained else len(rows)
    row: dict[str, Any] = {"prompt": rows[:start]}
    if trained:
        row["completion"] = rows[start:]
    return {**row, **_extras(example)} if start else None


def _write_text(example: Example) -> dict[str, Any] | None:
    return {"text": example.segments[0][0]} if len(example.segments) == 1 else None
