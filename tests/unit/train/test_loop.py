"""The loop: what it refuses, what it logs, which optimiser owns what."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from twofold.base.batch import TokenBatch
from twofold.base.files import read_jsonl
from twofold.model.qwen3 import Qwen3
from twofold.optim.schedule import lr_scale
from twofold.train.loop import OptimConfig, Trainer, TrainError, build_optimizers
from twofold.train.objectives import CrossEntropy, Sums

Make = Callable[..., Any]


class Spoiled(CrossEntropy):
    """Cross entropy whose loss is multiplied by ``factor`` from its ``start``-th call on."""

    def __init__(self, factor: float, start: int) -> None:
        super().__init__()
        self.factor, self.left = factor, start

    def __call__(self, model: Qwen3, batch: TokenBatch) -> tuple[Sums, Sums]:
        losses, stats = super().__call__(model, batch)
        self.left -= 1
        return {"loss": losses["loss"] * (self.factor if self.left < 0 else 1.0)}, stats


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run_by_name(
    factor: float, tmp_path: Path, make_model: Make, make_source: Make
) -> None:
    model = make_model()
    trainer = Trainer(model, make_source(1), Spoiled(factor, 2), OptimConfig(), 5, tmp_path)
    with pytest.raises(TrainError, match=r"step 2: loss or gradient is not finite \(\{'loss': (nan|inf)"):
        trainer.fit()
    assert all(torch.isfinite(p).all() for p in model.parameters())  # the bad update was not applied
    assert [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [0, 1]


def test_a_step_without_any_loss_weight_is_refused(
    tmp_path: Path, make_model: Make, make_source: Make, make_batch: Make
) -> None:
    source = make_source()
    source.make = lambda lengths, seed: make_batch(lengths, seed, [[0.0] * n for n in lengths])
    with pytest.raises(TrainError, match="step 0: no token of the batch carries a loss weight"):
        Trainer(make_model(), source, CrossEntropy(), OptimConfig(), 1, tmp_path).fit()


def test_metrics_say_what_was_done(tmp_path: Path, make_model: Make, make_source: Make) -> None:
    seen: list[tuple[int, float]] = []
    optim = OptimConfig(warmup=2, decay="linear", end=0.0, grad_clip=1e-3)
    trainer = Trainer(
        make_model(),
        make_source(),
        CrossEntropy(),
        optim,
        4,
        tmp_path,
        on_step=lambda s, row: seen.append((s, row["loss"])),
    )
    trainer.fit()
    rows = trainer.metrics.rows()
    assert [row["step"] for row in rows] == [0, 1, 2, 3] and seen == [(row["step"] + 1, row["loss"]) for row in rows]
    assert [row["num_tokens"] for row in rows] == [26, 52, 78, 104] and trainer.tokens == 104
    assert [row["lr_scale"] for row in rows] == [lr_scale(s, 4, 2, "linear", 1.0, 0.0) for s in range(4)]
    assert all(row["grad_norm"] > 0.01 for row in rows)  # as measured, before clipping
    assert 2 < rows[0]["loss"] < 6 and 0 <= rows[0]["mean_token_accuracy"] <= 1


def test_statistics_that_are_maxima_keep_the_largest(tmp_path: Path, make_model: Make, make_source: Make) -> None:
    class Peaks(CrossEntropy):
        values = iter([3.0, 8.0, 2.0, 5.0, 1.0, 4.0])

        def __call__(self, model: Qwen3, batch: TokenBatch) -> tuple[Sums, Sums]:
            losses, stats = super().__call__(model, batch)
            return losses, stats | {"gap/max": torch.tensor(next(self.values))}

    trainer = Trainer(make_model(), make_source(3), Peaks(), OptimConfig(), 2, tmp_path)
    trainer.fit()
    assert [row["gap/max"] for row in trainer.metrics.rows()] == [8.0, 5.0]


def test_nothing_is_saved_while_the_source_cannot_describe_itself(
    tmp_path: Path, make_model: Make, make_source: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("twofold.train.loop.CHECKPOINT_SECONDS", 0.0)
    source = make_source()
    source.can_checkpoint = False
    trainer = Trainer(make_model(), source, CrossEntropy(), OptimConfig(), 3, tmp_path)
    trainer.fit()
    assert not trainer.state_path.exists() and len(trainer.metrics.rows()) == 3


def test_training_learns(tmp_path: Path, make_model: Make, make_source: Make, make_batch: Make) -> None:
    source = make_source(1)
    source.make = lambda lengths, seed: make_batch(lengths, 7)
    trainer = Trainer(make_model(), source, CrossEntropy(), OptimConfig(warmup=1), 25, tmp_path)
    trainer.fit()
    rows = trainer.metrics.rows()
    assert rows[-1]["loss"] < 0.3 * rows[0]["loss"]


def test_muon_owns_the_matrices_inside_layers_and_adamw_the_rest(make_model: Make) -> None:
    model = make_model(True)
    names = {id(p): name for name, p in model.named_parameters()}
    owned = {
        kind: {names[id(p)] for group in optimizer.param_groups for p in group["params"]}
        for kind, (optimizer, _) in build_optimizers(model, OptimConfig()).items()
    }
    assert owned["muon"] | owned["adamw"] == set(names.values()) and not owned["muon"] & owned["adamw"]
    assert {"model.embed_tokens.weight", "model.norm.weight", "model.layers.0.mlp.gate.weight"} <= owned["adamw"]
    assert "model.layers.1.mlp.experts.down_proj" in owned["muon"]
    only = build_optimizers(model, OptimConfig(muon_lr=0.0))
    assert list(only) == ["adamw"] and len(only["adamw"][0].param_groups[0]["params"]) == len(names)


def test_a_run_that_has_learnt_enough_ends_early_and_stays_ended(
    tmp_path: Path, make_model: Make, make_source: Make
) -> None:
    def train(enough: Callable[[int], bool]) -> Trainer:
        trainer = Trainer(make_model(), make_source(1), CrossEntropy(), OptimConfig(), 6, tmp_path, enough=enough)
        trainer.fit()
        return trainer

    asked: list[int] = []
    assert train(lambda step: asked.append(step) or step == 3).step == 3  # type: ignore[func-returns-value]
    assert asked == [0, 1, 2, 3]
    resumed = train(lambda step: step >= 3)
    assert resumed.step == 3
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 3
