"""What a run will take, before it: memory, time and money of every stage that can be told from its configuration.

Training stages are rehearsed (``rehearse.py``): a few real steps in a process of their own. Time is the operations of
the whole stage over the ceiling of the device times the share of it that the rehearsal reached, plus what the stage
does besides; memory is the rehearsal's peak, raised by formula where larger micro-batches will come. Stages whose
length depends on what a model will say are counted in tokens at most. Not here: the display.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import twofold
from twofold.base.files import read_json, write_jsonl
from twofold.base.gguf_file import is_gguf
from twofold.base.malloc import wanted_environment
from twofold.base.records import InputError
from twofold.model.config import ModelConfig
from twofold.model.gguf_config import describe_gguf
from twofold.model.hf_config import read_config
from twofold.post.sft import StoredExamples, split
from twofold.recipes.chain import Chain, Stage
from twofold.recipes.corpus import DataConfig
from twofold.recipes.post import RLStageConfig
from twofold.recipes.pretrain import PretrainConfig
from twofold.recipes.sft import RowsConfig, TrainConfig
from twofold.text.rows import read_rows
from twofold.train.footprint import activation_bytes, logits_bytes
from twofold.train.meter import ceiling

SAMPLE_ROWS = 128  # conversations that a rehearsal reads, at least
ROW_BYTES = 100  # that a rendered token takes while a data file is being read
_SECONDS = 15.0  # of training steps that a rehearsal aims at
_FEWEST, _MOST = 3, 12  # steps of a rehearsal
_LONG_STEP = 20.0  # seconds; longer steps are rehearsed with as many conversations as one micro-batch takes
_GUESS = 0.3  # share of the ceiling reached, until it is measured

Say = Callable[[str], None]


@dataclass(frozen=True)
class Estimate:
    """One stage. ``seconds`` and ``peak_bytes`` are None where nothing can be said, and ``note`` says why.

    tokens: that are trained. flops: of training. efficiency: share of the ceiling. process: resident set after imports.
    parts: ``train.footprint`` at the largest micro-batch rehearsed.
    """

    stage: str
    title: str
    tokens: float = 0.0
    flops: float = 0.0
    seconds: float | None = None
    peak_bytes: float | None = None
    efficiency: float = 0.0
    process: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)
    note: str = ""


def plan(recipe: str, chain: Chain, overrides: Sequence[str], folder: Path, say: Say) -> list[Estimate]:
    """Estimate all stages of a recipe's chain, in order.

    Args:
        folder: empty, for what rehearsals write. say: told what is being rehearsed.

    Raises:
        InputError: a stage that fails when rehearsed; it would fail in the run.
    """
    planner = _Planner(recipe, chain, list(overrides), folder, say)
    return [planner.estimate(stage) for stage in chain.stages]


class _Planner:
    def __init__(self, recipe: str, chain: Chain, overrides: list[str], folder: Path, say: Say) -> None:
        self.recipe, self.chain, self.overrides, self.folder, self.say = recipe, chain, overrides, folder, say
        self.rows: tuple[int, int] = (0, 0)  # of the data file, and of the sample
        pretraining = [self.model(stage.config) for stage in chain.stages if isinstance(stage.config, PretrainConfig)]
        self.steps = min((self.count(tokens, config) for config, tokens in pretraining), default=_MOST)

    def estimate(self, stage: Stage) -> Estimate:
        """Of one stage; earlier ones have been asked for."""
        config = stage.config
        if isinstance(config, DataConfig):
            self.rehearse(stage)  # by itself, so that its memory is not taken for that of the training after it
            return Estimate(stage.name, stage.title, note="not estimated; stand-in data were made for the others")
        if isinstance(config, PretrainConfig):
            return self.pretraining(stage, config)
        if isinstance(config, RowsConfig):
            return self.reading(stage, config)
        if isinstance(config, TrainConfig):
            return self.fine_tuning(stage, config)
        if isinstance(config, RLStageConfig):
            rl = config.rl
            most = rl.steps * rl.queries_per_step * rl.group_size * rl.max_tokens
            return Estimate(stage.name, stage.title, note=f"samples at most {most:,} tokens and trains on them")
        return Estimate(stage.name, stage.title, note="not estimated")

    def model(self, config: PretrainConfig) -> tuple[ModelConfig, int]:
        """A pre-training stage's model, and the tokens of its steps."""
        vocabulary = next(s.config.vocab_size for s in self.chain.stages if isinstance(s.config, DataConfig))
        return config.shape.build(vocabulary, config.rope_theta, config.context), config.tokens_per_step

    @staticmethod
    def count(tokens: float, config: ModelConfig) -> int:
        """Steps of ``tokens`` that a rehearsal has time for."""
        return max(_FEWEST, min(_MOST, int(_SECONDS / guess_seconds(tokens, config))))

    def rehearse(self, stage: Stage, overrides: Sequence[str] = ()) -> dict[str, Any]:
        """Run one stage, and what it needs, on a few steps."""
        self.say(f"rehearsing {stage.name}: {stage.title}")
        return rehearse(
            {
                "recipe": self.recipe, "overrides": [*self.overrides, *overrides, "track=[]"], "seed": self.chain.seed,
                "steps": self.steps, "stage": stage.name, "folder": str(self.folder),
            }
        )  # fmt: skip

    def pretraining(self, stage: Stage, config: PretrainConfig) -> Estimate:
        """Steps of a known number of tokens."""
        found = self.rehearse(stage)
        head_start = sum(config.head_start.values())
        steps = max(1, round((config.tokens + head_start) / config.tokens_per_step))
        model, _ = self.model(config)
        longest = config.tokens_per_step + max(high for _, _, high in config.length_mix)
        return scaled(stage, found, steps * config.tokens_per_step, model, longest)

    def reading(self, stage: Stage, config: RowsConfig) -> Estimate:
        """In proportion to the rows of the file."""
        sample = self.folder / "sample.jsonl"
        train = next(s.config for s in self.chain.stages if isinstance(s.config, TrainConfig))
        self.rows = sample_rows(Path(config.data), sample, max(SAMPLE_ROWS, 8 * train.batch_size), config.broken)
        self.overrides.append(f"data={sample}")
        found = self.rehearse(stage)
        share = self.rows[0] / self.rows[1]
        tokens = read_json(self.folder / stage.name / "result.json")["tokens"] * share
        peak = max(found["peak"], found["process"] + ROW_BYTES * tokens)
        seconds = found["seconds"] * share
        return Estimate(stage.name, stage.title, seconds=seconds, peak_bytes=peak, process=found["process"])

    def fine_tuning(self, stage: Stage, config: TrainConfig) -> Estimate:
        """Steps of conversations as long as the sample's; held-out ones are measured twice."""
        rows = self.folder / "rows"
        examples = list(StoredExamples(rows / "train.safetensors"))
        held = StoredExamples(rows / "held_out.safetensors").offsets[-1]
        lengths = [len(example.token_ids) - 1 for example in examples]
        mean = sum(lengths) / len(lengths)
        model = checkpoint_config(Path(config.init))
        batch = config.batch_size
        if guess_seconds(batch * mean, model) > _LONG_STEP:
            batch = max(1, min(batch, int(config.micro_tokens / mean)))
        steps = self.count(batch * mean, model)
        cut = [f"train.batch_size={batch}", f"train.epochs={steps * batch / len(examples)!r}"]
        found = self.rehearse(stage, cut)
        share = self.rows[0] / self.rows[1]
        steps = max(1, round(config.epochs * len(examples) * share / config.batch_size))
        rng = random.Random(0)
        draws = [split(rng.choices(examples, k=config.batch_size), config.micro_tokens) for _ in range(min(steps, 200))]
        longest = max(sum(len(e.token_ids) - 1 for e in run) for draw in draws for run in draw)
        out = scaled(stage, found, steps * config.batch_size * mean, model, longest)
        more = 2 * held * (share - 1) * model.flops_per_token(mean / 2, backward=False)
        seconds = (out.seconds or 0.0) + more / (out.efficiency * ceiling_of(found["steps"]))
        peak = max(out.peak_bytes or 0.0, found["process"] + ROW_BYTES * sum(lengths) * share)
        return Estimate(**{**vars(out), "seconds": seconds, "peak_bytes": peak})


def guess_seconds(tokens: float, config: ModelConfig) -> float:
    """Seconds of a training step, before anything is known but the ceiling."""
    flops = tokens * config.flops_per_token(context=0, backward=True)
    return flops / (_GUESS * ceiling(torch.device("cpu"), torch.float32))


def scaled(stage: Stage, found: dict[str, Any], tokens: float, config: ModelConfig, longest: int) -> Estimate:
    """A stage that trains on ``tokens``, from a rehearsal; ``longest`` tokens are in its largest micro-batch."""
    rows = found["steps"][1:]  # without the step that warms up
    seen, elapsed, flops, seconds = (
        sum(row[name] for row in rows) for name in ("tokens", "elapsed", "flops", "seconds")
    )
    besides = max(0.0, found["seconds"] - sum(row["elapsed"] for row in found["steps"]))
    parts, most = found["parts"], max(longest, found["parts"]["tokens"])
    scored = min(most, parts["scored"] * most / parts["tokens"])
    more = activation_bytes(config, most) - parts["activations"]
    more += logits_bytes(config, scored, most) - parts["logits"]
    return Estimate(
        stage.name, stage.title, tokens, tokens * flops / seen, besides + tokens * elapsed / seen,
        found["peak"] + max(more, 0.0), flops / seconds / ceiling_of(found["steps"]), found["process"], parts,
    )  # fmt: skip


def ceiling_of(rows: Sequence[dict[str, float]]) -> float:
    """Operations a second that a rehearsal measured its rates against."""
    return rows[-1]["tflops"] * 1e12 / rows[-1]["mfu"]


def rehearse(job: dict[str, Any]) -> dict[str, Any]:
    """Run ``rehearse.main`` in a process that is set up as ``twofold run`` is.

    Raises:
        InputError: it failed; the message is its last line.
    """
    environment = wanted_environment(os.environ) or dict(os.environ)
    paths = [str(Path(twofold.__file__).parent.parent), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    command = [sys.executable, "-m", "twofold.recipes.rehearse"]
    run = subprocess.run(
        command, input=json.dumps(job), env=environment, capture_output=True, text=True, errors="replace"
    )
    if run.returncode:
        last = (run.stderr.strip().splitlines() or [f"exit code {run.returncode}"])[-1]
        raise InputError(f"stage {job['stage']} fails when it is rehearsed: {last}")
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def sample_rows(path: Path, out: Path, most: int, broken: str) -> tuple[int, int]:
    """Write at most ``most`` rows from all over a data file; returns how many it has, and how many were taken.

    Raises:
        InputError: no rows, or a broken one where ``broken`` is "error".
    """
    total = 0
    for place, row in read_rows(path):
        if isinstance(row, InputError):
            if broken == "error":
                raise InputError(f"{path}{place}: {row}; mend the row, or leave such rows out: rows.broken=skip")
            continue
        total += 1
    whole = (row for _, row in read_rows(path) if not isinstance(row, InputError))
    taken = [row for index, row in enumerate(whole) if index * most // max(total, 1) != (index - 1) * most // total]
    if not taken:
        raise InputError(f"{path} has no rows; give conversations as JSON Lines")
    write_jsonl(out, taken[:most])
    return total, len(taken[:most])


def checkpoint_config(path: Path) -> ModelConfig:
    """Of a model folder or a GGUF file."""
    return describe_gguf(path).config if is_gguf(path) else read_config(path)
