"""Prefetching: the batches and states of the source alone, errors in their place, and a thread that ends."""

from __future__ import annotations

import json
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch

from twofold.base.batch import BatchSource, TokenBatch, pack
from twofold.base.records import InputError
from twofold.data.packing import MixtureEntry, PackedSource
from twofold.data.prefetch import Prefetch, prefetching
from twofold.data.shards import Shard, write_shard


class Counting:
    """A source whose step n holds the number n; ``fails_at`` breaks that step."""

    can_prefetch = True

    def __init__(self, seconds: float = 0.0, fails_at: int = -1) -> None:
        self.seconds, self.fails_at, self.taken = seconds, fails_at, 0

    @property
    def can_checkpoint(self) -> bool:
        return self.taken % 2 == 0

    @property
    def metrics(self) -> dict[str, float]:
        return {"taken": float(self.taken)}

    def next_step(self) -> list[TokenBatch]:
        time.sleep(self.seconds)
        if self.taken == self.fails_at:
            raise ValueError(f"step {self.taken} is broken")
        self.taken += 1
        return [pack([[self.taken, self.taken]])]

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.taken = state["taken"]


def number(batches: list[TokenBatch]) -> int:
    return int(batches[0].tokens_T[0])


def settle(prefetch: Prefetch) -> None:
    """Wait until as many steps are ready as may be."""
    deadline = time.monotonic() + 20
    while len(prefetch._ready) < prefetch.ahead and time.monotonic() < deadline:
        time.sleep(0.001)


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def packed(folder: Path, **options: Any) -> PackedSource:
    entries = []
    for name, lengths in (("a", [7, 3, 40, 12] * 6), ("b", [90, 2, 55])):
        if not (folder / name).exists():
            write_shard(folder / name, [list(range(length)) for length in lengths], {})
        entries.append(MixtureEntry(name, Shard.open(folder / name), 0.5))
    return PackedSource(entries, 60, ((0.5, 4, 9), (0.5, 20, 30)), 1, micro_batches=2, **options)


def same(left: list[TokenBatch], right: list[TokenBatch]) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a.tokens_T, b.tokens_T) and torch.equal(a.targets_T, b.targets_T) and a.cu_seqlens == b.cu_seqlens
        for a, b in zip(left, right, strict=True)
    )


@pytest.mark.parametrize("ahead", [1, 2, 5])
@pytest.mark.parametrize("packing", ["stream", "best_fit"])
def test_batches_states_and_counts_are_those_of_the_source(tmp_path: Path, ahead: int, packing: str) -> None:
    """A run killed after any step and resumed goes on as the source alone would, whatever was made ahead."""
    alone = packed(tmp_path, packing=packing)
    steps, states, counts = [], [alone.state_dict()], [alone.tokens_by_source]
    for _ in range(12):
        steps.append(alone.next_step())
        states.append(alone.state_dict())
        counts.append(alone.tokens_by_source)
    for killed in range(12):
        with prefetching(packed(tmp_path, packing=packing), ahead) as first:
            for place in range(killed):
                assert same(first.next_step(), steps[place])
                if killed == 11:
                    assert isinstance(first, Prefetch)
                    settle(first)
                    assert first.tokens_by_source == counts[place + 1]
            saved = json.loads(json.dumps(first.state_dict()))
            assert saved == states[killed]
        source = packed(tmp_path, packing=packing)
        with prefetching(source, ahead) as resumed:
            resumed.load_state_dict(saved)
            assert resumed.state_dict() == saved
            for place in range(killed, 12):
                assert same(resumed.next_step(), steps[place])
                assert resumed.state_dict() == states[place + 1]
        assert source.state_dict() == states[12] and source.tokens_by_source == counts[12]
    assert threads() == []


def test_what_a_source_says_is_of_the_step_handed_out() -> None:
    source = Counting()
    with prefetching(source, 3) as ahead:
        assert isinstance(ahead, Prefetch)
        assert ahead.metrics == {"taken": 0.0} and ahead.can_checkpoint and threads() == []
        for step in range(1, 5):
            assert number(ahead.next_step()) == step
            settle(ahead)
            assert source.taken >= step + 3
            assert ahead.metrics == {"taken": float(step)} and ahead.state_dict() == {"taken": step}
            assert ahead.can_checkpoint == (step % 2 == 0)
    assert source.taken == 4 and threads() == []


def test_it_works_between_steps_and_never_too_far_ahead() -> None:
    source = Counting()
    with prefetching(source, 2) as ahead:
        assert isinstance(ahead, Prefetch)
        ahead.next_step()
        settle(ahead)  # nobody asks for a step meanwhile
        assert source.taken == 3
        time.sleep(0.05)
        assert source.taken == 3


def test_an_error_comes_in_its_place_with_its_traceback() -> None:
    source = Counting(fails_at=2)
    with prefetching(source, 5) as ahead:
        assert [number(ahead.next_step()) for _ in range(2)] == [1, 2]
        for _ in range(2):  # and again: nothing is skipped in silence
            with pytest.raises(ValueError, match="step 2 is broken") as failure:
                ahead.next_step()
            frames = [frame.name for frame in traceback.extract_tb(failure.value.__traceback__)]
            assert "_work" in frames and frames.count("next_step") >= 2
        assert ahead.state_dict() == {"taken": 2}
        source.fails_at = -1
        ahead.load_state_dict({"taken": 1})
        assert number(ahead.next_step()) == 2
    assert threads() == []


def test_an_interrupt_while_waiting_loses_nothing() -> None:
    """As Ctrl-C does: KeyboardInterrupt inside the wait, before the batch was there."""
    source = Counting(0.05)
    ahead = Prefetch(source, 1)
    real, waits = ahead._changed.wait_for, []

    def interrupted(condition: Any) -> Any:
        if threading.current_thread() is threading.main_thread() and not waits:
            waits.append(1)
            raise KeyboardInterrupt
        return real(condition)

    ahead._changed.wait_for = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        ahead.next_step()
    assert [number(ahead.next_step()) for _ in range(3)] == [1, 2, 3]
    ahead.close()
    ahead.close()
    assert threads() == [] and source.taken == 3


def test_an_error_of_the_step_ends_the_thread() -> None:
    source = Counting()
    with pytest.raises(ZeroDivisionError), prefetching(source, 2) as ahead:
        ahead.next_step()
        raise ZeroDivisionError
    assert threads() == [] and source.taken == 1


def test_only_sources_that_allow_it() -> None:
    class Rollouts(Counting):
        can_prefetch = False

    rollouts: BatchSource = Rollouts()
    with prefetching(rollouts, 2) as source:
        assert source is rollouts
    with prefetching(counting := Counting(), 0) as source:
        assert source is counting
    with pytest.raises(InputError, match="Rollouts looks at the model"):
        Prefetch(rollouts)
    with pytest.raises(InputError, match="ahead >= 1"):
        Prefetch(Counting(), 0)
    with pytest.raises(InputError, match="Prefetch looks"):
        Prefetch(Prefetch(Counting()))
