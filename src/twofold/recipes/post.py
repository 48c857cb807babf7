"""Post-training in four stages: cold start, reasoning RL, thinking-mode fusion, general RL, and the direct control.

Each function is one stage of a chain: it reads finished artefacts, trains with the one loop, and writes a complete
model folder plus what the report needs. Sizes and rates are the recipe's.
"""

from __future__ import annotations

import random
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from twofold.base.config import Config
from twofold.base.files import read_jsonl, write_json, write_jsonl
from twofold.base.records import Message, SamplingParams
from twofold.data.tasktext import task_documents
from twofold.episodes.play import play
from twofold.llm import LLM
from twofold.post import synth
from twofold.post.rewards import general_reward, reasoning_reward
from twofold.post.rl import Reward, RLConfig, RolloutSource
from twofold.post.sft import ChatSource
from twofold.post.synth import FusionMaker, Response
from twofold.recipes.chain import StageContext
from twofold.recipes.pretrain import run_training, save_model
from twofold.tasks.base import Item, Split, Task, sample_items
from twofold.tasks.families import corrupt, default_families
from twofold.tasks.gym import GymTask
from twofold.tasks.instruct import AnswerFormat, AnswerLength
from twofold.tasks.query import FLAG_PATTERNS, SYSTEM_PATTERNS, Query, flagged, single, user_turns, with_tools
from twofold.tasks.tools import Calc
from twofold.text.chat import Rendered, Renderer
from twofold.train.loop import OptimConfig
from twofold.train.objectives import CrossEntropy, PolicyGradient


class SFTConfig(Config):
    """A supervised stage: ``steps`` updates of ``batch_size`` conversations."""

    optim: OptimConfig
    steps: int
    batch_size: int = 32


class ColdStartConfig(SFTConfig):
    """Cold start; queries are drawn per family, then filtered and balanced."""

    queries_per_family: int = 400
    kept_per_family: int = 300
    traces_per_query: int = 3
    kept_per_query: int = 1
    bad_share: float = 0.1  # spoiled candidates mixed in, so that the filters have something to catch
    enough: float = 0.5  # training ends before ``steps`` once this share of new training queries is solved at T = 1
    probe_queries: int = 120
    probe_every: int = 10


class FusionConfig(SFTConfig):
    """Fusion: how many examples of each sort are made."""

    think: int = 1600
    no_think: int = 1200
    hard_direct_share: float = 0.2  # of direct answers; they are at chance, so more of them is only noise
    hard_switch: int = 250
    cut_thoughts: int = 250
    tool_use: int = 250
    format_hints: int = 3  # direct answers in a format: general RL can raise only what is sampled at all
    replay: int = 300  # pre-training documents, so that what SFT does not mention is not forgotten


class RLStageConfig(Config):
    """An RL stage: rollouts, optimiser, and how the query pool is chosen."""

    rl: RLConfig
    optim: OptimConfig
    pool_per_family: int = 150
    pass_rate: tuple[float, float] = (0.05, 0.95)
    probe_samples: int = 4


def families() -> dict[str, Task]:
    """The own task families by name."""
    return {task.name: task for task in default_families()}


def hard_families() -> list[Task]:
    """Families that need steps."""
    return [task for task in default_families() if task.step_by_step]


# What `twofold chat` tells people about these models.
ABOUT = {
    "can": [
        "sum mod 10: E1 B5 I6",
        "let mod 10: C= D7, G= C8, D=8, A= G2 find G",
        "swap I G E: a12 b23",
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


def cold_start(context: StageContext) -> None:
    """Stage 1: long-CoT cold start on filtered solver traces; deliberately short."""
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
    examples = [_thinking_example(policy.renderer, response) for response in chosen]
    source = ChatSource(examples, config.batch_size, context.seed)
    probe = _Headroom(policy, config, context.seed, {item.key for item in items})
    trainer = run_training(context, policy.model, source, CrossEntropy(), config.optim, config.steps, probe.enough)
    write_jsonl(context.out / "queries.jsonl", [asdict(item) for item in items])
    finish(policy, context, {
        "queries_drawn": len(drawn), "answered_without_thinking": dict(easy_dropped), "queries_kept": len(items),
        "candidates": len(candidates), "responses_kept": len(responses), "rejected": dict(reasons),
        "responses_trained": len(chosen), "tokens": trainer.tokens, "steps": trainer.step,
    })  # fmt: skip


class _Headroom:
    """Says when the cold start has taught enough: RL should find queries that are solved now and then, not always."""

    def __init__(self, policy: LLM, config: ColdStartConfig, seed: int, seen: set[str]) -> None:
        self.policy, self.config, self.seed = policy, config, seed
        tasks = hard_families()
        self.queries = query_pool(tasks, config.probe_queries // len(tasks), seed + 12, seen)

    def enough(self, step: int) -> bool:
        """True where the share of queries solved at T = 1 has reached the limit; looked at now and then only."""
        if not step or step % self.config.probe_every:
            return False
        self.policy.engine.update_weights()
        params = SamplingParams(1.0, max_tokens=128, seed=self.seed)
        groups = play(self.policy.engine, self.policy.renderer, self.queries, params)
        return statistics.mean(t.correct for group in groups for t in group) >= self.config.enough


def _candidates(item: Item, config: ColdStartConfig, rng: random.Random) -> list[Response]:
    out = [Response(item, trace, item.answer) for trace in item.traces[: config.traces_per_query]]
    if rng.random() < config.bad_share:
        wrong = str((int(item.answer) + 1) % 10) if item.answer.isdigit() else item.answer[::-1]
        out.append(Response(item, corrupt(item.traces[0], rng), wrong))
    return out


def _thinking_example(renderer: Renderer, response: Response) -> Rendered:
    reply = Message("assistant", response.answer, response.reasoning)
    return renderer.views([Message("user", response.item.prompt), reply])[-1]


def direct_control(context: StageContext) -> None:
    """The control arm: the same base, trained on answers alone with at least as many tokens as the cold start."""
    config: SFTConfig = context.config
    start = context.inputs["s3"]
    policy = LLM(start)
    items = [Item(**row) for row in read_jsonl(context.inputs["cold_start"] / "queries.jsonl")]
    examples = [
        policy.renderer.views([Message("user", item.prompt), Message("assistant", item.answer)])[-1] for item in items
    ]
    source = ChatSource(examples, config.batch_size, context.seed)
    trainer = run_training(context, policy.model, source, CrossEntropy(), config.optim, config.steps)
    finish(policy, context, {"tokens": trainer.tokens, "steps": config.steps})


def reasoning_rl(context: StageContext) -> None:
    """Stage 2: GRPO with rule verifiers on queries unseen in the cold start and learnable for it."""
    config: RLStageConfig = context.config
    start = context.inputs["cold_start"]
    policy = LLM(start, exact=True)
    seen = {row["key"] for row in read_jsonl(start / "queries.jsonl")}
    pool = query_pool(hard_families(), config.pool_per_family, context.seed + 22, seen)
    params = SamplingParams(1.0, max_tokens=config.rl.max_tokens, n=config.probe_samples, seed=context.seed)
    queries, rates = synth.learnable(policy.engine, policy.renderer, pool, params, *config.pass_rate)
    result = train_rl(context, policy, queries, reasoning_reward, start)
    result |= {"pool": len(pool), "learnable": len(queries), "mean_pass_rate": sum(rates) / len(rates)}
    finish(policy, context, result)


def query_pool(tasks: Sequence[Task], per_family: int, seed: int, seen: set[str]) -> list[Query]:
    """Thinking queries without a flag whose keys were not used before."""
    by_name = {task.name: task for task in tasks}
    items = sample_items(list(tasks), 4 * per_family * len(tasks), seed, "train")
    fresh = synth.balance([item for item in items if item.key not in seen], per_family)
    return [single(item, by_name[item.family]) for item in fresh]


def train_rl(
    context: StageContext, policy: LLM, queries: Sequence[Query], reward: Reward, start: Path
) -> dict[str, Any]:
    """Run the RL source through the one loop; returns the cost counters.

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
    return {
        "tokens": trainer.tokens,
        "generated_tokens": policy.engine.generated_tokens,
        "steps": rl.steps,
        "queries": len(queries),
    }


def fusion(context: StageContext) -> None:
    """Stage 3: thinking by rejection from the stage-2 model on stage-1 queries, direct answers, flags, cut thoughts."""
    config: FusionConfig = context.config
    start = context.inputs["rl"]
    policy, tasks = LLM(start), families()
    stage1 = [Item(**row) for row in read_jsonl(context.inputs["cold_start"] / "queries.jsonl")]
    easy = sample_items([tasks["max"]], len(stage1) // 3, context.seed + 33, "train")
    params = SamplingParams(0.6, max_tokens=128, n=2, seed=context.seed)
    responses, reasons = synth.rejection_sample(policy.engine, policy.renderer, stage1, tasks, params)
    responses += [Response(item, item.traces[0], item.answer) for item in easy]
    hard_direct = round(config.hard_direct_share * config.no_think)
    direct = sample_items(hard_families(), hard_direct, context.seed + 34, "train")
    direct += sample_items([tasks["max"]], config.no_think - hard_direct, context.seed + 35, "train")
    examples = _fusion_examples(FusionMaker(policy.renderer, tasks, responses, context.seed), config, direct)
    source = ChatSource(examples, config.batch_size, context.seed)
    trainer = run_training(context, policy.model, source, CrossEntropy(), config.optim, config.steps)
    finish(policy, context, {
        "asked": len(stage1), "rejection_kept": len(responses) - len(easy), "rejected": dict(reasons),
        "examples": len(examples), "tokens": trainer.tokens, "steps": config.steps,
    })  # fmt: skip


def _fusion_examples(maker: FusionMaker, config: FusionConfig, direct: Sequence[Item]) -> list[Rendered]:
    rng, calc = maker.rng, Calc()
    on = [p for p in maker.patterns if _calls_for(p) == "think"]
    off = [p for p in maker.patterns if _calls_for(p) == "no_think"]
    examples: list[Rendered] = []
    for number in range(config.think):
        pattern = ("no flag", "/think", rng.choice(on), rng.choice(on))[number % 4]
        examples += maker.conversation(pattern, direct)
    for number in range(config.no_think):
        examples += maker.conversation(rng.choice(off) if number % 3 else "/no_think", direct)
    examples += [maker.hard_switch(rng.choice(direct)) for _ in range(config.hard_switch)]
    examples += [maker.cut_thought(rng.choice(maker.responses)) for _ in range(config.cut_thoughts)]
    for number, item in enumerate(sample_items([calc], config.tool_use, rng.randrange(2**31), "train")):
        examples += maker.tool_use(item, calc, thinking=number % 2 == 0)
    formats, lengths = AnswerFormat((families()["max"],)), AnswerLength((families()["max"],))
    hints = sample_items([formats], config.format_hints, rng.randrange(2**31), "train")
    examples += [maker.direct(item, formats) for item in hints]
    instructed: list[Task] = [formats, lengths]
    documents = task_documents(instructed, config.replay, rng.randrange(2**31), 0.3, curriculum=False)
    return examples + [maker.document(text) for text in documents]


def _calls_for(pattern: str) -> str:
    item = Item("", "q", "a", (), "")
    turns = [(item, default_families()[0])] * user_turns(pattern)
    return flagged(turns, pattern, random.Random(0)).mode


def general_rl(context: StageContext) -> None:
    """Stage 4: RL over several task kinds at once, with what fusion left untaught among them."""
    config: RLStageConfig = context.config
    start = context.inputs["fusion"]
    policy = LLM(start, exact=True)
    queries = general_queries(config.pool_per_family, context.seed + 44, "train")
    result = train_rl(context, policy, queries, general_reward, start)
    finish(policy, context, result)


# Queries of each kind in units: training leans towards what fusion left untaught.
TRAIN_UNITS = {"think": 4, "direct": 2, "format": 3, "length": 3, "tool": 2, "reference": 1, "system": 9, "modes": 4}
TEST_UNITS = {"think": 1, "direct": 1, "format": 1, "length": 1, "tool": 1, "reference": 1, "system": 1, "modes": 0}


def general_queries(per_kind: int, seed: int, split: Split) -> list[Query]:
    """A mix of kinds: both modes, flag patterns, formats, lengths, a tool, and an answer compared with a reference."""
    rng, tasks = random.Random(f"general:{seed}:{split}"), families()
    counts = {kind: units * per_kind for kind, units in (TRAIN_UNITS if split == "train" else TEST_UNITS).items()}
    easy, calc = tasks["max"], Calc()
    spell = GymTask("spell_backward", (("min_word_len", 3),), (("max_word_len", 3, 4),), step_by_step=False)
    out: list[Query] = []
    for item in sample_items(hard_families(), counts["think"], seed + 1, split):
        out.append(single(item, tasks[item.family], rng.choice(["think", None]), kind="think"))
    for item in sample_items([easy], counts["direct"], seed + 2, split):
        out.append(single(item, easy, "no_think", kind="direct"))
    for task in (AnswerFormat((easy,)), AnswerLength((easy,))):
        for item in sample_items([task], counts[task.name], seed + 3, split):
            out.append(single(item, task, rng.choice(["no_think", "think"])))
    for number, item in enumerate(sample_items([calc], counts["tool"], seed + 4, split)):
        out.append(with_tools(item, calc, "think" if number % 2 else "no_think"))
    for item in sample_items([spell], counts["reference"], seed + 5, split):
        out.append(single(item, spell, "no_think", kind="reference"))
    out += mode_queries(SYSTEM_PATTERNS, counts["system"], seed + 6, split)
    return out + mode_queries(tuple(FLAG_PATTERNS), counts["modes"], seed + 7, split)


def mode_queries(patterns: Sequence[str], count: int, seed: int, split: Split) -> list[Query]:
    """Conversations with soft switches in the given patterns, taken in turn."""
    rng, tasks = random.Random(f"modes:{seed}:{split}"), families()
    items = sample_items(list(tasks.values()), 3 * count, seed, split) if count else []
    out = []
    for number in range(count):
        pattern = patterns[number % len(patterns)]
        chosen = items[3 * number : 3 * number + user_turns(pattern)]
        out.append(flagged([(item, tasks[item.family]) for item in chosen], pattern, rng))
    return out
