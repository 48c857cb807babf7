"""Queries of distillation: the three arms are asked in the same forms, and never for what is measured."""

from __future__ import annotations

from collections import Counter

import pytest

from twofold.base.split import held_out
from twofold.recipes.distill import both_modes, thinking_queries
from twofold.recipes.saw import forms_of
from twofold.tasks.families import REACHES


@pytest.mark.parametrize("seed", range(3))
def test_arms_think_about_short_and_long_items_in_two_forms(seed: int) -> None:
    queries = thinking_queries(300, seed)
    assert forms_of(queries) == {"no flag": 150, "/think": 150}
    reach = Counter(
        name for query in queries for name, sizes in REACHES.items()
        if query.kind in sizes and sizes[query.kind][0] <= query.item.meta["n"] <= sizes[query.kind][1]
    )  # fmt: skip
    assert reach == {"short": 50, "long": 150}  # besides 100 of families that come in one reach
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
