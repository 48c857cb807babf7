"""The terminal chat on a real (pseudo) terminal: Ctrl-C stops the answer and not the program, lines go on, history."""

from __future__ import annotations

import os
import sys
import time
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
        end = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < end, self.seen
            self.seen += os.read(self.fd, 4096).decode(errors="replace")
        before, _, self.seen = self.seen.partition(text)
        return before + text

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
        time.sleep(0.5)
        terminal.type("\x03")
        terminal.until("stopped; this exchange is not kept")
        terminal.until("you> ")
        terminal.type("\x03")
        terminal.until("Ctrl-D or /quit leaves")
        terminal.type("/set max_tokens=5\n")
        terminal.until("max_tokens=5")
        terminal.type("again\n")
        terminal.until("5 tokens")
        terminal.type("/quit\n")
        assert os.waitpid(terminal.child, 0)[1] == 0
    finally:
        os.close(terminal.fd)
    assert "again" in (tmp_path / "twofold" / "chat_history").read_text(encoding="utf-8")
