"""A realistic report with hostile texts in it."""

from __future__ import annotations

import math

import pytest

from twofold.report.model import (
    Claim,
    Condition,
    Figure,
    Heatmap,
    Plot,
    Report,
    Sample,
    Section,
    Series,
    StageCost,
    Table,
)

HOSTILE = "<script>alert('x')</script> | `tick` \"quoted\" & $x$"


def claims() -> list[Claim]:
    return [
        Claim(
            name="Thinking beats answering at once",
            statement="Accuracy after the cold start, thinking minus a direct-only control, in points",
            value=55.2,
            low=49.8,
            high=60.1,
            target=30,
            unit="points",
            holds=True,
        ),
        Claim(
            name="Mode following",
            statement="Share of `/think` and `/no_think` requests answered in the right mode",
            value=100.0,
            low=99.78,
            high=100.0,
            target=95,
            unit="%",
            holds=True,
            note="1750 items, seven flag patterns",
        ),
        Claim(
            name="RL lifts greedy accuracy",
            statement="Greedy accuracy after RL minus before, same items, in points",
            value=-2.4,
            low=-6.0,
            high=1.1,
            target=0,
            unit="points",
            holds=False,
            note="RL sharpens the distribution; greedy decoding gains nothing",
            conditions=[
                Condition(
                    name="more_sft",
                    text="RL minus more SFT",
                    value=4.2,
                    low=1.0,
                    high=7.4,
                    unit="points",
                    target=0,
                    sense="above",
                    met=True,
                ),
                Condition(name="greedy", text="greedy", value=-1.0, unit="points", target=0, sense="above"),
            ],
            shown=[Figure(name="pass", text="pass@8", value=81.0, unit="%", detail="of eight")],
        ),
        Claim(
            name="The budget curve rises",
            statement="Spearman correlation of budget and accuracy",
            value=0.964,
            target=0.9,
            holds=True,
        ),
        Claim(name="Experts specialise", statement="Needs the MoE arm", judged=False, note="run without `moe`"),
    ]


def sections() -> list[Section]:
    steps = [float(step) for step in range(0, 3000, 2)]
    loss = [3.2 * math.exp(-step / 500) + 1.1 + 0.05 * math.sin(step) for step in steps]
    budgets = [4.0, 8.0, 16.0, 24.0, 32.0, 48.0, 64.0, 90.0]
    long_stop = [2.0, 0.8, 5.5, 22.8, 49.8, 74.8, 83.8, 84.2]
    short_stop = [9.0, 7.2, 10.8, 42.2, 57.8, 81.2, 84.0, 84.2]
    arms = ["off-policy SFT", "on-policy KL", "RL 60 s", "RL 180 s"]
    return [
        Section(
            title="Pre-training",
            text="Three stages: **general**, reasoning, long.\n\n- S1 and S2 at 256 tokens\n- S3 at 1024, `theta` 1e6",
            plots=[
                Plot(
                    title="Loss",
                    x_label="step",
                    y_label="nats a token",
                    series=[
                        Series(name="train", x=steps, y=loss),
                        Series(name="held out", x=steps[::100], y=loss[::100]),
                    ],
                    note="Every 2nd step",
                ),
                Plot(
                    title="Bits per byte by position",
                    x_label="position in the window",
                    y_label="bits per byte",
                    kind="bar",
                    x_names=["0-256", "256-512", "512-1024"],
                    y_min=1.5,
                    series=[
                        Series(name="before S3", x=[0, 1, 2], y=[1.934, 2.072, 2.253]),
                        Series(name="after S3", x=[0, 1, 2], y=[1.918, 1.905, 1.931]),
                    ],
                ),
            ],
        ),
        Section(
            title="Thinking budget",
            text="Accuracy against the largest number of thinking tokens.",
            plots=[
                Plot(
                    title="Budget curve",
                    x_label="thinking budget, tokens",
                    y_label="accuracy, %",
                    log_x=True,
                    y_min=0,
                    y_max=100,
                    series=[
                        Series(
                            name=name,
                            x=budgets,
                            y=values,
                            low=[max(0.0, value - 4.5) for value in values],
                            high=[value + 4.5 for value in values],
                        )
                        for name, values in (("long stop", long_stop), ("short stop", short_stop))
                    ],
                ),
                Plot(
                    title="Strong to weak",
                    x_label="",
                    y_label="%",
                    kind="bar",
                    x_names=arms,
                    series=[
                        Series(
                            name="pass@1",
                            x=[0, 1, 2, 3],
                            y=[28.2, 46.5, 33.8, 42.5],
                            low=[23.9, 41.5, 28.7, 36.6],
                            high=[32.5, 51.5, 38.9, 48.4],
                        ),
                        Series(
                            name="pass@8",
                            x=[0, 1, 2, 3],
                            y=[67.5, 84.0, 60.0, 64.5],
                            low=[61.0, 78.9, 53.2, 57.9],
                            high=[74.0, 89.1, 66.8, 71.1],
                        ),
                    ],
                ),
            ],
            tables=[
                Table(
                    title="Accuracy by family",
                    columns=["family", "thinking", "not thinking", "items", "chance"],
                    rows=[
                        ["sum", 94.8, 6.9, 160, True],
                        ["let", 72.4, 8.7, 160, False],
                        [HOSTILE, math.nan, None, 160, None],
                    ],
                    note="Greedy, held-out items",
                )
            ],
            samples=[
                Sample(
                    title="A sum",
                    mode="thinking",
                    prompt="sum mod 10: E1 B5 I6 /think",
                    reasoning=" E0+1=1 B1+5=6 I6+6=2",
                    answer="2",
                    correct=True,
                ),
                Sample(
                    title="The same sum",
                    mode="not thinking",
                    prompt="sum mod 10: E1 B5 I6 /no_think",
                    reasoning="",
                    answer="7",
                    correct=False,
                    note="Answered at once",
                ),
                Sample(title=HOSTILE, mode=HOSTILE, prompt=HOSTILE, reasoning="```\n" + HOSTILE, answer=HOSTILE),
            ],
        ),
        Section(
            title="Experts",
            heatmaps=[
                Heatmap(
                    title="Share of tokens by expert",
                    row_labels=["text", "sum", "let", "swap"],
                    column_labels=[f"e{index}" for index in range(8)],
                    values=[[((row * 7 + column * 3) % 11) / 30 for column in range(8)] for row in range(4)],
                    note="Layer 2",
                )
            ],
        ),
    ]


@pytest.fixture
def report() -> Report:
    return make_report()


def make_report() -> Report:
    return Report(
        title="Twofold tiny: one model, two modes",
        command="twofold run tiny --seed 0 --set pretrain.s1.tokens=1700000",
        seed=0,
        versions={"python": "3.11.7", "torch": "2.13.0", "twofold": "0.1.0"},
        hardware="2 processors, 8 GiB, CPU (AVX2)",
        created="2026-01-02T03:04:05Z",
        intro="A 0.46 M parameter model taken through the whole recipe, from raw text to two modes and a student.",
        claims=claims(),
        claims_note="Read these with care.",
        stages=[
            StageCost(name="pretrain-s1", title="General pre-training", seconds=100.2, tokens=1_720_000, tflops=4.7),
            StageCost(name="pretrain-s2", title="Reasoning pre-training", seconds=160.0, tokens=2_560_000, tflops=7.0),
            StageCost(name="cold-start", title="Cold start", seconds=12.4, tokens=370_000, tflops=1.0),
            StageCost(
                name="rl", title="Reasoning RL", seconds=84.0, tokens=920_000, tflops=3.1, note="45 steps of 256"
            ),
            StageCost(name="report", title="This report", seconds=0.8),
        ],
        sections=sections(),
        data_card=Section(
            title="Data card",
            text="Everything is generated or part of Python itself.",
            tables=[
                Table(
                    title="Sources",
                    columns=["source", "bytes", "licence"],
                    rows=[["Python library", 7_300_000, "PSF-2.0"], ["generated tasks", 5_100_000, "own work"]],
                )
            ],
        ),
        peak_memory_bytes=1_450_000_000,
        total_seconds=357.4,
    )
