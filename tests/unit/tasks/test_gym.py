"""The reasoning-gym adapter (skipped where the extra is not installed)."""

from __future__ import annotations

import importlib
import random
from typing import Any

import pytest

from twofold.base.records import InputError
from twofold.tasks import gym
from twofold.tasks.base import sample_items


def test_items_verify_and_are_short() -> None:
    pytest.importorskip("reasoning_gym")
    families = gym.gym_families()
    items = sample_items(families, 60, seed=0, split="test")
    assert items == sample_items(families, 60, seed=0, split="test")
    by_name = {task.name: task for task in families}
    for item in items:
        task = by_name[item.family]
        assert len(item.prompt) <= 120 and "\n" not in item.prompt
        assert task.verify(item, f" {item.answer}\n") == 1.0
        for bad in ("", "   ", "no idea", f"{item.answer} or {item.answer}", item.answer + "1"):
            assert task.verify(item, bad) == 0.0, (item.prompt, bad)
    train = sample_items(families, 60, seed=0, split="train")
    assert {i.key for i in train}.isdisjoint({i.key for i in items})


def test_variable_names_do_not_matter_for_the_key() -> None:
    pytest.importorskip("reasoning_gym")
    task = gym.GymTask("simple_equations", (("min_terms", 2), ("max_terms", 2)))
    keys = [task.generate(random.Random(seed), 1.0).key for seed in range(20)]
    assert all("<0>" in key for key in keys)


def test_level_grows_the_settings() -> None:
    pytest.importorskip("reasoning_gym")
    task = gym.GymTask("spell_backward", (("min_word_len", 3),), (("max_word_len", 3, 6),))
    assert {len(task.generate(random.Random(seed), 0.0).answer) for seed in range(20)} == {3}
    assert max(len(task.generate(random.Random(seed), 1.0).answer) for seed in range(40)) > 3


def test_errors_name_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("reasoning_gym")
    with pytest.raises(InputError, match="cannot make 'no_such_set'"):
        gym.GymTask("no_such_set").generate(random.Random(0), 1.0)

    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    gym._open_dataset.cache_clear()
    with pytest.raises(InputError, match=r"twofold\[tasks\]"):
        gym.GymTask("gcd").generate(random.Random(0), 1.0)
