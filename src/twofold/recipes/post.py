"""Post-training up to reasoning RL: the cold start, RL with verifiers, and the arms that both are compared with.

Each function is one stage of a chain: it reads finished artefacts, trains with the one loop, and writes a complete
model folder plus what the report needs. Sizes and rates are the recipe's. Fusion is in ``fusion.py``, general RL in
``general.py``.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import field_validator

from twofold.base.config import Config
from twofold.base.files import read_json, read_jsonl, write_json, write_jsonl
from twofold.base.records import Message, SamplingParams
from twofold.episodes.play import Trajectory, play
from twofold.llm import LLM
from twofold.post import synth
from twofold.post.rewards import reasoning_reward
from twofold.post.rl import Reward, RLConfig, RolloutSource
from twofold.post.sft import ChatSource, Example
from twofold.post.synth import Response
from twofold.recipes.chain import StageContext
from twofold.recipes.pretrain import run_training, save_model
from twofold.recipes.saw import flops, forms_of, saw, steps_for
from twofold.tasks.base import Item, Task, sample_items
from twofold.tasks.families import corrupt, default_families, signed_families
from twofold.tasks.query import Query, single
from twofold.text.chat import Rendered, Renderer
from twofold.train.loop import OptimConfig, Trainer
from twofold.train.objectives import CrossEntropy, PolicyGradient


class SFTConfig(Config):
    """A supervised stage: ``steps`` updates of ``batch_size`` conversations.

    tuned: peak rates that were tried on the tuning seeds (docs/claims.md); a record that trains nothing.
    """

    optim: OptimConfig
    steps: int
    batch_size: int = 32
    tuned: tuple[float, ...] = ()


class ColdStartConfig(SFTConfig):
    """Cold start; queries are drawn per family, then filtered and balanced."""

    queries_per_family: int = 1000
    kept_per_family: int = 800
    traces_per_query: int = 3
    kept_per_query: int = 1
    bad_share: float = 0.1  # spoiled candidates mixed in, so that the filters have something to catch


class RLStageConfig(Config):
    """An RL stage: rollouts, optimiser, and how the query pool is chosen."""

    rl: RLConfig
    optim: OptimConfig
    pool_per_family: int = 150
    pass_rate: tuple[float, float] = (0.01, 0.95)
    probe_samples: int = 8
    tuned: tuple[float, ...] = ()

    @field_validator("rl")
    @classmethod
    def _can_learn(cls, rl: RLConfig) -> RLConfig:
        """Refused here, the stages before it have not been run for nothing."""
        problem = rl.problem()
        if problem:
            raise ValueError(problem)
        return rl


class RejectionConfig(Config):
    """Rejection-sampling SFT at the cost of the RL run: sampling, keeping what is right, training on it and, as often,
    on solver traces of fresh items, without which it forgets the other families."""

    optim: OptimConfig
    batch_size: int = 32
    samples: int = 24
    kept_per_query: int = 8
    tuned: tuple[float, ...] = ()


class MoreSFTConfig(Config):
    """More SFT on solver traces of fresh items, at the cost of the RL run."""

    optim: OptimConfig
    batch_size: int = 32
    items: int = 12000
    tuned: tuple[float, ...] = ()


def families() -> dict[str, Task]:
    """The own task families by name, as training text shows them."""
    return {task.name: task for task in default_families()}


def hard_families() -> list[Task]:
    """Families that need steps, as training text shows them."""
    return [task for task in default_families() if task.step_by_step]


# What `twofold chat` tells people about these models.
ABOUT = {
    "can": [
        "sum mod 10: E1 B5 I6",
        "swap I G E: a12 b23 c13",
        "run mod 10: E1 k5 I6",
        "top: E15 B52 I60 C38",
        "max: E1 B5 I6 /no_think",
    ],
    "cannot": "hold a general conversation or use tools reliably: it has half a million parameters and knows a few "
    "task formats",
}


def finish(policy: LLM, context: StageContext, result: dict[str, Any]) -> None:
    """Write the model folder, what it can do, and the stage's result."""
    save_model(policy.model, policy.tokenizer, context.out)
    write_json(context.out / "about.json", ABOUT)
    write_json(context.out / "result.json", result)


def supervise(
    context: StageContext, policy: LLM, examples: Sequence[Example], steps: int, batch_size: int, optim: OptimConfig
) -> Trainer:
    """Train on rendered examples with this stage's seed."""
    source = ChatSource(examples, batch_size, context.seed)
    return run_training(context, policy.model, source, CrossEntropy(), optim, steps)


def cold_start(context: StageContext) -> None:
    """Stage 1: long-CoT cold start on filtered solver traces, until they teach no more (RL gets no credit for them)."""
    config: ColdStartConfig = context.config
    start = context.inputs["s3"]
    policy, tasks = LLM(start), families()
    drawn = sample_items(default_families(), config.queries_per_family * len(tasks), context.seed + 11, "train")
    direct = synth.answered_directly(policy.engine, policy.renderer, drawn, tasks)
    hard = [item for item, known in zip(drawn, direct, strict=True) if not known and tasks[item.family].step_by_step]
    easy_dropped = Counter(item.family for item, known in zip(drawn, direct, strict=True) if known)
    items = synth.balance(hard, config.kept_per_family)
    rng = random.Random(f"cold:{context.seed}")
    candidates = [r for item in items for r in _candidates(item, config, rng)]
    responses, reasons = synth.filter_responses(candidates, tasks)
    chosen = synth.most_natural(policy.engine, policy.renderer, responses, config.kept_per_query)
    examples = [thinking_example(policy.renderer, response) for response in chosen]
    trainer = supervise(context, policy, examples, config.steps, config.batch_size, config.optim)
    write_jsonl(context.out / "queries.jsonl", [asdict(item) for item in items])
    finish(policy, context, saw(policy, trainer, Counter({"no flag": len(examples)}), "solver traces", config.tuned) | {
        "queries_drawn": len(drawn), "answered_without_thinking": dict(easy_dropped), "queries_kept": len(items),
        "candidates": len(candidates), "responses_kept": len(responses), "rejected": dict(reasons),
        "responses_trained": len(chosen),
    })  # fmt: skip


def _candidates(item: Item, config: ColdStartConfig, rng: random.Random) -> list[Response]:
    out = [Response(item, trace, item.answer) for trace in item.traces[: config.traces_per_query]]
    if rng.random() < config.bad_share:
        out.append(Response(item, corrupt(item.traces[0], rng), corrupt(item.answer, rng)))
    return out


def thinking_example(renderer: Renderer, response: Response) -> Rendered:
    """A thought and its answer to a query without a flag."""
    reply = Message("assistant", response.answer, response.reasoning)
    return renderer.views([Message("user", response.item.prompt), reply])[-1]


def direct_control(context: StageContext) -> None:
    """The control arm: the same base, trained on answers alone with at least as many tokens as the cold start."""
    config: SFTConfig = context.config
    policy = LLM(context.inputs["s3"])
    items = [Item(**row) for row in read_jsonl(context.inputs["cold_start"] / "queries.jsonl")]
    examples = [
        policy.renderer.views([Message("user", item.prompt), Message("assistant", item.answer)])[-1] for item in items
    ]
    trainer = supervise(context, policy, examples, config.steps, config.batch_size, config.optim)
    finish(policy, context, saw(policy, trainer, Counter({"no flag": len(items)}), "answers alone", config.tuned))


def reasoning_rl(context: StageContext) -> None:
    """Stage 2: GRPO with rule verifiers on mixed queries, of which no training text shows the steps."""
    config: RLStageConfig = context.config
    start = context.inputs["cold_start"]
    policy = LLM(start, exact=True)
    pool = mixed_queries(config.pool_per_family, context.seed + 22)
    queries, chosen = learnable(context, policy, pool)
    write_jsonl(context.out / "queries.jsonl", [asdict(query.item) for query in queries])
    finish(policy, context, train_rl(context, policy, queries, reasoning_reward, start) | chosen)


def learnable(context: StageContext, policy: LLM, pool: Sequence[Query]) -> tuple[list[Query], dict[str, Any]]:
    """The queries of ``pool`` that the policy solves now and then, and how they were chosen, for the stage's result."""
    config: RLStageConfig = context.config
    params = SamplingParams(1.0, max_tokens=config.rl.max_tokens, n=config.probe_samples, seed=context.seed)
    queries, rates = synth.learnable(policy.engine, policy.renderer, pool, params, *config.pass_rate)
    facts = {
        "pool": len(pool),
        "learnable": len(queries),
        "mean_pass_rate": sum(rates) / len(rates),
        "choosing_flops": flops(policy, 0, policy.engine.generated_tokens),
    }
    return queries, facts


def mixed_queries(per_family: int, seed: int) -> list[Query]:
    """Thinking queries without a flag, with mixed signs: there are no traces of them anywhere."""
    tasks = {task.name: task for task in signed_families("mixed")}
    items = sample_items(list(tasks.values()), per_family * len(tasks), seed, "train")
    return [single(item, tasks[item.family]) for item in items]


def train_rl(
    context: StageContext, policy: LLM, queries: Sequence[Query], reward: Reward, start: Path
) -> dict[str, Any]:
    """Run the RL source through the one loop; returns what the arm saw.

    Args:
        start: where the policy came from; its frozen copy is the reference when there is a KL term.
    """
    config: RLStageConfig = context.config
    rl = config.rl
    objective = PolicyGradient(rl.kind, rl.clip_low, rl.clip_high, kl_coef=rl.kl_coef)
    reference = LLM(start).engine if rl.kl_coef else None
    source = RolloutSource(policy.engine, policy.renderer, queries, reward, objective, rl, context.seed, reference)
    policy.model.train()
    trainer = run_training(context, policy.model, source, objective, config.optim, rl.steps * rl.minibatches)
    return saw(policy, trainer, forms_of(queries), "verifier", config.tuned) | {
        "steps": rl.steps,
        "queries": len(queries),
    }


def rejection_control(context: StageContext) -> None:
    """Opponent of RL: SFT on own samples that the same verifier keeps, same start, same queries, same operations."""
    config: RejectionConfig = context.config
    policy, tasks = LLM(context.inputs["cold_start"]), families()
    items = [Item(**row) for row in read_jsonl(context.inputs["rl"] / "queries.jsonl")]
    queries = [single(item, tasks[item.family]) for item in items]
    budget = read_json(context.inputs["rl"] / "result.json")["flops"]
    kept = [as_example(trajectory) for trajectory in kept_samples(policy, queries, config, context.seed)]
    examples = kept + trace_examples(policy.renderer, len(kept), context.seed + 23)
    left = budget - flops(policy, 0, policy.engine.generated_tokens)
    steps = steps_for(policy, left, examples, config.batch_size)
    trainer = supervise(context, policy, examples, steps, config.batch_size, config.optim)
    labels = "own samples that the verifier kept, solver traces"
    result = saw(policy, trainer, forms_of(queries), labels, config.tuned)
    finish(policy, context, result | {"examples": len(examples), "queries": len(queries)})


def kept_samples(policy: LLM, queries: Sequence[Query], config: RejectionConfig, seed: int) -> list[Trajectory]:
    """Right and whole samples of each query, at most ``kept_per_query`` different ones."""
    params = SamplingParams(1.0, max_tokens=128, n=config.samples, seed=seed)
    out = []
    for group in play(policy.engine, policy.renderer, queries, params):
        right = {tuple(t.token_ids): t for t in group if reasoning_reward(t)["correct"] == 1.0}
        out += list(right.values())[: config.kept_per_query]
    return out


def as_example(trajectory: Trajectory) -> Rendered:
    """A sampled episode as a training example: its own tokens, trained where the model chose them."""
    return Rendered(list(trajectory.token_ids), [float(chosen) for chosen in trajectory.sampled])


def trace_examples(renderer: Renderer, count: int, seed: int) -> list[Rendered]:
    """Solver traces of fresh items, families in turn."""
    items = sample_items(hard_families(), count, seed, "train")
    return [thinking_example(renderer, Response(item, item.traces[0], item.answer)) for item in items]


def more_sft_control(context: StageContext) -> None:
    """Opponent of RL: more SFT on the traces there are (fresh items), same start, same operations."""
    config: MoreSFTConfig = context.config
    policy = LLM(context.inputs["cold_start"])
    budget = read_json(context.inputs["rl"] / "result.json")["flops"]
    examples = trace_examples(policy.renderer, config.items, context.seed + 23)
    steps = steps_for(policy, budget, examples, config.batch_size)
    trainer = supervise(context, policy, examples, steps, config.batch_size, config.optim)
    finish(policy, context, saw(policy, trainer, Counter({"no flag": len(examples)}), "solver traces", config.tuned))
