"""Queries of distillation: the three arms are asked in the same forms, and never for what is measured."""

from __future__ import annotations

from collections import Counter

import pytest

from twofold.base.split import held_out
from twofold.recipes.distill import both_modes, thinking_queries
from twofold.recipes.saw import forms_of
from twofold.tasks.families import REACHES
from twofold.tasks.query import Query


def signs(query: Query) -> int:
    """How many signs a `run` or `top` item has: the cases of its letters."""
    return len({entry[0].isupper() for entry in query.item.prompt.split(": ")[1].split()})


@pytest.mark.parametrize("seed", range(3))
def test_arms_think_about_pure_and_mixed_items_in_two_forms(seed: int) -> None:
    queries = thinking_queries(300, seed)
    assert forms_of(queries) == {"no flag": 150, "/think": 150}
    signed = [query for query in queries if query.kind in REACHES["mixed"]]
    assert Counter(signs(query) for query in signed) == {1: 60, 2: 150}  # besides 90 of families without signs
    for query in signed:
        low, high = REACHES["mixed"][query.kind]
        assert low <= query.item.meta["n"] <= high
    assert not any(held_out(query.item.key) for query in queries)
    assert all(query.task.verify(query.item, query.item.answer) == 1.0 for query in queries)
    flagged = Counter(query.kind for query in queries if query.form == "/think")
    for family, count in Counter(query.kind for query in queries).items():
        assert 0.3 * count < flagged[family] < 0.7 * count, (family, flagged)  # the form says nothing of the family


def test_the_off_policy_phase_has_both_modes() -> None:
    queries = both_modes(200, 0.6, 5)
    assert forms_of(queries) == {"no flag": 60, "/think": 60, "/no_think": 80}
    assert Counter(query.mode for query in queries) == {"think": 120, "no_think": 80}
    assert not any(held_out(query.item.key) for query in queries)
    direct = [query for query in queries if query.form == "/no_think" and query.kind in REACHES["mixed"]]
    assert len(direct) == 20 and all(signs(query) == 1 for query in direct)
