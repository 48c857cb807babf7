"""The split by content, canonical keys and balanced sampling."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twofold.base.records import InputError
from twofold.tasks.base import Item, Split, Task, canonical_key, draw_item, exact_match, held_out, sample_items
from twofold.tasks.families import LETTERS, Hop, Least, Pick, Run, SumMod, Swap, Top, default_families, signed_families


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
    test = sample_items(tasks, 300, seed=2, split="test")
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
    names = ["sum", "swap", "run", "least", "top", "max", "min", "last"]
    assert [item.family for item in items[:9]] == [*names, "sum"]
    assert [i for i in items if i.family == "sum"] == sample_items([SumMod()], 6, seed=7, split="train")


@pytest.mark.parametrize(
    "task",
    [
        Swap(4, 6),
        Swap(),
        SumMod(3, 5),
        SumMod(),
        Run(),
        Run("mixed"),
        Least(),
        Least("mixed", 5, 8),
        Least("beyond", 9, 10),
        Top(),
    ],
    ids=repr,
)
def test_sizes_get_equal_shares_of_train_items(task: Task) -> None:
    """One size has up to 81 times the keys of another."""
    sizes = Counter(item.meta["n"] for item in sample_items([task], 600, seed=3, split="train"))
    even = 600 / len(sizes)
    assert len(sizes) == task.high - task.low + 1  # type: ignore[attr-defined]
    assert all(abs(count - even) < 0.25 * even for count in sizes.values()), sizes


@pytest.mark.parametrize("task", [Swap(4, 6), SumMod(3, 5)], ids=repr)
def test_sizes_get_equal_shares_of_test_items_too(task: Task) -> None:
    """Of ``swap`` 6, 22 and 57 keys are held out: in one draw from all of them size 6 would have two items of three."""
    sizes: Counter[int] = Counter()
    for seed in range(60):
        sizes.update(item.meta["n"] for item in sample_items([task], 6, seed=seed, split="test"))
    assert len(sizes) == 3 and all(abs(count - 120) < 30 for count in sizes.values()), sizes


def test_a_size_without_further_items_makes_way_for_others() -> None:
    items = sample_items([Swap(4, 6)], 80, seed=0, split="test")
    sizes = Counter(item.meta["n"] for item in items)
    assert sizes[4] == 6 and sizes[5] > 15 and sizes[6] > 40  # all that size 4 has
    assert draw_item(Swap(3, 4), random.Random(0), "test").meta["n"] == 4  # of size 3 no key is held out


@pytest.mark.parametrize("task", [*default_families(), *signed_families("mixed"), *signed_families("beyond")], ids=repr)
def test_test_items_are_different_questions(task: Task) -> None:
    test = sample_items([task], 80, seed=4, split="test")  # as many as the recipes measure
    assert len({item.key for item in test}) == 80 and all(held_out(item.key) for item in test)
    train = sample_items([task], 200, seed=4, split="train")
    assert len({item.prompt for item in train}) == 200 and not any(held_out(item.key) for item in train)


def test_train_items_may_be_one_question_under_other_letters() -> None:
    items = sample_items([Swap(4, 4)], 300, seed=0, split="train")
    assert len({item.prompt for item in items}) == 300 > 81 > len({item.key for item in items})


def test_level_bounds_the_size() -> None:
    rng = random.Random(0)
    assert {SumMod().generate(rng, 0.0).meta["n"] for _ in range(50)} == {3}
    assert {SumMod().generate(rng, 1.0).meta["n"] for _ in range(300)} == {3, 4, 5, 6, 7, 8}
    assert {Swap().generate(rng, 1.0).meta["n"] for _ in range(300)} == {3, 4, 5, 6, 7, 8}
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
    cases: list[tuple[Task, int, Split]] = [(Few(), 4, "train"), (Few(), 1, "test"), (Swap(4, 4), 7, "test")]
    for task, count, split in cases:
        with pytest.raises(InputError, match=f"'{task.name}' has no further {split} item .*; ask for fewer items or"):
            sample_items([task], count, seed=0, split=split)
    with pytest.raises(InputError, match="no further test item"):
        draw_item(Few(), random.Random(0), "test")
    assert len(sample_items([Swap(4, 4)], 6, seed=0, split="test")) == 6


def test_bad_arguments() -> None:
    with pytest.raises(InputError, match="at least one task"):
        sample_items([], 1, seed=0, split="train")
    with pytest.raises(InputError, match="distinct"):
        sample_items([SumMod(), SumMod()], 1, seed=0, split="train")
    with pytest.raises(InputError, match="'train' or 'test'"):
        sample_items([SumMod()], 1, seed=0, split="dev")  # type: ignore[arg-type]
