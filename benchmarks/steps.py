"""Twofold's training step alone, for benchmarks that compare or take apart nothing but that. Not here: the loop."""

from __future__ import annotations

from collections.abc import Callable

from twofold.base.batch import pack
from twofold.model.qwen3 import Qwen3
from twofold.train.loop import OptimConfig, build_optimizers
from twofold.train.objectives import CrossEntropy


def training_step(model: Qwen3, rows: list[list[int]]) -> Callable[[], None]:
    """Forward, backward and AdamW on the same packed documents every time."""
    batch, objective = pack(rows), CrossEntropy()
    optimizers = build_optimizers(model, OptimConfig(muon_lr=0.0))

    def step() -> None:
        losses, _ = objective(model, batch)
        (losses["loss"] / batch.num_tokens).backward()
        for optimizer, _ in optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step
