"""What a training stage shows while it runs: the progress line, speed.jsonl, and trackers where asked for.

metrics.jsonl is the loop's and says what was learnt; it is the same whatever machine ran it and however often it was
interrupted. What depends on the clock goes to speed.jsonl, where memory goes to memory.json; neither counts as content
of the artefact.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from twofold.base.files import write_json
from twofold.base.log import MetricsLog
from twofold.base.progress import Metric
from twofold.recipes.artefacts import VOLATILE
from twofold.recipes.chain import Stage, StageContext
from twofold.train.footprint import footprint
from twofold.train.loop import Trainer
from twofold.train.meter import bits_per_byte
from twofold.train.trackers import Trackers, check_installed

_LAYERS_SHOWN = 6
_LOAD = "max_expert_load/layer_"


class Watch:
    """Called by a Trainer after every step; inside its ``with`` block trackers are open.

    Raises:
        InputError: a tracker that cannot be started.
    """

    def __init__(self, context: StageContext) -> None:
        self.context = context
        self.speed = MetricsLog(context.work / "speed.jsonl")
        settings = {"seed": context.seed, **context.config.model_dump(mode="json")}
        self.trackers = Trackers(context.track, context.work / "track", context.name, settings)
        self.footprint: dict[str, float] = {}
        self.before = time.perf_counter()
        self._begun = False

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self.trackers.close()

    def step(self, trainer: Trainer, step: int, row: Mapping[str, Any]) -> None:
        """Take in the row of the step that makes ``step`` steps in all."""
        now = time.perf_counter()
        if not self._begun:
            self.speed.rewind(step - 1)  # rows of steps that an interrupted run did and this one does again
            self._begun = True
            self.before = now - trainer.meter.recent[-1].seconds
        reading = trainer.meter.reading()
        work = trainer.meter.recent[-1]
        self.speed.write(
            {"step": step - 1, "tokens": work.tokens, "flops": work.flops, "elapsed": now - self.before, **reading}
        )
        self._largest(trainer)
        density = bits_per_byte(row)
        every = {**row, **({} if density is None else {"bits_per_byte": density})}
        every |= {f"speed/{name}": value for name, value in reading.items()}
        rates = {name: peak * row["lr_scale"] for name, (_, peak) in trainer.optimizers.items()}
        self.trackers.log(step - 1, every | {f"lr/{name}": rate for name, rate in rates.items()})
        self.context.progress.update(step, **shown(row, reading, max(rates.values())))
        self.before = time.perf_counter()

    def _largest(self, trainer: Trainer) -> None:
        """Note where memory goes, of the step with the largest micro-batch so far."""
        tokens = max(batch.num_tokens for batch in trainer.batches)
        if tokens > self.footprint.get("tokens", 0):
            self.footprint = footprint(trainer.model, trainer.optimizers, trainer.batches)

    def keep(self) -> None:
        """Leave speed.jsonl, memory.json and TensorBoard's files in the artefact, as what is no content of it."""
        kept, events = self.context.out / VOLATILE, self.context.work / "track" / "tensorboard"
        kept.mkdir(parents=True, exist_ok=True)
        if self.speed.path.exists():
            shutil.copyfile(self.speed.path, kept / "speed.jsonl")
        if self.footprint:
            write_json(kept / "memory.json", self.footprint)
        if events.is_dir():
            shutil.copytree(events, kept / "tensorboard")


def tracked(stages: Sequence[Stage], names: tuple[str, ...]) -> list[Stage]:
    """The stages, with trackers in the contexts that they run in. Their keys stay, so nothing is made again.

    Raises:
        ConfigError: a tracker's package is missing.
    """
    check_installed(names)
    return [_tracked(stage, names) if names else stage for stage in stages]


def _tracked(stage: Stage, names: tuple[str, ...]) -> Stage:
    return replace(stage, run=lambda context: stage.run(replace(context, track=names)))


def shown(row: Mapping[str, Any], reading: Mapping[str, float], rate: float) -> dict[str, Metric]:
    """What the progress line has of a step, the most important first.

    Args:
        row: of metrics. reading: the meter's. rate: the largest learning rate.
    """
    out: dict[str, Metric] = {name: row[name] for name in ("loss", "reward", "kl", "entropy") if name in row}
    out |= {"tok/s": f"{reading['tokens_per_second']:,.0f}", "MFU": f"{reading['mfu']:.0%}"}
    out |= {"norm": f"{row['grad_norm']:.2g}", "lr": f"{rate:.2g}", "GB": f"{reading['memory_bytes'] / 1e9:.3g}"}
    density = bits_per_byte(row)
    if density is not None:
        out["bpb"] = f"{density:.3g}"
    loads = {name.removeprefix(_LOAD): row[name] for name in row if name.startswith(_LOAD)}
    if loads:
        worst = max(loads, key=loads.__getitem__)
        each = "/".join(f"{load:.1f}" for load in loads.values())
        out["load"] = each if len(loads) <= _LAYERS_SHOWN else f"{loads[worst]:.1f} in layer {worst}"
    return out | ({"dead": f"{row['dead_experts']:.0f}"} if row.get("dead_experts") else {})
