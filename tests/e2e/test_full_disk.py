"""A disk that is really full: the run says so in one line, loses nothing finished, and goes on once there is room.

The disk is a tmpfs in a mount namespace of its own; skipped where the system does not allow one.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from twofold.base.files import sha256_file

SCRIPT = Path(__file__).with_name("killed_chain.py")
NAMESPACE = ["unshare", "--map-root-user", "--mount", "sh", "-ec"]
SHELL = """
mount -t tmpfs -o size={small} tmpfs {disk}
{python} {script} {disk}/run 2>{log} && exit 3
ls {disk}/run > {kept}
mount -o remount,size=256m {disk}
{python} {script} {disk}/run
cp -r {disk}/run {result}
"""


def namespaces_work(folder: Path) -> bool:
    if shutil.which("unshare") is None:
        return False
    trial = [*NAMESPACE, f"mount -t tmpfs tmpfs {folder}"]
    return subprocess.run(trial, capture_output=True).returncode == 0


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("small", "finished"), [("3m", []), ("14600k", ["data"])], ids=["in-data", "later"])
def test_a_full_disk_is_one_line_and_the_run_goes_on(tmp_path: Path, small: str, finished: list[str]) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if not namespaces_work(disk):
        pytest.skip("the system does not let this user mount a tmpfs in a namespace")
    names = {name: tmp_path / name for name in ("log", "kept", "result")}
    shell = SHELL.format(small=small, disk=disk, python=sys.executable, script=SCRIPT, **names)
    done = subprocess.run([*NAMESPACE, shell], capture_output=True, text=True, timeout=800)
    log = names["log"].read_text()
    assert done.returncode == 0, done.stderr + log
    last = log.strip().splitlines()[-1]
    assert "the disk is full" in last and "free some space and run the same command" in last
    assert set(finished) <= set(names["kept"].read_text().split())
    subprocess.run([sys.executable, str(SCRIPT), str(tmp_path / "straight")], check=True, timeout=300)
    for stage in ("s1", "general_rl", "opd"):
        same = [sha256_file(tmp_path / folder / stage / "model.safetensors") for folder in ("straight", "result")]
        assert same[0] == same[1], stage
