"""The data path at scale, small enough for every day: a gigabyte of sparse shards opened, resumed and read.

``benchmarks/loader.py`` measures the same at 10 GB and over 100,000 steps. Times here are of the processor, so that a
busy machine does not matter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from twofold.base.files import sha256_file, write_json
from twofold.data import shards
from twofold.data.order import LISTED
from twofold.data.packing import MixtureEntry, PackedSource
from twofold.data.shard_set import open_shards

SHARDS, TOKENS = 4, 1 << 27


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four shards of 256 MiB that take 8 MB on the disk; their manifests say a wrong SHA-256 of the tokens."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(SHARDS):
        (part := folder / str(number)).mkdir()
        with open(part / "tokens.bin", "wb") as handle:
            handle.truncate(2 * TOKENS)
        lengths = np.random.default_rng(number).integers(2, 1022, TOKENS // 512 + 4096)
        edges = np.concatenate([[0], np.cumsum(lengths)])
        edges = np.concatenate([edges[edges < TOKENS], [TOKENS]])
        np.save(part / "offsets.npy", edges)
        digests = {"tokens.bin": "0" * 64, "offsets.npy": sha256_file(part / "offsets.npy")}
        facts = {"format": shards.FORMAT, "dtype": "<u2", "documents": len(edges) - 1, "tokens": TOKENS, "bytes": 0}
        write_json(part / "shard.json", facts | {"vocab_size": 65536, "sha256": digests, "meta": {}})
        shards.remember_verified(part)  # hashing them would be an error, and is noticed
    return folder


def source_of(folder: Path) -> PackedSource:
    entries = [MixtureEntry("all", open_shards(folder), 1.0)]
    return PackedSource(entries, 4096, ((0.75, 512, 1024), (0.25, 64, 512)), 0)


def lengths(source: PackedSource, steps: int) -> list[list[int]]:
    return [batch.cu_seqlens for _ in range(steps) for batch in source.next_step()]


def test_opening_and_resuming_take_no_time(corpus: Path) -> None:
    start = time.process_time()
    first = source_of(corpus)
    documents = len(open_shards(corpus))
    assert documents > LISTED
    state = first.state_dict()
    state["cursors"][0] |= {"position": documents - 40, "epoch": 3, "pieces": 123_456_789}
    first.load_state_dict(state)
    before = lengths(first, 3)
    saved = json.loads(json.dumps(first.state_dict()))
    after = lengths(first, 20)
    assert first.state_dict()["cursors"][0]["epoch"] == 4, "over the end of an epoch"
    assert time.process_time() - start < 2.0
    start = time.process_time()
    resumed = source_of(corpus)
    resumed.load_state_dict(saved)
    assert lengths(resumed, 20) == after != before
    assert time.process_time() - start < 1.0


STEPS = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import test_scale
def anonymous():
    rows = Path("/proc/self/status").read_text().splitlines()
    return next(int(row.split()[1]) for row in rows if row.startswith("RssAnon"))
source = test_scale.source_of(Path(sys.argv[1]))
found = []
for steps in (1000, 3000):
    for _ in range(steps):
        source.next_step()
    found.append(anonymous())
print(*found)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc")
def test_memory_is_flat(corpus: Path) -> None:
    """In a process of its own; a list of all documents' order would be 8 MB, one of the offsets again as much."""
    command = [sys.executable, "-c", STEPS, str(corpus), str(Path(__file__).parent)]
    environment = {**os.environ, "PYTHONPATH": str(Path(shards.__file__).parents[2])}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    early, late = map(int, run.stdout.split())
    assert late - early < 1024, f"{early} kB after 1000 steps, {late} kB after 4000"
