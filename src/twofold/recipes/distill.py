"""Strong-to-weak distillation: off-policy, then on-policy, and RL on the same student for comparison.

The teacher is the finished flagship; the student a smaller model with a base of its own. Every arm starts from the
same off-policy student, and generated plus trained tokens and FLOPs are counted, so that costs compare.
"""

from __future__ import annotations

import random
from typing import Any

from twofold.base.config import Config
from twofold.base.records import Message, SamplingParams
from twofold.episodes.play import play
from twofold.llm import LLM
from twofold.post.distill import DistillConfig, DistillSource
from twofold.post.rewards import reasoning_reward
from twofold.post.sft import ChatSource
from twofold.recipes.chain import StageContext
from twofold.recipes.post import (
    RLStageConfig,
    SFTConfig,
    families,
    finish,
    hard_families,
    train_rl,
)
from twofold.recipes.pretrain import run_training
from twofold.tasks.base import sample_items
from twofold.tasks.query import Query, single
from twofold.text.chat import Rendered, Renderer
from twofold.train.loop import OptimConfig
from twofold.train.objectives import CrossEntropy, TokenKL


class OffPolicyConfig(SFTConfig):
    """SFT on teacher outputs in both modes."""

    queries: int = 1000
    think_share: float = 0.7


class OnPolicyConfig(Config):
    """Token-level KL on the student's own samples."""

    distill: DistillConfig
    optim: OptimConfig
    queries: int = 3000
    think_share: float = 0.7


def flops(policy: LLM, trained_tokens: float, generated_tokens: float, forward_tokens: float = 0.0) -> float:
    """Floating-point operations of a stage: 3 x forward for trained tokens, 1 x for generated and scored ones."""
    config = policy.model.config
    forward = config.flops_per_token(context=64, backward=False)
    return forward * (3 * trained_tokens + generated_tokens + forward_tokens)


def mixed_queries(count: int, think_share: float, seed: int) -> list[Query]:
    """Step-by-step items to be thought about, and any item to be answered directly."""
    rng, tasks = random.Random(f"distill:{seed}"), families()
    thinking = round(count * think_share)
    hard = sample_items(hard_families(), thinking, seed, "train")
    direct = sample_items(list(tasks.values()), count - thinking, seed + 1, "train")
    queries = [single(item, tasks[item.family], rng.choice(["think", None])) for item in hard]
    return queries + [single(item, tasks[item.family], "no_think") for item in direct]


def off_policy(context: StageContext) -> None:
    """Phase 1: SFT on what the teacher answers under /think and /no_think."""
    config: OffPolicyConfig = context.config
    start = context.inputs["student_base"]
    student, teacher = LLM(start), LLM(context.inputs["general_rl"])
    queries = mixed_queries(config.queries, config.think_share, context.seed + 55)
    params = SamplingParams(0.6, max_tokens=128, seed=context.seed)
    groups = play(teacher.engine, teacher.renderer, queries, params)
    examples = [e for group in groups for t in group if (e := _teacher_example(student.renderer, t)) is not None]
    source = ChatSource(examples, config.batch_size, context.seed)
    trainer = run_training(context, student.model, source, CrossEntropy(), config.optim, config.steps)
    cost = flops(student, trainer.tokens, 0) + flops(teacher, 0, teacher.engine.generated_tokens)
    finish(student, context, {"examples": len(examples), "tokens": trainer.tokens, "flops": cost})


def _teacher_example(renderer: Renderer, trajectory: Any) -> Rendered | None:
    """A whole teacher reply as a training example; unfinished ones are left out."""
    final = trajectory.final
    if trajectory.truncated or final is None or final.errors:
        return None
    reply = Message("assistant", final.content, final.reasoning)
    return renderer.views([*trajectory.query.messages, reply], empty_think_trained=True)[-1]


def on_policy(context: StageContext) -> None:
    """Phase 2: the student samples in either mode, the teacher's distribution is the target."""
    config: OnPolicyConfig = context.config
    student, teacher = LLM(context.inputs["student_sft"], exact=True), LLM(context.inputs["general_rl"])
    teacher.model.requires_grad_(False)
    queries = mixed_queries(config.queries, config.think_share, context.seed + 66)
    source = DistillSource(student.engine, student.renderer, queries, config.distill, context.seed)
    objective = TokenKL(teacher.model, config.distill.direction, student.tokenizer.vocab_size)
    trainer = run_training(context, student.model, source, objective, config.optim, config.distill.steps)
    generated = student.engine.generated_tokens
    cost = flops(student, trainer.tokens, generated) + flops(teacher, 0, 0, trainer.tokens)
    finish(student, context, {"tokens": trainer.tokens, "generated_tokens": generated, "flops": cost})


def student_rl(context: StageContext) -> None:
    """The arm to compare with: RL on the same student, thinking queries only."""
    config: RLStageConfig = context.config
    start = context.inputs["student_sft"]
    student = LLM(start, exact=True)
    tasks = families()
    items = sample_items(hard_families(), config.pool_per_family * len(hard_families()), context.seed + 77, "train")
    queries = [single(item, tasks[item.family], "think") for item in items]
    result = train_rl(context, student, queries, reasoning_reward, start)
    cost = flops(student, result["tokens"], result["generated_tokens"])
    finish(student, context, result | {"flops": cost})
