"""How often a run is saved: every few seconds, but never so often that saving takes a large part of the time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from twofold.train import loop
from twofold.train.loop import OptimConfig, Trainer
from twofold.train.objectives import CrossEntropy
from twofold.train.store import Store

Make = Callable[..., Any]


@pytest.mark.parametrize(("cost", "saves"), [(0.01, range(9, 12)), (1.0, range(3, 5))])
def test_large_states_are_saved_less_often(
    cost: float, saves: range, tmp_path: Path, make_model: Make, make_source: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """100 steps of half a second: every five seconds, or every twenty where a save takes one."""
    clock = SimpleNamespace(now=0.0)
    done: list[float] = []

    def save(self: Store, *_: object) -> None:
        clock.now += cost
        done.append(clock.now)

    def on_step(*_: object) -> None:
        clock.now += 0.5

    monkeypatch.setattr(Store, "save", save)
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: clock.now, perf_counter=lambda: clock.now))
    Trainer(make_model(), make_source(), CrossEntropy(), OptimConfig(), 100, tmp_path, on_step).fit()
    assert len(done) in saves
