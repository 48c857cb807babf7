"""Strong-to-weak distillation: off-policy, then on-policy, with two opponents that start from the same student.

The teacher is the finished flagship; the student a smaller model with a base of its own. After the off-policy phase
three arms get the same queries in the same prompt forms and the same number of operations: the teacher's distribution
on the student's own samples, RL with the verifier, and more SFT on texts of the teacher.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from twofold.base.config import Config
from twofold.base.files import read_json, read_jsonl, write_jsonl
from twofold.base.records import Message, SamplingParams
from twofold.episodes.play import play
from twofold.llm import LLM
from twofold.post.distill import DistillConfig, DistillSource
from twofold.post.rewards import reasoning_reward
from twofold.recipes.chain import StageContext
from twofold.recipes.post import SFTConfig, families, finish, hard_families, learnable, supervise, train_rl
from twofold.recipes.pretrain import run_training
from twofold.recipes.saw import flops, forms_of, saw, steps_for
from twofold.tasks.base import Item, sample_items
from twofold.tasks.families import signed_families
from twofold.tasks.query import Mode, Query, single
from twofold.text.chat import Rendered, Renderer
from twofold.train.loop import OptimConfig
from twofold.train.objectives import TokenKL


class OffPolicyConfig(SFTConfig):
    """SFT on teacher outputs in both modes."""

    queries: int = 1000
    think_share: float = 0.7


class OnPolicyConfig(Config):
    """Token-level KL on the student's own samples; ``distill.steps`` is a limit, the operations of RL decide."""

    distill: DistillConfig
    optim: OptimConfig
    tuned: tuple[float, ...] = ()


class TeacherTextConfig(Config):
    """More SFT on teacher texts, at the operations of RL; samples: replies of the teacher to each query."""

    optim: OptimConfig
    batch_size: int = 32
    samples: int = 4
    tuned: tuple[float, ...] = ()


QUERIES = 2400  # drawn for the arms after the off-policy phase; those that RL can learn from are asked by all three
_ASKED = "queries.jsonl"


def both_modes(count: int, think_share: float, seed: int) -> list[Query]:
    """Step-by-step items to be thought about, and any item to be answered directly."""
    rng, tasks = random.Random(f"distill:{seed}"), families()
    thinking = round(count * think_share)
    direct = sample_items(list(tasks.values()), count - thinking, seed + 1, "train")
    queries = thinking_queries(thinking, seed)
    return queries + [single(item, tasks[item.family], "no_think") for item in rng.sample(direct, len(direct))]


def thinking_queries(count: int, seed: int) -> list[Query]:
    """Step-by-step items, half of them with mixed signs, with ``/think`` or without a flag in equal shares."""
    rng, tasks = random.Random(f"forms:{seed}"), families()
    items = sample_items(hard_families(), count // 2, seed, "train")
    items += sample_items(signed_families("mixed"), count - count // 2, seed + 2, "train")
    flags: list[Mode | None] = [("think", None)[number % 2] for number in range(count)]
    rng.shuffle(flags)  # the form says nothing of the family
    return [single(item, tasks[item.family], flag) for item, flag in zip(items, flags, strict=True)]


def off_policy(context: StageContext) -> None:
    """Phase 1: SFT on what the teacher answers under /think and /no_think."""
    config: OffPolicyConfig = context.config
    student, teacher = LLM(context.inputs["student_base"]), LLM(context.inputs["general_rl"])
    queries = both_modes(config.queries, config.think_share, context.seed + 55)
    examples = teacher_texts(student.renderer, teacher, queries, context.seed)
    trainer = supervise(context, student, examples, config.steps, config.batch_size, config.optim)
    beside = flops(teacher, 0, teacher.engine.generated_tokens)
    result = saw(student, trainer, forms_of(queries), "teacher's texts", config.tuned, beside)
    finish(student, context, result | {"examples": len(examples)})


def teacher_texts(
    renderer: Renderer, teacher: LLM, queries: Sequence[Query], seed: int, each: int = 1
) -> list[Rendered]:
    """Whole and different teacher replies as training examples, ``each`` a query; unfinished ones are left out."""
    params = SamplingParams(0.6, max_tokens=128, n=each, seed=seed)
    groups = play(teacher.engine, teacher.renderer, queries, params)
    texts = [e for group in groups for t in group if (e := _teacher_example(renderer, t)) is not None]
    return list({tuple(text.token_ids): text for text in texts}.values())


def _teacher_example(renderer: Renderer, trajectory: Any) -> Rendered | None:
    final = trajectory.final
    if trajectory.truncated or final is None or final.errors:
        return None
    reply = Message("assistant", final.content, final.reasoning)
    return renderer.views([*trajectory.query.messages, reply], empty_think_trained=True)[-1]


def student_rl(context: StageContext) -> None:
    """RL on the student; its operations are what the other arms get."""
    start = context.inputs["student_sft"]
    student = LLM(start, exact=True)
    queries, chosen = learnable(context, student, thinking_queries(QUERIES, context.seed + 77))
    write_jsonl(context.out / _ASKED, [{"item": asdict(q.item), "flag": q.form == "/think"} for q in queries])
    finish(student, context, train_rl(context, student, queries, reasoning_reward, start) | chosen)


def asked_by_all(context: StageContext) -> list[Query]:
    """The queries that RL chose as learnable for it, in the same forms."""
    tasks = families()
    out = []
    for row in read_jsonl(context.inputs["student_rl"] / _ASKED):
        item = Item(**row["item"])
        out.append(single(item, tasks[item.family], "think" if row["flag"] else None))
    return out


def on_policy(context: StageContext) -> None:
    """Phase 2: the student samples, the teacher's distribution is the target."""
    config: OnPolicyConfig = context.config
    student, teacher = LLM(context.inputs["student_sft"], exact=True), LLM(context.inputs["general_rl"])
    teacher.model.requires_grad_(False)
    queries = asked_by_all(context)
    source = DistillSource(student.engine, student.renderer, queries, config.distill, context.seed)
    objective = TokenKL(teacher.model, config.distill.direction, student.tokenizer.vocab_size)
    steps = min(config.distill.steps, _affordable(context, student, teacher, queries, config.distill))
    trainer = run_training(context, student.model, source, objective, config.optim, steps)
    beside = _choosing(context) + flops(teacher, 0, 0, trainer.tokens)
    result = saw(student, trainer, forms_of(queries), "teacher's distribution", config.tuned, beside)
    finish(student, context, result)


def _affordable(
    context: StageContext, student: LLM, teacher: LLM, queries: Sequence[Query], config: DistillConfig
) -> int:
    """Steps whose sampling, training and teacher's scoring cost what RL cost, by one step that is sampled and left."""
    sample = DistillSource(student.engine, student.renderer, queries, config, context.seed)
    tokens = sum(batch.num_tokens for batch in sample.next_step())
    generated, student.engine.generated_tokens = student.engine.generated_tokens, 0
    each = flops(student, tokens, generated) + flops(teacher, 0, 0, tokens)
    return max(1, round((_operations_of_rl(context) - _choosing(context)) / each))


def more_teacher_texts(context: StageContext) -> None:
    """The other opponent: SFT on teacher texts to the same queries, the teacher's sampling paid for."""
    config: TeacherTextConfig = context.config
    student, teacher = LLM(context.inputs["student_sft"]), LLM(context.inputs["general_rl"])
    queries = asked_by_all(context)
    examples = teacher_texts(student.renderer, teacher, queries, context.seed, config.samples)
    beside = _choosing(context) + flops(teacher, 0, teacher.engine.generated_tokens)
    steps = steps_for(student, _operations_of_rl(context) - beside, examples, config.batch_size)
    trainer = supervise(context, student, examples, steps, config.batch_size, config.optim)
    result = saw(student, trainer, forms_of(queries), "teacher's texts", config.tuned, beside)
    finish(student, context, result | {"examples": len(examples)})


def _operations_of_rl(context: StageContext) -> float:
    return float(read_json(context.inputs["student_rl"] / "result.json")["flops"])


def _choosing(context: StageContext) -> float:
    """Operations by which RL chose the queries that all arms ask: each of them is charged for it."""
    return float(read_json(context.inputs["student_rl"] / "result.json")["choosing_flops"])
