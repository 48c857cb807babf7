"""The training loop: one for pre-training, SFT, RL and distillation.

A source makes the micro-batches of a step, an objective turns each into sums, the loop divides once by the counts of
the whole step, clips, updates, logs and checkpoints. It knows nothing about data, rewards or engines. A non-finite
loss or gradient stops the run by name; nothing is skipped silently.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from twofold.base.batch import BatchSource, TokenBatch
from twofold.base.config import Config
from twofold.base.log import MetricsLog
from twofold.base.records import InputError
from twofold.model.qwen3 import Qwen3
from twofold.model.weights import split_sizes
from twofold.optim.muon import MatrixParameter, Muon
from twofold.optim.schedule import Decay, lr_scale
from twofold.train import checkpoint
from twofold.train.objectives import Objective, Sums

CHECKPOINT_SECONDS = 5.0  # most work that a kill can lose, plus one step (or one rollout batch)


class TrainError(RuntimeError):
    """Training cannot go on; the message says at which step and what to look at."""


class OptimConfig(Config):
    """Learning rates and schedule. ``muon_lr`` 0 gives every parameter to AdamW."""

    muon_lr: float = 0.02
    adam_lr: float = 3e-3
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    warmup: int = 10
    decay: Decay = "linear"
    start: float = 1.0
    end: float = 0.0


class Trainer:
    """Runs ``steps`` optimiser steps and leaves the trained weights in ``model``.

    Args:
        work: folder for resumable state (saved every CHECKPOINT_SECONDS) and metrics.jsonl.
        on_step: called with (step, metrics) after every update, for progress display and controllers.
        enough: asked with the number of steps done before each further one; True ends the run early. It may depend on
            that number and the weights alone, so that a resumed run is given the same answer.
    """

    def __init__(
        self,
        model: Qwen3,
        source: BatchSource,
        objective: Objective,
        optim: OptimConfig,
        steps: int,
        work: Path,
        on_step: Callable[[int, dict[str, float]], None] | None = None,
        enough: Callable[[int], bool] | None = None,
    ) -> None:
        self.model, self.source, self.objective, self.optim, self.steps = model, source, objective, optim, steps
        self.state_path = work / "state.safetensors"
        self.metrics = MetricsLog(work / "metrics.jsonl")
        self.on_step, self.enough = on_step, enough
        self.step = 0
        self.tokens = 0
        self.optimizers = build_optimizers(model, optim)

    def fit(self) -> None:
        """Train to the last step, resuming from the saved state if there is one."""
        if self.state_path.exists():
            self._restore()
        self.metrics.rewind(self.step)
        saved_at = time.monotonic()
        while self.step < self.steps and not (self.enough is not None and self.enough(self.step)):
            row = self._train_step()
            self.metrics.write(row)
            if self.on_step is not None:
                self.on_step(self.step, row)
            due = time.monotonic() - saved_at >= CHECKPOINT_SECONDS or self.step == self.steps
            if due and self.source.can_checkpoint:
                self._save()
                saved_at = time.monotonic()

    def _train_step(self) -> dict[str, Any]:
        batches = self.source.next_step()
        counts: dict[str, float] = defaultdict(float)
        for batch in batches:
            for name, count in self.objective.counts(batch).items():
                counts[name] += count
        if not any(counts.values()):
            raise TrainError(f"step {self.step}: no token of the batch carries a loss weight; nothing can be learnt")
        self.objective.begin_step(self.model, batches)
        totals: dict[str, float] = defaultdict(float)
        for batch in batches:
            for name, value in self._backward(batch, counts).items():
                totals[name] = max(totals[name], float(value)) if name.endswith("/max") else totals[name] + float(value)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.optim.grad_clip or float("inf"))
        if not torch.isfinite(norm):
            raise TrainError(
                f"step {self.step}: loss or gradient is not finite ({dict(totals)}); lower the learning rate"
            )
        scale = lr_scale(self.step, self.steps, self.optim.warmup, self.optim.decay, self.optim.start, self.optim.end)
        for optimizer, peak in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = peak * scale
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens += sum(batch.num_tokens for batch in batches)
        other_metrics = self.objective.end_step() | getattr(self.source, "metrics", {})
        row = {"step": self.step - 1, **totals, "grad_norm": float(norm), "lr_scale": scale, "num_tokens": self.tokens}
        return row | other_metrics

    def _backward(self, batch: TokenBatch, counts: dict[str, float]) -> Sums:
        losses, stats = self.objective(self.model, batch)
        means = {name: value / max(counts[name], 1e-9) for name, value in losses.items()}
        torch.stack(list(means.values())).sum().backward()
        return {name: value.detach() for name, value in means.items()} | {
            name: value.detach() if name.endswith("/max") else value.detach() / max(counts[name], 1e-9)
            for name, value in stats.items()
        }

    def _save(self) -> None:
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for name, (optimizer, _) in self.optimizers.items():
            tensors |= checkpoint.optimizer_tensors(name, optimizer, self.model)
        facts = {"step": self.step, "tokens": self.tokens, "steps": self.steps, "source": self.source.state_dict()}
        checkpoint.save_state(self.state_path, tensors, facts)

    def _restore(self) -> None:
        tensors, facts = checkpoint.load_state(self.state_path)
        weights = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
        try:
            self.model.load_state_dict(weights)
        except RuntimeError as error:
            raise InputError(f"{self.state_path} does not fit this model ({error}); delete it to start again") from None
        for name, (optimizer, _) in self.optimizers.items():
            checkpoint.restore_optimizer(name, optimizer, self.model, tensors)
        self.source.load_state_dict(facts["source"])
        self.step, self.tokens = facts["step"], facts["tokens"]


def build_optimizers(model: Qwen3, optim: OptimConfig) -> dict[str, tuple[torch.optim.Optimizer, float]]:
    """Muon for the matrices inside layers (not routers, not adapters), AdamW for the rest; each with its peak rate."""
    matrices: list[MatrixParameter] = []
    rest: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        matrix = parameter.dim() >= 2 and ".layers." in name and ".adapters." not in name
        if optim.muon_lr and matrix and not name.endswith("mlp.gate.weight"):
            matrices.append(MatrixParameter(parameter, tuple(split_sizes(model.config, name))))
        else:
            rest.append(parameter)
    adamw = torch.optim.AdamW(rest, lr=optim.adam_lr, betas=optim.betas, weight_decay=optim.weight_decay, fused=True)
    out: dict[str, tuple[torch.optim.Optimizer, float]] = {"adamw": (adamw, optim.adam_lr)}
    if matrices:
        out["muon"] = (Muon(matrices, optim.muon_lr, weight_decay=optim.weight_decay), optim.muon_lr)
    return out
