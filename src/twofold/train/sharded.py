"""States of several processes: a folder of safetensors files, each rank's share in its own, written in the background.

torch.distributed.checkpoint lays tensors out and cuts them anew for another number of ranks; ``state.json`` has the
facts. A folder gets its name only when every rank has written and rank 0 has seen it, so it is whole or absent; the
ranks share one file system. Names and contents are those of ``checkpoint.py``. What it needs of torch is imported where
it is used, because one process never needs it.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from twofold.base.files import read_json, write_json
from twofold.train.checkpoint import damaged

FACTS = "state.json"
_SCALAR = (1,)  # numbers are stored as vectors of one element: readers of slices know no others


class SavedFolder:
    """A state that ``ShardedWriter`` wrote; any number of processes may read it, all together.

    Raises:
        InputError: the folder is not readable as such.
    """

    def __init__(self, path: Path) -> None:
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

        self.origin = path
        try:
            stored = read_json(path / FACTS)
            self.facts: dict[str, Any] = stored["facts"]
            self._scalars = set(stored["scalars"])
            found = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
            self.shapes = {
                name: () if name in self._scalars else tuple(entry.size)  # type: ignore[union-attr]
                for name, entry in found.items()
            }
        except (OSError, KeyError, TypeError, ValueError, AttributeError, json.JSONDecodeError) as error:
            raise damaged(path, error) from None

    def fill(self, targets: dict[str, torch.Tensor]) -> None:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

        flat = {name: t.view(_SCALAR) if name in self._scalars else t for name, t in targets.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that one process loads alone is meant
            dcp.load(flat, storage_reader=HuggingFaceStorageReader(str(self.origin)))


class ShardedWriter:
    """Writes states one after another, each while training goes on; ``finish`` waits for the last.

    Raises:
        OSError, RuntimeError: from the next call, when a write has failed.
    """

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo")  # training's own exchanges go on at the same time
        self._pending: Future[Any] | None = None

    def save(self, path: Path, tensors: dict[str, torch.Tensor], facts: dict[str, Any], old: list[Path]) -> None:
        """Begin writing ``path``; when it is whole, ``old`` are deleted. All ranks call this."""
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

        self.finish()
        temporary = path.with_name(f".{path.name}.tmp")
        scalars = sorted(name for name, tensor in tensors.items() if tensor.dim() == 0)
        if dist.get_rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            write_json(temporary / FACTS, {"facts": facts, "scalars": scalars})
        dist.barrier(self._group)
        flat = {name: t.view(_SCALAR) if t.dim() == 0 else t for name, t in tensors.items()}
        writer = HuggingFaceStorageWriter(str(temporary), save_distributed=True)
        pending = dcp.async_save(flat, storage_writer=writer, process_group=self._group)
        assert isinstance(pending, Future)
        if dist.get_rank() == 0:
            pending.add_done_callback(lambda done: None if done.exception() else _publish(temporary, path, old))
        self._pending = pending

    def finish(self) -> None:
        """Wait until the last state is whole on disk."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()
            dist.barrier(self._group)


def _publish(temporary: Path, path: Path, old: list[Path]) -> None:
    shutil.rmtree(path, ignore_errors=True)
    os.replace(temporary, path)
    for folder in old:
        shutil.rmtree(folder, ignore_errors=True)
        folder.unlink(missing_ok=True)
