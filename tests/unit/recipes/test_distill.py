"""Queries of distillation: the three arms are asked in the same forms, and never for what is measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from twofold.base.split import held_out
from twofold.post import synth
from twofold.post.rl import RLConfig
from twofold.recipes import distill, post
from twofold.recipes.distill import QUERIES, asked_by_all, both_modes, student_rl, thinking_queries
from twofold.recipes.post import RLStageConfig
from twofold.recipes.saw import forms_of
from twofold.tasks.families import REACHES
from twofold.tasks.query import Query
from twofold.train.loop import OptimConfig


def signs(query: Query) -> int:
    """How many signs a `run` or `least` item has: the cases of its letters."""
    return len({entry[0].isupper() for entry in query.item.prompt.split(": ")[1].split()})


@pytest.mark.parametrize("seed", range(3))
def test_arms_think_about_pure_and_mixed_items_in_two_forms(seed: int) -> None:
    queries = thinking_queries(300, seed)
    assert forms_of(queries) == {"no flag": 150, "/think": 150}
    signed = [query for query in queries if query.kind in REACHES["mixed"]]
    assert Counter(signs(query) for query in signed) == {1: 60, 2: 150}  # besides 90 of families without signs
    for query in signed:
        low, high = REACHES["mixed" if signs(query) == 2 else "pure"][query.kind]
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


def test_all_arms_ask_what_rl_found_learnable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pools: list[Sequence[Query]] = []
    trained: list[Sequence[Query]] = []
    results: list[dict[str, Any]] = []

    def every_third(engine: Any, renderer: Any, pool: Sequence[Query], *_: Any) -> tuple[list[Query], list[float]]:
        pools.append(pool)
        return [*pool[::3]], [0.5] * len(pool)

    def train(context: Any, policy: Any, queries: Sequence[Query], *_: Any) -> dict[str, Any]:
        trained.append(queries)
        return {}

    engine = SimpleNamespace(generated_tokens=7)
    monkeypatch.setattr(distill, "LLM", lambda *_, **__: SimpleNamespace(engine=engine, renderer=None))
    monkeypatch.setattr(post, "flops", lambda policy, trained, generated: 10.0 * generated)
    monkeypatch.setattr(synth, "learnable", every_third)
    monkeypatch.setattr(distill, "train_rl", train)
    monkeypatch.setattr(distill, "finish", lambda policy, context, result: results.append(result))
    config = RLStageConfig(rl=RLConfig(steps=1), optim=OptimConfig(muon_lr=0.0))
    student_rl(SimpleNamespace(config=config, inputs={"student_sft": tmp_path}, out=tmp_path, seed=0))  # type: ignore[arg-type]
    asked = asked_by_all(SimpleNamespace(inputs={"student_rl": tmp_path}))  # type: ignore[arg-type]
    ((chosen,), (pool,)) = trained, pools
    assert len(pool) == QUERIES and list(chosen) == list(pool[::3])
    assert results == [{"pool": QUERIES, "learnable": len(chosen), "mean_pass_rate": 0.5, "choosing_flops": 70.0}]
    assert [(q.messages, q.form, q.kind, q.mode) for q in asked] == [
        (q.messages, q.form, q.kind, q.mode) for q in chosen
    ]
    assert forms_of(asked) == forms_of(chosen) and set(forms_of(asked)) == {"no flag", "/think"}
    for again, query in zip(asked, chosen, strict=True):
        assert (again.item.key, again.item.answer, again.item.meta) == (
            query.item.key,
            query.item.answer,
            query.item.meta,
        )
        assert again.task.verify(again.item, query.item.answer) == 1.0
        assert again.task.verify(again.item, query.item.answer + "x") == 0.0
    assert {signs(query) for query in asked if query.kind in REACHES["mixed"]} == {1, 2}
    assert not any(held_out(query.item.key) for query in asked)
