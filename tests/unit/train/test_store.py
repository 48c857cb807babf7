"""Which states are on disk, and which one a run goes on from."""

from __future__ import annotations

from pathlib import Path

import torch

from twofold.model.parallel import Parallel
from twofold.train.checkpoint import load_state
from twofold.train.store import Store


def save(store: Store, step: int) -> None:
    store.save({"a": torch.tensor([float(step)])}, {"step": step})


def numbered(work: Path) -> list[int]:
    return sorted(load_state(path)[1]["step"] for path in work.glob("state-*"))


def test_one_state_unless_more_are_asked_for(tmp_path: Path) -> None:
    store = Store(tmp_path, Parallel(), keep_every=0, keep_last=2)
    assert store.open() is None
    for step in (1, 2, 3):
        save(store, step)
    assert [path.name for path in tmp_path.iterdir()] == ["state.safetensors"]
    saved = store.open()
    assert saved is not None and saved.facts == {"step": 3} and saved.shapes == {"a": (1,)}


def test_the_last_few_outlive_newer_ones_and_never_change(tmp_path: Path) -> None:
    store = Store(tmp_path, Parallel(), keep_every=10, keep_last=2)
    for step in (5, 10, 15, 20, 25):
        save(store, step)
    assert numbered(tmp_path) == [10, 20]
    for step in (30, 37):
        save(store, step)
    assert numbered(tmp_path) == [20, 30] and load_state(store.path)[1]["step"] == 37
    more = Store(tmp_path, Parallel(), keep_every=10, keep_last=4)
    save(more, 38)
    assert numbered(tmp_path) == [20, 30]
    none = Store(tmp_path, Parallel(), keep_every=10, keep_last=0)
    save(none, 40)
    assert numbered(tmp_path) == []


def test_what_a_killed_writer_left_is_swept_up(tmp_path: Path) -> None:
    (tmp_path / ".state-00000007.tmp").mkdir()
    (tmp_path / ".state-00000007.tmp" / "half").write_bytes(b"1")
    assert Store(tmp_path, Parallel(), 0, 2).open() is None
    assert list(tmp_path.iterdir()) == []
