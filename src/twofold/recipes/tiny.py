"""`twofold run tiny`: the whole recipe on a laptop, one chain of stages from raw text to a model you can chat with.

This file is the record of what was decided: sizes, rates, mixtures, and which stage stands on which. What the stages
do is in their own modules.
"""

from __future__ import annotations

from collections.abc import Sequence

from twofold.base.config import Config
from twofold.recipes.chain import Chain, Stage
from twofold.recipes.corpus import DataConfig, build_data
from twofold.recipes.pretrain import ModelShape, PretrainConfig, pretrain
from twofold.train.loop import OptimConfig

FLAGSHIP = ModelShape(hidden_size=96, intermediate_size=256, head_dim=24)
SPANS = ((0, 256), (256, 512), (512, 1024))
SHORT = ((1.0, 192, 256),)
LONG = ((0.75, 512, 1024), (0.25, 128, 512))


def _s1(shape: ModelShape) -> PretrainConfig:
    return PretrainConfig(
        shape=shape,
        optim=OptimConfig(warmup=20, decay="constant"),
        tokens=1_700_000,
        tokens_per_step=2560,
        mixture={"text": 0.75, "tasks_general": 0.2, "gym": 0.05},
        length_mix=SHORT,
        rope_theta=1e4,
        context=256,
    )


def _s2(shape: ModelShape) -> PretrainConfig:
    return PretrainConfig(
        shape=shape,
        optim=OptimConfig(warmup=0, decay="linear", start=1.0, end=0.15),
        tokens=2_600_000,
        tokens_per_step=2560,
        mixture={"tasks_reasoning": 0.72, "text": 0.25, "gym": 0.03},
        length_mix=SHORT,
        rope_theta=1e4,
        context=256,
        spans=SPANS,
    )


def _s3(shape: ModelShape, rope_theta: float = 1e6) -> PretrainConfig:
    return PretrainConfig(
        shape=shape,
        optim=OptimConfig(warmup=5, decay="linear", start=0.5, end=0.05),
        tokens=400_000,
        tokens_per_step=4096,
        mixture={"retrieval": 0.3, "text": 0.35, "tasks_general": 0.35},
        length_mix=LONG,
        rope_theta=rope_theta,
        context=1024,
        spans=SPANS,
        probe_distance=256,
    )


class TinyConfig(Config):
    """The whole recipe's settings, one group a stage."""

    data: DataConfig = DataConfig()
    s1: PretrainConfig = _s1(FLAGSHIP)
    s2: PretrainConfig = _s2(FLAGSHIP)
    s3: PretrainConfig = _s3(FLAGSHIP)


def build(overrides: Sequence[str] = (), seed: int = 0) -> Chain:
    """The recipe's chain with overrides applied."""
    config = TinyConfig().override(overrides)
    stages = [
        Stage("data", "Text and tasks: clean, split, tokenise", config.data, (), build_data),
        Stage("s1", "Pre-training 1: general", config.s1, ("data",), pretrain),
        Stage("s2", "Pre-training 2: reasoning", config.s2, ("data", "s1"), pretrain),
        Stage("s3", "Pre-training 3: long context", config.s3, ("data", "s2"), pretrain),
    ]
    return Chain("tiny", stages, seed, config)
