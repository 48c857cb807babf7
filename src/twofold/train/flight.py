"""The flight record: what is known about a run when it dies, in one JSON file beside its state.

Settings, the last rows of metrics, the step's batches, memory and the traceback. Writing it never hides the error that
ended the run. Not here: stopping or mending anything.
"""

from __future__ import annotations

import platform
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from twofold.base.batch import TokenBatch
from twofold.base.files import write_json
from twofold.base.log import peak_memory_bytes

LAST_ROWS = 20


def record(
    path: Path,
    error: BaseException,
    facts: dict[str, Any],
    rows: Sequence[dict[str, Any]],
    batches: Sequence[TokenBatch],
) -> None:
    """Write the record and name it in a note on ``error``; a disk that takes nothing more is named there instead."""
    written = {
        "error": f"{type(error).__name__}: {error}",
        "traceback": traceback.format_exception(error),
        "at": time.strftime("%Y-%m-%d %H:%M:%S"),
        **facts,
        "metrics": list(rows[-LAST_ROWS:]),
        "batches": [
            {
                "tokens": batch.num_tokens,
                "sequences": len(batch.cu_seqlens) - 1,
                "weight": float(batch.weights_T.sum()),
                "sources": sorted(set(batch.source_S)),
            }
            for batch in batches
        ],
        "memory": memory(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    try:
        write_json(path, written)
        error.add_note(f"what is known about it: {path}")
    except (OSError, TypeError, ValueError) as failure:
        error.add_note(f"the flight record {path} could not be written: {failure}")


def memory() -> dict[str, int]:
    """Bytes: largest resident set of the process, and of each GPU what is and was in use."""
    out = {"peak_resident": peak_memory_bytes()}
    for index in range(torch.cuda.device_count()):
        out[f"gpu{index}_allocated"] = torch.cuda.memory_allocated(index)
        out[f"gpu{index}_peak"] = torch.cuda.max_memory_allocated(index)
    return out
