from __future__ import annotations

import os
import subprocess
import sys

import pytest

from twofold.base import malloc
from twofold.base.malloc import MALLOC_SETTINGS, wanted_environment

GLIBC = sys.platform.startswith("linux") and malloc.platform.libc_ver()[0] == "glibc"


def test_settings_present_or_chosen_by_the_user_are_left_alone() -> None:
    assert wanted_environment(MALLOC_SETTINGS) is None
    assert wanted_environment({"MALLOC_TOP_PAD_": "1"}) is None


@pytest.mark.skipif(not GLIBC, reason="glibc only")
def test_the_environment_is_extended() -> None:
    assert wanted_environment({"A": "1"}) == {"A": "1", **MALLOC_SETTINGS}


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(malloc.sys, "platform", "darwin")
    assert wanted_environment({}) is None
    monkeypatch.setattr(malloc.sys, "platform", "linux")
    monkeypatch.setattr(malloc.platform, "libc_ver", lambda: ("", ""))
    assert wanted_environment({}) is None


def test_a_refused_restart_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no")

    monkeypatch.setattr(malloc, "wanted_environment", lambda _: {"A": "1"})
    monkeypatch.setattr(malloc.os, "execve", refuse)
    malloc.ensure_malloc_settings()


@pytest.mark.skipif(not GLIBC, reason="glibc only")
def test_the_process_restarts_once_with_its_arguments() -> None:
    code = (
        "import os, sys; print('start', flush=True)\n"
        "from twofold.base.malloc import ensure_malloc_settings\n"
        "ensure_malloc_settings()\n"
        "print(sys.argv[1:], os.environ['MALLOC_TOP_PAD_'], os.getpid())"
    )
    environment = {name: value for name, value in os.environ.items() if name not in MALLOC_SETTINGS}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    process = subprocess.Popen(
        [sys.executable, "-c", code, "a b", "c"], env=environment, stdout=subprocess.PIPE, text=True
    )
    output, _ = process.communicate(timeout=20)
    assert output.splitlines() == ["start", "start", f"['a b', 'c'] 268435456 {process.pid}"]
