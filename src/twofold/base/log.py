"""Metrics on disk and process facts: JSON Lines that survive a resume, threads, peak memory.

Not here: progress display (``progress.py``) and plots (the report).
"""

from __future__ import annotations

import json
import resource
import sys
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


def peak_memory_bytes() -> int:
    """Largest resident set of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
