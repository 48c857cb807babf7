"""Thinking-mode fusion, and the arms that its cost and its thinking budget are compared with.

Not here: general RL, which teaches what fusion leaves untaught (``general.py``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from twofold.base.config import Config
from twofold.base.files import read_json, read_jsonl
from twofold.base.records import SamplingParams
from twofold.data.tasktext import task_documents
from twofold.llm import LLM
from twofold.post import synth
from twofold.post.sft import write_examples
from twofold.post.synth import FusionMaker, Response
from twofold.recipes.chain import StageContext
from twofold.recipes.post import SFTConfig, families, finish, hard_families, supervise
from twofold.recipes.saw import flops, saw, steps_for
from twofold.tasks.base import Item, sample_items
from twofold.tasks.families import anytime_families, easy_families, signed_families
from twofold.tasks.instruct import shown_tasks
from twofold.tasks.query import FLAG_PATTERNS, Mode, flagged, random_pattern, turns_of, user_turns
from twofold.tasks.tools import Calc
from twofold.text.chat import Rendered
from twofold.train.loop import OptimConfig


class FusionConfig(SFTConfig):
    """Fusion: how many examples of each sort are made."""

    fresh: int = 3000  # queries besides those of stages 1 and 2
    think: int = 2000
    no_think: int = 1800
    hard_direct_share: float = 0.2  # of direct answers; they are at chance, so more of them is only noise
    hard_switch: int = 250
    cut_thoughts: int = 900  # of families in which part of the steps is worth something
    tool_use: int = 700
    any_form: int = 500  # direct answers in whatever form: general RL can choose among forms, not invent them
    replay: int = 200  # pre-training documents, so that what SFT does not mention is not forgotten


class ThinkOnlyConfig(Config):
    """The control of fusion: thinking responses and as many tokens, nothing else. fresh: as for fusion."""

    optim: OptimConfig
    batch_size: int = 32
    fresh: int = 3000
    tuned: tuple[float, ...] = ()


def fusion(context: StageContext) -> None:
    """Stage 3: thinking by rejection from the stage-2 model, direct answers, flags, cut thoughts, tools.

    With ``cut_thoughts`` 0 this is the control of the thinking budget: as many steps, no thought that was stopped.
    """
    config: FusionConfig = context.config
    policy, tasks = LLM(context.inputs["rl"]), families()
    responses, reasons = own_responses(context, policy, config.fresh)
    hard_direct = round(config.hard_direct_share * config.no_think)
    direct = sample_items(hard_families(), hard_direct, context.seed + 34, "train")
    direct += sample_items(easy_families(), config.no_think - hard_direct, context.seed + 35, "train")
    maker = FusionMaker(policy.renderer, tasks, responses, context.seed)
    examples = _fusion_examples(maker, config, direct)
    write_examples(context.out / "examples.safetensors", examples)
    trainer = supervise(context, policy, examples, config.steps, config.batch_size, config.optim)
    result = saw(policy, trainer, maker.forms, "own thoughts that the verifier kept, solver answers", config.tuned)
    finish(policy, context, result | {"rejected": dict(reasons), "examples": len(examples)})


def own_responses(context: StageContext, policy: LLM, fresh: int) -> tuple[list[Response], Counter[str]]:
    """Thoughts of the stage-2 model that pass every filter: on queries of stages 1 and 2, and on fresh ones, half of
    these mixed as in stage 2. Easy families have solver traces instead."""
    stage1 = [Item(**row) for row in read_jsonl(context.inputs["cold_start"] / "queries.jsonl")]
    stage2 = [Item(**row) for row in read_jsonl(context.inputs["rl"] / "queries.jsonl")]
    asked = [*stage1, *stage2[: len(stage1)]]
    asked += sample_items(hard_families(), fresh // 2, context.seed + 36, "train")
    asked += sample_items(signed_families("mixed"), fresh // 2, context.seed + 37, "train")
    params = SamplingParams(0.6, max_tokens=128, n=2, seed=context.seed)
    responses, reasons = synth.rejection_sample(policy.engine, policy.renderer, asked, families(), params)
    easy = sample_items(easy_families(), len(responses) // 4, context.seed + 33, "train")
    return responses + [Response(item, item.traces[0], item.answer) for item in easy], reasons


def _fusion_examples(maker: FusionMaker, config: FusionConfig, direct: Sequence[Item]) -> list[Rendered]:
    rng, calc = maker.rng, Calc()
    examples: list[Rendered] = []
    for number in range(config.think):
        pattern = "no flag" if number % 4 == 0 else "/think" if number % 4 == 1 else _pattern(maker, "think")
        examples += maker.conversation(pattern, direct)
    for number in range(config.no_think):
        examples += maker.conversation(_pattern(maker, "no_think") if number % 3 else "/no_think", direct)
    examples += [maker.hard_switch(rng.choice(direct)) for _ in range(config.hard_switch)]
    partial = {task.name for task in anytime_families()}
    anytime = [r for r in maker.responses if r.item.family in partial]
    examples += [maker.cut_thought(rng.choice(anytime)) for _ in range(config.cut_thoughts)]
    for number, item in enumerate(sample_items([calc], config.tool_use, rng.randrange(2**31), "train")):
        examples += maker.tool_use(item, calc, thinking=number % 2 == 0)
    shown = shown_tasks(easy_families())
    by_name = {task.name: task for task in shown}
    for item in sample_items(shown, config.any_form, rng.randrange(2**31), "train"):
        examples.append(maker.direct(item, by_name[item.family]))
    documents = task_documents(shown, config.replay, rng.randrange(2**31), 0.0, curriculum=False)
    return examples + [maker.document(text) for text in documents]


def _pattern(maker: FusionMaker, mode: Mode) -> str:
    """A pattern that calls for ``mode``: a named one, or twice as often random flags.

    Half of the random ones have their last flag in an earlier turn, in both modes: without them the model learns to
    look at the last turn alone, where most prompts have their flag.
    """
    rng = maker.rng
    if rng.random() < 1 / 3:
        return rng.choice([p for p in maker.patterns if _calls_for(p) == mode])
    kept = rng.random() < 0.5
    while _calls_for(pattern := random_pattern(rng)) != mode or (kept and not _kept(pattern)):
        pass
    return pattern


def _kept(pattern: str) -> bool:
    """Whether the last turn has no flag and an earlier one has."""
    *earlier, last = turns_of(pattern)
    return last == "u" and any(len(turn) > 1 for turn in earlier)


def _calls_for(pattern: str) -> Mode:
    item = Item("", "q", "a", (), "")
    turns = [(item, hard_families()[0])] * user_turns(pattern)
    return flagged(turns, pattern).mode


def think_only(context: StageContext) -> None:
    """Control of fusion's cost: fusion's own thinking responses alone, for as many tokens as fusion trained on."""
    config: ThinkOnlyConfig = context.config
    policy, tasks = LLM(context.inputs["rl"]), families()
    responses, reasons = own_responses(context, policy, config.fresh)
    maker = FusionMaker(policy.renderer, tasks, responses, context.seed)
    patterns = [p for p in maker.patterns if _calls_for(p) == "think" and len(FLAG_PATTERNS[p]) == 1]
    examples = [view for number in range(len(responses)) for view in maker.conversation(patterns[number % 2], [])]
    budget = flops(policy, read_json(context.inputs["fusion"] / "result.json")["tokens"])
    steps = steps_for(policy, budget, examples, config.batch_size)
    trainer = supervise(context, policy, examples, steps, config.batch_size, config.optim)
    result = saw(policy, trainer, maker.forms, "own thoughts that the verifier kept", config.tuned)
    finish(policy, context, result | {"rejected": dict(reasons), "examples": len(examples)})
