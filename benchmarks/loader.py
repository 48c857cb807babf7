"""The data path at scale: 10 GB of token shards opened, resumed and read for 100,000 steps; what making ahead is worth.

    python -m benchmarks.loader [--shards 40] [--mib 256] [--steps 1000 10000 100000] [--out FILE]

The shards' token files are sparse (holes read as zeros, and take no disk), their documents have log-normal lengths of
about 500 tokens. ``first_open`` hashes everything once; ``open`` and ``resume`` are fresh processes after that, timed
from the end of the imports to the first batch. A resumed process must make the batches of the one that was saved.
``anonymous_mib`` is memory that is not a mapped file (RssAnon; Linux). In ``prefetch`` a step of matrix products, or a
wait as for a GPU, goes beside batches as they are, or beside a source that takes its time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from twofold.base.batch import BatchSource, TokenBatch
from twofold.base.files import read_json, sha256_file, write_json
from twofold.data.packing import MixtureEntry, PackedSource
from twofold.data.prefetch import prefetching
from twofold.data.shard_set import open_shards
from twofold.data.shards import FORMAT

TOKENS_PER_STEP = 8192
LENGTH_MIX = ((0.75, 512, 1024), (0.25, 128, 512))
MEAN_LENGTH = 500
PROBE_STEPS = 200


def make(folder: Path, shards: int, mib: int) -> None:
    """Sparse shards with their manifests; all have the same token file, which is hashed once."""
    tokens = mib * (1 << 20) // 2
    digest = ""
    for number in range(shards):
        shard = folder / f"{number:05d}"
        shard.mkdir()
        with open(shard / "tokens.bin", "wb") as handle:
            handle.truncate(2 * tokens)
        digest = digest or sha256_file(shard / "tokens.bin")
        np.save(shard / "offsets.npy", offsets(number, tokens))
        manifest = {
            "format": FORMAT,
            "dtype": "<u2",
            "documents": len(np.load(shard / "offsets.npy", mmap_mode="r")) - 1,
            "tokens": tokens,
            "bytes": 0,
            "vocab_size": 65536,
            "sha256": {"tokens.bin": digest, "offsets.npy": sha256_file(shard / "offsets.npy")},
            "meta": {},
        }
        write_json(shard / "shard.json", manifest)


def offsets(seed: int, tokens: int) -> np.ndarray:
    """Where documents of log-normal lengths begin, up to exactly ``tokens``."""
    generator = np.random.default_rng(seed)
    lengths = generator.lognormal(np.log(MEAN_LENGTH) - 0.5, 1.0, 2 * tokens // MEAN_LENGTH).astype(np.int64) + 1
    edges = np.concatenate([[0], np.cumsum(lengths)])
    return np.concatenate([edges[edges < tokens], [tokens]])


def source_of(folder: Path, packing: str = "stream") -> PackedSource:
    """The whole folder as one shuffled source."""
    entries = [MixtureEntry("all", open_shards(folder, verify="once"), 1.0)]
    return PackedSource(entries, TOKENS_PER_STEP, LENGTH_MIX, 0, packing=packing)  # type: ignore[arg-type]


def fingerprint(batches: list[TokenBatch], source: PackedSource) -> str:
    """What tells one step from another: the lengths of its pieces, and where the source stands after it."""
    facts = [[batch.cu_seqlens, batch.tokens_T.sum().item()] for batch in batches]
    return hashlib.sha256(json.dumps([facts, source.state_dict()["cursors"]]).encode()).hexdigest()


def anonymous_mib() -> float:
    """Memory of this process that is no mapped file."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))


def part_open(folder: Path, state: Path, steps: list[int]) -> dict[str, Any]:
    """Open everything and make the first batch."""
    start = time.perf_counter()
    source = source_of(folder)
    opened = time.perf_counter()
    source.next_step()
    documents = len(open_shards(folder, verify="quick"))
    return {
        "documents": documents,
        "open_seconds": opened - start,
        "first_batch_seconds": time.perf_counter() - opened,
        "anonymous_mib": anonymous_mib(),
    }


def part_save(folder: Path, state: Path, steps: list[int]) -> dict[str, Any]:
    """Go to the middle of the corpus, save, and tell what comes after."""
    source = source_of(folder)
    for _ in range(50):
        source.next_step()
    saved = source.state_dict()
    saved["cursors"][0] |= {"position": len(open_shards(folder, verify="quick")) // 2, "offset": 0}
    source.load_state_dict(saved)
    for _ in range(50):
        source.next_step()
    write_json(
        state, {"source": source.state_dict(), "next": [fingerprint(source.next_step(), source) for _ in range(50)]}
    )
    return {}


def part_resume(folder: Path, state: Path, steps: list[int]) -> dict[str, Any]:
    """Open, restore, make the first batch; then compare."""
    start = time.perf_counter()
    source = source_of(folder)
    saved = read_json(state)
    source.load_state_dict(saved["source"])
    found = [fingerprint(source.next_step(), source)]
    seconds = time.perf_counter() - start
    found += [fingerprint(source.next_step(), source) for _ in saved["next"][1:]]
    return {"seconds": seconds, "exact": found == saved["next"]}


def part_steps(folder: Path, state: Path, steps: list[int]) -> dict[str, Any]:
    """Memory and time of a step at several counts."""
    source = source_of(folder)
    rows, done, tokens = [], 0, 0
    for goal in sorted(steps):
        start = time.perf_counter()
        for _ in range(goal - done):
            tokens += sum(batch.num_tokens for batch in source.next_step())
        seconds, number, done = time.perf_counter() - start, goal - done, goal
        rows.append(
            {
                "steps": goal,
                "anonymous_mib": round(anonymous_mib(), 1),
                "milliseconds_a_step": round(1000 * seconds / number, 4),
            }
        )
    return {"rows": rows, "tokens": tokens}


class Slow:
    """A source that takes ``seconds`` more a step, as tokenising or a network would."""

    can_checkpoint = can_prefetch = True

    def __init__(self, source: BatchSource, seconds: float) -> None:
        self.source, self.seconds = source, seconds

    def next_step(self) -> list[TokenBatch]:
        time.sleep(self.seconds)
        return self.source.next_step()

    def state_dict(self) -> dict[str, Any]:
        return self.source.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.source.load_state_dict(state)


def matrices(milliseconds: float) -> Callable[[], object]:
    """Work on the processor that takes about so long alone."""
    left, right = torch.randn(256, 256), torch.randn(256, 256)

    def several(count: int) -> None:
        for _ in range(count):
            left @ right

    several(50)
    start = time.perf_counter()
    several(200)
    count = max(1, round(milliseconds / 1000 / ((time.perf_counter() - start) / 200)))
    return lambda: several(count)


def part_prefetch(folder: Path, state: Path, steps: list[int]) -> dict[str, Any]:
    """Milliseconds that a step waits for its batch, and that it takes in all, without and with making ahead."""
    works = {"matrices_20ms": matrices(20.0), "gpu_20ms": lambda: time.sleep(0.02)}
    extra = {"packed": 0.0, "slow_15ms": 0.015}
    found: dict[str, Any] = {}
    for work_name, work in works.items():
        for source_name, seconds in extra.items():
            for ahead in (0, 2):
                row = waits(Slow(source_of(folder), seconds) if seconds else source_of(folder), work, ahead)
                found[f"{source_name} {work_name} ahead={ahead}"] = row
    return found


def waits(source: BatchSource, work: Callable[[], object], ahead: int) -> dict[str, float]:
    """One row of ``part_prefetch``."""
    waited = []
    with prefetching(source, ahead) as batches:
        batches.next_step()
        begun = time.perf_counter()
        for _ in range(PROBE_STEPS):
            start = time.perf_counter()
            batches.next_step()
            waited.append(1000 * (time.perf_counter() - start))
            work()
        whole = 1000 * (time.perf_counter() - begun) / PROBE_STEPS
    return {
        "wait_ms_median": round(statistics.median(waited), 3),
        "wait_ms_99": round(sorted(waited)[int(0.99 * PROBE_STEPS)], 3),
        "step_ms_mean": round(whole, 3),
    }


PARTS: dict[str, Callable[[Path, Path, list[int]], dict[str, Any]]] = {
    "open": part_open,
    "save": part_save,
    "resume": part_resume,
    "steps": part_steps,
    "prefetch": part_prefetch,
}


def run(part: str, folder: Path, state: Path, steps: list[int]) -> dict[str, Any]:
    """One part in a process of its own; ``process_seconds`` has Python's start and the imports in it."""
    command = [sys.executable, "-m", "benchmarks.loader", "--part", part, "--folder", str(folder)]
    command += ["--state", str(state), "--steps", *map(str, steps)]
    start = time.perf_counter()
    text = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, Any] = json.loads(text)
    return found | {"process_seconds": round(time.perf_counter() - start, 3)}


def compare(shards: int, mib: int, steps: list[int]) -> dict[str, Any]:
    """Everything, on shards in a temporary folder."""
    with tempfile.TemporaryDirectory() as name:
        folder, state = Path(name) / "corpus", Path(name) / "state.json"
        folder.mkdir()
        make(folder, shards, mib)
        facts = {
            "bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
            "bytes_on_disk": sum(512 * path.stat().st_blocks for path in folder.rglob("*") if path.is_file()),
        }
        parts = {"first_open": "open", **{part: part for part in PARTS}}
        return facts | {label: run(part, folder, state, steps) for label, part in parts.items()}


def main() -> None:
    """Make the shards, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=40)
    parser.add_argument("--mib", type=int, default=256, help="of each shard's tokens")
    parser.add_argument("--steps", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--part", choices=[*PARTS], help="(used by the script itself)")
    parser.add_argument("--folder", type=Path, help="(used by the script itself)")
    parser.add_argument("--state", type=Path, help="(used by the script itself)")
    arguments = parser.parse_args()
    if arguments.part:
        print(json.dumps(PARTS[arguments.part](arguments.folder, arguments.state, arguments.steps)))
        return
    results = compare(arguments.shards, arguments.mib, arguments.steps)
    facts = {"torch": torch.__version__, "threads": torch.get_num_threads(), "processors": os.cpu_count()}
    results = {"machine": platform.processor() or platform.machine(), **facts, **results}
    print(json.dumps(results, indent=1))
    if arguments.out:
        write_json(arguments.out, results)


if __name__ == "__main__":
    main()
