"""Rows of chat data sets to checked conversations, and back: OpenAI, ShareGPT, Alpaca, prompt/completion, text.

A row's format is told by its keys. What a format cannot hold exactly is not written in it: ``write_example`` reads
its own row back and refuses if anything changed. Not here: rendering, files, and preference pairs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from twofold.base.records import InputError, Message, ToolCall
from twofold.text.messages import (
    TurnWeights,
    messages_from_openai,
    messages_to_openai,
    split_thinking,
    turn_weights,
    validate_tools,
)

Format = Literal["openai", "sharegpt", "alpaca", "prompt_completion", "text"]

_SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}
_WRITTEN = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}
_KNOWN = (
    "messages (OpenAI), conversations (ShareGPT), instruction and output (Alpaca), prompt and completion (TRL), "
    "prompt alone, or text"
)


@dataclass(frozen=True, slots=True)
class Example:
    """One row, normalised: a conversation, or plain text in ``segments``; one of the two is empty.

    weights: loss weights of assistant turns that are not 1, by message index (for ``Renderer.render`` and ``views``).
    thinking: the row's ``enable_thinking``, None if it says nothing. segments: (text, loss weight), for
    ``Renderer.render_text``.
    """

    format: Format
    messages: tuple[Message, ...] = ()
    tools: tuple[dict[str, Any], ...] | None = None
    weights: dict[int, TurnWeights] = field(default_factory=dict)
    thinking: bool | None = None
    segments: tuple[tuple[str, float], ...] = ()


def read_example(row: Mapping[str, Any], *, inline_thinking: bool = True) -> Example:
    """Read one row of a chat data set.

    Args:
        row: columns by name; columns that no format knows are ignored, columns that are None count as absent.
        inline_thinking: split ``<think>`` blocks off assistant text (False: models without think blocks).

    Raises:
        InputError: an unknown format, or a bad field, named.
    """
    if not isinstance(row, Mapping):
        raise InputError(f"a row must be an object, got {type(row).__name__}")
    row = {key: value for key, value in row.items() if value is not None}
    if "chosen" in row or "rejected" in row:
        raise InputError("a row with chosen and rejected is a preference pair, not one conversation; read each apart")
    if "messages" in row:
        return _read_openai(row, _with_system(row, row["messages"]), inline_thinking)
    if "conversations" in row:
        return _read_sharegpt(row, inline_thinking)
    if "instruction" in row:
        return _read_alpaca(row, inline_thinking)
    if "prompt" in row:
        return _read_prompt(row, inline_thinking)
    if "text" in row:
        return Example("text", segments=((_string(row, "text"), 1.0),))
    raise InputError(f"unknown row with keys {', '.join(map(str, row)) or '(none)'}; known are {_KNOWN}")


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


def _read_openai(row: Mapping[str, Any], rows: Any, inline: bool) -> Example:
    messages = messages_from_openai(rows, inline_thinking=inline)
    weights = {}
    for index, message in enumerate(rows):
        weight = _weight(f"messages[{index}]", message)
        if weight is not None:
            weights[index] = weight
    return _checked(Example("openai", tuple(messages), _tools(row), weights, _thinking(row)))


def _read_sharegpt(row: Mapping[str, Any], inline: bool) -> Example:
    turns = row["conversations"]
    if not isinstance(turns, list):
        raise InputError(f"conversations must be a list, got {type(turns).__name__}")
    if turns and isinstance(turns[0], Mapping) and "role" in turns[0]:
        return _read_openai(row, _with_system(row, turns), inline)
    rows = [_turn(index, turn, inline) for index, turn in enumerate(turns)]
    return replace(_read_openai(row, _with_system(row, rows), inline), format="sharegpt")


def _with_system(row: Mapping[str, Any], rows: Any) -> Any:
    """The rows after a system turn from the row's own column, if that has one; "" says that there is none."""
    if not row.get("system") or not isinstance(rows, list):
        return rows
    return [{"role": "system", "content": _string(row, "system")}, *rows]


def _turn(index: int, turn: Any, inline: bool) -> dict[str, Any]:
    where = f"conversations[{index}]"
    if not isinstance(turn, Mapping):
        raise InputError(f"{where} must be an object with from and value, got {type(turn).__name__}")
    speaker, value = turn.get("from"), turn.get("value")
    role = _SPEAKERS.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise InputError(f"{where}.from is {speaker!r}; use one of {', '.join(_SPEAKERS)}")
    if not isinstance(value, str):
        raise InputError(f"{where}.value must be a string, got {type(value).__name__}")
    kept = {key: turn[key] for key in ("weight", "train", "weights") if turn.get(key) is not None}
    if speaker != "function_call":
        return {"role": role, "content": value, **kept}
    reasoning, text = split_thinking(value) if inline else (None, value)
    try:
        calls = json.loads(text)
    except (ValueError, RecursionError):
        raise InputError(
            f"{where}.value is a function_call but not JSON; give an object with name and arguments"
        ) from None
    listed = calls if isinstance(calls, list) else [calls]
    return {"role": role, "content": "", "reasoning_content": reasoning, "tool_calls": listed, **kept}


def _read_alpaca(row: Mapping[str, Any], inline: bool) -> Example:
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
    return replace(_read_openai(row, _with_system(row, rows), inline), format="alpaca")


def _read_prompt(row: Mapping[str, Any], inline: bool) -> Example:
    """TRL's rows: strings are plain text, lists are messages of which only the completion's are trained."""
    prompt, completion = row["prompt"], row.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str | None):
        segments = ((prompt, 0.0),) if completion is None else ((prompt, 0.0), (completion, 1.0))
        return Example("prompt_completion", segments=segments)
    if not isinstance(prompt, list) or not isinstance(completion, list | None):
        raise InputError("prompt and completion must both be strings or both be lists of messages")
    prompt = _with_system(row, prompt)
    example = _read_openai(row, [*prompt, *(completion or [])], inline)
    asked = [index for index, message in enumerate(example.messages[: len(prompt)]) if message.role == "assistant"]
    silent = dict.fromkeys(asked, TurnWeights(0.0, 0.0, 0.0))
    return replace(example, format="prompt_completion", weights={**example.weights, **silent})


def _weight(where: str, message: Mapping[str, Any]) -> TurnWeights | None:
    """The turn's weights from ``weight`` (a number), ``train`` (true or false) or ``weights`` (by part)."""
    values = {key: message[key] for key in ("weight", "train", "weights") if message.get(key) is not None}
    if not values:
        return None
    if len(values) > 1:
        raise InputError(f"{where} has {' and '.join(values)}; give one of them")
    [(key, value)] = values.items()
    if message.get("role") != "assistant":
        if value:
            raise InputError(f"{where}.{key} is set on a {message.get('role')} turn; only assistant turns are trained")
        return None
    if key == "weights":
        if not isinstance(value, Mapping) or not set(value) <= {"reasoning", "content", "calls"}:
            raise InputError(f"{where}.weights must be an object with reasoning, content, calls")
        return TurnWeights(**{part: weight for part, weight in value.items() if weight is not None})
    if key == "train" and not isinstance(value, bool):
        raise InputError(f"{where}.train must be true or false, got {value!r}")
    weight = float(value) if isinstance(value, bool) else value
    return TurnWeights(weight, weight, weight)


def _tools(row: Mapping[str, Any]) -> tuple[dict[str, Any], ...] | None:
    tools = row.get("tools")
    if isinstance(tools, str) and tools:
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            raise InputError("tools is text but not JSON; give a list of objects") from None
    if not tools:
        return None
    validate_tools(tools)
    return tuple(tools)


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
    rows = messages_to_openai(example.messages)
    for index, turn in example.weights.items():
        if turn.reasoning == turn.content == turn.calls:
            rows[index]["weight"] = turn.content
        else:
            rows[index]["weights"] = {"reasoning": turn.reasoning, "content": turn.content, "calls": turn.calls}
    return {"messages": rows, **_extras(example)}


def _extras(example: Example) -> dict[str, Any]:
    extras: dict[str, Any] = {}
    if example.tools:
        extras["tools"] = list(example.tools)
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
    rows = messages_to_openai(example.messages)
    trained = [i for i, m in enumerate(example.messages) if m.role == "assistant" and i not in example.weights]
    start = trained[0] if trained else len(rows)
    row: dict[str, Any] = {"prompt": rows[:start]}
    if trained:
        row["completion"] = rows[start:]
    return {**row, **_extras(example)} if start else None


def _write_text(example: Example) -> dict[str, Any] | None:
    return {"text": example.segments[0][0]} if len(example.segments) == 1 else None
