"""Loading a folder of Qwen3-0.6B's shape: peak memory against its size, speed against plain reads of the same file.

    python -m benchmarks.load_speed [--layers 28] [--rounds 5] [--out FILE]

A random bf16 folder is made in a temporary place. Every measurement is a fresh process, so that peaks are its own; the
sides run in turn and the file is in the page cache. ``ours`` is ``load_weights`` in bf16, ``sequential`` reads the file
into one small buffer again and again, ``into_memory`` into as much fresh memory, and ``safetensors`` is the library's
``load_file`` with every tensor copied out of the mapping (without that nothing has been read yet).
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import __version__ as safetensors_version
from safetensors.torch import load_file

from twofold.base.files import write_json
from twofold.model.presets import preset
from twofold.model.sources import WEIGHTS
from twofold.model.weights import empty_model, load_weights, save_weights

BUFFER_BYTES = 16 << 20


def make(folder: Path, layers: int) -> None:
    """A folder of random weights; the model is in memory once."""
    config = preset("Qwen3-0.6B").model_copy(update={"num_hidden_layers": layers})
    model = empty_model(config, torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            for row in parameter.view(-1).split(1 << 22):
                row.normal_(0.0, config.initializer_range)
    save_weights(model, folder)


def ours(folder: Path) -> Any:
    """Twofold's loader."""
    return load_weights(folder, torch.bfloat16)


def sequential(folder: Path) -> Any:
    """Read the whole file through one buffer."""
    buffer = memoryview(bytearray(BUFFER_BYTES))
    with open(folder / WEIGHTS, "rb", buffering=0) as handle:
        while handle.readinto(buffer):
            pass


def into_memory(folder: Path) -> Any:
    """Read the whole file into fresh memory of its size."""
    memory = torch.empty((folder / WEIGHTS).stat().st_size, dtype=torch.uint8)
    view, done = memory.numpy().data, 0
    with open(folder / WEIGHTS, "rb", buffering=0) as handle:
        while count := handle.readinto(view[done:]):
            done += count
    return memory


def safetensors(folder: Path) -> Any:
    """The library's reader, with every tensor in memory of its own."""
    return {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}


SIDES: dict[str, Callable[[Path], Any]] = {
    "ours": ours,
    "sequential": sequential,
    "into_memory": into_memory,
    "safetensors": safetensors,
}


def high_water_bytes() -> int:
    """Largest resident set of this process (Linux; getrusage would count what the parent had before)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def measure(side: str, folder: Path) -> dict[str, float]:
    """Seconds and peak of one side, in this process."""
    before = high_water_bytes()
    start = time.perf_counter()
    kept = SIDES[side](folder)
    seconds = time.perf_counter() - start
    del kept
    return {"seconds": seconds, "peak_bytes": high_water_bytes(), "before_bytes": before}


def run(*arguments: str) -> str:
    """This script again in a process of its own; what it prints."""
    command = [sys.executable, "-m", "benchmarks.load_speed", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def compare(folder: Path, rounds: int) -> dict[str, Any]:
    """All sides in turn; medians, and ratios round by round."""
    size = sum(path.stat().st_size for path in folder.iterdir())
    sequential(folder)  # from here on the page cache has it
    rows = [{side: json.loads(run("--side", side, "--folder", str(folder))) for side in SIDES} for _ in range(rounds)]
    results: dict[str, Any] = {"folder_bytes": size}
    for side in SIDES:
        seconds = statistics.median(row[side]["seconds"] for row in rows)
        peak = statistics.median(row[side]["peak_bytes"] for row in rows)
        before = statistics.median(row[side]["before_bytes"] for row in rows)
        results[side] = {
            "seconds": round(seconds, 4),
            "gigabytes_per_second": round(size / seconds / 1e9, 2),
            "peak_of_folder": round(peak / size, 3),
            "peak_of_folder_without_python_and_torch": round((peak - before) / size, 3),
        }
        if side != "ours":
            ratios = [row[side]["seconds"] / row["ours"]["seconds"] for row in rows]
            results[side]["our_speed_of_this"] = round(statistics.median(ratios), 2)
    return results


def main() -> None:
    """Make the folder, compare, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=preset("Qwen3-0.6B").num_hidden_layers)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--side", choices=[*SIDES, "make"], help="(used by the script itself)")
    parser.add_argument("--folder", type=Path, help="(used by the script itself)")
    arguments = parser.parse_args()
    if arguments.side == "make":
        make(arguments.folder, arguments.layers)
    elif arguments.side:
        print(json.dumps(measure(arguments.side, arguments.folder)))
    else:
        with tempfile.TemporaryDirectory() as name:
            run("--side", "make", "--folder", name, "--layers", str(arguments.layers))
            results = compare(Path(name), arguments.rounds)
        facts = {"torch": torch.__version__, "safetensors_version": safetensors_version, "layers": arguments.layers}
        results = {"machine": platform.processor() or platform.machine(), **facts, **results}
        print(json.dumps(results, indent=1))
        if arguments.out:
            write_json(arguments.out, results)


if __name__ == "__main__":
    main()
