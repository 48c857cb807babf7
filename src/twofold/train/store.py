"""Where the states of a run lie: the newest to resume from, the last few and the best when they are asked for.

One process writes ``state.safetensors``, several write folders ``state-<step>``; either resumes from either. Not here:
what a state holds (``checkpoint.py``).
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from twofold.model.parallel import Parallel
from twofold.train.checkpoint import Saved, SavedFile, save_state
from twofold.train.sharded import SavedFolder, ShardedWriter

SINGLE, BEST = "state.safetensors", "best.safetensors"
_NUMBERED = re.compile(r"state-(\d{8})(\.safetensors)?")


class Store:
    """The states in a run's folder ``work``.

    keep_every, keep_last: states of every so many steps that outlive newer ones, and how many of them.
    """

    def __init__(self, work: Path, parallel: Parallel, keep_every: int, keep_last: int) -> None:
        self.work, self.alone, self.first = work, parallel.world.size == 1, parallel.world.rank == 0
        self.keep_every, self.keep_last = keep_every, keep_last
        self._writer = None if self.alone else ShardedWriter()
        self.path = work / SINGLE if self.alone else work

    def open(self) -> Saved | None:
        """The newest state, or None."""
        if self.first:
            for left in self.work.glob(".state-*.tmp"):  # of a run that was killed while it wrote
                shutil.rmtree(left, ignore_errors=True)
        found: list[Saved] = [SavedFolder(path) for path in self._folders()[-1:]]
        if (self.work / SINGLE).exists():
            found.append(SavedFile(self.work / SINGLE))
        return max(found, key=lambda saved: saved.facts.get("step", 0), default=None)

    def keeps(self, step: int) -> bool:
        """Whether the state of this step is to outlive newer ones."""
        return self.keep_every > 0 and step % self.keep_every == 0

    def save(self, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
        """Write a state; older ones go when it is whole. All ranks call this."""
        step = facts["step"]
        if self._writer is not None:
            self.path = self.work / f"state-{step:08d}"
            old = [path for path in self._folders() if path != self.path and path not in self._kept(step)]
            self._writer.save(self.path, tensors, facts, [*old, self.work / SINGLE])
            return
        save_state(self.path, tensors, facts)
        if self.keeps(step):
            kept = self.work / f"state-{step:08d}.safetensors"
            kept.unlink(missing_ok=True)
            os.link(self.path, kept)
        for path in self._numbered():
            if path not in self._kept(step):
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()

    def save_best(self, weights: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
        """Write weights as one file, whatever the number of ranks."""
        if self.first:
            save_state(self.work / BEST, weights, facts)

    def finish(self) -> None:
        """Wait until the last state is whole on disk."""
        if self._writer is not None:
            self._writer.finish()

    def _numbered(self) -> list[Path]:
        return sorted(path for path in self.work.iterdir() if _NUMBERED.fullmatch(path.name))

    def _folders(self) -> list[Path]:
        return [path for path in self._numbered() if path.is_dir()] if self.work.exists() else []

    def _kept(self, step: int) -> set[Path]:
        """The last few states that are to outlive that of ``step``, itself included."""
        paths = {*self._numbered(), *([] if self.alone else [self.path])}  # a folder is there only when it is whole
        kept = sorted(path for path in paths if self.keeps(int(path.name[6:14])))
        return set(kept[-self.keep_last :]) if self.keep_last else set()
