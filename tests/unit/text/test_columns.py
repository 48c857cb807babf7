"""Columns that a row's format does not read."""

from __future__ import annotations

from typing import Any

import pytest

from twofold.base.records import InputError
from twofold.text.formats import read_example

U, A = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "It is 4."}


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"prompt": "q", "response": "a"}, ["response"]),
        ({"prompt": "q", "output": "a", "id": 1}, ["output"]),
        ({"prompt": [U], "answer": "4"}, ["answer"]),
        ({"prompt": "q", "completion": "a", "system": "S"}, ["system"]),
        ({"messages": [U], "response": "4"}, ["response"]),
        ({"messages": [U], "solution": "4"}, ["solution"]),
        ({"messages": [U, A], "response": "5"}, ["response"]),
        ({"messages": [U, A], "functions": [{"name": "f"}]}, ["functions"]),
        ({"messages": [U, A], "tool": [{"name": "f"}], "Reasoning": "because"}, ["tool", "Reasoning"]),
        ({"instruction": "q", "context": "c", "output": "a"}, ["context"]),
        ({"instruction": "q", "context": "c", "response": "a"}, ["context", "response"]),
        ({"instruction": "q", "output": "a", "sytem": "S"}, ["sytem"]),
        ({"instruction": "q", "output": "a", "System Prompt": "S"}, ["System Prompt"]),
        ({"text": "q", "answer": "a"}, ["answer"]),
        ({"text": "q", "conversation": [U, A]}, ["conversation"]),
        ({"messages": [U, A], "enable_thinking": False}, ["enable_thinking"]),
    ],
)
def test_what_may_be_the_answer_stops(row: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(InputError, match="not read beside") as caught:
        read_example(row)
    assert all(repr(name) in str(caught.value) for name in named)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [U, A], "prompt": "2+2?", "prompt_id": "ab", "source": "s"},  # a copy of the first turn
        {
            "messages": [U, A],
            "problem": "Add 2 and 2.",
            "answer": "4",
            "solution": "4 it is",
        },  # what a reply is checked by
        {"messages": [U, A], "text": "User: 2+2?\nAssistant: It is 4."},  # the same as one text
        {"messages": [U, A], "n_messages": 2, "instruction_type": "math", "response_model": "m", "turns": 2},
        {"messages": [U, A], "response": "", "tools": None, "functions": [], "history": "[]", "output": float("nan")},
        {"instruction": "Add 2 and 2.", "input": "", "output": "4", "text": "### Add 2 and 2.\n### 4"},
    ],
)
def test_what_says_nothing_new_is_listed(row: dict[str, Any]) -> None:
    used = {"messages", "instruction", "input", "output", "tools"}
    left = {key for key, value in row.items() if key not in used and value is not None and value == value}
    assert set(read_example(row).ignored) == left


def test_an_unpaired_preference_is_no_conversation() -> None:
    with pytest.raises(InputError, match="completion and label"):
        read_example({"prompt": "q", "completion": "a", "label": False})
