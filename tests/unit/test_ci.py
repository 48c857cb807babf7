"""The check of a change: what .ci/run does in which order, and that a skip cannot pass for the page's tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def program(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize(
    ("user", "missing", "code", "installs", "warns"),
    [
        (0, ("chromium", "chromedriver"), 0, True, False),
        (0, ("chromedriver",), 0, True, False),
        (0, (), 0, False, False),
        (0, ("chromium",), 1, True, True),
        (1000, ("chromium",), 0, False, True),
    ],
)
def test_the_browser_is_installed_then_style_comes_before_tests(
    user: int, missing: tuple[str, ...], code: int, installs: bool, warns: bool, tmp_path: Path
) -> None:
    for name in {"chromium", "chromedriver"} - set(missing):
        program(tmp_path, name, "")
    (tmp_path / "dirname").symlink_to(shutil.which("dirname") or "")
    program(tmp_path, "id", f"echo {user}")
    program(tmp_path, "make", f"echo make $* >> {tmp_path}/log")
    program(tmp_path, "apt-get", f"echo apt-get $* >> {tmp_path}/log; exit {code}")
    bash = shutil.which("bash") or ""
    done = subprocess.run([bash, ROOT / ".ci" / "run"], env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    lines = (tmp_path / "log").read_text().splitlines()
    assert done.returncode == 0, done.stderr
    assert lines[-2:] == ["make check", "make test"]
    assert bool(lines[:-2]) == installs and ("warning" in done.stderr) == warns
    if installs and not code:
        assert lines[0] == "apt-get update" and {"chromium", "chromium-driver"} <= set(lines[1].split())


def test_a_failed_check_ends_the_run(tmp_path: Path) -> None:
    for name in ("chromium", "chromedriver"):
        program(tmp_path, name, "")
    (tmp_path / "dirname").symlink_to(shutil.which("dirname") or "")
    program(tmp_path, "make", f"echo make $* >> {tmp_path}/log; exit 3")
    done = subprocess.run([shutil.which("bash") or "", ROOT / ".ci" / "run"], env={"PATH": str(tmp_path)})
    assert done.returncode == 3 and (tmp_path / "log").read_text() == "make check\n"


def test_a_skipped_test_of_the_page_fails_where_chromium_is(tmp_path: Path) -> None:
    web, bin_folder = tmp_path / "web", tmp_path / "bin"
    web.mkdir()
    bin_folder.mkdir()
    shutil.copy(ROOT / "tests" / "e2e" / "web" / "conftest.py", web)
    (web / "test_one.py").write_text("import pytest\ndef test_a():\n    pytest.skip('no reason')\ndef test_b(): ...\n")
    (web / "test_two.py").write_text("import pytest\npytest.importorskip('no_such_package')\n")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        web,
        "--continue-on-collection-errors",
        web,
    ]
    environment = os.environ | {"PATH": str(bin_folder), "PYTEST_ADDOPTS": ""}
    alone = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert alone.returncode == 0 and "1 passed, 2 skipped" in alone.stdout, alone.stdout
    program(bin_folder, "chromium", "")
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert found.returncode == 1 and "1 failed, 1 passed, 1 error" in found.stdout, found.stdout
    assert "skipped although Chromium is installed" in found.stdout
