"""Training jobs as one of several processes, so that a test can start, compare and kill them.

python parallel_ranks.py FOLDER JOBS: JOBS is JSON, a list of {"name", "moe", "muon", "steps", "parallel", "kill",
"interrupt", "precision"}. Each job trains in FOLDER/name; the first process leaves the first step's gradients and the
final weights beside the state.
"""

import json
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from twofold.base import dist
from twofold.base.batch import TokenBatch, pack
from twofold.model.config import ModelConfig
from twofold.model.parallel import Parallel, ParallelConfig, collect, parallelise, row_order
from twofold.model.qwen3 import Qwen3
from twofold.train import loop
from twofold.train.checkpoint import save_state
from twofold.train.loop import FitConfig, OptimConfig, Trainer
from twofold.train.objectives import CrossEntropy


def make_model(moe: bool) -> Qwen3:
    shape: dict[str, Any] = dict(
        vocab_size=48, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, head_dim=8, rms_norm_eps=1e-6, rope_theta=1e4, max_position_embeddings=64,
        tie_word_embeddings=not moe, initializer_range=0.1,
    )  # fmt: skip
    if moe:
        shape |= dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=12)
    model = Qwen3(ModelConfig(**shape))
    model.init_weights(0)
    return model


class Source:
    """Step i has 3 micro-batches of 4 documents of 3 to 40 tokens, some without weight; its state is one counter."""

    can_checkpoint = True

    def __init__(self) -> None:
        self.taken = 0

    def next_step(self) -> list[TokenBatch]:
        self.taken += 1
        generator = torch.Generator().manual_seed(self.taken)
        batches = []
        for _ in range(3):
            lengths = torch.randint(3, 41, (4,), generator=generator).tolist()
            rows = [torch.randint(0, 48, (n,), generator=generator).tolist() for n in lengths]
            weights = [(torch.rand(n, generator=generator) < 0.8).float().tolist() for n in lengths]
            batches.append(pack(rows, weights))
        return batches

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.taken = state["taken"]


def train(folder: Path, job: dict[str, Any]) -> Trainer:
    """Run one job; a job with "kill" ends this process by SIGKILL after that step's update."""
    model = make_model(job["moe"])
    precision = job.get("precision", "fp32")
    parallel = parallelise(model, ParallelConfig(precision=precision, **job.get("parallel", {})))
    optim = OptimConfig(
        muon_lr=0.02 if job["muon"] else 0.0, adam_lr=3e-3, warmup=2, weight_decay=0.01, decay="cosine", end=0.1,
    )  # fmt: skip
    gradients: dict[str, torch.Tensor] = {}
    clip = parallel.clip_gradients

    def watched(watched_model: torch.nn.Module, largest: float) -> torch.Tensor:
        norm = clip(watched_model, largest)
        if not gradients:
            gradients.update(whole_gradients(model, parallel))
        return norm

    if job.get("gradients"):
        parallel.clip_gradients = watched  # type: ignore[method-assign]

    def on_step(step: int, row: dict[str, float]) -> None:
        if step == job.get("kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        if step == job.get("interrupt"):
            signal.raise_signal(signal.SIGINT)

    objective = CrossEntropy(balance=0.02 if job["moe"] else 0.0)
    trainer = Trainer(model, Source(), objective, optim, job["steps"], folder / job["name"], on_step)
    trainer.fit(FitConfig(split=job.get("split", 1), precision=precision), parallel=parallel)
    weights = collect(model, parallel).state_dict()
    if dist.world().rank == 0:
        save_state(folder / job["name"] / "final", weights, {})
        save_state(folder / job["name"] / "gradients", gradients, {})
    return trainer


def whole_gradients(model: Qwen3, parallel: Parallel) -> dict[str, torch.Tensor]:
    out = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        full, order = dist.whole(parameter.grad).clone(), row_order(model, name, parallel.tensor)
        out[name] = full if order is None else full[order.argsort()]
    return out


if __name__ == "__main__":
    torch.set_num_threads(1)
    loop.CHECKPOINT_SECONDS = 0.0
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell would have it ignored
    with dist.session():
        for description in json.loads(sys.argv[2]):
            with suppress(KeyboardInterrupt):
                train(Path(sys.argv[1]), description)
