"""Metrics on disk and process facts: JSON Lines that survive a resume, processors, memory now and at most.

Not here: progress display (``progress.py``) and plots (the report).
"""

from __future__ import annotations

import json
import os
import resource
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from twofold.base.files import read_jsonl, write_jsonl


class MetricsLog:
    """Appends one row a step to a JSON Lines file; ``rewind`` drops rows that a resumed run will write again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def rewind(self, step: int) -> None:
        """Keep rows whose ``step`` is below ``step``; a half-written last line is dropped."""
        if not self.path.exists():
            return
        whole = self.path.read_text(encoding="utf-8").split("\n")[:-1]
        write_jsonl(self.path, [row for row in map(json.loads, whole) if row["step"] < step])

    def write(self, row: dict[str, Any]) -> None:
        """Append one row (a JSON object with a ``step``)."""
        with open(self.path, "a", encoding="utf-8") as handle:
            handle.write(json.dumps(row) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """Everything written so far."""
        return read_jsonl(self.path) if self.path.exists() else []


def usable_processors() -> int:
    """Processors this process may use, which in a container can be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bytes() -> int:
    """Resident set of this process now; where the system does not say, the largest so far."""
    return _status("VmRSS") or peak_memory_bytes()


def peak_memory_bytes() -> int:
    """Largest resident set of this process so far, not counting that of the process which started it."""
    found = _status("VmHWM")  # Linux carries a parent's peak over into ru_maxrss
    if found is not None:
        return found
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _status(name: str) -> int | None:
    """A size from what Linux tells of this process, in bytes."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return None
