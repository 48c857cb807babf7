"""The terminal chat on a real (pseudo) terminal: Ctrl-C stops the answer and not the program, lines go on, history."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pty = pytest.importorskip("pty")
CODE = """
import sys
from pathlib import Path
from twofold.chat_cli import chat
chat(Path(sys.argv[1]), {"max_tokens": 900, "ignore_eos": True}, fold=True)
"""


class Terminal:
    """A child on a terminal of its own."""

    def __init__(self, command: list[str], state: Path) -> None:
        self.child, self.fd = pty.fork()
        if self.child == 0:
            os.environ.update(XDG_STATE_HOME=str(state), TERM="xterm", COLUMNS="100", OMP_NUM_THREADS="1")
            os.execv(command[0], command)
        self.seen = ""

    def until(self, text: str, seconds: float = 120.0) -> str:
        """Everything up to the next appearance of a text."""
        self._read(lambda: text in self.seen, seconds)
        before, _, self.seen = self.seen.partition(text)
        return before + text

    def more(self, characters: int, seconds: float = 120.0) -> None:
        """Wait for so many characters more."""
        self._read(lambda: len(self.seen) >= characters, seconds)

    def _read(self, enough: Callable[[], bool], seconds: float) -> None:
        end = time.monotonic() + seconds
        while not enough():
            ready, _, _ = select.select([self.fd], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"nothing more came; up to then: {self.seen!r}"
            self.seen += os.read(self.fd, 4096).decode(errors="replace")

    def interrupt_until(self, text: str) -> None:
        """Ctrl-C at a prompt, again if need be: Python's readline overlooks one that comes before it waits for keys."""
        for _ in range(20):
            self.type("\x03")
            with contextlib.suppress(AssertionError):
                self.until(text, 3.0)
                return
        raise AssertionError(f"nothing answers Ctrl-C; up to then: {self.seen!r}")

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())


@pytest.mark.slow
def test_stopping_an_answer_keeps_the_chat(served_folder: Path, tmp_path: Path) -> None:
    terminal = Terminal([sys.executable, "-c", CODE, str(served_folder)], tmp_path)
    try:
        terminal.until("Ctrl-D leaves")
        terminal.until("you> ")
        terminal.type("sum \\\n")
        terminal.until("...> ")
        terminal.type("E1 B5\n")
        terminal.until("E1 B5")
        terminal.more(20)  # the answer has begun; most of its 900 tokens are still to come
        terminal.type("\x03")
        terminal.until("stopped; this exchange is not kept")
        terminal.until("you> ")
        terminal.interrupt_until("Ctrl-D or /quit leaves")
        terminal.type("/set max_tokens=5\n")
        terminal.until("max_tokens=5")
        terminal.type("again\n")
        terminal.until("5 tokens")
        terminal.type("/quit\n")
        assert os.waitpid(terminal.child, 0)[1] == 0
    finally:
        os.close(terminal.fd)
    assert "again" in (tmp_path / "twofold" / "chat_history").read_text(encoding="utf-8")
