"""Ctrl-C that waits for the end of a step: the first asks, the second insists.

Only the main thread of a process that has Python's own handler is looked after; whoever has taken the signal keeps it.
"""

from __future__ import annotations

import signal
import sys
import threading
from contextlib import suppress
from types import FrameType, TracebackType


class Interrupt:
    """Inside the ``with`` block, ``asked`` says whether Ctrl-C was pressed; a second one raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.asked = False
        self._mine = False

    def __enter__(self) -> Interrupt:
        main = threading.current_thread() is threading.main_thread()
        self._mine = main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if self._mine:
            signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._mine:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        with suppress(RuntimeError, OSError, ValueError):  # it may have come in the middle of writing there
            print("\nstopping at the end of this step; Ctrl-C again stops at once", file=sys.stderr, flush=True)
