"""How much memory the KV cache may take, and how it is cut into blocks.

Two shapes of one mechanism. Blocks of 32 positions, for serving and long texts: samples share prefixes, memory follows
what is used. One block for each whole sequence, for batches of short ones: nothing is shared beyond a request's
samples, but decoding reads all rows without gathering them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from twofold.base.records import Request
from twofold.model.config import ModelConfig

BLOCK = 32
_WHOLE_FROM = 8  # samples given together from which one block for each pays
_WHOLE_TOKENS = 2048  # longest sequences that get one block each
_SHARED = 256  # first tokens that, where two requests have them in common, are worth a prefix cache
_CPU_SHARE, _GPU_SHARE = 0.5, 0.8  # of what is free
_CGROUP = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))


@dataclass(frozen=True, slots=True)
class Shape:
    """Blocks of a cache, positions of each, and whether each holds a whole sequence."""

    blocks: int
    block_size: int
    whole: bool


def free_bytes(device: torch.device) -> int:
    """Memory that could be taken now: of the GPU, or of the machine within its control group's limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = _meminfo() or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    for limit, current in _CGROUP:
        try:
            numbers = [int((Path("/sys/fs/cgroup") / name).read_text()) for name in (limit, current)]
        except (OSError, ValueError):  # no such group, or no limit
            continue
        free = min(free, numbers[0] - numbers[1])
    return max(free, 0)


def _meminfo() -> int | None:
    """What Linux calls available, in bytes."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None


def cache_bytes(config: ModelConfig, itemsize: int, rows: int, device: torch.device, held: int = 0) -> int:
    """The cache's share of free memory, or what ``rows`` sequences of the model's longest context take if less.

    ``held``: bytes of the cache that a new one would replace.
    """
    share = _GPU_SHARE if device.type == "cuda" else _CPU_SHARE
    return min(int((free_bytes(device) + held) * share), rows * config.longest * config.kv_bytes_per_token(itemsize))


def paged_shape(total_bytes: int, token_bytes: int, block_size: int) -> Shape:
    """As many blocks as fit."""
    return Shape(total_bytes // (token_bytes * block_size), block_size, whole=False)


def whole_shape(requests: Sequence[Request], rows: int, total_bytes: int, token_bytes: int) -> Shape | None:
    """One block for each of at most ``rows`` sequences running at once; None where that is not the better shape.

    It is where samples are many and short, fit together, and no two requests begin with the same long text.
    """
    samples = sum(request.params.n for request in requests)
    longest = max((len(r.prompt_ids) + r.params.max_tokens for r in requests), default=1)
    capacity = -(-longest // 64) * 64
    rows = min(rows, samples)
    if samples < _WHOLE_FROM or longest > _WHOLE_TOKENS or rows * capacity * token_bytes > total_bytes:
        return None
    heads = [request.prompt_ids[:_SHARED] for request in requests if len(request.prompt_ids) > _SHARED]
    return Shape(rows, capacity, whole=True) if len(set(heads)) == len(heads) else None
