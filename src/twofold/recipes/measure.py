"""Evaluation stages: the same battery for every checkpoint, on held-out items that are fixed for all seeds.

Items come from the test split with a constant seed, so checkpoints, arms and seeds compare item by item. Nothing is
trained and nothing is chosen here; what a number means for a claim is in ``claims.py``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from twofold.base.config import Config
from twofold.base.files import write_json
from twofold.base.records import SamplingParams
from twofold.episodes.play import Trajectory
from twofold.eval.scores import Scores, evaluate
from twofold.llm import LLM
from twofold.recipes.chain import StageContext
from twofold.recipes.post import families, general_queries, hard_families, mode_queries
from twofold.tasks.base import sample_items
from twofold.tasks.query import FLAG_PATTERNS, Query, single

# Of every held-out set: the same items whatever the run's seed. Changed once the recipe's settings are chosen, so that
# nothing is judged on the items it was chosen with.
ITEMS_SEED = 20261125
THINK = SamplingParams(temperature=0.6, max_tokens=160)


class MeasureConfig(Config):
    """Sizes of the battery; a size of 0 leaves that part out."""

    items_per_family: int = 150
    samples: int = 2
    hot_samples: int = 8
    pass_k: int = 8
    mode_queries: int = 900
    general_per_kind: int = 150
    budgets: tuple[int, ...] = ()
    budget_items: int = 100
    sample_count: int = 6


def measure_checkpoint(context: StageContext) -> None:
    """Score the one model among the inputs; writes scores.json, items.json (rows for paired tests) and samples.json."""
    config: MeasureConfig = context.config
    (folder,) = context.inputs.values()
    policy = LLM(folder)
    parts = Battery(policy, config, context.seed)
    context.progress.start(5, "part")
    results = parts.core()
    context.progress.update(2)
    if config.mode_queries:
        results["modes"] = parts.modes()
    context.progress.update(3)
    if config.general_per_kind:
        results["general"] = parts.general()
    context.progress.update(4)
    budget = parts.budget() if config.budgets else None
    context.progress.update(5)
    scores: dict[str, Any] = {name: part.summary() for name, part in results.items()}
    if config.hot_samples:
        scores["hot"]["pass_at_k"] = results["hot"].pass_at(config.pass_k)
    write_json(context.out / "scores.json", scores | {"budget": budget})
    write_json(context.out / "items.json", {name: part.to_json() for name, part in results.items()})
    write_json(context.out / "samples.json", parts.samples)
    context.progress.finish()


class Battery:
    """The parts of the evaluation of one policy."""

    def __init__(self, policy: LLM, config: MeasureConfig, seed: int) -> None:
        self.policy, self.config = policy, config
        self.params = replace(THINK, seed=1_000_000 * (seed + 1))
        tasks = families()
        items = sample_items(list(tasks.values()), config.items_per_family * len(tasks), ITEMS_SEED, "test")
        self.think = [single(item, tasks[item.family]) for item in items]
        self.direct = [single(item, tasks[item.family], hard_switch=True) for item in items]
        self.soft = [single(item, tasks[item.family], "no_think") for item in items]
        hard = {task.name for task in hard_families()}
        self.hard = [query for query in self.think if query.item.family in hard]
        self.samples: list[dict[str, Any]] = []

    def _run(self, queries: list[Query], params: SamplingParams, title: str = "") -> Scores:
        scores, groups = evaluate(self.policy.engine, self.policy.renderer, queries, params)
        if title:
            step = max(1, len(groups) // self.config.sample_count)
            self.samples += [sample_row(title, group[0]) for group in groups[::step][: self.config.sample_count]]
        return scores

    def core(self) -> dict[str, Scores]:
        """Thinking, the hard switch and the soft switch at T = 0.6 and greedy; T = 1 with pass@k when asked for."""
        params = self.params
        greedy = replace(params, temperature=0.0)
        out = {
            "think": self._run(self.think, replace(params, n=self.config.samples), "thinking"),
            "direct": self._run(self.direct, params, "hard switch"),
            "no_think": self._run(self.soft, params, "/no_think"),
        }
        if self.config.hot_samples:
            out["greedy"] = self._run(self.hard, greedy)
            out["hot"] = self._run(self.hard, replace(params, temperature=1.0, n=self.config.hot_samples))
        return out

    def modes(self) -> Scores:
        """Every flag pattern, and the hard switch against flags."""
        queries = mode_queries(tuple(FLAG_PATTERNS), self.config.mode_queries, ITEMS_SEED, "test")
        tasks = families()
        items = sample_items(list(tasks.values()), self.config.mode_queries // 8, ITEMS_SEED + 1, "test")
        switched = [
            single(item, tasks[item.family], "think" if number % 2 else None, True, "mode: hard switch")
            for number, item in enumerate(items)
        ]
        return self._run([*queries, *switched], self.params, "flags")

    def general(self) -> Scores:
        """The task kinds of general RL."""
        queries = general_queries(self.config.general_per_kind, ITEMS_SEED, "test")
        return self._run(queries, self.params, "general")

    def budget(self) -> list[dict[str, Any]]:
        """Accuracy against the thinking budget, with a forced stop and with plain truncation of the same samples."""
        queries = self.hard[: 3 * self.config.budget_items]
        rows = []
        for limit in self.config.budgets:
            params = replace(self.params, thinking_budget=limit)
            forced, groups = evaluate(self.policy.engine, self.policy.renderer, queries, params)
            cut = [[_plainly_cut(t) for t in group] for group in groups]
            truncated = replace(forced, correct=cut)
            rows.append(
                {
                    "budget": limit,
                    "forced": forced.summary()["accuracy"],
                    "truncated": truncated.summary()["accuracy"],
                    "forced_share": sum(t.forced for g in groups for t in g) / len(queries),
                    "max_thinking_tokens": max(t.thinking_tokens for g in groups for t in g),
                    "forced_items": forced.correct,
                    "truncated_items": cut,
                }
            )
        return rows


def _plainly_cut(trajectory: Trajectory) -> float:
    """The verdict without the forced stop: a thought that did not end within the budget leaves no answer.

    Up to the budget's last token the two arms are the same sample (its tokens depend on seed and position alone).
    """
    return 0.0 if trajectory.forced else trajectory.correct


def sample_row(title: str, trajectory: Trajectory) -> dict[str, Any]:
    """One episode for people to read."""
    final = trajectory.final
    turns = [f"{m.role}: {m.content}" for m in trajectory.query.messages]
    return {
        "title": title,
        "kind": trajectory.query.kind,
        "mode": trajectory.query.mode,
        "prompt": "\n".join(turns) if len(turns) > 1 else trajectory.query.messages[0].content,
        "reasoning": (trajectory.first.reasoning if trajectory.first else None) or "",
        "answer": final.content if final else "",
        "calls": [f"{c.name}({c.arguments})" for c in (trajectory.first.tool_calls if trajectory.first else ())],
        "tool_results": trajectory.tool_results,
        "expected": trajectory.query.item.answer,
        "correct": trajectory.correct == 1.0,
        "followed": trajectory.followed_mode,
    }
