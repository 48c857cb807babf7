"""The command in locales and with paths of all sorts: no traceback, and what is printed can be read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

C = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
ROW = {"messages": [{"role": "user", "content": "客单价 é 😀"}, {"role": "assistant", "content": "naïve – “q”"}]}


def run(where: Path, *arguments: str, given: str = "", **changes: str) -> tuple[int, bytes]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | changes
    ran = subprocess.run(
        [sys.executable, "-m", "twofold.cli", *arguments],
        *(), env=environment, input=given.encode(), capture_output=True, cwd=where, timeout=300,
    )  # fmt: skip
    assert b"Traceback" not in ran.stderr, ran.stderr.decode(errors="replace")
    return ran.returncode, ran.stdout + ran.stderr


@pytest.fixture
def model(served_folder: Path, tmp_path: Path) -> Path:
    path = tmp_path / "modèle 客"
    path.symlink_to(served_folder)
    return path


def test_commands_in_an_ascii_pipe(model: Path, tmp_path: Path) -> None:
    data = tmp_path / "données 客.jsonl"
    data.write_text(json.dumps(ROW, ensure_ascii=False) + "\n", encoding="utf-8")
    code, out = run(tmp_path, "inspect", model.name, **C)
    assert code == 0 and b"mod?le ?" in out and out.isascii()
    code, out = run(tmp_path, "data", "view", data.name, "--model", model.name, **C)
    assert code == 0 and b"na?" in out and out.isascii()
    code, out = run(tmp_path, "inspect", "é客", **C)
    assert code == 1 and b"error: " in out
    settings = ("--set", "max_tokens=4", "--set", "stop=2024")
    code, out = run(tmp_path, "chat", model.name, *settings, given="客 é 😀\n/set\n/quit\n", **C)
    assert code == 0 and b"4 tokens" in out and b"stop=('2024',)" in out and out.isascii()


@pytest.mark.parametrize("name", ["2024", "1e5", "null", "[1, 2]", "~tilde.jsonl", "a.b.c=d=e", "[/b].jsonl"])
def test_names_that_look_like_something_else(model: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(json.dumps(ROW) + "\n", encoding="utf-8")
    code, out = run(tmp_path, "run", "sft", "--set", f"init={model}", "--set", f"data={name}", "--dry-run")
    assert code == 0 and f"data = '{name}'" in out.decode()
