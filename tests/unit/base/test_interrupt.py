"""A Ctrl-C that comes at a bad moment is neither lost nor early: its handler is called when the block has ended."""

from __future__ import annotations

import signal
import threading
from types import FrameType

import pytest

from twofold.base.interrupt import uninterrupted


def test_the_block_ends_first() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        signal.raise_signal(signal.SIGINT)
        done.append(1)
    assert done and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_whoever_had_the_signal_gets_it_once() -> None:
    seen: list[int] = []

    def handler(number: int, frame: FrameType | None) -> None:
        seen.append(number)

    before = signal.signal(signal.SIGINT, handler)
    try:
        with uninterrupted():
            with uninterrupted():  # as a step inside a step
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)
            assert seen == []
        assert seen == [signal.SIGINT] and signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_error_inside_is_not_hidden_and_nothing_is_asked_without_a_signal() -> None:
    with pytest.raises(ZeroDivisionError), uninterrupted():
        raise ZeroDivisionError
    with pytest.raises(KeyboardInterrupt) as caught, uninterrupted():
        signal.raise_signal(signal.SIGINT)
        raise ZeroDivisionError
    assert isinstance(caught.value.__context__, ZeroDivisionError)


def test_other_threads_and_an_ignored_signal_are_left_alone() -> None:
    failed: list[BaseException] = []

    def elsewhere() -> None:
        try:
            with uninterrupted():
                pass
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert not failed
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
