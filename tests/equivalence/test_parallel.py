"""One process, two and four give the same losses, gradients and weights, however the model is spread; states cross."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from twofold.base.files import read_jsonl
from twofold.train.checkpoint import load_state

SCRIPT = Path(__file__).parent / "parallel_ranks.py"
WAYS = {
    "fsdp": {},
    "tensor": {"tensor": 2},
    "context": {"context": 2},
    "experts": {"experts": True},
    "recompute": {"recompute": "selective"},
}
WAYS_OF_FOUR = {
    "fsdp": {},
    "hsdp": {"replicate": 2},
    "tensor": {"tensor": 4},
    "fsdp_tensor": {"tensor": 2},
    "context": {"context": 4},
    "context_tensor": {"context": 2, "tensor": 2},
    "experts": {"experts": True},
    "experts_hsdp": {"experts": True, "replicate": 2, "recompute": "full"},
}


def jobs_of(ways: dict[str, dict[str, Any]], steps: int = 3) -> list[dict[str, Any]]:
    """Every way for a dense and a MoE model."""
    return [
        {"name": f"{name}-{'moe' if moe else 'dense'}", "moe": moe, "muon": True, "steps": steps, "parallel": way,
         "gradients": True}
        for name, way in ways.items()
        for moe in (False, True)
        if moe or "experts" not in way
    ]  # fmt: skip


def start(ranks: int, folder: Path, jobs: list[dict[str, Any]], killed: bool = False) -> None:
    """Run the jobs on ``ranks`` processes and wait for them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    base = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(folder), json.dumps(jobs)]
    processes = []
    for rank in range(ranks):
        place = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = base | {name: str(value) for name, value in place.items()}
        processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    told = []
    try:
        for process in processes:
            told.append(process.communicate(timeout=300)[1])
    finally:
        for process in processes:
            process.kill()
    codes = [process.returncode for process in processes]
    assert codes == [-9 if killed else 0] * ranks, "\n".join(text[-3000:] for text in told)


@pytest.fixture(scope="module")
def here() -> ModuleType:
    """The script as a module, to run jobs in this process."""
    spec = importlib.util.spec_from_file_location("parallel_ranks", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def alone(here: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same training on one process."""
    folder = tmp_path_factory.mktemp("alone")
    for job in jobs_of({"alone": {}}):
        here.train(folder, job)
    return folder


def same(a: Path, b: Path, weights: float = 2e-4) -> None:
    """Metrics and first gradients to 1e-5, and weights as far as Muon's iterations let them be."""
    rows, expected = read_jsonl(a / "metrics.jsonl"), read_jsonl(b / "metrics.jsonl")
    assert len(rows) == len(expected)
    for row, wanted in zip(rows, expected, strict=True):
        assert row == pytest.approx(wanted, rel=1e-5, abs=1e-5)
    gradients, wanted = load_state(a / "gradients")[0], load_state(b / "gradients")[0]
    for name in wanted:
        torch.testing.assert_close(gradients[name], wanted[name], atol=1e-5, rtol=1e-5, msg=name)
    final, wanted = load_state(a / "final")[0], load_state(b / "final")[0]
    assert final.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(final[name], wanted[name], atol=weights, rtol=1e-3, msg=name)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    start(2, folder, jobs_of(WAYS))
    return folder


@pytest.mark.parametrize("job", [job["name"] for job in jobs_of(WAYS)])
def test_two_processes_equal_one(job: str, two: Path, alone: Path) -> None:
    same(two / job, alone / f"alone-{job.rpartition('-')[2]}")


@pytest.mark.slow
def test_two_processes_in_bf16_are_as_near_to_fp32_as_one(here: ModuleType, alone: Path, tmp_path: Path) -> None:
    """They add rounded products in another order, so there is no equality; gradients and weights are fp32."""
    jobs = [job | {"precision": "bf16"} for job in jobs_of(WAYS)]
    start(2, tmp_path, jobs)
    for job in jobs_of({"one": {}}):
        here.train(tmp_path, job | {"precision": "bf16"})
    for name, kind in ((job["name"], job["name"].rpartition("-")[2]) for job in jobs):
        rows, wanted = (read_jsonl(f / "metrics.jsonl") for f in (tmp_path / name, alone / f"alone-{kind}"))
        for row, expected in zip(rows, wanted, strict=True):
            assert row["loss"] == pytest.approx(expected["loss"], abs=0.02), name
        exact, one, many = (
            load_state(folder / "gradients")[0]
            for folder in (alone / f"alone-{kind}", tmp_path / f"one-{kind}", tmp_path / name)
        )
        for key, truth in exact.items():
            assert many[key].dtype == torch.float32, (name, key)
            errors = [float((gradients[key] - truth).norm() / truth.norm()) for gradients in (one, many)]
            assert 0 < errors[1] < 2 * errors[0] + 0.02, (name, key, errors)
        assert {t.dtype for t in load_state(tmp_path / name / "final")[0].values()} == {torch.float32}


@pytest.mark.slow
def test_four_processes_equal_one(alone: Path, tmp_path: Path) -> None:
    start(4, tmp_path, jobs_of(WAYS_OF_FOUR))
    for job in jobs_of(WAYS_OF_FOUR):
        same(tmp_path / job["name"], alone / f"alone-{job['name'].rpartition('-')[2]}")


def test_killed_on_two_processes_and_resumed_on_two_and_on_one(two: Path, here: ModuleType, tmp_path: Path) -> None:
    """Bit for bit where nothing else changed."""
    job = {"name": "fsdp-moe", "moe": True, "muon": True, "steps": 3, "gradients": True}
    start(2, tmp_path / "a", [job | {"kill": 2}], killed=True)
    saved = sorted((tmp_path / "a" / "fsdp-moe").glob("state-*"))
    assert saved and not (tmp_path / "a" / "fsdp-moe" / "final").exists()
    one = tmp_path / "b"
    one.mkdir()
    subprocess.run(["cp", "-r", str(tmp_path / "a" / "fsdp-moe"), str(one)], check=True)
    start(2, tmp_path / "a", [job])
    final, wanted = (load_state(folder / "fsdp-moe" / "final")[0] for folder in (tmp_path / "a", two))
    assert all(torch.equal(final[name], wanted[name]) for name in wanted)
    here.train(one, job)
    final = load_state(one / "fsdp-moe" / "final")[0]
    for name in wanted:
        torch.testing.assert_close(final[name], wanted[name], atol=2e-4, rtol=1e-3, msg=name)
    for row, expected in zip(*(read_jsonl(f / "fsdp-moe" / "metrics.jsonl") for f in (one, two)), strict=True):
        assert row == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.slow
def test_states_go_from_one_world_to_another(here: ModuleType, tmp_path: Path) -> None:
    """One step each on 1, 4 (tensor x FSDP), 2 (tensor), 2 (experts) and 1 processes equals one process all along."""
    job = {"name": "x", "moe": True, "muon": True, "steps": 5}
    here.train(tmp_path / "wanted", job)
    stages = [(1, {}), (4, {"tensor": 2}), (2, {"tensor": 2}), (2, {"experts": True})]
    for step, (ranks, parallel) in enumerate(stages, 1):
        start(ranks, tmp_path, [job | {"parallel": parallel, "interrupt": step}])
        assert [row["step"] for row in read_jsonl(tmp_path / "x" / "metrics.jsonl")] == list(range(step))
    assert here.train(tmp_path, job).step == 5
    rows, wanted = (read_jsonl(folder / "x" / "metrics.jsonl") for folder in (tmp_path, tmp_path / "wanted"))
    for row, expected in zip(rows, wanted, strict=True):
        assert row == pytest.approx(expected, rel=1e-5, abs=1e-5)
