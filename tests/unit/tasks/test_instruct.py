"""Instruction wrappers: forms, split, verifiers."""

from __future__ import annotations

import random

import pytest

from twofold.base.records import InputError
from twofold.tasks.base import Item, held_out, sample_items
from twofold.tasks.families import Pick, SumMod, Swap
from twofold.tasks.instruct import (
    AnswerFormat,
    AnswerLength,
    follows_instruction,
    with_format,
    with_length,
)

BASE = Item("sum", "sum mod 10: E1 B5 I6", "2", (" E0+1=1",), "key", {"n": 3})
CUPS = Item("swap", "swap I G E: a12 b23", "G E I", (), "key")


def test_formats() -> None:
    task = AnswerFormat((SumMod(),))
    for surface, answer in (("[x]", "[2]"), ("ans=x", "ans=2"), ('"x"', '"2"')):
        item = with_format(BASE, surface)
        assert item.prompt == f"sum mod 10: E1 B5 I6 reply as {surface}"
        assert item.answer == answer and item.key == BASE.key and item.traces == BASE.traces
        assert task.verify(item, f" {answer}\n") == 1.0
        assert follows_instruction(item, answer)
        for bad in ("2", "", "[]", "[[2]]", "[3]2", "ans=", "ans=2 ans=2", '""', '"2', answer + answer, answer + " 2"):
            assert task.verify(item, bad) == 0.0
            assert not follows_instruction(item, bad), (surface, bad)
    assert follows_instruction(with_format(BASE, "[x]"), "[3]")  # right form, wrong content
    assert follows_instruction(with_format(CUPS, "[x]"), "[E G I]")
    assert not follows_instruction(with_format(CUPS, "[x]"), "[E]")


def test_lengths() -> None:
    task = AnswerLength((SumMod(),))
    item = with_length(BASE, 3)
    assert item.prompt.endswith(" reply 3 times") and item.answer == "2 2 2"
    assert task.verify(item, "2 2 2") == 1.0
    for bad in ("2", "2 2", "2 2 2 2", "222", "2, 2, 2", ""):
        assert task.verify(item, bad) == 0.0
        assert not follows_instruction(item, bad)
    assert follows_instruction(item, "5 5 5") and not follows_instruction(item, "5 5 6")
    cups = with_length(CUPS, 2)
    assert cups.answer == "G E I G E I" and follows_instruction(cups, cups.answer)
    assert not follows_instruction(cups, "G E I")


def test_held_out_bases_stay_held_out() -> None:
    tasks = (AnswerFormat((SumMod(), Pick(), Swap())), AnswerLength((SumMod(),)))
    test = sample_items(tasks, 60, seed=1, split="test")
    assert all(held_out(item.key) for item in test)
    assert {item.key for item in test}.isdisjoint({i.key for i in sample_items([SumMod()], 300, 2, "train")})
    assert {item.family for item in test} == {"format", "length"}


def test_task_properties_and_errors() -> None:
    assert AnswerFormat((Pick(),)).step_by_step is False
    assert AnswerFormat((Pick(), SumMod())).step_by_step is True
    assert AnswerLength((Pick(), SumMod())).licence == "CC0-1.0"
    with pytest.raises(InputError, match="unknown answer format"):
        with_format(BASE, "<x>")
    with pytest.raises(InputError, match="1 to 4"):
        with_length(BASE, 5)
    with pytest.raises(InputError, match="no instruction"):
        follows_instruction(BASE, "2")
    with pytest.raises(InputError, match="at least one base"):
        AnswerFormat(()).generate(random.Random(0), 1.0)
