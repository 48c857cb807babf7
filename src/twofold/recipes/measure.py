"""Evaluation stages: the same battery for every checkpoint of a run, on held-out items drawn for its seed.

Checkpoints and arms of one run compare item by item; another training seed has other items, so that an interval over
seeds holds the noise of items too. Nothing is trained and nothing is chosen here; what a number means for a claim is
in ``claims``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from twofold.base.config import Config
from twofold.base.files import write_json
from twofold.base.records import SamplingParams
from twofold.episodes.play import Trajectory
from twofold.eval.scores import Scores, evaluate
from twofold.llm import LLM
from twofold.recipes.chain import StageContext
from twofold.recipes.general import general_queries, mode_queries
from twofold.recipes.post import families, hard_families
from twofold.recipes.pretrain import items_seed
from twofold.tasks.base import Task, sample_items
from twofold.tasks.families import Reach, anytime_families, first_is_best, signed_families
from twofold.tasks.query import FLAG_PATTERNS, MODE_KIND, Mode, Query, single

THINK = SamplingParams(temperature=0.6, max_tokens=160)
Part = Literal["think", "direct", "no_think", "hot", "mixed", "flag", "beyond", "modes", "general", "budget"]


class MeasureConfig(Config):
    """Sizes of the battery and which parts of it are asked for."""

    parts: tuple[Part, ...] = ("think", "direct", "no_think", "beyond")
    items_per_family: int = 80
    mixed_items: int = 240  # a family, at T = 0.6 and greedily; sampled hot are as many as of other families
    samples: int = 2
    hot_samples: int = 8
    pass_k: int = 8
    per_pattern: int = 60
    general_per_kind: int = 80
    budgets: tuple[int, ...] = ()
    sample_count: int = 6


def measure_checkpoint(context: StageContext) -> None:
    """Score the one model among the inputs; writes scores.json, items.json (rows for paired tests) and samples.json."""
    config: MeasureConfig = context.config
    (folder,) = context.inputs.values()
    battery = Battery(LLM(folder), config, context.seed)
    context.progress.start(len(config.parts), "part")
    results: dict[str, Scores] = {}
    budget = None
    for number, part in enumerate(config.parts, start=1):
        if part == "budget":
            budget = battery.budget()
        else:
            results |= battery.measure(part)
        context.progress.update(number)
    scores: dict[str, Any] = {name: result.summary() for name, result in results.items()}
    for name in ("hot", "mixed_hot", "mixed_flag"):
        if name in results:
            scores[name]["pass_at_k"] = results[name].pass_at(config.pass_k)
    write_json(context.out / "scores.json", scores | {"budget": budget})
    write_json(context.out / "items.json", {name: result.to_json() for name, result in results.items()})
    write_json(context.out / "samples.json", battery.samples)
    context.progress.finish()


class Battery:
    """The parts of the evaluation of one policy."""

    def __init__(self, policy: LLM, config: MeasureConfig, seed: int) -> None:
        self.policy, self.config = policy, config
        self.items_seed = items_seed(seed)
        self.params = replace(THINK, seed=1_000_000 * (seed + 1))
        self.hot = replace(self.params, temperature=1.0, n=config.hot_samples)
        self.samples: list[dict[str, Any]] = []

    def measure(self, part: Part) -> dict[str, Scores]:
        """One part of the battery; some give several results, each on the same items."""
        params, several = self.params, replace(self.params, n=self.config.samples)
        if part == "think":
            return {"think": self._run(self._short(), several, "thinking")}
        if part == "direct":
            return {"direct": self._run(self._short(hard_switch=True), params, "hard switch")}
        if part == "no_think":
            return {"no_think": self._run(self._short("no_think"), params, "/no_think")}
        if part == "hot":
            hard = {task.name for task in hard_families()}
            return {"hot": self._run([query for query in self._short() if query.item.family in hard], self.hot)}
        if part == "mixed":
            queries = self._asked(signed_families("mixed"), each=self.config.mixed_items)
            return {
                "mixed": self._run(queries, several, "mixed"),
                "mixed_greedy": self._run(queries, replace(params, temperature=0.0)),
                "mixed_hot": self._run(self._signed("mixed"), self.hot),
            }
        if part == "flag":
            return {"mixed_flag": self._run(self._signed("mixed", "think"), self.hot)}
        if part == "beyond":
            return {"beyond": self._run(self._signed("beyond"), several, "longer than trained")}
        if part == "modes":
            return {"modes": self._run(self._modes(), params, "flags")}
        return {"general": self._run(self._general(), params, "general")}

    def _run(self, queries: list[Query], params: SamplingParams, title: str = "") -> Scores:
        scores, groups = evaluate(self.policy.engine, self.policy.renderer, queries, params)
        if title:
            step = max(1, len(groups) // self.config.sample_count)
            self.samples += [sample_row(title, group[0]) for group in groups[::step][: self.config.sample_count]]
        return scores

    def _short(self, flag: Mode | None = None, hard_switch: bool = False) -> list[Query]:
        return self._asked(list(families().values()), flag, hard_switch)

    def _signed(self, reach: Reach, flag: Mode | None = None) -> list[Query]:
        return self._asked(signed_families(reach), flag)

    def _asked(
        self, tasks: Sequence[Task], flag: Mode | None = None, hard_switch: bool = False, each: int | None = None
    ) -> list[Query]:
        by_name = {task.name: task for task in tasks}
        items = sample_items(tasks, (each or self.config.items_per_family) * len(tasks), self.items_seed, "test")
        return [single(item, by_name[item.family], flag, hard_switch) for item in items]

    def _modes(self) -> list[Query]:
        """Every flag pattern, and the hard switch against flags."""
        patterns = tuple(FLAG_PATTERNS)
        queries = mode_queries(patterns, self.config.per_pattern * len(patterns), self.items_seed, "test")
        tasks = families()
        items = sample_items(list(tasks.values()), self.config.per_pattern, self.items_seed + 1, "test")
        switched = [
            single(item, tasks[item.family], "think" if number % 2 else None, True, f"{MODE_KIND}hard switch")
            for number, item in enumerate(items)
        ]
        return [*queries, *switched]

    def _general(self) -> list[Query]:
        """The task kinds of general RL."""
        return general_queries(self.config.general_per_kind, self.items_seed, "test")

    def budget(self) -> list[dict[str, Any]]:
        """Verdicts at each thinking budget on families in which part of the steps is worth something.

        ``stopped`` says whose thought was ended by the budget; ``chance`` is how often the best fixed guess is right.
        """
        queries = self._asked(anytime_families())
        rows = []
        for limit in self.config.budgets:
            params = replace(self.params, thinking_budget=limit)
            _, groups = evaluate(self.policy.engine, self.policy.renderer, queries, params)
            played = [group[0] for group in groups]
            rows.append(
                {
                    "budget": limit,
                    "kinds": [query.kind for query in queries],
                    "correct": [t.correct for t in played],
                    "stopped": [float(t.forced) for t in played],
                    "chance": [first_is_best(query.item.meta["n"]) for query in queries],
                    "thinking_tokens": [t.thinking_tokens for t in played],
                }
            )
        return rows


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
