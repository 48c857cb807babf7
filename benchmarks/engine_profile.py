"""Where the time of our engine goes on a CPU, beside what the machine could do at best.

    python -m benchmarks.engine_profile MODEL.gguf [--kinds int8 float32] [--cases n1 n8 n32 prefill] [--out FILE]

The cases are those of ``benchmarks.engine_speed``. Of each: seconds of the whole, the shares of matrix products with
weights, of attention and of all else by torch's profiler (on the wall clock of the calling thread; the profiler itself
slows small operations), and two floors: reading the weights once a step at the measured speed of a plain sum over
memory, and multiplying at the measured speed of a large fp32 product. The second is no floor for int8.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.engine_speed import CONCURRENT, LONG, NEW, Generate, ours, prompts_of, tokenizer
from twofold.base.files import write_json
from twofold.model.gguf_read import open_gguf
from twofold.model.quantised import load_quantised
from twofold.train.meter import ceiling

RESULT = Path(__file__).parent / "results" / "engine-profile.json"
PRODUCTS = ("quantized::linear", "mkldnn::_linear", "aten::addmm", "aten::mm")
ATTENTION = ("aten::bmm", "aten::baddbmm", "aten::_softmax", "aten::_scaled_dot_product")
BYTES = {"int8": 1, "float16": 2, "float32": 4}


def best_seconds(run: Any, times: int = 5) -> float:
    """The shortest of several runs."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def ceilings() -> dict[str, float]:
    """Bytes a second of a sum over a GiB, and operations a second of a large fp32 product."""
    numbers = torch.ones(2**28)
    return {
        "bytes_per_second": 2**30 / best_seconds(numbers.sum),
        "operations_per_second": ceiling(torch.device("cpu"), torch.float32),
    }


def shares(run: Any) -> dict[str, float]:
    """Shares of the profiled time that kinds of operations take."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    events = profiler.key_averages()
    whole = sum(event.self_cpu_time_total for event in events)

    def share(names: tuple[str, ...]) -> float:
        return sum(event.self_cpu_time_total for event in events if event.key.startswith(names)) / whole

    found = {"products": share(PRODUCTS), "attention": share(ATTENTION)}
    found["rest"] = 1 - sum(found.values())
    return {name: round(value, 3) for name, value in found.items()}


def profile_case(generate: Generate, draw: Callable[[], tuple[list[list[int]], int]]) -> dict[str, float]:
    """Seconds and shares of what ``generate`` does with fresh prompts, once warm."""

    def run() -> None:
        generate(*draw())

    run()
    return {"seconds": round(best_seconds(run, 3), 3)} | shares(run)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--kinds", nargs="+", default=["int8", "float32"], choices=[*BYTES])
    parser.add_argument("--cases", nargs="+", default=["n1", "n8", "n32", "prefill"], choices=[*CONCURRENT, "prefill"])
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    coder, rng = tokenizer(arguments.model), random.Random(0)
    tokens = coder.encode_with_special(Path(argparse.__file__).read_text())
    found: dict[str, Any] = {"machine": platform.machine(), "torch": torch.__version__, **ceilings()}
    for kind in arguments.kinds:
        config, source = open_gguf(arguments.model)
        run = ours(load_quantised(config, source, kind))
        looked_up = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
        weights = config.num_parameters() - looked_up
        for case in arguments.cases:
            row = profile_case(run, partial(prompts_of, case, tokens, coder, rng))
            steps, rows = (1, LONG) if case == "prefill" else (NEW, CONCURRENT[case])
            row["floor_of_reading"] = round(steps * weights * BYTES[kind] / found["bytes_per_second"], 3)
            row["floor_of_fp32_products"] = round(2 * steps * rows * weights / found["operations_per_second"], 3)
            found[f"{kind} {case}"] = row
            print(kind, case, json.dumps(row), flush=True)
    write_json(arguments.out, found)


if __name__ == "__main__":
    main()
