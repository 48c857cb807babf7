"""The training loop: one for pre-training, SFT, RL and distillation.

A source makes the micro-batches of a step, an objective turns each into sums, the loop divides once by the counts of
the whole step on all ranks, clips, updates, logs and saves. It knows nothing about data, rewards or engines. A step
whose loss or gradient is not finite is left out with a warning and counted; several in a row stop the run by name.
Micro-batches that do not fit in memory are cut finer. What a state holds is in ``checkpoint.py``.
"""

from __future__ import annotations

import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, field_validator

from twofold.base.batch import BatchSource, TokenBatch
from twofold.base.config import Config
from twofold.base.log import MetricsLog
from twofold.base.records import InputError
from twofold.model.parallel import Parallel, collect, kinds, reorder, row_order, tensor_ranks
from twofold.model.qwen3 import Qwen3
from twofold.model.weights import split_sizes
from twofold.optim.groups import GROUPS, Group, WeightDecay, group_of
from twofold.optim.muon import MatrixParameter, Muon
from twofold.optim.schedule import Decay, lr_scale, piecewise, remark
from twofold.train import checkpoint, flight, micro
from twofold.train.compute import Precision, compiled, in_precision
from twofold.train.interrupt import Interrupt
from twofold.train.meter import Meter, Work, step_flops
from twofold.train.objectives import Objective, Sums
from twofold.train.store import BEST, SINGLE, Store

CHECKPOINT_SECONDS = 5.0  # most work that a kill can lose, plus one step (or one rollout batch)
SAVING_SHARE = 0.05  # of the time may go into saving; large states are saved more seldom than that


class TrainError(RuntimeError):
    """Training cannot go on; the message says at which step and what to look at."""


class OptimConfig(Config):
    """Learning rates and schedule. ``muon_lr`` 0 gives every parameter to AdamW.

    ``decay`` may be (tokens, multiplier) points instead of a name: the rate is linear between them, in tokens trained,
    and ``warmup``, ``start`` and ``end`` have no meaning. ``weight_decay`` as a number is for matrices alone; give
    {"matrices": 0.1, "embeddings": 0.1} to shrink other groups as well.
    """

    muon_lr: float = 0.02
    adam_lr: float = 3e-3
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: Annotated[float, Field(ge=0)] | WeightDecay = 0.0
    grad_clip: float = 1.0
    warmup: int = 10
    decay: Decay | tuple[tuple[float, float], ...] = "linear"
    start: float = 1.0
    end: float = 0.0

    @field_validator("decay")
    @classmethod
    def _rising(cls, decay: Any) -> Any:
        if not isinstance(decay, str):
            tokens = [point[0] for point in decay]
            if not tokens or tokens != sorted(set(tokens)):
                raise ValueError("decay needs (tokens, multiplier) points whose tokens rise")
        return decay

    def shrinks(self, group: Group) -> float:
        """Weight decay of a group of parameters."""
        if isinstance(self.weight_decay, WeightDecay):
            return float(getattr(self.weight_decay, group))
        return self.weight_decay if group == "matrices" else 0.0

    def remark(self, steps: int) -> str | None:
        """What is odd about the rate over a run of ``steps`` steps, or None."""
        if isinstance(self.decay, str):
            return remark(steps, self.warmup, self.decay, self.start, self.end)
        return None

    def scale(self, step: int, steps: int, tokens: int) -> float:
        """Multiplier of the peak rates at a step (0-based) that begins after ``tokens`` trained tokens."""
        if isinstance(self.decay, str):
            return lr_scale(step, steps, self.warmup, self.decay, self.start, self.end)
        return piecewise(tokens, self.decay)


class FitConfig(Config):
    """How a run is carried out. Nothing here changes what is learnt, but for the rounding of bf16.

    precision: of matrix products and activations; weights, gradients and moments are fp32 in both. compile: let torch
    compile norms and dense feed-forwards.
    max_skipped: steps in a row that are not finite before the run stops. split: parts that every micro-batch is cut
    into, at sequence boundaries, from the start; more when memory runs out. keep_every, keep_last: a state is kept
    after every so many steps, the last so many of them (0 keeps none). keep_best: the metric, better when smaller,
    whose best row's weights are kept.
    """

    precision: Precision = "fp32"
    compile: bool = False
    max_skipped: int = 3
    split: int = 1
    keep_every: int = 0
    keep_last: int = 2
    keep_best: str = ""


@dataclass(frozen=True)
class Hook:
    """``run(steps done)`` after every ``every`` steps and after the last; what it measures joins the step's metrics.

    It is called before the step is logged and saved, on every rank, and may look at the model but not change it.
    """

    every: int
    run: Callable[[int], Mapping[str, float] | None]


class Trainer:
    """Runs ``steps`` optimiser steps and leaves the trained weights in ``model``.

    Args:
        work: folder for resumable state (saved every CHECKPOINT_SECONDS or less often) and metrics.jsonl.
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
        self.work = work
        self.metrics = MetricsLog(work / "metrics.jsonl")
        self.on_step, self.enough = on_step, enough
        self.config, self.hooks, self.parallel = FitConfig(), tuple[Hook, ...](), Parallel()
        self.step = self.tokens = 0
        self.skipped = self.skipped_in_a_row = 0
        self.split = 1
        self.best: float | None = None
        self.optimizers = build_optimizers(model, optim)
        self.device = model.model.embed_tokens.weight.device
        self.meter = Meter(self.device, model.dtype)
        self.batches: list[TokenBatch] = []  # of the step under way, for the flight record

    @property
    def state_path(self) -> Path:
        """Where one process saves its state."""
        return self.work / SINGLE

    def fit(
        self, config: FitConfig | None = None, hooks: Sequence[Hook] = (), parallel: Parallel | None = None
    ) -> None:
        """Train to the last step, resuming from the saved state if there is one.

        Ctrl-C ends the run after the step under way, saved; a second one at once.

        Args:
            parallel: what ``parallelise`` gave for the model, before this Trainer was made.

        Raises:
            TrainError: training cannot go on. InputError: a saved state that does not fit. KeyboardInterrupt: Ctrl-C;
                its message says how to go on.
        """
        self.config, self.hooks, self.parallel = config or FitConfig(), tuple(hooks), parallel or Parallel()
        self.split = self.config.split
        computes = torch.bfloat16 if self.config.precision == "bf16" else self.model.dtype
        self.meter = Meter(self.device, computes, self.parallel.world.size)
        _check_parallel(self.objective, self.parallel, self.config)
        store = Store(self.work, self.parallel, self.config.keep_every, self.config.keep_last)
        self._resume(store)
        odd = self.optim.remark(self.steps)
        if odd and self.step < self.steps and self.parallel.world.rank == 0:
            warnings.warn(f"learning rate: {odd}", RuntimeWarning, stacklevel=2)
        with Interrupt() as interrupt, compiled(self.model, self.config.compile):
            try:
                self._run(store, interrupt)
                store.finish()
            except Exception as error:
                rank = self.parallel.world.rank
                path = self.work / ("flight.json" if self.parallel.world.size == 1 else f"flight-{rank}.json")
                facts = self._facts() | {"rank": rank, "fit": self.config.model_dump(mode="json")}
                flight.record(path, error, facts, self.metrics.rows(), self.batches)
                raise

    def load_best(self) -> int:
        """Put the weights of the best row of ``keep_best`` into the model; returns the steps it was trained.

        Raises:
            InputError: there are none.
        """
        path = self.work / BEST
        if not path.exists():
            raise InputError(f"there is no {path}; fit with keep_best and a hook that measures it")
        saved = checkpoint.SavedFile(path)
        reorder(self.model, checkpoint.restore_weights(saved, self.model), 1, self.parallel.tensor)
        return int(saved.facts["step"])

    def _run(self, store: Store, interrupt: Interrupt) -> None:
        saved_at, pause = time.monotonic(), CHECKPOINT_SECONDS
        while self.step < self.steps and not (self.enough is not None and self.enough(self.step)):
            row = self._train_step()
            if row is None:
                continue
            last = self.step == self.steps
            for hook in self.hooks:
                if last or self.step % hook.every == 0:
                    row |= hook.run(self.step) or {}
            if self.parallel.world.rank == 0:
                self.metrics.write(row)
            if self.on_step is not None:
                self.on_step(self.step, row)
            self._keep_best(store, row)
            asked, late = self._agreed(interrupt.asked, time.monotonic() - saved_at >= pause)
            can = self.source.can_checkpoint
            if can and (late or last or asked or store.keeps(self.step)):
                begun = time.monotonic()
                store.save(checkpoint.run_tensors(self.model, self.optimizers), self._facts())
                saved_at = time.monotonic()
                pause = CHECKPOINT_SECONDS and max(CHECKPOINT_SECONDS, (saved_at - begun) / SAVING_SHARE)
            if asked and not last:
                store.finish()
                saved = f"saved in {store.path}" if can else "the last state saved is an earlier one"
                raise KeyboardInterrupt(f"stopped after step {self.step}, {saved}; run the same again to go on")

    def _keep_best(self, store: Store, row: dict[str, Any]) -> None:
        name = self.config.keep_best
        if name in row and (self.best is None or row[name] < self.best):
            self.best = row[name]
            weights = {f"model.{key}": t for key, t in collect(self.model, self.parallel).state_dict().items()}
            store.save_best(weights, {"step": self.step, name: self.best})

    def _resume(self, store: Store) -> None:
        saved = store.open()
        if saved is None:
            self.metrics.rewind(0)
            return
        checkpoint.check_facts(saved, self.settings())
        facts = saved.facts
        reorder(
            self.model, checkpoint.restore(saved, self.model, self.optimizers), facts["tensor"], self.parallel.tensor
        )
        try:
            self.source.load_state_dict(facts["source"])
            self.objective.load_state_dict(facts["objective"])
        except KeyError as error:
            raise InputError(
                f"{saved.origin}: its state of the data lacks {error}; delete it to start the stage again"
            ) from None
        self.step, self.tokens, self.skipped, self.best = (facts[n] for n in ("step", "tokens", "skipped", "best"))
        self.split = max(self.split, facts["split"])
        if self.parallel.world.rank == 0:
            self.metrics.rewind(self.step)
            rows = len(self.metrics.rows())
            if rows != self.step:
                raise InputError(
                    f"{self.metrics.path} has rows of {rows} steps, the state beside it is of {self.step}; "
                    f"put the file back, or delete {saved.origin} to start again"
                )

    def _agreed(self, *wishes: bool) -> list[bool]:
        """Whether any rank wishes each, the same on all."""
        return [bool(value) for value in self.parallel.world.max(torch.tensor([float(wish) for wish in wishes]))]

    def _train_step(self) -> dict[str, Any] | None:
        """One attempt at a step: its metrics, or None when it was not finite."""
        begun = time.perf_counter()
        drawn = self.source.next_step()
        waited = time.perf_counter() - begun
        own = micro.share(drawn, self.parallel.data.rank, self.parallel.data.size)
        counts = self._count(own)
        totals = self._gradients(own, counts)
        norm = float(self.parallel.clip_gradients(self.model, self.optim.grad_clip or float("inf")))
        other_metrics = self.objective.end_step() | getattr(self.source, "metrics", {})
        if not norm < float("inf"):
            self._skip(totals)
            return None
        scale = self.optim.scale(self.step, self.steps, self.tokens)
        for optimizer, peak in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = peak * scale
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.skipped_in_a_row = 0
        self.tokens += int(counts["num_tokens"])
        mine = sum(batch.num_tokens for batch in own)
        flops = step_flops(self.model, own) * counts["num_tokens"] / mine  # other ranks have their like
        self.meter.add(Work(int(counts["num_tokens"]), flops, time.perf_counter() - begun, waited))
        row = {"step": self.step - 1, **totals, "grad_norm": norm, "lr_scale": scale, "num_tokens": self.tokens}
        row |= other_metrics
        row |= {"skipped_steps": self.skipped} if self.skipped else {}
        return row | ({"micro_batch_split": self.split} if self.split > 1 else {})

    def _count(self, batches: list[TokenBatch]) -> dict[str, float]:
        """What the sums of the whole step, on all ranks, are divided by."""
        counts: dict[str, float] = defaultdict(float)
        for batch in batches:
            for name, count in self.objective.counts(batch).items():
                counts[name] += count
        counts["num_tokens"] = float(sum(batch.num_tokens for batch in batches))
        if self.parallel.world.size > 1:
            names = sorted(counts)
            together = self.parallel.data.sum(torch.tensor([counts[name] for name in names], dtype=torch.float64))
            counts = dict(zip(names, together.tolist(), strict=True))
        if not any(count for name, count in counts.items() if name != "num_tokens"):
            raise TrainError(f"step {self.step}: no token of the batch carries a loss weight; nothing can be learnt")
        return counts

    def _gradients(self, batches: list[TokenBatch], counts: dict[str, float]) -> dict[str, float]:
        """Gradients of the whole step in the parameters, and its means; cut finer until it fits in memory."""
        while True:
            self.batches = [micro.to_device(piece, self.device) for piece in micro.finer(batches, self.split)]
            try:
                return in_precision(self.model, self._cast, lambda: self._accumulate(counts))
            except (RuntimeError, MemoryError) as error:
                if not micro.out_of_memory(error):
                    raise
                reason = str(error).splitlines()[0]
            self._cut_finer(reason)  # outside the handler, which holds on to the failed pass

    @property
    def _cast(self) -> Precision:
        """What parameters are cast to here; sharded ones come in the type that computes already."""
        return "fp32" if self.parallel.tokens.size > 1 else self.config.precision

    def _accumulate(self, counts: dict[str, float]) -> dict[str, float]:
        self.objective.begin_step(self.model, self.batches, self.parallel.tokens)
        totals: dict[str, float] = defaultdict(float)
        for batch in self.batches:
            for name, value in self._backward(self.parallel.mine(batch), counts).items():
                totals[name] = max(totals[name], float(value)) if name.endswith("/max") else totals[name] + float(value)
        if self.parallel.tokens.size == 1:
            return totals
        names = sorted(totals)
        values = torch.tensor([totals[name] for name in names], dtype=torch.float64)
        pairs = zip(names, self.parallel.tokens.sum(values), self.parallel.tokens.max(values), strict=True)
        together = {name: float(largest if name.endswith("/max") else total) for name, total, largest in pairs}
        return {name: together[name] for name in totals}

    def _backward(self, batch: TokenBatch, counts: dict[str, float]) -> Sums:
        losses, stats = self.objective(self.model, batch)
        means = {name: value / max(counts[name], 1e-9) for name, value in losses.items()}
        torch.stack(list(means.values())).sum().backward()
        return {name: value.detach() for name, value in means.items()} | {
            name: value.detach() if name.endswith("/max") else value.detach() / max(counts[name], 1e-9)
            for name, value in stats.items()
        }

    def _cut_finer(self, reason: str) -> None:
        """Forget the pass that ran out of memory and cut micro-batches in twice as many parts.

        Raises:
            TrainError: nothing is left to be cut, or other ranks wait in the middle of the pass.
        """
        self._forget_gradients()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        longest = max(self.batches, key=lambda batch: batch.num_tokens)
        if self.parallel.world.size > 1:
            raise TrainError(
                f"step {self.step}: rank {self.parallel.world.rank} is out of memory ({reason}); "
                f"start again with split={2 * self.split}, or recompute=full"
            )
        if all(len(batch.cu_seqlens) == 2 for batch in self.batches):
            raise TrainError(
                f"step {self.step}: a sequence of {longest.num_tokens} tokens does not fit in memory even alone "
                f"({reason}); use recompute=full, shorter sequences or a smaller model"
            )
        self.split *= 2
        warnings.warn(
            f"step {self.step}: a micro-batch of {longest.num_tokens} tokens did not fit in memory; micro-batches are "
            f"cut in {self.split} parts from here on, with the same global batch",
            RuntimeWarning,
            stacklevel=2,
        )

    def _skip(self, totals: dict[str, float]) -> None:
        """Leave a step out: weights, moments and schedule stay as they are.

        Raises:
            TrainError: that was one too many in a row.
        """
        self._forget_gradients()
        self.skipped += 1
        self.skipped_in_a_row += 1
        found = f"step {self.step}: loss or gradient is not finite ({dict(totals)})"
        if self.skipped_in_a_row >= self.config.max_skipped:
            raise TrainError(
                f"{found}, {self.skipped_in_a_row} times in a row; none of it reached the weights. Lower the learning "
                "rate or grad_clip, or look at the data of these batches"
            )
        warnings.warn(f"{found}; it is left out, and the next batch takes its place", RuntimeWarning, stacklevel=2)

    def _forget_gradients(self) -> None:
        for optimizer, _ in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)

    def settings(self) -> dict[str, Any]:
        """What a resumed run must share with the one that was saved, JSON-able.

        The number of steps belongs to it only where the schedule depends on it.
        """
        found: dict[str, Any] = {"optim": self.optim.model_dump(mode="json")}
        objective = {"name": type(self.objective).__name__} | self.objective.settings()
        fixed = self.optim.decay == "constant" or not isinstance(self.optim.decay, str)
        found |= {"objective": objective} | ({} if fixed else {"steps": self.steps})
        return found | ({"precision": self.config.precision} if self.config.precision != "fp32" else {})

    def _facts(self) -> dict[str, Any]:
        """The JSON part of a state."""
        return {
            "step": self.step,
            "tokens": self.tokens,
            "steps": self.steps,
            "skipped": self.skipped,
            "split": self.split,
            "best": self.best,
            "tensor": self.parallel.tensor,
            "settings": self.settings(),
            "source": self.source.state_dict(),
            "objective": self.objective.state_dict(),
        }


def _check_parallel(objective: Objective, parallel: Parallel, config: FitConfig) -> None:
    """Refuse objectives that need more of a sequence than a context-parallel rank has, and settings at odds."""
    if config.compile and parallel.world.size > 1:
        raise InputError("compile=true needs one process; leave it out, or start without torchrun")
    if parallel.tokens.size > 1 and config.precision != parallel.precision:
        raise InputError(
            f"precision={config.precision} in training, {parallel.precision} in ParallelConfig; give both the same"
        )
    if parallel.context.size > 1 and not objective.by_token:
        raise InputError(
            f"{type(objective).__name__} with these settings looks at whole sequences, which context="
            f"{parallel.context.size} divides among ranks; use context=1"
        )


def build_optimizers(model: Qwen3, optim: OptimConfig) -> dict[str, tuple[torch.optim.Optimizer, float]]:
    """Muon for the matrices inside layers (not routers, not adapters), AdamW for the rest; each with its peak rate."""
    matrices: list[MatrixParameter] = []
    rest: dict[Group, list[torch.nn.Parameter]] = {group: [] for group in GROUPS}
    ranks = tensor_ranks(model)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        matrix = parameter.dim() >= 2 and ".layers." in name and ".adapters." not in name
        if optim.muon_lr and matrix and not name.endswith("mlp.gate.weight"):
            order = row_order(model, name, ranks)
            matrices.append(MatrixParameter(parameter, tuple(split_sizes(model.config, name)), order))
        else:
            rest[group_of(name, parameter.dim())].append(parameter)
    groups = [
        {"params": alike, "name": group, "weight_decay": optim.shrinks(group)}
        for group, parameters in rest.items()
        for alike in kinds(parameters)
    ]
    adamw = torch.optim.AdamW(groups, lr=optim.adam_lr, betas=optim.betas, fused=True)
    out: dict[str, tuple[torch.optim.Optimizer, float]] = {"adamw": (adamw, optim.adam_lr)}
    if matrices:
        out["muon"] = (Muon(matrices, optim.muon_lr, weight_decay=optim.shrinks("matrices")), optim.muon_lr)
    return out
