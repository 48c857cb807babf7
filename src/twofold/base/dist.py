"""Process groups started by ``torchrun``, and helpers for sharded tensors; all do nothing on one process.

``session`` reads torchrun's environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT): gloo on CPUs, NCCL on
GPUs. Without it, or with a world of one, no process group exists, and a plain tensor is its own shard. Sharded tensors
are torch's DTensors; that part of torch takes a second to import and is loaded only when there are some.
Not here: which rank holds what (``model/parallel.py``).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist

from twofold.base.records import InputError

TIMEOUT = timedelta(minutes=10)  # longest wait for another rank
_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Ranks:
    """Processes that add up or share out something; ``rank`` is this one's place among ``size``."""

    rank: int = 0
    size: int = 1
    group: Any = None

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks, the same on each; the tensor itself when alone. No gradient."""
        return self._reduced(tensor, dist.ReduceOp.SUM)

    def max(self, tensor: torch.Tensor) -> torch.Tensor:
        """Largest value over the ranks, the same on each. No gradient."""
        return self._reduced(tensor, dist.ReduceOp.MAX)

    def _reduced(self, tensor: torch.Tensor, operation: Any) -> torch.Tensor:
        if self.size == 1:
            return tensor
        out = tensor.detach().clone()
        dist.all_reduce(out, operation, group=self.group)
        return out


ALONE = Ranks()


@contextmanager
def session() -> Iterator[Ranks]:
    """All processes that torchrun started, for the length of a ``with`` block.

    Raises:
        InputError: an environment that is set in part or contradicts itself, or ranks that cannot be reached.
    """
    size = _environment()
    if size == 1:
        yield ALONE
        return
    gpu = torch.cuda.is_available()
    local = int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
    if gpu:
        if local >= torch.cuda.device_count():
            raise InputError(
                f"local rank {local} has no GPU: this machine has {torch.cuda.device_count()}; "
                "start as many processes as it has GPUs"
            )
        torch.cuda.set_device(local)
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise InputError(
            f"the processes did not meet at {where} ({_first_line(error)}); start all with torchrun"
        ) from None
    try:
        yield world()
    finally:
        dist.destroy_process_group()


def world() -> Ranks:
    """All processes of the running session, or this one alone."""
    if not dist.is_available() or not dist.is_initialized():
        return ALONE
    return Ranks(dist.get_rank(), dist.get_world_size())


def device_type() -> str:
    """Where meshes lie: "cuda" where there is a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def mesh(shape: Sequence[int], names: Sequence[str]) -> Any:
    """A device mesh over all ranks, the last dimension the fastest.

    Raises:
        InputError: a shape whose product is not the number of processes.
    """
    needed, size = 1, world().size
    for length in shape:
        needed *= length
    if needed != size:
        sizes = ", ".join(f"{name}={length}" for name, length in zip(names, shape, strict=True))
        raise InputError(f"{sizes} needs {needed} processes, {size} run; change one of them or torchrun's number")
    return dist.init_device_mesh(device_type(), tuple(shape), mesh_dim_names=tuple(names))


def ranks_of(part: Any) -> Ranks:
    """The ranks along a mesh of one dimension."""
    if part.size() == 1:
        return ALONE
    group = part.get_group()
    return Ranks(dist.get_rank(group), dist.get_world_size(group), group)


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a DTensor, without importing them."""
    return hasattr(tensor, "device_mesh")


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a sharded tensor, with its gradient; a plain tensor itself."""
    return cast(Any, tensor).to_local() if is_sharded(tensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a sharded tensor, on every rank (they must all ask); a plain tensor itself. No gradient."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        return cast(Any, tensor).full_tensor()


def whole_of(part: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """All of what every rank has a ``part`` of, sharded as the DTensor ``like`` is."""
    from torch.distributed.tensor import DTensor

    placed: Any = like
    facts: dict[str, Any] = {"run_check": False, "shape": like.shape, "stride": like.stride()}
    return whole(DTensor.from_local(part, placed.device_mesh, placed.placements, **facts))


def piece(full: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The view of ``full`` that this rank holds of a tensor sharded as ``like`` is."""
    if not is_sharded(like):
        return full
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    placed: Any = like
    shape, offset = compute_local_shape_and_global_offset(like.shape, placed.device_mesh, placed.placements)
    return full[tuple(slice(begin, begin + length) for begin, length in zip(offset, shape, strict=True))]


@torch.no_grad()
def fill(target: torch.Tensor, full: torch.Tensor) -> None:
    """Copy into ``target`` what it holds of ``full``."""
    local(target).copy_(piece(full, target))


def copies(tensor: torch.Tensor) -> int:
    """On how many ranks of the session each element lies."""
    shards, placed = 1, cast(Any, tensor)
    if is_sharded(tensor):
        for length, placement in zip(placed.device_mesh.shape, placed.placements, strict=True):
            shards *= 1 if placement.is_replicate() else length
    return world().size // shards


def _environment() -> int:
    """World size that torchrun's environment names, 1 without one."""
    found = [name for name in _NEEDED if name in os.environ]
    size = os.environ.get("WORLD_SIZE", "1")
    if "WORLD_SIZE" not in found or size == "1":
        return 1
    missing = [name for name in _NEEDED if name not in found]
    if missing:
        raise InputError(
            f"WORLD_SIZE is {size} but {missing[0]} is not set; start with torchrun --nproc-per-node {size}"
        )
    try:
        rank, count = int(os.environ["RANK"]), int(size)
    except ValueError:
        raise InputError(f"RANK={os.environ['RANK']!r} and WORLD_SIZE={size!r} must be whole numbers") from None
    if not 0 <= rank < count:
        raise InputError(f"RANK={rank} is outside a WORLD_SIZE of {count}; start with torchrun")
    return count


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
