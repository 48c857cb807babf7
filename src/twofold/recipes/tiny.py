"""`twofold run tiny`: the whole recipe on a laptop, one chain of stages from raw text to a model you can chat with.

This file is the record of what was decided: sizes, rates, mixtures, and which stage stands on which. What the stages
do is in their own modules. ``controls=true`` adds the arms that some claims need (direct answers only, the old RoPE
base, distillation against RL, the MoE pair); it changes nothing about the main chain.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from twofold.base.config import Config
from twofold.optim.schedule import Decay
from twofold.post.distill import DistillConfig
from twofold.post.rl import RLConfig
from twofold.recipes.chain import Chain, Stage, command_line
from twofold.recipes.corpus import DataConfig, build_data
from twofold.recipes.distill import (
    OffPolicyConfig,
    OnPolicyConfig,
    TeacherTextConfig,
    more_teacher_texts,
    off_policy,
    on_policy,
    student_rl,
)
from twofold.recipes.fusion import FusionConfig, ThinkOnlyConfig, fusion, think_only
from twofold.recipes.general import GeneralSFTConfig, general_rl, general_sft
from twofold.recipes.measure import MeasureConfig, Part, measure_checkpoint
from twofold.recipes.post import (
    ColdStartConfig,
    MoreSFTConfig,
    RejectionConfig,
    RLStageConfig,
    SFTConfig,
    cold_start,
    direct_control,
    more_sft_control,
    reasoning_rl,
    rejection_control,
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
MIXED = ((1.0, 32, 96),)  # pieces so short that a micro-batch of 256 tokens holds several sources
BUDGETS = (0, 8, 16, 24, 32, 40, 48)
GENERAL_MIXTURE = {"text": 0.58, "tasks_general": 0.3, "notes_short": 0.08, "gym": 0.04}


def _s1(shape: ModelShape, tokens: int = 1_200_000, copying: int = 300_000) -> PretrainConfig:
    return PretrainConfig(
        shape=shape,
        optim=OptimConfig(warmup=20, decay="constant"),
        tokens=tokens,
        tokens_per_step=2560,
        head_start={"copying": copying},
        mixture=GENERAL_MIXTURE,
        ordered=("copying", "tasks_general", "notes_short"),
        length_mix=SHORT,
        rope_theta=1e4,
        context=256,
        spans=SPANS,
    )


def _s2(shape: ModelShape, tokens: int = 3_600_000, text: float = 0.2) -> PretrainConfig:
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
        probe_distance=256,
        task_items=40,
    )


def _s3(shape: ModelShape, tokens: int = 800_000, rope_theta: float = 1e6) -> PretrainConfig:
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
        task_items=40,
    )


def _moe(scope: Literal["global", "micro"]) -> PretrainConfig:
    """Text and tasks in short pieces, so that every micro-batch is mixed; the weight is Qwen3's."""
    return PretrainConfig(
        shape=SPARSE,
        optim=OptimConfig(warmup=20, decay="linear", end=0.1),
        tokens=600_000,
        tokens_per_step=2560,
        mixture={"tasks_reasoning": 0.6, "text": 0.4},
        length_mix=MIXED,
        rope_theta=1e4,
        context=256,
        balance=1e-3,
        balance_scope=scope,
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
    cold_start: ColdStartConfig = ColdStartConfig(optim=_sft(0.01, 3e-3), steps=300)
    rl: RLStageConfig = RLStageConfig(
        rl=RLConfig(steps=60, entropy_low=0.03, entropy_high=0.6),
        optim=_rl(4e-4, decay="linear", end=0.1),
        pool_per_family=500,
        probe_samples=4,
        tuned=(2e-4, 4e-4, 8e-4),
    )
    fusion: FusionConfig = FusionConfig(optim=_sft(0.005, 1.5e-3), steps=800)
    general_rl: RLStageConfig = RLStageConfig(
        rl=RLConfig(
            steps=160,
            queries_per_step=20,
            group_size=16,
            max_tokens=96,
            kl_coef=0.03,
            entropy_low=0.03,
            entropy_high=3.0,
        ),
        optim=_rl(6e-4, decay="linear", end=0.1),
        pool_per_family=60,
        tuned=(3e-4, 6e-4, 1e-3),
    )


class PostControls(Config):
    """Opponents of the flagship's post-training stages."""

    direct: SFTConfig = SFTConfig(optim=_sft(0.01, 3e-3), steps=700)
    more_sft: MoreSFTConfig = MoreSFTConfig(optim=_sft(0.005, 1.5e-3), tuned=(0.0025, 0.005, 0.01))
    rejection: RejectionConfig = RejectionConfig(optim=_sft(0.01, 3e-3), tuned=(0.0025, 0.005, 0.01))
    think_only: ThinkOnlyConfig = ThinkOnlyConfig(optim=_sft(0.005, 1.5e-3))
    general_sft_24: GeneralSFTConfig = GeneralSFTConfig(optim=_sft(0.01, 3e-3), steps=160, tuned=(0.003, 0.01, 0.03))
    general_sft_240: GeneralSFTConfig = GeneralSFTConfig(
        optim=_sft(0.01, 3e-3), steps=160, labelled=240, tuned=(0.003, 0.01, 0.03)
    )


class StudentConfig(Config):
    """The smaller model: its base, another base that never leaves stage 1, and the arms of distillation."""

    s1: PretrainConfig = _s1(STUDENT, 900_000)
    s2: PretrainConfig = _s2(STUDENT, 2_000_000)
    off_policy: OffPolicyConfig = OffPolicyConfig(optim=_sft(0.01, 3e-3), steps=100)
    rl: RLStageConfig = RLStageConfig(
        rl=RLConfig(steps=60, entropy_low=0.03, entropy_high=0.6),
        optim=_rl(4e-4, decay="linear", end=0.1),
        probe_samples=4,
        tuned=(2e-4, 4e-4, 8e-4),
    )
    on_policy: OnPolicyConfig = OnPolicyConfig(
        distill=DistillConfig(steps=1000, queries_per_step=32, temperature=0.6),
        optim=OptimConfig(muon_lr=0.005, adam_lr=1.5e-3, warmup=2, decay="linear", end=0.1),
        tuned=(0.003, 0.005, 0.01),
    )
    more_sft: TeacherTextConfig = TeacherTextConfig(optim=_sft(0.02, 6e-3), tuned=(0.0025, 0.005, 0.01, 0.02))


class TinyFullConfig(TinyConfig):
    """With the control arms' settings."""

    post: PostControls = PostControls()
    student: StudentConfig = StudentConfig()
    moe_global: PretrainConfig = _moe("global")
    moe_micro: PretrainConfig = _moe("micro")


CORE: tuple[Part, ...] = ("think", "direct", "no_think", "beyond")


def measured(full: MeasureConfig, *parts: Part) -> MeasureConfig:
    """The battery for one checkpoint: the parts named."""
    return full.model_copy(update={"parts": parts, "budgets": full.budgets if "budget" in parts else ()})


def build(overrides: Sequence[str] = (), seed: int = 0) -> Chain:
    """The recipe's chain with overrides applied."""
    config = TinyFullConfig().override(overrides)
    stages = main_stages(config)
    if config.controls:
        stages += post_controls(config) + student_stages(config) + base_controls(config)
    titles = {stage.name: stage.title for stage in stages}
    report = ReportConfig(command=command_line("tiny", overrides, seed), titles=titles)
    needs = tuple(stage.name for stage in stages)
    stages.append(Stage("report", "Report", report, needs, write_stage_report))
    return Chain("tiny", tracked(stages, config.track), seed, config)


def main_stages(config: TinyConfig) -> list[Stage]:
    """From raw text to the finished model, each checkpoint measured."""
    full = config.measure
    cold, rl = measured(full, *CORE, "mixed"), measured(full, *CORE, "mixed")
    fused = measured(full, *CORE, "mixed", "modes", "general", "budget")
    return [
        Stage("data", "Text and tasks: clean, split, tokenise", config.data, (), build_data, version=2),
        Stage("s1", "Pre-training 1: general", config.s1, ("data",), pretrain),
        Stage("s2", "Pre-training 2: reasoning", config.s2, ("data", "s1"), pretrain),
        Stage("s3", "Pre-training 3: long context", config.s3, ("data", "s2"), pretrain),
        Stage("cold_start", "Post-training 1: long-CoT cold start", config.cold_start, ("s3",), cold_start, version=2),
        Stage("eval_cold_start", "Measure", cold, ("cold_start",), measure_checkpoint, version=2),
        Stage("rl", "Post-training 2: reasoning RL", config.rl, ("cold_start",), reasoning_rl, version=2),
        Stage("eval_rl", "Measure", rl, ("rl",), measure_checkpoint, version=2),
        Stage(
            "fusion", "Post-training 3: thinking-mode fusion", config.fusion, ("rl", "cold_start"), fusion, version=2
        ),
        Stage("eval_fusion", "Measure", fused, ("fusion",), measure_checkpoint, version=2),
        Stage("general_rl", "Post-training 4: general RL", config.general_rl, ("fusion",), general_rl, version=3),
        Stage("eval_final", "Measure", fused, ("general_rl",), measure_checkpoint, version=2),
    ]


def post_controls(config: TinyFullConfig) -> list[Stage]:
    """Opponents of the flagship's stages, each measured on the parts that its claim needs."""
    post, full = config.post, config.measure
    uncut = config.fusion.model_copy(update={"cut_thoughts": 0})
    arms = [
        ("direct", "Control: direct answers only", post.direct, ("s3", "cold_start"), direct_control, CORE),
        ("rl_more_sft", "Control: more SFT on traces", post.more_sft, ("cold_start", "rl"), more_sft_control,
         ("think", "mixed", "beyond")),
        ("rl_rejection", "Control: SFT on own right samples", post.rejection, ("cold_start", "rl"), rejection_control,
         ("think", "mixed", "beyond")),
        ("think_only", "Control: thinking alone", post.think_only, ("rl", "cold_start", "fusion"), think_only,
         ("think", "mixed")),
        ("uncut", "Control: fusion without cut thoughts", uncut, ("rl", "cold_start"), fusion, ("budget",)),
        ("general_sft_24", "Control: 24 solved examples", post.general_sft_24, ("fusion",), general_sft,
         ("think", "general")),
        ("general_sft_240", "Control: 240 solved examples", post.general_sft_240, ("fusion",), general_sft,
         ("think", "general")),
    ]  # fmt: skip
    stages = []
    for name, title, setting, needs, run, parts in arms:
        stages.append(Stage(name, title, setting, needs, run, version=2))
        stages.append(Stage(f"eval_{name}", "Measure", measured(full, *parts), (name,), measure_checkpoint, version=2))
    return stages


def student_stages(config: TinyFullConfig) -> list[Stage]:
    """The smaller model: two bases, and three arms of equal operations on one of them."""
    student = config.student
    battery = measured(config.measure, "think", "hot", "mixed", "flag", "beyond")
    # stage 1's shares, with task text as new to the model as stage 2's, of all sizes from the start
    mixture = {"text": 0.58, "tasks_reasoning": 0.3, "notes_short": 0.08, "gym": 0.04}
    general = student.s2.model_copy(update={"mixture": mixture, "ordered": ()})
    arms = [
        ("student_sft", "Distillation 1: off-policy", student.off_policy, ("student_base", "general_rl"), off_policy),
        ("student_rl", "Distillation 2, opponent: RL", student.rl, ("student_sft",), student_rl),
        ("student_opd", "Distillation 2: on-policy", student.on_policy, ("student_sft", "general_rl", "student_rl"),
         on_policy),
        ("student_more_sft", "Distillation 2, opponent: teacher's texts", student.more_sft,
         ("student_sft", "general_rl", "student_rl"), more_teacher_texts),
    ]  # fmt: skip
    stages = [
        Stage("student_s1", "Student: pre-training 1", student.s1, ("data",), pretrain),
        Stage("student_base", "Student: pre-training 2", student.s2, ("data", "student_s1"), pretrain),
        Stage("student_base_general", "Control: stage 1 goes on", general, ("data", "student_s1"), pretrain),
    ]
    for name, title, setting, needs, run in arms:
        stages.append(Stage(name, title, setting, needs, run, version=2))
        stages.append(Stage(f"eval_{name}", "Measure", battery, (name,), measure_checkpoint, version=2))
    return stages


def base_controls(config: TinyFullConfig) -> list[Stage]:
    """The old RoPE base, and the pair of mixtures of experts."""
    old_base = config.s3.model_copy(update={"rope_theta": config.s2.rope_theta})
    return [
        Stage("s3_old_base", "Control: long context, old RoPE base", old_base, ("data", "s2"), pretrain),
        Stage("moe_global", "MoE: global balance", config.moe_global, ("data",), pretrain),
        Stage("moe_micro", "MoE control: micro-batch balance", config.moe_micro, ("data",), pretrain),
    ]
