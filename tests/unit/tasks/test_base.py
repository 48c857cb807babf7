"""The split by content, canonical keys and balanced sampling."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twofold.base.records import InputError
from twofold.tasks.base import Item, canonical_key, draw_item, exact_match, held_out, sample_items
from twofold.tasks.families import LETTERS, Hop, Let, Pick, SumMod, Swap, default_families


def rename_letters(text: str, mapping: dict[str, str]) -> str:
    """Rename the letters A-J of a prompt (lower-case words hold none)."""
    return "".join(mapping.get(char, char) for char in text)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.permutations(list(LETTERS)))
def test_key_survives_renaming_case_and_space(seed: int, permutation: list[str]) -> None:
    mapping = dict(zip(LETTERS, permutation, strict=True))
    for task in (SumMod(), Swap(), Pick(), Hop()):
        item = task.generate(random.Random(seed), 1.0)
        renamed = rename_letters(item.prompt, mapping)
        assert canonical_key(renamed) == item.key
        assert canonical_key("  " + renamed.replace(" ", " \t ") + "\n") == item.key


def test_distinct_items_keep_distinct_keys() -> None:
    assert canonical_key("sum mod 10: A1 B2") != canonical_key("sum mod 10: A2 B1")
    assert canonical_key("swap A B C: a12") != canonical_key("swap A B C: a13")
    assert canonical_key("pick A: A1 B2") != canonical_key("pick B: A1 B2")
    # "a" the label of a move is not the cup "A": whichever letter the cup has, the key is the same
    assert canonical_key("swap A B C: a12") == canonical_key("swap J E C: a12")


def test_about_a_tenth_is_held_out() -> None:
    share = sum(held_out(f"key {i}") for i in range(5000)) / 5000
    assert 0.08 < share < 0.125


def test_test_items_are_never_near_copies_of_train_items() -> None:
    tasks = [*default_families(), Hop()]
    train = sample_items(tasks, 1500, seed=1, split="train")
    test = sample_items(tasks, 500, seed=2, split="test")
    assert {i.key for i in train}.isdisjoint({i.key for i in test})
    assert {i.prompt for i in train}.isdisjoint({i.prompt for i in test})
    # under every one of some other letter namings a test item is still not a training item
    train_prompts = {i.prompt for i in train}
    rng = random.Random(0)
    for item in test:
        other = dict(zip(LETTERS, rng.sample(LETTERS, 10), strict=True))
        assert rename_letters(item.prompt, other) not in train_prompts


def test_sampling_is_deterministic_distinct_and_balanced() -> None:
    tasks = default_families()
    items = sample_items(tasks, 42, seed=7, split="train")
    assert items == sample_items(tasks, 42, seed=7, split="train")
    assert items != sample_items(tasks, 42, seed=8, split="train")
    assert len({item.prompt for item in items}) == 42
    assert [item.family for item in items[:5]] == ["sum", "let", "swap", "max", "sum"]
    assert [i for i in items if i.family == "let"] == sample_items([Let()], 11, seed=7, split="train")


def test_level_bounds_the_size() -> None:
    rng = random.Random(0)
    assert {SumMod().generate(rng, 0.0).meta["n"] for _ in range(50)} == {3}
    assert {SumMod().generate(rng, 1.0).meta["n"] for _ in range(300)} == {3, 4, 5, 6, 7, 8}
    with pytest.raises(InputError, match="between 0 and 1"):
        SumMod().generate(rng, 1.5)


@dataclass(frozen=True)
class Few:
    """A task with three items in all, none held out."""

    name: str = "few"
    version: int = 1
    step_by_step: bool = False
    licence: str = "CC0-1.0"

    def generate(self, rng: random.Random, level: float) -> Item:
        text = rng.choice([key for key in (f"k{i}" for i in range(9)) if not held_out(key)][:3])
        return Item(self.name, text, "1", (), text)

    def verify(self, item: Item, answer: str) -> float:
        return exact_match(item, answer)


def test_running_out_of_items_is_an_error_that_names_the_task() -> None:
    assert len(sample_items([Few()], 3, seed=0, split="train")) == 3
    with pytest.raises(InputError, match="'few' ran out"):
        sample_items([Few()], 4, seed=0, split="train")
    with pytest.raises(InputError, match="no test item"):
        draw_item(Few(), random.Random(0), "test")


def test_bad_arguments() -> None:
    with pytest.raises(InputError, match="at least one task"):
        sample_items([], 1, seed=0, split="train")
    with pytest.raises(InputError, match="distinct"):
        sample_items([SumMod(), SumMod()], 1, seed=0, split="train")
    with pytest.raises(InputError, match="'train' or 'test'"):
        sample_items([SumMod()], 1, seed=0, split="dev")  # type: ignore[arg-type]
