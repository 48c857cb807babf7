from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import twofold
from twofold import cli
from twofold.base.config import Config
from twofold.base.files import write_text
from twofold.base.records import InputError
from twofold.recipes.chain import Chain, Stage, StageContext


class Part(Config):
    steps: int = 3
    fault: str = ""


class Whole(Config):
    first: Part = Part()
    second: Part = Part()


def work(context: StageContext) -> None:
    faults = {
        "crash": ZeroDivisionError("boom"),
        "input": InputError("the corpus [x] is empty: pass another"),
        "stop": KeyboardInterrupt(),
    }
    if context.config.fault:
        raise faults[context.config.fault]
    write_text(context.out / "result.txt", f"{context.seed} {context.config.steps}")


def build(overrides: list[str], seed: int) -> Chain:
    config = Whole().override(overrides)
    stages = [
        Stage("first", "The first", config.first, (), work),
        Stage("second", "It [2]", config.second, ("first",), work),
    ]
    return Chain("fake", stages, seed, config)


@pytest.fixture(autouse=True)
def fake_recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(cli.RECIPES, "fake", build)
    monkeypatch.chdir(tmp_path)


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments))


def error_line(result: Result) -> str:
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and "Traceback" not in result.output
    return lines[0]


def test_run_then_run_again() -> None:
    first = invoke("run", "fake", "--set", "second.steps=5")
    assert first.exit_code == 0, first.output
    assert "2 of 2 stages ran" in first.stdout and "It [2]" in first.stdout
    assert Path("runs/fake/second/result.txt").read_text() == "0 5"
    second = invoke("run", "fake", "--set", "second.steps=5")
    assert second.exit_code == 0 and "nothing to do" in second.stdout


def test_seed_and_out_choose_the_folder() -> None:
    assert invoke("run", "fake", "--seed", "3").exit_code == 0
    assert Path("runs/fake-seed3/first/result.txt").read_text() == "3 3"
    assert invoke("run", "fake", "--out", "elsewhere", "--only", "first").exit_code == 0
    assert sorted(path.name for path in Path("elsewhere").iterdir() if path.name[0] != ".") == ["first"]
    redone = invoke("run", "fake", "--out", "elsewhere", "--redo", "first")
    assert "2 of 2 stages ran" in redone.stdout


def test_dry_run_shows_configuration_and_plan_and_touches_nothing() -> None:
    result = invoke("run", "fake", "--dry-run", "--set", "first.steps=9")
    assert result.exit_code == 0
    assert "steps = 9" in result.stdout and "second" in result.stdout
    assert re.search(r"run +[0-9a-f]{16} +first +The first", result.stdout)
    assert not Path("runs").exists()
    invoke("run", "fake", "--only", "first")
    assert re.search(r"done +[0-9a-f]{16} +first", invoke("run", "fake", "--dry-run").stdout)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["run", "fakee"], 2, "unknown recipe 'fakee'; did you mean 'fake'?"),
        (["run", "fake", "--set", "first.step=3"], 2, "did you mean 'steps'?"),
        (["run", "fake", "--set", "first.steps=x"], 2, "first.steps"),
        (["run", "fake", "--only", "secon"], 1, "did you mean 'second'?"),
        (["run", "fake", "--redo", "third"], 1, "no stage 'third'"),
        (["run", "fake", "--set", "second.fault=crash"], 1, "stage second failed: ZeroDivisionError: boom"),
        (["run", "fake", "--set", "second.fault=input"], 1, "the corpus [x] is empty: pass another"),
    ],
)
def test_errors_are_one_line_with_an_exit_code(arguments: list[str], code: int, words: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == code
    assert error_line(result).startswith("error: ") and words in error_line(result)


def test_debug_shows_the_traceback() -> None:
    result = invoke("run", "fake", "--set", "first.fault=crash", "--debug")
    assert result.exit_code == 1 and isinstance(result.exception, Exception)
    assert isinstance(result.exception.__cause__, ZeroDivisionError)


def test_control_c_says_how_to_go_on() -> None:
    result = invoke("run", "fake", "--set", "second.fault=stop")
    assert result.exit_code == 130
    assert error_line(result) == "stopped; run the same command to go on"
    again = invoke("run", "fake", "--set", "second.fault=stop", "--redo", "second")
    assert "without --redo" in error_line(again)


SLOW = """
import signal, sys, time
from twofold import cli
from twofold.base.config import Config
from twofold.base.files import write_text
from twofold.recipes.chain import Chain, Stage

def work(context):
    write_text(context.work / "started", "1")
    time.sleep(20)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell would have it ignored
cli.RECIPES["slow"] = lambda overrides, seed: Chain("slow", [Stage("s", "S", Config(), (), work)], seed)
cli.main()
"""


def test_control_c_and_a_second_run_in_real_processes(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", SLOW, "run", "slow"]
    first = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline and not list(tmp_path.glob("runs/slow/.work/*/work/started")):
        time.sleep(0.02)
    second = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert second.returncode == 1 and f"another run (process {first.pid})" in second.stderr
    first.send_signal(signal.SIGINT)
    _, stderr = first.communicate(timeout=15)
    assert first.returncode == 130
    assert stderr.strip() == "stopped; run the same command to go on"
    assert list(tmp_path.glob("runs/slow/.work/*/heartbeat.json"))


def test_version_and_doctor() -> None:
    assert invoke("--version").stdout == f"twofold {twofold.__version__}\n"
    doctor = invoke("doctor")
    assert doctor.exit_code == 0
    for name in ("python", "torch", "processors", "memory", "compute type", "matplotlib"):
        assert re.search(rf"^{name} +\S", doctor.stdout, re.MULTILINE)


def test_the_command_line_itself_imports_no_torch() -> None:
    code = "import sys, twofold.cli; sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0
