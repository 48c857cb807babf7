"""Batches made ahead of time by one thread, for sources that look at nothing but their data.

Batches and saved states are those of the source alone: the state is that after the last step handed out, whatever has
been made ahead. Sources that look at the model (rollouts, distillation) do not say ``can_prefetch`` and are left as
they are. Not here: several workers and processes; one thread keeps the order and shares the mapped files.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from twofold.base.batch import BatchSource, TokenBatch
from twofold.base.records import InputError

_FACTS = ("metrics", "tokens_by_source")  # what a source may tell about itself, as mappings


@dataclass(frozen=True, slots=True)
class _Moment:
    """A source after a step: its batches, its state, and what it says about itself."""

    batches: list[TokenBatch]
    state: dict[str, Any]
    can_checkpoint: bool
    facts: dict[str, Any]


class Prefetch:
    """A BatchSource whose steps a background thread makes while the one before is trained on.

    The thread begins with the first step and ends with ``close``, after which ``source`` stands at the last step that
    was handed out. An error of the source is raised by the ``next_step`` that would have returned its batches, with the
    traceback of the thread, and again by every later one until a state is loaded.

    Args:
        source: must say ``can_prefetch`` and return a new value from ``state_dict`` every time.
        ahead: most steps that wait to be used; memory holds one more, which is being made.

    Raises:
        InputError: the source may not run ahead of the model, or ``ahead`` is below 1.
    """

    can_prefetch = False  # running ahead twice gains nothing

    def __init__(self, source: BatchSource, ahead: int = 2) -> None:
        if not getattr(source, "can_prefetch", False):
            raise InputError(f"{type(source).__name__} looks at the model, so its batches cannot be made ahead of time")
        if ahead < 1:
            raise InputError(f"prefetching needs ahead >= 1, got {ahead}; use the source itself for none")
        self.source, self.ahead = source, ahead
        self._ready: deque[_Moment | BaseException] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._handed = _moment(source, [])

    @property
    def can_checkpoint(self) -> bool:
        """Whether the source could be saved after the last step handed out."""
        return self._handed.can_checkpoint

    @property
    def metrics(self) -> dict[str, float]:
        """The source's metrics of the last step handed out."""
        metrics: dict[str, float] = self._handed.facts.get("metrics", {})
        return metrics

    @property
    def tokens_by_source(self) -> dict[str, int]:
        """The source's tokens up to the last step handed out."""
        tokens: dict[str, int] = self._handed.facts["tokens_by_source"]
        return tokens

    def next_step(self) -> list[TokenBatch]:
        """The next step, at once if it has been made."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True)
            self._thread.start()
        with self._changed:
            self._changed.wait_for(lambda: self._ready)
            first = self._ready[0]
            if isinstance(first, BaseException):
                raise first
            self._handed = first
            self._ready.popleft()
            self._changed.notify_all()
        return first.batches

    def state_dict(self) -> dict[str, Any]:
        """State of the source after the last step handed out."""
        return self._handed.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` was taken; steps made ahead are thrown away."""
        self._stop()
        self.source.load_state_dict(state)
        self._handed = _moment(self.source, [])

    def close(self) -> None:
        """End the thread and put the source where the last step handed out left it."""
        if self._thread is not None:
            self._stop()
            self.source.load_state_dict(self._handed.state)

    def _stop(self) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        self._thread, self._stopping = None, False
        self._ready.clear()

    def _work(self) -> None:
        """The thread: one step after another, while there is room."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopping or len(self._ready) < self.ahead)
                if self._stopping:
                    return
            made: _Moment | BaseException
            try:
                made = _moment(self.source, self.source.next_step())
            except BaseException as error:
                made = error
            with self._changed:
                self._ready.append(made)
                self._changed.notify_all()
            if isinstance(made, BaseException):
                return


def _moment(source: BatchSource, batches: list[TokenBatch]) -> _Moment:
    facts = {name: dict(getattr(source, name)) for name in _FACTS if hasattr(source, name)}
    return _Moment(batches, source.state_dict(), source.can_checkpoint, facts)


@contextmanager
def prefetching(source: BatchSource, ahead: int) -> Iterator[BatchSource]:
    """The source with steps made ahead where it allows that and ``ahead`` is not 0, else itself.

    Afterwards the source stands where the last step handed out left it.
    """
    if ahead == 0 or not getattr(source, "can_prefetch", False):
        yield source
        return
    ahead_source = Prefetch(source, ahead)
    try:
        yield ahead_source
    finally:
        ahead_source.close()
