"""The data card: what a model was trained on, in numbers, for the report and for the model's folder.

Counts, shares, licences, what was dropped and why, what was held out, and hashes that identify the exact data.
Not here: samples of the data, quality judgements, rendering to Markdown or HTML.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from twofold.base.config import digest
from twofold.base.records import InputError
from twofold.data.dedup import Dropped


@dataclass(frozen=True)
class CardEntry:
    """One source: counts of its training part; ``share`` is its share of the training tokens seen (0 to 1);
    ``held_out`` counts documents or items kept away from training; ``sha256`` identifies the token file."""

    name: str
    licence: str
    documents: int
    tokens: int
    bytes: int
    share: float
    held_out: int = 0
    dropped: tuple[Dropped, ...] = ()
    sha256: str = ""


def data_card(entries: Sequence[CardEntry]) -> dict[str, Any]:
    """Summarise the sources as JSON-able data.

    Returns:
        ``sources`` (a row each, with ``dropped`` counted by kind), ``totals``, ``licences`` and a ``hash`` of it all.

    Raises:
        InputError: no entries, or two of one name.
    """
    if not entries:
        raise InputError("a data card needs at least one source")
    names = [entry.name for entry in entries]
    if len(set(names)) != len(names):
        raise InputError(f"data card sources must have distinct names, got {names}")
    rows = [_row(entry) for entry in entries]
    totals: dict[str, Any] = {
        column: sum(row[column] for row in rows) for column in ("documents", "tokens", "bytes", "held_out")
    }
    totals["dropped"] = dict(sorted(sum((Counter(row["dropped"]) for row in rows), Counter()).items()))
    card: dict[str, Any] = {
        "sources": rows,
        "totals": totals,
        "licences": sorted({entry.licence for entry in entries}),
    }
    return card | {"hash": digest(card)}


def _row(entry: CardEntry) -> dict[str, Any]:
    kinds = Counter(drop.reason.split(":")[0] for drop in entry.dropped)
    return {
        "name": entry.name,
        "licence": entry.licence,
        "documents": entry.documents,
        "tokens": entry.tokens,
        "bytes": entry.bytes,
        "bytes_per_token": round(entry.bytes / entry.tokens, 3) if entry.tokens else None,
        "share": entry.share,
        "held_out": entry.held_out,
        "dropped": dict(sorted(kinds.items())),
        "sha256": entry.sha256,
    }
