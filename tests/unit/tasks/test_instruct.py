"""Instructions: forms, orders, split, verifiers, and that a form chosen at random is at chance."""

from __future__ import annotations

import random
import re
from collections import Counter
from itertools import permutations

import pytest

from twofold.base.records import InputError
from twofold.tasks.base import Item, held_out, sample_items
from twofold.tasks.families import Direct, SumMod, Swap, easy_families
from twofold.tasks.instruct import (
    ANY,
    ORDERS,
    STYLES,
    Order,
    Styled,
    asked_tasks,
    follows_style,
    shown_tasks,
    with_style,
)

BASE = Item("max", "max: E1 B5", "5", (" E1=1 B5=5",), "key", {"n": 2})
RNG = random.Random(0)
SURFACES = {"brackets": "[5]", "quotes": '"5"', "equation": "ans=5", "twice": "5 5", "thrice": "5 5 5"}


@pytest.mark.parametrize("cue", STYLES)
def test_styles(cue: str) -> None:
    item, task = with_style(BASE, cue, RNG), Styled((Direct("max"),), cue)
    assert item.prompt == f"max: E1 B5 style {cue}" and item.family == f"style {cue}" == task.name
    assert item.answer == SURFACES[cue] and item.key == BASE.key and item.traces == BASE.traces
    assert item.meta == {"n": 2, "cue": cue, "base": "max", "base_answer": "5"}
    assert task.verify(item, f" {item.answer}\n") == 1.0
    for other, surface in SURFACES.items():
        assert task.verify(item, surface) == float(other == cue)
        assert follows_style(item, surface) == (other == cue)
    for bad in ("5", "", " ", "[]", "[[5]]", "[5", "5]", "ans=", "ans=5 ans=5", '""', '"5', "5 5 5 5", "5  5", "55"):
        assert task.verify(item, bad) == 0.0
        assert not follows_style(item, bad), bad
    for bad in (item.answer + item.answer, item.answer + " 4", "style " + cue, item.answer + "."):
        assert task.verify(item, bad) == 0.0


@pytest.mark.parametrize("cue", STYLES)
def test_a_style_may_be_followed_with_a_wrong_answer(cue: str) -> None:
    item = with_style(BASE, cue, RNG)
    wrong = SURFACES[cue].replace("5", "4")
    assert follows_style(item, wrong) and Styled((Direct("max"),), cue).verify(item, wrong) == 0.0
    assert not follows_style(with_style(BASE, "twice", RNG), "5 4")
    assert not follows_style(with_style(BASE, "thrice", RNG), "5 5 4")
    assert not follows_style(with_style(BASE, "brackets", RNG), "[5 4]")


def test_with_the_cue_any_every_style_is_right_and_each_is_shown_as_often() -> None:
    task, shown = Styled((Direct("max"),)), Counter[str]()
    for seed in range(1500):
        item = with_style(BASE, ANY, random.Random(seed))
        assert task.verify(item, item.answer) == 1.0
        shown[item.answer] += 1
    assert set(shown) == set(SURFACES.values()) and all(240 < count < 360 for count in shown.values()), shown
    item = with_style(BASE, ANY, RNG)
    assert re.fullmatch("max: E1 B5 style [a-z]{4,8}", item.prompt)
    assert all(task.verify(item, f"{surface}\n") == 1.0 for surface in SURFACES.values())
    assert all(task.verify(item, bad) == 0.0 for bad in ("5", "", "[4]", "ans=4", "5 5 5 5", "[5] [5]"))


def test_orders() -> None:
    for cue in ORDERS:
        item = Order(cue).generate(random.Random(3), 1.0)
        letters = item.meta["letters"]
        assert item.prompt == f"order {' '.join(letters)}: {cue}" and item.family == f"order {cue}"
        wanted = letters if cue == "front" else letters[::-1]
        assert item.answer == " ".join(wanted) and item.traces == ()
        right = [Order(cue).verify(item, " ".join(order)) for order in permutations(letters)]
        assert sum(right) == 1.0 and Order(cue).verify(item, f" {item.answer}\n") == 1.0  # chance is 1 in 24
        for bad in ("", "A", "".join(letters), ", ".join(letters), " ".join([*letters, letters[0]])):
            assert Order(cue).verify(item, bad) == 0.0


def test_with_the_cue_any_every_order_is_right_and_each_is_shown_as_often() -> None:
    task, shown = Order(), Counter[tuple[int, ...]]()
    for seed in range(7200):
        item = task.generate(random.Random(seed), 1.0)
        letters = item.meta["letters"]
        shown[tuple(letters.index(letter) for letter in item.answer.split())] += 1
        assert task.verify(item, item.answer) == 1.0
    assert len(shown) == 24 and all(230 < count < 370 for count in shown.values()), shown
    assert all(task.verify(item, " ".join(order)) == 1.0 for order in permutations(letters))
    missing = next(letter for letter in "ABCDEFGHIJ" if letter not in letters)
    for bad in ("", letters[0], " ".join([letters[0]] * 3), " ".join([*letters[:2], missing]), "".join(letters)):
        assert task.verify(item, bad) == 0.0


def test_a_random_style_is_right_in_one_of_five() -> None:
    """Training text shows all forms in equal shares, so this is where general RL starts."""
    rng, right, count = random.Random(5), 0.0, 0
    tasks = [task for task in asked_tasks(easy_families()) if isinstance(task, Styled)]
    by_name = {task.name: task for task in tasks}
    for item in sample_items(tasks, 1500, seed=6, split="train"):
        guess = rng.choice(sorted(STYLES.values())).format(item.meta["base_answer"])
        right += by_name[item.family].verify(item, guess)
        count += 1
    assert 0.16 < right / count < 0.24


def test_held_out_bases_stay_held_out() -> None:
    tasks = [*asked_tasks(easy_families()), *shown_tasks(easy_families())]
    test = sample_items(tasks, 120, seed=1, split="test")
    assert all(held_out(item.key) for item in test)
    assert {item.key for item in test}.isdisjoint({i.key for i in sample_items(easy_families(), 600, 2, "train")})
    keys = {cue: {Order(cue).generate(random.Random(i), 1.0).key for i in range(50)} for cue in (ANY, *ORDERS)}
    assert keys[ANY] == keys["front"] == keys["back"]  # letters held out are so under every cue


def test_asked_and_shown_tasks() -> None:
    asked = [task.name for task in asked_tasks(easy_families())]
    assert asked == [*(f"style {cue}" for cue in STYLES), "order front", "order back"]
    assert [task.name for task in shown_tasks(easy_families())] == ["style any", "order any"]
    assert not any(task.step_by_step for task in [*asked_tasks([]), *shown_tasks([])])
    assert Styled((SumMod(), Swap())).licence == "CC0-1.0"


def test_errors() -> None:
    with pytest.raises(InputError, match=r"unknown style 'verse'; known: any, brackets"):
        with_style(BASE, "verse", RNG)
    with pytest.raises(InputError, match="unknown style 'verse'"):
        Styled((Direct("max"),), "verse").generate(RNG, 1.0)
    with pytest.raises(InputError, match=r"unknown order 'side'; known: any, front, back"):
        Order("side").generate(RNG, 1.0)
    with pytest.raises(InputError, match="at least one base"):
        Styled(()).generate(RNG, 1.0)
    for item in (BASE, with_style(BASE, ANY, RNG), Order("front").generate(RNG, 1.0)):
        with pytest.raises(InputError, match="asks for no particular style; wrap it with with_style"):
            follows_style(item, "5")
