"""On-policy distillation as a source."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from twofold.engine.engine import Engine
from twofold.post.distill import DistillConfig, DistillSource
from twofold.tasks.query import Query
from twofold.text.chat import Renderer
from twofold.train.loop import OptimConfig, Trainer
from twofold.train.objectives import LOGP_DIFFERENCE, TokenKL

CONFIG = DistillConfig(steps=4, queries_per_step=6, max_tokens=10)


@pytest.fixture
def make_trainer(
    make_engine: Callable[..., Engine], renderer: Renderer, queries: list[Query], tmp_path: Path
) -> Callable[..., Trainer]:
    def make(steps: int, name: str = "work") -> Trainer:
        engine = make_engine()
        source = DistillSource(engine, renderer, queries, CONFIG, seed=2)
        teacher = make_engine(seed=1).model
        objective = TokenKL(teacher, "reverse", renderer.tokenizer.vocab_size)
        optim = OptimConfig(muon_lr=0.0, adam_lr=2e-2, warmup=0, decay="constant")
        return Trainer(engine.model, source, objective, optim, steps, tmp_path / name)

    return make


def test_the_student_comes_nearer_on_its_own_tokens(make_trainer: Callable[..., Trainer]) -> None:
    trainer = make_trainer(12)
    trainer.fit()
    rows = trainer.metrics.rows()
    assert rows[-1]["kl"] < 0.8 * rows[0]["kl"]
    assert all(row["on_policy"] == 1.0 and row[LOGP_DIFFERENCE + "/max"] < 1e-5 for row in rows)
    assert all(0 <= row["completions/clipped_ratio"] <= 1 and row["reward"] == 0 for row in rows)


def test_resuming_is_exact(make_trainer: Callable[..., Trainer]) -> None:
    whole = make_trainer(4, "whole")
    whole.fit()
    make_trainer(2, "cut").fit()
    again = make_trainer(4, "cut")
    again.fit()
    assert whole.metrics.rows() == again.metrics.rows()
    assert whole.source.state_dict() == again.source.state_dict()
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
