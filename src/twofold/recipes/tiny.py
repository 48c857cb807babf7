"""`twofold run tiny`: the whole recipe on a laptop, one chain of stages from raw text to a model you can chat with.

This file is the record of what was decided: sizes, rates, mixtures, and which stage stands on which. What the stages
do is in their own modules. ``controls=true`` adds the arms that some claims need (direct answers only, the old RoPE
base, distillation against RL, the MoE pair); it changes nothing about the main chain.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from twofold.base.config import Config
from twofold.optim.schedule import Decay
from twofold.post.distill import DistillConfig
from twofold.post.rl import RLConfig
from twofold.recipes.chain import Chain, Stage, command_line
from twofold.recipes.corpus import DataConfig, build_data
from twofold.recipes.distill import OffPolicyConfig, OnPolicyConfig, off_policy, on_policy, student_rl
from twofold.recipes.measure import MeasureConfig, measure_checkpoint
from twofold.recipes.post import (
    ColdStartConfig,
    FusionConfig,
    RLStageConfig,
    SFTConfig,
    cold_start,
    direct_control,
    fusion,
    general_rl,
    reasoning_rl,
)
from twofold.recipes.pretrain import ModelShape, PretrainConfig, pretrain
from twofold.recipes.report import ReportConfig, write_stage_report
from twofold.recipes.watch import tracked
from twofold.train.loop import OptimConfig
from twofold.train.trackers import Track

FLAGSHIP = ModelShape(hidden_size=96, intermediate_size=256, head_dim=24)
STUDENT = ModelShape(hidden_size=64, intermediate_size=192, head_dim=16)
SPARSE = ModelShape(hidden_size=64, intermediate_size=192, head_dim=16, experts=8, experts_per_token=2, expert_size=96)
SPANS = ((0, 256), (256, 512), (512, 1024))
SHORT = ((1.0, 192, 256),)
LONG = ((0.75, 512, 1024), (0.25, 128, 512))
BUDGETS = (0, 8, 16, 24, 32, 40, 48, 56, 64, 96)


def _s1(shape: ModelShape, tokens: int = 1_500_000, copying: int = 300_000, balance: float = 0.0) -> PretrainConfig:
    return PretrainConfig(
        shape=shape,
        optim=OptimConfig(warmup=20, decay="constant"),
        tokens=tokens,
        tokens_per_step=2560,
        head_start={"copying": copying} if copying else {},
        mixture={"text": 0.58, "tasks_general": 0.3, "notes_short": 0.08, "gym": 0.04},
        ordered=("copying", "tasks_general", "notes_short"),
        length_mix=SHORT,
        rope_theta=1e4,
        context=256,
        spans=SPANS,
        balance=balance,
    )


def _s2(shape: ModelShape, tokens: int = 3_200_000, text: float = 0.2, balance: float = 0.0) -> PretrainConfig:
    return PretrainConfig(
        shape=shape,
        optim=OptimConfig(warmup=0, decay="linear", start=1.0, end=0.15),
        tokens=tokens,
        tokens_per_step=2560,
        mixture={"tasks_reasoning": 0.94 - text, "text": text, "notes_short": 0.04, "gym": 0.02},
        ordered=("tasks_reasoning",),
        length_mix=SHORT,
        rope_theta=1e4,
        context=256,
        spans=SPANS,
        balance=balance,
        probe_distance=256,
    )


def _s3(shape: ModelShape, tokens: int = 700_000, rope_theta: float = 1e6) -> PretrainConfig:
    return PretrainConfig(
        shape=shape,
        optim=OptimConfig(warmup=5, decay="linear", start=0.5, end=0.05),
        tokens=tokens,
        tokens_per_step=4096,
        mixture={"notes_long": 0.15, "text": 0.35, "tasks_reasoning": 0.5},
        length_mix=LONG,
        rope_theta=rope_theta,
        context=1024,
        spans=SPANS,
        probe_distance=256,
    )


def _sft(muon: float, adam: float) -> OptimConfig:
    return OptimConfig(muon_lr=muon, adam_lr=adam, warmup=8, decay="linear", end=0.0)


def _rl(lr: float, decay: Decay = "constant", end: float = 0.0) -> OptimConfig:
    return OptimConfig(muon_lr=0.0, adam_lr=lr, warmup=5, decay=decay, end=end)


class TinyConfig(Config):
    """The whole recipe's settings, one group a stage. ``track`` names trackers that get the rows of training."""

    controls: bool = False
    track: Track = ()
    measure: MeasureConfig = MeasureConfig(budgets=BUDGETS)
    data: DataConfig = DataConfig()
    s1: PretrainConfig = _s1(FLAGSHIP)
    s2: PretrainConfig = _s2(FLAGSHIP)
    s3: PretrainConfig = _s3(FLAGSHIP)
    cold_start: ColdStartConfig = ColdStartConfig(optim=_sft(0.01, 3e-3), steps=70)
    rl: RLStageConfig = RLStageConfig(
        rl=RLConfig(steps=45, entropy_low=0.03, entropy_high=0.6),
        optim=_rl(4e-4, decay="linear", end=0.1),
    )
    fusion: FusionConfig = FusionConfig(optim=_sft(0.005, 1.5e-3), steps=360)
    general_rl: RLStageConfig = RLStageConfig(
        rl=RLConfig(
            steps=100,
            queries_per_step=32,
            group_size=8,
            max_tokens=96,
            kl_coef=0.05,
            entropy_low=0.03,
            entropy_high=3.0,
        ),
        optim=_rl(3e-4, decay="linear", end=0.1),
        pool_per_family=60,
    )
    direct: SFTConfig = SFTConfig(optim=_sft(0.01, 3e-3), steps=250)


class StudentConfig(Config):
    """The distillation arms."""

    s1: PretrainConfig = _s1(STUDENT, 1_200_000)
    s2: PretrainConfig = _s2(STUDENT, 2_400_000, text=0.1)
    off_policy: OffPolicyConfig = OffPolicyConfig(optim=_sft(0.01, 3e-3), steps=100, queries=1000)
    on_policy: OnPolicyConfig = OnPolicyConfig(
        distill=DistillConfig(steps=44, temperature=0.6),
        optim=OptimConfig(muon_lr=0.003, adam_lr=1e-3, warmup=2, decay="linear", end=0.1),
        think_share=0.8,
    )
    rl: RLStageConfig = RLStageConfig(
        rl=RLConfig(steps=80, entropy_low=0.03, entropy_high=0.6), optim=_rl(3e-4), pool_per_family=300
    )


class TinyFullConfig(TinyConfig):
    """With the control arms' settings."""

    student: StudentConfig = StudentConfig()
    moe_s1: PretrainConfig = _s1(SPARSE, 300_000, copying=0, balance=0.1)
    moe_s2: PretrainConfig = _s2(SPARSE, 700_000, balance=0.1)


def measured(full: MeasureConfig, *parts: str) -> MeasureConfig:
    """The battery for one checkpoint: ``full`` without the parts not named (hot, general, budget)."""
    absent: dict[str, dict[str, Any]] = {
        "hot": {"hot_samples": 0},
        "general": {"mode_queries": 0, "general_per_kind": 0},
        "budget": {"budgets": ()},
    }
    changes: dict[str, Any] = {}
    for part, change in absent.items():
        if part not in parts:
            changes |= change
    return full.model_copy(update=changes)


def build(overrides: Sequence[str] = (), seed: int = 0) -> Chain:
    """The recipe's chain with overrides applied."""
    config = TinyFullConfig().override(overrides)
    stages = main_stages(config)
    if config.controls:
        stages += control_stages(config)
    titles = {stage.name: stage.title for stage in stages}
    report = ReportConfig(command=command_line("tiny", overrides, seed), titles=titles)
    needs = tuple(stage.name for stage in stages)
    stages.append(Stage("report", "Report", report, needs, write_stage_report))
    return Chain("tiny", tracked(stages, config.track), seed, config)


def main_stages(config: TinyConfig) -> list[Stage]:
    """From raw text to the finished model, each checkpoint measured."""
    battery = config.measure
    return [
        Stage("data", "Text and tasks: clean, split, tokenise", config.data, (), build_data),
        Stage("s1", "Pre-training 1: general", config.s1, ("data",), pretrain),
        Stage("s2", "Pre-training 2: reasoning", config.s2, ("data", "s1"), pretrain),
        Stage("s3", "Pre-training 3: long context", config.s3, ("data", "s2"), pretrain),
        Stage("cold_start", "Post-training 1: long-CoT cold start", config.cold_start, ("s3",), cold_start),
        Stage("eval_cold_start", "Measure", measured(battery, "hot"), ("cold_start",), measure_checkpoint),
        Stage("rl", "Post-training 2: reasoning RL", config.rl, ("cold_start",), reasoning_rl),
        Stage("eval_rl", "Measure", measured(battery, "hot"), ("rl",), measure_checkpoint),
        Stage("fusion", "Post-training 3: thinking-mode fusion", config.fusion, ("rl", "cold_start"), fusion),
        Stage("eval_fusion", "Measure", measured(battery, "general"), ("fusion",), measure_checkpoint),
        Stage("general_rl", "Post-training 4: general RL", config.general_rl, ("fusion",), general_rl, version=2),
        Stage("eval_final", "Measure", measured(battery, "general", "budget"), ("general_rl",), measure_checkpoint),
    ]


def control_stages(config: TinyFullConfig) -> list[Stage]:
    """Arms that some claims are judged against."""
    student, battery = config.student, config.measure
    students = measured(battery, "hot").model_copy(update={"items_per_family": 250})
    old_base = config.s3.model_copy(update={"rope_theta": config.s2.rope_theta})
    by_source = {"balance_scope": "source"}
    return [
        Stage("direct", "Control: direct answers only", config.direct, ("s3", "cold_start"), direct_control),
        Stage("eval_direct", "Measure", measured(battery), ("direct",), measure_checkpoint),
        Stage("s3_old_base", "Control: long context, old RoPE base", old_base, ("data", "s2"), pretrain),
        Stage("student_s1", "Student: pre-training 1", student.s1, ("data",), pretrain),
        Stage("student_base", "Student: pre-training 2", student.s2, ("data", "student_s1"), pretrain),
        Stage(
            "student_sft", "Distillation 1: off-policy", student.off_policy, ("student_base", "general_rl"), off_policy
        ),
        Stage("eval_student_sft", "Measure", students, ("student_sft",), measure_checkpoint),
        Stage("student_opd", "Distillation 2: on-policy", student.on_policy, ("student_sft", "general_rl"), on_policy),
        Stage("eval_student_opd", "Measure", students, ("student_opd",), measure_checkpoint),
        Stage("student_rl", "Comparison: RL on the student", student.rl, ("student_sft",), student_rl),
        Stage("eval_student_rl", "Measure", students, ("student_rl",), measure_checkpoint),
        Stage("moe_s1", "MoE: pre-training 1, global balance", config.moe_s1, ("data",), pretrain),
        Stage("moe_global", "MoE: pre-training 2, global balance", config.moe_s2, ("data", "moe_s1"), pretrain),
        Stage(
            "moe_micro_s1",
            "MoE control: micro-batch balance",
            config.moe_s1.model_copy(update=by_source),
            ("data",),
            pretrain,
        ),
        Stage(
            "moe_micro",
            "MoE control: micro-batch balance",
            config.moe_s2.model_copy(update=by_source),
            ("data", "moe_micro_s1"),
            pretrain,
        ),
    ]
