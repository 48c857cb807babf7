"""The trainer against Hugging Face's Trainer and TRL's SFTTrainer on a CPU: same model, documents, order and optimiser.

    python -m benchmarks.trainer_speed --peer-python PATH [--sizes 5M 30M] [--rounds 3] [--out FILE]

Documents are functions and classes of Python's standard library as they come, 16 to 512 tokens, 16 a step; tokens a
second count those of documents, not padding. Ours is ``twofold.train.loop.Trainer`` as recipes use it, metrics and
states included. Theirs pad each batch to its longest document, as their defaults do. Every run is a process of its own:
peak memory is that of the process, with what it imports. Sides run in turn, and medians of per-round ratios are what
counts. PATH is an interpreter that has torch, transformers, datasets and trl.

Also printed for ours: the share of a step that is matrix products, and the share of the measured fp32 ceiling.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.steps import training_step
from twofold.base.batch import pack
from twofold.base.files import write_json
from twofold.base.log import peak_memory_bytes
from twofold.base.malloc import ensure_malloc_settings
from twofold.data.corpus import python_stdlib_documents
from twofold.model.config import ModelConfig
from twofold.model.hf_config import config_to_hf
from twofold.model.qwen3 import Qwen3
from twofold.post.sft import ChatSource, StoredExample
from twofold.text.chat import Renderer
from twofold.text.tokenizer import Tokenizer
from twofold.train.loop import OptimConfig, Trainer
from twofold.train.meter import ceiling, step_flops
from twofold.train.objectives import CrossEntropy

RESULT = Path(__file__).parent / "results" / "trainer-speed.json"
SIDES = ("twofold", "transformers", "trl")
VOCAB, PER_STEP, LONGEST, RATE = 8192, 16, 512, 1e-3
WARM = 2  # steps that do not count
SHAPES = {
    "5M": {"hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 5, "num_attention_heads": 4},
    "30M": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8},
}
STEPS = {"5M": 12, "30M": 6}


def shape(size: str) -> ModelConfig:
    """A dense Qwen3 of about that many parameters."""
    values: dict[str, Any] = dict(SHAPES[size])
    return ModelConfig(
        **values, vocab_size=VOCAB, num_key_value_heads=values["num_attention_heads"] // 2, head_dim=64,
        rms_norm_eps=1e-6, rope_theta=1e4, max_position_embeddings=LONGEST, tie_word_embeddings=True,
        initializer_range=0.02,
    )  # fmt: skip


def corpus(count: int, folder: Path) -> list[list[int]]:
    """Tokenised functions and classes; the tokenizer is left in ``folder``."""
    pieces: list[str] = []
    for document in python_stdlib_documents()[::7]:
        for node in ast.parse(document.text).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                pieces.append(ast.get_source_segment(document.text, node) or "")
    tokenizer = Tokenizer.train(pieces, VOCAB - 64)
    Renderer(tokenizer).save(folder)
    rows = (tokenizer.encode(piece)[:LONGEST] for piece in pieces)
    return [row for row in rows if len(row) >= 16][:count]


def ours(job: dict[str, Any]) -> dict[str, Any]:
    """The same job by our trainer."""
    torch.set_num_threads(job["threads"])
    config = shape(job["size"])
    model = Qwen3(config)
    model.init_weights(0)
    rows = [StoredExample(ids, [1.0] * len(ids)) for ids in job["documents"]]
    source = InOrder(rows, job["documents_per_step"], 0)
    optim = OptimConfig(muon_lr=0.0, adam_lr=job["rate"], warmup=0, decay="constant", betas=(0.9, 0.999))
    ends: list[float] = []
    work = Path(job["work"])
    trainer = Trainer(
        model, source, CrossEntropy(), optim, job["steps"], work, lambda *_: ends.append(time.perf_counter())
    )
    before = peak_memory_bytes()
    ends.append(time.perf_counter())
    trainer.fit()
    peak = peak_memory_bytes()
    return {
        "step_seconds": [end - start for start, end in itertools.pairwise(ends)],
        "losses": [row["loss"] for row in trainer.metrics.rows()],
        "peak_memory_bytes": peak,
        "before_bytes": before,
        "parameters": config.num_parameters(),
        **products(model, job["documents"][: job["documents_per_step"]]),
    }


class InOrder(ChatSource):
    """Documents as they come, not shuffled."""

    def _epoch(self, epoch: int) -> list[int]:
        return list(range(len(self.examples)))


def products(model: Qwen3, documents: list[list[int]]) -> dict[str, float]:
    """Of a step: the share of its time in matrix products, and its operations by what the ceiling allows."""
    step = training_step(model, documents)
    step()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        step()
    times = {event.key: event.self_cpu_time_total for event in seen.key_averages()}
    matrix = sum(time for name, time in times.items() if name in ("aten::mm", "aten::addmm", "aten::bmm"))
    return {
        "gemm_share": matrix / sum(times.values()),
        "flops": step_flops(model, [pack(documents)]),
        "ceiling": ceiling(torch.device("cpu"), torch.float32),
    }


def run(side: str, job: dict[str, Any], python: Path) -> dict[str, Any]:
    """One run in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.trainer_speed", "--worker"]
    if side != "twofold":
        command = [str(python), str(Path(__file__).with_name("trainer_peers.py"))]
    with tempfile.TemporaryDirectory() as work:
        text = json.dumps(job | {"side": side, "work": work})
        done = subprocess.run(command, input=text, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("result ")]
    if not lines:
        raise RuntimeError(f"{side} failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(lines[0].removeprefix("result "))
    return found


def measure(size: str, python: Path, rounds: int, sides: list[str]) -> dict[str, Any]:
    """All sides of one size, in turn."""
    steps = STEPS[size]
    with tempfile.TemporaryDirectory() as folder:
        documents = corpus(steps * PER_STEP, Path(folder))
        job = {
            "size": size, "config": config_to_hf(shape(size), torch.float32), "tokenizer": folder, "steps": steps,
            "documents": documents, "documents_per_step": PER_STEP, "rate": RATE, "threads": torch.get_num_threads(),
        }  # fmt: skip
        runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
        for _ in range(rounds):
            for side in sides:
                runs[side].append(run(side, job, python))
                rate = speed(runs[side][-1], documents)
                peak = runs[side][-1]["peak_memory_bytes"] / 2**20
                print(f"{size} {side:14} {rate:8.0f} tokens/s  {peak:6.0f} MiB", flush=True)
    return summary(runs, documents)


def speed(found: dict[str, Any], documents: list[list[int]]) -> float:
    """Tokens of documents a second, after the first steps."""
    tokens = sum(len(row) for row in documents[WARM * PER_STEP : len(found["step_seconds"]) * PER_STEP])
    return tokens / sum(found["step_seconds"][WARM:])


def summary(runs: dict[str, list[dict[str, Any]]], documents: list[list[int]]) -> dict[str, Any]:
    """Medians of every side, and ratios of ours to each peer."""
    rates = {side: [speed(found, documents) for found in many] for side, many in runs.items()}
    peaks = {side: [found["peak_memory_bytes"] for found in many] for side, many in runs.items()}
    mine = runs["twofold"][0]
    lengths = [len(row) for row in documents]
    out: dict[str, Any] = {
        "parameters": {side: many[0]["parameters"] for side, many in runs.items()},
        "document_tokens": {"mean": round(statistics.mean(lengths)), "longest": max(lengths)},
        "tokens_per_second": {side: round(statistics.median(values)) for side, values in rates.items()},
        "peak_memory_mib": {side: round(statistics.median(values) / 2**20) for side, values in peaks.items()},
        "before_training_mib": {side: round(many[0]["before_bytes"] / 2**20) for side, many in runs.items()},
        "first_and_last_loss": {side: [many[0]["losses"][0], many[0]["losses"][-1]] for side, many in runs.items()},
        "gemm_share": round(mine["gemm_share"], 3),
        "share_of_ceiling": round(
            mine["flops"] / sum(lengths[:PER_STEP]) * statistics.median(rates["twofold"]) / mine["ceiling"], 3
        ),
        "ceiling_gflops": round(mine["ceiling"] / 1e9, 1),
    }
    for side in runs.keys() - {"twofold"}:
        faster = [a / b for a, b in zip(rates["twofold"], rates[side], strict=True)]
        smaller = [a / b for a, b in zip(peaks["twofold"], peaks[side], strict=True)]
        for name, values in (("speed", faster), ("memory", smaller)):
            triple = (round(f(values), 2) for f in (statistics.median, min, max))
            out[f"{name} by {side}"] = list(triple)
    print(json.dumps(out), flush=True)
    return out


def main() -> None:
    """Run the comparison and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", type=Path)
    parser.add_argument("--sizes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--sides", nargs="+", default=list(SIDES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print("result", json.dumps(ours(json.load(sys.stdin))), flush=True)
        return
    if arguments.peer_python is None:
        parser.error("--peer-python is missing: an interpreter that has torch, transformers, datasets and trl")
    facts = {"machine": platform.machine(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    versions = "import transformers, trl; print(transformers.__version__, trl.__version__)"
    shown = subprocess.run([arguments.peer_python, "-c", versions], capture_output=True, text=True, check=True)
    facts |= dict(zip(("transformers", "trl"), shown.stdout.split()[-2:], strict=True))
    results = {
        size: measure(size, arguments.peer_python, arguments.rounds, arguments.sides) for size in arguments.sizes
    }
    write_json(arguments.out, {**facts, **results})


if __name__ == "__main__":
    ensure_malloc_settings()
    main()
