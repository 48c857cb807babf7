"""The terminal side of ``twofold chat``: lines in, with continuations and a history; replies out, thoughts apart.

Not here: the conversation (``chat_cli.py``).
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from contextlib import suppress
from pathlib import Path

from rich.console import Console
from rich.rule import Rule
from rich.text import Text

from twofold.base.records import InputError, ToolCall
from twofold.text.parse import Delta

try:
    import readline  # gives input() line editing and a history
except ImportError:  # not on every system
    readline = None  # type: ignore[assignment]

PROMPT, CONTINUED = "you> ", "...> "
BLOCK = '"""'
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # a reply must not steer the terminal
_HISTORY_LINES = 1000


def printable(text: str) -> str:
    """Text without characters that steer a terminal."""
    return _UNPRINTABLE.sub("\ufffd", text)


class Input:
    """What the user types or pipes in, one message at a time.

    Args:
        console: piped lines are shown on it, so that the output reads as a conversation. history: keep typed lines in
            a file in the user's state folder.
    """

    def __init__(self, console: Console, history: bool = True) -> None:
        self.console, self.interactive = console, sys.stdin.isatty()
        self._file = history_file() if history and self.interactive and readline is not None else None
        if self._file is not None:
            with suppress(OSError):
                readline.read_history_file(self._file)

    def read(self) -> str:
        """The next message: a line, lines joined where one ends in a backslash, or a block between triple quotes.

        Raises:
            EOFError: there is no more. InputError: the input is not UTF-8.
        """
        line = self._line(PROMPT)
        if line.lstrip().startswith(BLOCK):
            return self._block(line.lstrip().removeprefix(BLOCK))
        lines = [line]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            try:
                lines.append(self._line(CONTINUED))
            except EOFError:
                break
        return "\n".join(lines)

    def close(self) -> None:
        """Write the history, for this user's eyes only."""
        if self._file is None:
            return
        with suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._file.touch(mode=0o600)
            readline.set_history_length(_HISTORY_LINES)
            readline.write_history_file(self._file)

    def _block(self, first: str) -> str:
        lines = [first]
        while not lines[-1].rstrip().endswith(BLOCK):
            try:
                lines.append(self._line(CONTINUED))
            except EOFError:
                raise InputError(f"the input ended inside a block; close it with {BLOCK}") from None
        lines[-1] = lines[-1].rstrip().removesuffix(BLOCK)
        return "\n".join(lines).strip("\n")

    def _line(self, prompt: str) -> str:
        try:
            if self.interactive:
                return input(prompt)
            line = input()
        except UnicodeDecodeError as error:
            raise InputError(f"the input is not UTF-8 text ({error.reason}); convert it first") from None
        if line.strip():
            self.console.print(Text(prompt + printable(line), style="bold"), soft_wrap=True)
        return line


class ReplyView:
    """Prints the deltas of one reply: thoughts dim and italic under a rule or as one line, the answer plain."""

    def __init__(self, console: Console, fold: bool = False) -> None:
        self.console, self.fold = console, fold
        self.kind = ""
        self.line_open = False
        self.pieces = 0  # of a folded thought
        self.started = time.perf_counter()

    def show(self, delta: Delta) -> None:
        """Print one increment."""
        if delta.kind != self.kind:
            self.end()
            if not self.fold and delta.kind == "reasoning":
                self.console.print(Rule(Text("thinking", "dim"), style="dim", align="left"))
            elif not self.fold and self.kind == "reasoning":
                self.console.print(Rule(style="dim"))
            self.kind = delta.kind
        if delta.call is not None:
            self.console.print(Text(f"calls {call_text(delta.call)}", style="cyan"), soft_wrap=True)
        elif self.fold and delta.kind == "reasoning":
            self._count()
        else:
            text = printable(delta.text)
            style = "dim italic" if delta.kind == "reasoning" else ""
            self.console.print(Text(text, style=style), end="", soft_wrap=True)
            self.line_open = not text.endswith("\n")

    def end(self) -> None:
        """Finish what is open: a folded thought becomes one line, and the cursor goes to the start of a line."""
        if self.pieces:
            self._rewind()
            seconds = time.perf_counter() - self.started
            self.console.print(Text(f"thought for {seconds:.1f} s; /thoughts shows it", style="dim italic"))
            self.pieces = 0
        elif self.line_open:
            self.console.print()
        self.line_open = False

    def _count(self) -> None:
        """A counter that runs in place, on a terminal."""
        self.pieces += 1
        if self.console.is_terminal:
            self._rewind()
            self.console.print(Text(f"thinking … {self.pieces}", style="dim italic"), end="")

    def _rewind(self) -> None:
        if self.console.is_terminal:
            self.console.file.write("\r\x1b[2K")


def call_text(call: ToolCall) -> str:
    """A call as people write one; JSON escapes keep it printable whatever the model put there."""
    arguments = ", ".join(f"{json.dumps(k)[1:-1]}={json.dumps(v)}" for k, v in call.arguments.items())
    return f"{json.dumps(call.name)[1:-1]}({arguments})"


def history_file() -> Path:
    """Where typed lines are kept: in the user's state folder, as the XDG convention names it."""
    state = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(state) / "twofold" / "chat_history"
