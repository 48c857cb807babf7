"""kill -9 in the middle of pre-training, RL and distillation, then the same command: the same weights, bit for bit."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from twofold.base.files import sha256_file

SCRIPT = Path(__file__).with_name("killed_chain.py")
KILLS = (("s1", 5), ("s1", 14), ("general_rl", 3), ("general_rl", 10), ("opd", 4), ("opd", 9))


def run_to_end(folder: Path) -> None:
    subprocess.run([sys.executable, str(SCRIPT), str(folder)], check=True, timeout=300)


def run_until(folder: Path, stage: str, rows: int) -> None:
    """Start the run and kill it once the stage has logged ``rows`` steps."""
    process = subprocess.Popen([sys.executable, str(SCRIPT), str(folder)])
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        logs = list((folder / ".work").glob(f"{stage}-*/work/metrics.jsonl"))
        if logs and logs[0].read_text().count("\n") >= rows:
            break
        time.sleep(0.01)
    assert process.poll() is None, f"the run ended before it could be killed in {stage}"
    process.send_signal(signal.SIGKILL)
    process.wait()


def weights(folder: Path) -> dict[str, str]:
    return {name: sha256_file(folder / name / "model.safetensors") for name in ("s1", "general_rl", "opd")}


@pytest.mark.timeout(900)  # eight runs of a process that loads torch; slow machines need patience
def test_killed_and_resumed_runs_end_in_the_same_weights(tmp_path: Path) -> None:
    run_to_end(tmp_path / "straight")
    killed_at = 0
    for stage, rows in KILLS:
        run_until(tmp_path / "killed", stage, rows)
        killed_at += 1
    run_to_end(tmp_path / "killed")
    assert killed_at == len(KILLS)
    assert weights(tmp_path / "straight") == weights(tmp_path / "killed")
