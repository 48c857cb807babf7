"""Prompt lookup: guess what comes next from where the same words stood before, in the sequence's own tokens.

Costs no model. Editing, quoting and repeating guess well; other text hardly at all. The engine feeds the guess together
with the newest token and keeps what it would have sampled anyway. (arXiv 2304.04487 copies spans from references the
same way.)
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

_LONGEST, _SHORTEST = 5, 2  # tokens at the end that must have stood together before
_REACH = 8192  # newest tokens that are searched


def prompt_lookup(tokens: Sequence[int], count: int) -> list[int]:
    """Up to ``count`` tokens that followed the latest earlier place where the end of ``tokens`` stood; none if nowhere.

    Longer ends go first.
    """
    if count < 1:
        return []
    recent = array("i", tokens[-_REACH:])
    data, size = recent.tobytes(), recent.itemsize
    for length in range(min(_LONGEST, len(recent) - 1), _SHORTEST - 1, -1):
        pattern = data[-length * size :]
        at = data.rfind(pattern, 0, len(data) - size)
        while at % size and at >= 0:  # bytes that match across tokens
            at = data.rfind(pattern, 0, at + len(pattern) - 1)
        if at >= 0:
            first = at // size + length
            return recent[first : first + count].tolist()
    return []
