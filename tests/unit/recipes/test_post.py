"""Queries and candidates of post-training up to reasoning RL; the stages themselves run in tests/e2e."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from twofold.base.split import held_out
from twofold.post.synth import reject_reason
from twofold.recipes.post import ColdStartConfig, _candidates, families, hard_families, mixed_queries
from twofold.tasks.base import Task, sample_items
from twofold.tasks.families import REACHES, default_families, signed_families
from twofold.train.loop import OptimConfig

CONFIG = ColdStartConfig(optim=OptimConfig(muon_lr=0.0), steps=1, bad_share=1.0)


def test_families() -> None:
    assert list(families().values()) == default_families()
    assert [task.name for task in hard_families()] == ["sum", "swap", "run", "least", "top"]
    assert hard_families()[2:4] == signed_families("pure")  # no solver steps of mixed items


def test_rl_asks_for_mixed_signs_alone() -> None:
    queries = mixed_queries(40, 22)
    assert Counter(query.kind for query in queries) == {"run": 40, "least": 40}
    for query in queries:
        low, high = REACHES["mixed"][query.kind]
        letters = [entry[0] for entry in query.item.prompt.split(": ")[1].split()]
        assert len({letter.isupper() for letter in letters}) == 2, query.item.prompt
        assert low <= query.item.meta["n"] <= high and not held_out(query.item.key)
        assert query.form == "no flag" and query.mode == "think"
        assert query.task.verify(query.item, query.item.answer) == 1.0


@pytest.mark.parametrize("task", hard_families(), ids=lambda task: task.name)
def test_spoiled_candidates_fall_to_a_filter(task: Task) -> None:
    """The good ones come first and pass; the last one is wrong on purpose, in its steps and in its answer."""
    rng = random.Random(0)
    for item in sample_items([task], 60, 1, "train"):
        *good, bad = _candidates(item, CONFIG, rng)
        assert [response.reasoning for response in good] == list(item.traces[: CONFIG.traces_per_query])
        assert all(reject_reason(response, task) is None for response in good)
        assert bad.reasoning not in item.traces
        assert reject_reason(bad, task) is not None, (item.prompt, bad.reasoning, bad.answer)
