"""Queries of general RL: which skills and forms they have, and that nothing of a measurement is in training."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

import pytest

from twofold.base.split import held_out
from twofold.recipes.general import (
    SKILLS,
    TAUGHT_SYSTEM,
    TRAIN_UNITS,
    general_queries,
    mode_queries,
    skill_queries,
)
from twofold.recipes.measure import MeasureConfig
from twofold.recipes.pretrain import items_seed
from twofold.recipes.saw import forms_of
from twofold.recipes.tiny import TinyConfig
from twofold.tasks.base import sample_items
from twofold.tasks.families import default_families
from twofold.tasks.instruct import ORDERS, STYLES
from twofold.tasks.query import FLAG_PATTERNS, HELD_OUT_PATTERNS, MODE_KIND, SYSTEM_PATTERNS, TAUGHT_PATTERNS, Query
from twofold.text.chat import CHAT_TEMPLATE, Renderer
from twofold.text.tokenizer import Tokenizer

SEEDS = range(4)


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    items = sample_items(default_families(), 60, 0, "train")
    return Renderer(Tokenizer.train([*(item.prompt for item in items), CHAT_TEMPLATE, "user assistant system"], 400))


def signature(query: Query, renderer: Renderer) -> tuple[str, ...]:
    """The turns and their flags in the notation of ``FLAG_PATTERNS``, read off the conversation as it is rendered."""
    text = renderer.tokenizer.decode(renderer.prompt_ids(query.messages))
    found = re.findall(r"<\|im_start\|>(system|user)\n(.*?)<\|im_end\|>", text, re.DOTALL)
    turns = [(role, re.findall(r"/(no_think|think)\b", content)) for role, content in found]
    return tuple(role[0] + "".join({"think": "+", "no_think": "-"}[flag] for flag in flags) for role, flags in turns)


def test_skills() -> None:
    names = [f"style {cue}" for cue in STYLES] + [f"order {cue}" for cue in ORDERS]
    assert list(SKILLS) == names


@pytest.mark.parametrize("seed", SEEDS)
def test_training_has_every_skill_in_the_units_named(seed: int) -> None:
    kinds = Counter(query.kind for query in general_queries(12, seed, "train"))
    assert set(SKILLS) <= set(kinds)
    assert all(kinds[skill] == 12 * TRAIN_UNITS["skill"] for skill in SKILLS)
    assert [kinds[kind] for kind in ("think", "direct", "tool")] == [120, 12, 48]
    assert {*TAUGHT_SYSTEM} == {*SYSTEM_PATTERNS} - {*HELD_OUT_PATTERNS}
    system = [kinds[MODE_KIND + pattern] for pattern in TAUGHT_SYSTEM]
    assert sum(system) >= 12 * TRAIN_UNITS["system"] and max(system) - min(system) <= 4
    assert all(kinds[MODE_KIND + pattern] > 0 for pattern in TAUGHT_PATTERNS)


@pytest.mark.parametrize("seed", SEEDS)
def test_held_out_patterns_are_never_trained_on(seed: int, renderer: Renderer) -> None:
    """As many queries as the recipe asks, random patterns among them."""
    queries = general_queries(TinyConfig().general_rl.pool_per_family, seed + 44, "train")
    untaught = {FLAG_PATTERNS[pattern] for pattern in HELD_OUT_PATTERNS}
    shown = {signature(query, renderer) for query in queries}
    assert not untaught & shown
    assert not set(HELD_OUT_PATTERNS) & set(forms_of(queries))
    assert forms_of(queries)["random flags"] > 40 and {FLAG_PATTERNS[pattern] for pattern in TAUGHT_PATTERNS} <= shown
    assert len(shown) > 40 and max(map(len, shown)) == 5
    measured = mode_queries(tuple(FLAG_PATTERNS), 3 * len(FLAG_PATTERNS), seed, "test")
    assert untaught <= {signature(query, renderer) for query in measured}  # the signature does find them
    assert all(query.form in FLAG_PATTERNS for query in measured)  # what is measured has a name


def test_random_patterns_call_for_both_modes() -> None:
    spelled = [query for query in general_queries(60, 44, "train") if query.form == "random flags"]
    modes = Counter(query.mode for query in spelled)
    assert min(modes["think"], modes["no_think"]) > 0.2 * len(spelled), modes
    assert "random flags" not in forms_of(general_queries(20, 0, "test"))


def test_the_measurement_has_the_skills_and_the_three_plain_kinds() -> None:
    queries = general_queries(20, 0, "test")
    plain = dict.fromkeys(["think", "direct", "tool"], 20)
    assert Counter(query.kind for query in queries) == dict.fromkeys(SKILLS, 40) | plain
    assert {query.mode for query in queries if query.kind != "think" and query.kind != "tool"} == {"no_think"}
    tools = Counter(query.form for query in queries if query.kind == "tool")
    assert tools == {"tool, /think": 10, "tool, /no_think": 10}


@pytest.mark.parametrize("seed", SEEDS)
def test_no_measured_item_is_trained_on(seed: int, key_of: Callable[[str], str]) -> None:
    test, train = (general_queries(20, items_seed(seed) if split == "test" else seed + 44, split)
                   for split in ("test", "train"))  # fmt: skip
    assert all(held_out(query.item.key) for query in test)
    plain = [query.item for query in [*test, *train] if query.kind in ("think", "direct")]
    assert all(key_of(item.prompt) == item.key for item in plain)
    assert not any(held_out(query.item.key) for query in train)
    assert {query.item.key for query in test}.isdisjoint(query.item.key for query in train)
    # earlier turns of a conversation are questions too (the key of `calc` is not that of its prompt)
    for query in train:
        asked = [m.content.split(" /")[0].split(" style ")[0] for m in query.messages if m.role == "user"]
        keyed = [text for text in asked if not text.startswith(("calc", "order"))]
        assert not any(held_out(key_of(text)) for text in keyed), asked


def test_measured_items_differ_from_seed_to_seed() -> None:
    first, second = ({query.item.prompt for query in general_queries(20, items_seed(seed), "test")} for seed in (0, 1))
    assert len(first & second) < 0.5 * len(first)


def test_the_recipe_asks_for_no_more_items_than_there_are() -> None:
    per_kind = TinyConfig().measure.general_per_kind
    assert per_kind == MeasureConfig().general_per_kind
    for seed in range(3):
        kinds = Counter(query.kind for query in general_queries(per_kind, items_seed(seed), "test"))
        assert set(kinds) == {*SKILLS, "think", "direct", "tool"} and min(kinds.values()) == per_kind
    assert len(general_queries(TinyConfig().general_rl.pool_per_family, 44, "train")) > 1000


def test_skill_queries_are_direct_and_even() -> None:
    queries = skill_queries(5, 1, "train")
    assert Counter(query.kind for query in queries) == dict.fromkeys(SKILLS, 5)
    assert forms_of(queries) == {"/no_think": 35}
    assert all(query.task.verify(query.item, query.item.answer) == 1.0 for query in queries)
    assert mode_queries(TAUGHT_PATTERNS, 0, 1, "train") == []
