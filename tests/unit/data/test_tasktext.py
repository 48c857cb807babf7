"""Pre-training text of task items: form, split, curriculum, determinism."""

from __future__ import annotations

import re

import pytest

from twofold.base.records import InputError
from twofold.data.tasktext import task_documents
from twofold.tasks.base import canonical_key, held_out
from twofold.tasks.families import Pick, SumMod, Swap, default_families
from twofold.tasks.gym import GymTask


def test_form_and_share() -> None:
    texts = list(task_documents(default_families(), 800, seed=0, think_share=0.75, curriculum=False))
    assert texts == list(task_documents(default_families(), 800, seed=0, think_share=0.75, curriculum=False))
    assert texts != list(task_documents(default_families(), 800, seed=1, think_share=0.75, curriculum=False))
    thinking = [re.fullmatch(r"[a-z]+:? [^\n]+\n [^\n]+\n\n[^\n]+", text) for text in texts]
    direct = [re.fullmatch(r"[a-z]+:? [^\n]+\n[^\n ][^\n]*", text) for text in texts]
    assert all((a is None) != (b is None) for a, b in zip(thinking, direct, strict=True))
    assert 0.7 < sum(match is not None for match in thinking) / 800 < 0.8


def test_extremes_of_the_share() -> None:
    for share, marks in ((0.0, 0), (1.0, 40)):
        texts = task_documents(default_families(), 40, seed=0, think_share=share, curriculum=False)
        assert sum("\n\n" in text for text in texts) == marks


def test_only_train_items() -> None:
    for text in task_documents([SumMod(), Swap(), Pick()], 600, seed=3, think_share=0.5, curriculum=True):
        assert not held_out(canonical_key(text.splitlines()[0]))


def test_curriculum_ramps_over_the_first_half() -> None:
    sizes = [
        len(text.splitlines()[0].split(": ")[1].split())
        for text in task_documents([SumMod()], 1000, seed=0, think_share=1.0, curriculum=True)
    ]
    assert set(sizes[:50]) == {3} and max(sizes[:250]) < 7
    assert set(sizes[500:]) == {3, 4, 5, 6, 7, 8}


def test_other_traces_on_request() -> None:
    first = list(task_documents([SumMod()], 50, seed=0, think_share=1.0, curriculum=False))
    mixed = list(task_documents([SumMod()], 50, seed=0, think_share=1.0, curriculum=False, all_traces=True))
    assert [a.splitlines()[0] for a in first] == [b.splitlines()[0] for b in mixed]
    assert 10 < sum(a != b for a, b in zip(first, mixed, strict=True)) < 40


def test_tasks_without_traces_are_direct() -> None:
    pytest.importorskip("reasoning_gym")
    texts = list(task_documents([GymTask("gcd")], 5, seed=0, think_share=1.0, curriculum=True))
    assert all(len(text.splitlines()) == 2 for text in texts)


def test_errors() -> None:
    with pytest.raises(InputError, match="at least one task"):
        list(task_documents([], 1, seed=0, think_share=1.0, curriculum=True))
    with pytest.raises(InputError, match="think_share"):
        list(task_documents([SumMod()], 1, seed=0, think_share=1.5, curriculum=True))
