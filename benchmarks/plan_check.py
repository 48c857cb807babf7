"""What ``twofold plan`` says against what runs take: three real trainings, each in a process of its own.

    python -m benchmarks.plan_check [--only NAME ...] [--scale 1.0] [--out FILE]

The runs, of one to three minutes each: general pre-training of the tiny recipe's flagship on 0.6 M tokens, full
fine-tuning of a 10 M model, and an adapter on one of 30 M, on conversations made here. Each is estimated first and then
run; memory is the largest resident set of the process, time that of the training stage. Goals: 15 % of memory, 25 % of
time. Needs a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from twofold.base.files import read_json, write_json, write_jsonl
from twofold.base.malloc import wanted_environment
from twofold.cli import build_chain
from twofold.data.corpus import pydoc_topic_documents
from twofold.model.qwen3 import Qwen3
from twofold.recipes.plan import plan
from twofold.recipes.pretrain import ModelShape, save_model
from twofold.text.tokenizer import Tokenizer

GOALS = {"memory": 0.15, "seconds": 0.25}
SHAPES = {
    "10M": ModelShape(hidden_size=320, intermediate_size=896, layers=6, heads=5, kv_heads=5, head_dim=64),
    "30M": ModelShape(hidden_size=512, intermediate_size=1536, layers=8, heads=8, kv_heads=4, head_dim=64),
}

ROWS = {"10M": 480, "30M": 240}


@dataclass(frozen=True)
class Run:
    """A recipe's stage with the settings it is run with. before: a stage that runs first, in a process of its own."""

    recipe: str
    stage: str
    settings: tuple[str, ...]
    before: str


def runs(folder: Path, scale: float) -> dict[str, Run]:
    """The three runs; their checkpoints and conversations are written to ``folder``."""
    texts = [document.text for document in pydoc_topic_documents()]
    tokenizer = Tokenizer.train(texts, 4096)
    for name, shape in SHAPES.items():
        model = Qwen3(shape.build(tokenizer.vocab_size, 1e4, 1024))
        model.init_weights(0)
        save_model(model, tokenizer, folder / name)
        write_jsonl(folder / f"{name}.jsonl", conversations(texts, round(ROWS[name] * scale)))

    def sft(model: str, *more: str) -> Run:
        return Run(
            "sft", "sft", (f"init={folder / model}", f"data={folder / model}.jsonl", "train.epochs=1", *more), "rows"
        )

    pretraining = Run("tiny", "s1", (f"s1.tokens={round(600_000 * scale)}", "s1.head_start={}"), "data")
    return {"tiny s1": pretraining, "sft full 10M": sft("10M"), "sft lora 30M": sft("30M", "train.method=lora")}


def conversations(texts: list[str], count: int) -> list[dict[str, Any]]:
    """Questions of one line, and 20 to 200 words of the language reference as the answer."""
    rng = random.Random(0)
    words = [text.split() for text in texts]
    out = []
    for number in range(count):
        chosen = rng.choice(words)
        begin = rng.randrange(max(1, len(chosen) - 200))
        answer = " ".join(chosen[begin : begin + rng.randint(20, 200)])
        messages = [{"role": "user", "content": f"Question {number}: what does {chosen[begin]} mean?"}]
        out.append({"messages": [*messages, {"role": "assistant", "content": answer}]})
    return out


def estimated(run: Run) -> dict[str, float]:
    """What the planner says, in this process, of the stage and the one before it."""
    with tempfile.TemporaryDirectory() as folder:
        chain = build_chain(run.recipe, list(run.settings), 0)
        kept = [stage for stage in chain.stages if stage.name in (run.stage, run.before, "rows")]
        chain.stages = kept
        found = {e.stage: e for e in plan(run.recipe, chain, run.settings, Path(folder), lambda line: None)}
    stage = found[run.stage]
    return {"memory": float(stage.peak_bytes or 0), "seconds": float(stage.seconds or 0), "share": stage.efficiency}


def measured(run: Run, folder: Path) -> dict[str, float]:
    """The stage in a process of its own; rows are read in the same one, as a user's run does."""
    settings = [part for setting in run.settings for part in ("--set", setting)]
    command = [sys.executable, "-m", "twofold.cli", "run", run.recipe, *settings, "--out", str(folder)]
    environment = wanted_environment(os.environ) or dict(os.environ)
    if run.recipe == "tiny":  # its data stage takes more memory than the training that is looked at
        subprocess.run([*command, "--only", run.before], check=True, env=environment)
    subprocess.run([*command, "--only", run.stage], check=True, env=environment)
    cost = read_json(folder / run.stage / "manifest.json")["cost"]
    return {"memory": float(cost["peak_memory_bytes"]), "seconds": float(cost["seconds"])}


def main() -> None:
    """Estimate, run, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--scale", type=float, default=1.0, help="of the runs' lengths")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    console, results = Console(), {}
    with tempfile.TemporaryDirectory() as folder:
        for name, run in runs(Path(folder), arguments.scale).items():
            if arguments.only and name not in arguments.only:
                continue
            said, took = estimated(run), measured(run, Path(folder) / name.replace(" ", "-"))
            off = {key: said[key] / took[key] - 1 for key in GOALS}
            held = {key: abs(off[key]) <= goal for key, goal in GOALS.items()}
            results[name] = {"estimated": said, "measured": took, "off": off, "within_goal": held}
            console.print(name, json.dumps(results[name]), soft_wrap=True, highlight=False)
    facts = {"torch": torch.__version__, "threads": torch.get_num_threads(), "goals": GOALS}
    if arguments.out:
        write_json(arguments.out, {"machine": platform.processor() or platform.machine(), **facts, "runs": results})


if __name__ == "__main__":
    main()
