"""General RL over many kinds of tasks, its queries, and the arms that learn the same skills from labelled examples.

A skill here is something that no earlier stage taught: which style or order a cue asks for. Earlier training shows
the forms themselves in equal shares (``tasks/instruct.py``), so a skill starts at chance.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from twofold.base.records import Message
from twofold.llm import LLM
from twofold.post.rewards import general_reward
from twofold.post.sft import Example, StoredExamples
from twofold.recipes.chain import StageContext
from twofold.recipes.post import RLStageConfig, SFTConfig, families, finish, hard_families, supervise, train_rl
from twofold.recipes.saw import forms_of, saw
from twofold.tasks.base import Split, Task, sample_items
from twofold.tasks.families import easy_families
from twofold.tasks.instruct import asked_tasks
from twofold.tasks.query import (
    SYSTEM_PATTERNS,
    TAUGHT_PATTERNS,
    Query,
    flagged,
    random_pattern,
    single,
    user_turns,
    with_tools,
)
from twofold.tasks.tools import Calc
from twofold.text.chat import Rendered, Renderer

TAUGHT_SYSTEM = tuple(name for name in SYSTEM_PATTERNS if name in TAUGHT_PATTERNS)
# Queries of each kind in units: training leans towards what no earlier stage taught.
TRAIN_UNITS = {"think": 10, "direct": 1, "skill": 4, "tool": 4, "system": 2, "modes": 6}
TEST_UNITS = {"think": 1, "direct": 1, "skill": 2, "tool": 1, "system": 0, "modes": 0}


class GeneralSFTConfig(SFTConfig):
    """Labelled examples of the same skills, mixed half and half with examples of fusion."""

    labelled: int = 24


def general_rl(context: StageContext) -> None:
    """Stage 4: RL over several task kinds at once, with what fusion left untaught among them."""
    config: RLStageConfig = context.config
    start = context.inputs["fusion"]
    policy = LLM(start, exact=True)
    queries = general_queries(config.pool_per_family, context.seed + 44, "train")
    finish(policy, context, train_rl(context, policy, queries, general_reward, start))


def general_sft(context: StageContext) -> None:
    """Opponent of general RL: SFT on ``labelled`` solved examples of the untaught skills, with replay of fusion."""
    config: GeneralSFTConfig = context.config
    start = context.inputs["fusion"]
    policy, rng = LLM(start), random.Random(f"general sft:{context.seed}")
    each = -(-config.labelled // len(SKILLS))
    queries = rng.sample(skill_queries(each, context.seed + 45, "train"), config.labelled)
    labelled = [_solved(policy.renderer, query) for query in queries]
    replay = list(StoredExamples(start / "examples.safetensors"))
    half = config.steps * config.batch_size // 2
    examples: list[Example] = [labelled[number % len(labelled)] for number in range(half)]
    examples += rng.choices(replay, k=half)
    trainer = supervise(context, policy, examples, config.steps, config.batch_size, config.optim)
    result = saw(policy, trainer, forms_of(queries), f"{config.labelled} solved examples", config.tuned)
    finish(policy, context, result)


def _solved(renderer: Renderer, query: Query) -> Rendered:
    reply = Message("assistant", query.item.answer, "")
    return renderer.views([*query.messages, reply], empty_think_trained=True)[-1]


def general_queries(per_kind: int, seed: int, split: Split) -> list[Query]:
    """A mix of kinds: both modes, styles, orders, a tool, and flag patterns."""
    rng, tasks, calc = random.Random(f"general:{seed}:{split}"), families(), Calc()
    counts = {kind: units * per_kind for kind, units in (TRAIN_UNITS if split == "train" else TEST_UNITS).items()}
    out: list[Query] = []
    for item in sample_items(hard_families(), counts["think"], seed + 1, split):
        out.append(single(item, tasks[item.family], rng.choice(["think", None]), kind="think"))
    for item in sample_items(easy_families(), counts["direct"], seed + 2, split):
        out.append(single(item, tasks[item.family], "no_think", kind="direct"))
    out += skill_queries(counts["skill"], seed + 3, split)
    for number, item in enumerate(sample_items([calc], counts["tool"], seed + 4, split)):
        out.append(with_tools(item, calc, "think" if number % 2 else "no_think"))
    out += mode_queries(TAUGHT_SYSTEM, counts["system"], seed + 6, split)
    half = counts["modes"] // 2
    out += mode_queries(TAUGHT_PATTERNS, half, seed + 7, split)
    return out + mode_queries([random_pattern(rng) for _ in range(half)], half, seed + 8, split)


def skill_queries(per_skill: int, seed: int, split: Split) -> list[Query]:
    """Direct queries whose cue names a style or an order, as many of each."""
    out = []
    for task in asked_tasks(easy_families()):
        out += [single(item, task, "no_think") for item in sample_items([task], per_skill, seed, split)]
    return out


def mode_queries(patterns: Sequence[str], count: int, seed: int, split: Split) -> list[Query]:
    """Conversations with soft switches in the given patterns, taken in turn."""
    rng, tasks = random.Random(f"modes:{seed}:{split}"), families()
    pool: list[Task] = list(tasks.values())
    items = sample_items(pool, min(count * 3, 60 * len(pool)), seed, split) if count else []
    out = []
    for number in range(count):
        pattern = patterns[number % len(patterns)]
        chosen = rng.sample(items, user_turns(pattern))
        out.append(flagged([(item, tasks[item.family]) for item in chosen], pattern))
    return out


SKILLS = tuple(task.name for task in asked_tasks([]))
