"""Scoring a checkpoint on queries: one row an item, with the settings that produced it, so a score can be re-made.

Truncation and unclosed thoughts are part of every score. Item rows are kept for paired tests between checkpoints.
Not here: which queries, or what a score means for a claim.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from twofold.base.records import SamplingParams
from twofold.engine.engine import Engine
from twofold.episodes.play import Trajectory, play
from twofold.eval.stats import mean_interval, pass_at_k_interval, wilson
from twofold.tasks.query import Query
from twofold.text.chat import Renderer


@dataclass
class Scores:
    """Results on one list of queries under one setting.

    correct[i] holds the verdicts of the samples of item i; followed likewise for the mode. kinds[i] names its sort.
    """

    settings: dict[str, Any]
    kinds: list[str] = field(default_factory=list)
    correct: list[list[float]] = field(default_factory=list)
    followed: list[list[float]] = field(default_factory=list)
    thinking_tokens: list[list[int]] = field(default_factory=list)
    truncated: float = 0.0
    unclosed: float = 0.0

    def summary(self) -> dict[str, Any]:
        """Accuracy and mode following with 95 % intervals, overall and by kind; JSON-able."""
        by_kind: dict[str, list[int]] = defaultdict(list)
        for index, kind in enumerate(self.kinds):
            by_kind[kind].append(index)
        tokens = [t for row in self.thinking_tokens for t in row]
        return {
            "settings": self.settings,
            "accuracy": _interval(self.correct),
            "followed": _interval(self.followed),
            "by_kind": {kind: _interval([self.correct[i] for i in rows]) for kind, rows in by_kind.items()},
            "followed_by_kind": {kind: _interval([self.followed[i] for i in rows]) for kind, rows in by_kind.items()},
            "items": len(self.kinds),
            "mean_thinking_tokens": sum(tokens) / max(1, len(tokens)),
            "truncated": self.truncated,
            "unclosed": self.unclosed,
        }

    def pass_at(self, k: int) -> dict[str, float]:
        """Unbiased pass@k over items, with its interval."""
        return asdict(pass_at_k_interval([(len(row), round(sum(row))) for row in self.correct], k))

    def only(self, kinds: Sequence[str]) -> list[list[float]]:
        """Verdicts of the items of some kinds, in order, for paired tests."""
        return [row for row, kind in zip(self.correct, self.kinds, strict=True) if kind in kinds]

    def to_json(self) -> dict[str, Any]:
        """Everything, item rows included."""
        return asdict(self)


def evaluate(
    engine: Engine, renderer: Renderer, queries: Sequence[Query], params: SamplingParams
) -> tuple[Scores, list[list[Trajectory]]]:
    """Play every query ``params.n`` times and score the episodes; returns the scores and the episodes."""
    groups = play(engine, renderer, queries, params)
    return score(queries, groups, params), groups


def score(queries: Sequence[Query], groups: Sequence[Sequence[Trajectory]], params: SamplingParams) -> Scores:
    """Scores of episodes already played."""
    flat = [t for group in groups for t in group]
    return Scores(
        settings=asdict(params),
        kinds=[query.kind for query in queries],
        correct=[[t.correct for t in group] for group in groups],
        followed=[[float(t.followed_mode) for t in group] for group in groups],
        thinking_tokens=[[t.thinking_tokens for t in group] for group in groups],
        truncated=sum(t.truncated for t in flat) / max(1, len(flat)),
        unclosed=sum(t.final is None or not t.final.closed for t in flat) / max(1, len(flat)),
    )


def _interval(rows: Sequence[Sequence[float]]) -> dict[str, float]:
    """Wilson for one sample an item, normal over item means otherwise."""
    if all(len(row) == 1 for row in rows):
        return asdict(wilson(round(sum(row[0] for row in rows)), len(rows)))
    return asdict(mean_interval(rows))
