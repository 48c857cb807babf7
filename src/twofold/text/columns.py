"""Columns of a row that its format does not read: harmless ones are listed, one that may hold the answer stops.

A row with its answer in ``response`` beside ``messages`` would be trained without it, and nobody would notice. Not
here: the formats (``formats.py``).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from typing import Any

from twofold.base.records import InputError

# Columns that say something of a conversation, by the name that a format would read them under.
_SAYS = {
    "messages": "messages",
    "conversations": "messages",
    "conversation": "messages",
    "dialogue": "messages",
    "dialog": "messages",
    "chat": "messages",
    "turns": "messages",
    "instruction": "instruction",
    "input": "input",
    "context": "input",
    "prompt": "prompt",
    "question": "prompt",
    "query": "prompt",
    "problem": "prompt",
    "output": "output or completion",
    "completion": "completion",
    "response": "completion or output",
    "responses": "completion or output",
    "reply": "completion or output",
    "assistant": "completion or output",
    "answer": "completion or output",
    "solution": "completion or output",
    "target": "completion or output",
    "system": "system",
    "system_prompt": "system",
    "system_message": "system",
    "tools": "tools",
    "functions": "tools",
    "function": "tools",
    "tool_calls": "tool_calls of a message",
    "reasoning": "reasoning_content of a message",
    "reasoning_content": "reasoning_content of a message",
    "thinking": "reasoning_content of a message",
    "thought": "reasoning_content of a message",
    "cot": "reasoning_content of a message",
    "history": "history",
    "text": "text",
    "content": "content of a message",
    "chat_template_kwargs": "chat_template_kwargs",
    "enable_thinking": "chat_template_kwargs",
}
_REFERENCES = ("answer", "solution", "target", "problem", "question", "query")  # kept to check a reply by, often
_NEAR_TO = (
    "messages", "conversations", "instruction", "input", "prompt", "output", "completion", "response", "system",
    "tools", "functions", "history", "chat_template_kwargs",
)  # fmt: skip
_ABOUT = re.compile(
    r"(?:^|_)(?:ids?|hash|len|length|type|kind|source|lang|language|tokens|num|n|count|index|idx|name|time|date|model"
    r"|score|category|difficulty)(?:_|$)"
)
_TURN_KEYS = ("content", "value")
_LONG = 24  # characters


class ColumnError(InputError):
    """A column may hold part of the conversation, and nothing reads it."""


def check_columns(row: Mapping[str, Any], used: Collection[str], chat: bool, answered: bool) -> tuple[str, ...]:
    """The columns that nothing reads and nobody misses.

    Args:
        row: without columns that say nothing.
        used: columns that the row's format reads.
        chat: the format is one of conversations, not of plain text.
        answered: the conversation has its answer, so a reference beside it is none that is trained.

    Raises:
        ColumnError: a column that seems to hold part of the conversation, or to be a misspelled one; it is named.
    """
    left = [key for key in row if key not in used]
    missed = {}
    for key in left:
        instead = _instead(key)
        if instead and not (answered and _plain(key) in _REFERENCES) and _counts(row, key, used, chat, answered):
            missed[key] = instead
    if missed:
        names = ", ".join(f"{key!r} (as {instead}?)" for key, instead in missed.items())
        plural = len(missed) > 1
        read = ", ".join(key for key in row if key in used)
        raise ColumnError(
            f"the column{'s' if plural else ''} {names} {'are' if plural else 'is'} not read beside {read}; rename "
            f"{'them' if plural else 'it'}, or take {'them' if plural else 'it'} out"
        )
    return tuple(map(str, left))


def _instead(key: Any) -> str:
    """The name under which a format would read a column; empty for one that says nothing of a conversation."""
    name = _plain(key)
    if name in _SAYS:
        return _SAYS[name]
    near = [] if _ABOUT.search(name) else difflib.get_close_matches(name, _NEAR_TO, n=1, cutoff=0.85)
    return _SAYS[near[0]] if near else ""


def _plain(key: Any) -> str:
    return re.sub(r"[\s-]+", "_", str(key).strip().lower())


def _counts(row: Mapping[str, Any], key: str, used: Collection[str], chat: bool, answered: bool) -> bool:
    """Whether leaving a column out loses something: it is no copy of what is read, nor all of that as one text."""
    if isinstance(row[key], bool):
        return _plain(key) == "enable_thinking"
    said = _texts(row[key])
    if not said:
        return False
    if not chat and isinstance(row[key], list):
        return True  # turns beside plain text: which of the two is meant?
    read = [text for name in used if name in row for text in _texts(row[name])]
    if answered and _plain(key) == "text" and all(text in said[0] for text in read):
        return False
    return not all(any(_is_in(text, other) for other in read) for text in said)


def _is_in(text: str, other: str) -> bool:
    """Whether other text has this one as well; a short one may stand in it by chance."""
    return text == other or (len(text) >= _LONG and text in other)


def _texts(value: Any) -> list[str]:
    """What a value says: its strings, of turns only what is said in them."""
    if isinstance(value, str):
        return [] if value.strip() in ("", "[]", "{}", "null") else [value.strip()]
    if isinstance(value, Mapping):
        turn = [value[key] for key in _TURN_KEYS if key in value]
        return [text for inner in turn or value.values() for text in _texts(inner)]
    return [text for inner in value for text in _texts(inner)] if isinstance(value, list | tuple) else []
