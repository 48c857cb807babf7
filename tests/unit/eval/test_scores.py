"""Scores: one row an item, truncation and open thoughts in every score, intervals by kind."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from twofold.base.records import SamplingParams
from twofold.episodes.play import Trajectory
from twofold.eval.scores import Scores, score
from twofold.eval.stats import wilson
from twofold.tasks.base import Item
from twofold.tasks.families import SumMod
from twofold.tasks.query import Query, single
from twofold.text.parse import Parsed

ITEM = Item("sum", "sum mod 10: E1 B5", "6", (), "sum")
PARAMS = SamplingParams(0.6, n=2, seed=7)


def query(kind: str, flag: Any = None) -> Query:
    return single(ITEM, SumMod(), flag, kind=kind)


def episode(
    asked: Query, answer: str, reasoning: str | None = " a", closed: bool = True, cut: bool = False
) -> Trajectory:
    parsed = Parsed(reasoning, answer, (), closed, not cut, ())
    return Trajectory(asked, 0, [], [], [], [], parsed, parsed, cut, thinking_tokens=4 if reasoning else 0)


QUERIES = [query("a"), query("b"), query("a", "no_think")]
GROUPS = [
    [episode(QUERIES[0], "6"), episode(QUERIES[0], "5")],
    [episode(QUERIES[1], "6", None), episode(QUERIES[1], "", closed=False, cut=True)],
    [episode(QUERIES[2], "6", ""), episode(QUERIES[2], "6")],
]


def test_rows_and_rates() -> None:
    scores = score(QUERIES, GROUPS, PARAMS)
    assert scores.correct == [[1, 0], [1, 0], [1, 1]] and scores.followed == [[1, 1], [0, 0], [1, 0]]
    assert scores.kinds == ["a", "b", "a"] and scores.thinking_tokens == [[4, 4], [0, 4], [0, 4]]
    assert scores.truncated == scores.unclosed == pytest.approx(1 / 6)
    assert scores.settings["temperature"] == 0.6 and scores.settings["seed"] == 7 and scores.settings["n"] == 2
    assert scores.only(["a"]) == [[1, 0], [1, 1]] and scores.only(["none"]) == []
    again = Scores(**json.loads(json.dumps(scores.to_json())))
    assert again.correct == scores.correct and again.settings["top_p"] == 1.0


def test_several_samples_of_one_item_are_not_independent_evidence() -> None:
    queries, groups = [*QUERIES, query("b")], [*GROUPS, [episode(query("b"), "6")] * 2]
    summary = score(queries, groups, PARAMS).summary()
    assert summary["accuracy"]["value"] == pytest.approx(0.75) and summary["items"] == 4
    half = summary["accuracy"]["high"] - 0.75
    assert half == pytest.approx(1.96 * (0.25 / 3 / 4) ** 0.5)  # over 4 item means, not over 8 samples
    assert summary["by_kind"]["a"]["value"] == 0.75 and summary["followed_by_kind"]["b"]["value"] == 0.5
    assert summary["mean_thinking_tokens"] == pytest.approx(3.0)
    assert summary["truncated"] == summary["unclosed"] == pytest.approx(1 / 8)
    json.dumps(summary)


def test_one_sample_an_item_gives_a_wilson_interval() -> None:
    summary = score(QUERIES, [group[:1] for group in GROUPS], replace(PARAMS, n=1)).summary()
    expected = wilson(3, 3)
    assert summary["accuracy"] == {"value": 1.0, "low": expected.low, "high": expected.high}
    assert summary["by_kind"]["b"]["value"] == 1.0


def test_pass_at_k() -> None:
    scores = score(QUERIES, GROUPS, PARAMS)
    assert scores.pass_at(1)["value"] == pytest.approx(2 / 3) and scores.pass_at(2)["value"] == 1.0
