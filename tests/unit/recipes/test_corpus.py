"""No leak through task text: steps are shown at short sizes alone, and no cue names a form."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from twofold.recipes.corpus import DataConfig, _task_texts
from twofold.recipes.pretrain import items_seed
from twofold.recipes.tiny import TinyConfig
from twofold.tasks.base import sample_items
from twofold.tasks.families import REACHES, Pick, default_families, easy_families, growing_families
from twofold.tasks.instruct import ORDERS, STYLES, asked_tasks

COUNT = 2000


@pytest.fixture(scope="module", params=[True, False], ids=["curriculum", "mixed"])
def texts(request: pytest.FixtureRequest) -> list[str]:
    return list(_task_texts(COUNT, 5, DataConfig(), curriculum=request.param))


def size_of(prompt: str) -> int:
    """Digits to be taken away, or turns."""
    return len(prompt.split(": ")[1].split())


def test_no_size_beyond_the_short_reach_is_shown(texts: list[str]) -> None:
    seen: dict[str, Counter[int]] = {name: Counter() for name in REACHES["short"]}
    for text in texts:
        prompt = text.split("\n")[0]
        if (name := prompt.split()[0].rstrip(":")) in seen:
            seen[name][size_of(prompt)] += 1
    for name, (low, high) in REACHES["short"].items():
        assert set(seen[name]) == set(range(low, high + 1)), name
        assert sum(seen[name].values()) > 150


def test_no_cue_names_a_form(texts: list[str]) -> None:
    words = {word for text in texts for word in re.findall(r"[a-z]+", text)}
    assert not words & {*STYLES, *ORDERS}
    cues = {text.split("\n")[0].split()[-1] for text in texts if re.search(r" style |^order ", text)}
    assert cues == {"any"}
    names = {task.name for task in asked_tasks(easy_families())}
    assert not any(name in text for name in names for text in texts)


def test_every_form_is_shown_in_equal_shares() -> None:
    texts = list(_task_texts(6000, 6, DataConfig(shown_share=1.0, easy_share=0.0, lookup_share=0.0), curriculum=True))
    replies = [text.split("\n")[1] for text in texts if " style any" in text]
    shown = Counter(re.sub(r"\d", "0", reply) for reply in replies)
    assert set(shown) == {style.format(0) for style in STYLES.values()}
    even = len(replies) / len(STYLES)
    assert len(replies) == 3000 and all(abs(count - even) < 0.15 * even for count in shown.values()), shown


def test_which_families_are_shown_and_how_often_with_steps(texts: list[str]) -> None:
    names = Counter(text.split()[0].rstrip(":") for text in texts if " style " not in text and text[:5] != "order")
    assert set(names) == {task.name for task in [*default_families(), Pick()]}
    steps = {task.name for task in default_families() if task.step_by_step}
    hard = [text for text in texts if text.split()[0].rstrip(":") in steps]
    assert sum("\n\n" in text for text in hard) / len(hard) == pytest.approx(DataConfig().think_share, abs=0.03)
    assert names["swap"] / names["sum"] == pytest.approx(2, rel=0.35)


def test_the_recipe_asks_for_no_more_held_out_items_than_there_are() -> None:
    """The data stage keeps 400 out of text, every measurement wants as many of a family as its settings say."""
    sample_items(default_families(), 400, 0, "test")
    for tasks in (default_families(), growing_families("long"), growing_families("beyond")):
        sample_items(tasks, TinyConfig().measure.items_per_family * len(tasks), items_seed(0), "test")
