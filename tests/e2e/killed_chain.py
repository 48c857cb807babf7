"""A shrunken chain of the real stages, run as a process so that a test can kill it: python killed_chain.py FOLDER.

Pre-training, RL and on-policy distillation are the recipe's own functions on a very small model; only RL's reward is
another (the share of even token ids), because an untrained model earns nothing from the real one.
State is saved after every step that allows it.
"""

import sys
from dataclasses import asdict
from pathlib import Path

import torch

from twofold.base.config import Config
from twofold.base.files import write_jsonl
from twofold.episodes.play import Trajectory
from twofold.llm import LLM
from twofold.post.distill import DistillConfig
from twofold.post.rl import RLConfig
from twofold.recipes import tiny
from twofold.recipes.chain import Chain, Stage, StageContext
from twofold.recipes.corpus import build_data
from twofold.recipes.distill import OnPolicyConfig, on_policy
from twofold.recipes.post import RLStageConfig, finish, hard_families, train_rl
from twofold.recipes.pretrain import ModelShape, pretrain
from twofold.tasks.base import sample_items
from twofold.tasks.query import single
from twofold.train import loop
from twofold.train.loop import OptimConfig

SHAPE = ModelShape(hidden_size=32, intermediate_size=64, head_dim=16, layers=2, heads=2, kv_heads=1)
ADAM = OptimConfig(muon_lr=0.0, adam_lr=1e-3, warmup=1, decay="constant")


def even_reward(trajectory: Trajectory) -> dict[str, float]:
    """Share of even token ids: varied, and within reach of any model."""
    sampled = [t for t, mine in zip(trajectory.token_ids, trajectory.sampled, strict=True) if mine]
    return {"even": sum(t % 2 == 0 for t in sampled) / len(sampled)}


def small_rl(context: StageContext) -> None:
    (start,) = context.inputs.values()
    policy = LLM(start, exact=True)
    tasks = {task.name: task for task in hard_families()}
    items = sample_items(list(tasks.values()), 8 * len(tasks), context.seed, "train")
    queries = [single(item, tasks[item.family]) for item in items]
    asked = [{"item": asdict(query.item), "flag": number % 2 == 0} for number, query in enumerate(queries)]
    write_jsonl(context.out / "queries.jsonl", asked)  # distillation asks what RL was asked
    finish(policy, context, train_rl(context, policy, queries, even_reward, start) | {"choosing_flops": 0.0})


def build() -> Chain:
    data = tiny.DataConfig(
        general_tasks=300, reasoning_tasks=60, gym_documents=30, copying_documents=200,
        short_notes=20, long_notes=4, probe_documents=2, vocab_size=400, tokenizer_chars=300,
    )  # fmt: skip
    s1 = tiny.TinyConfig().s1.model_copy(
        update={
            "shape": SHAPE,
            "tokens": 25_000,
            "head_start": {"copying": 4_000},
            "tokens_per_step": 1024,
            "spans": ((0, 256),),
            "eval_windows": 4,
        }
    )
    rl = RLStageConfig(
        rl=RLConfig(
            steps=8, queries_per_step=4, group_size=4, max_tokens=48, entropy_low=6.0, entropy_high=7.0, kl_coef=0.02
        ),
        optim=ADAM,
    )
    opd = OnPolicyConfig(distill=DistillConfig(steps=12, queries_per_step=8, max_tokens=24), optim=ADAM)
    longer = rl.model_copy(update={"rl": rl.rl.model_copy(update={"steps": 10})})
    stages = [
        Stage("data", "data", data, (), build_data),
        Stage("s1", "pre-training", s1, ("data",), pretrain),
        Stage("general_rl", "RL", rl, ("s1",), small_rl),
        Stage("student_sft", "another start", s1.model_copy(update={"tokens": 20_000}), ("data",), pretrain),
        Stage("student_rl", "what distillation may cost", longer, ("student_sft",), small_rl),
        Stage("opd", "distillation", opd, ("student_sft", "general_rl", "student_rl"), on_policy),
    ]
    return Chain("killed", stages, seed=0, config=Config())


if __name__ == "__main__":
    torch.set_num_threads(1)
    loop.CHECKPOINT_SECONDS = 0.0
    build().run(Path(sys.argv[1]))
