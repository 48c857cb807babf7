"""Programs in locales that are not UTF-8: nothing printed ends them, paths are found, what was piped in is read."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CODE = r"""
import sys
from twofold.base.streams import ensure_utf8_paths, forgiving_streams
ensure_utf8_paths()
forgiving_streams()
print(sys.argv[1], "\xe9 \u5ba2 \udce9 \ud83d")
print(open(sys.argv[1], encoding="utf-8").read(), file=sys.stderr)
print(ascii(input()), sys.flags.utf8_mode)
"""
C = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}  # Python's own help for such locales is off


def run(name: Path, given: bytes = "ü 客\n".encode(), **changes: str) -> tuple[bytes, bytes]:
    paths = {"PYTHONPATH": os.pathsep.join(sys.path)}
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("LC_", "LANG", "PYTHON"))}
    command = [sys.executable, "-c", CODE, os.fsencode(name)]
    ran = subprocess.run(command, env=environment | paths | changes, input=given, capture_output=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout, ran.stderr


@pytest.fixture
def found(tmp_path: Path) -> Path:
    path = tmp_path / "données 客"
    path.write_text("naïve – 客", encoding="utf-8")
    return path


def test_ascii(found: Path) -> None:
    out, errors = run(found, **C)
    assert b"donn?es ? ? ? ? ?\n" in out and out.isascii()
    assert errors.isascii() and errors.startswith(b"na")  # stderr is Python's own: escapes
    assert b"'\\xfc \\u5ba2' 1" in out  # read as UTF-8


def test_latin_1(found: Path) -> None:
    out, _ = run(found, **C, PYTHONIOENCODING="latin-1")
    assert "données ? é ? ? ?\n".encode("latin-1") in out
    assert b"\\xc3\\xbc" in out  # the user said that the pipe is latin-1, and it is read as such


def test_utf8_and_a_choice_of_the_user_stay(found: Path) -> None:
    out, _ = run(found, LC_ALL="C.UTF-8", PYTHONUTF8="1")
    assert "données 客 é 客 ? ?\n".encode() in out
    out, _ = run(found, LC_ALL="C.UTF-8", PYTHONIOENCODING="ascii:backslashreplace")
    assert b"donn\\xe9es \\u5ba2" in out


def test_a_process_that_cannot_hear_the_setting_goes_on(found: Path) -> None:
    code = "from twofold.base.streams import ensure_utf8_paths; ensure_utf8_paths(); print('went on')"
    code = f"import sys; sys.path[:0] = {sys.path!r}; {code}"
    ran = subprocess.run([sys.executable, "-E", "-c", code], env={**os.environ, "LC_ALL": "C"}, capture_output=True)
    assert ran.stdout == b"went on\n", ran.stderr
