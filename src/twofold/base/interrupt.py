"""Ctrl-C held back while code runs that must not be left half-way; Python's handler is called right after.

Python raises KeyboardInterrupt wherever the main thread happens to be. C++ that calls Python may take it for an
attribute that is missing, or end the process (``torch.jit.trace`` does both); bookkeeping may be left half done. Not
here: Ctrl-C that waits for the end of a training step (``train/interrupt.py``).
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Inside the block SIGINT is noted; whoever handles it is called when the block has ended, however it ends.

    Does nothing in other threads than the main one, which get no signals, and where SIGINT is ignored or left to the
    system.
    """
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        yield
        return
    noted: list[FrameType | None] = []
    signal.signal(signal.SIGINT, lambda _, frame: noted.append(frame))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if noted:
            handler(signal.SIGINT, noted[0])
