"""The one rule that keeps data out of training: a hash of its key decides, for task items and documents alike.

What a key is (a canonical prompt, a document's id) is known where the data is. Imports no torch.
"""

from __future__ import annotations

import hashlib

HELD_OUT_BYTES = 26  # of 256: about 10 % of all keys are never used for training


def held_out(key: str) -> bool:
    """Whether a key belongs to the held-out tenth: its first MD5 byte is below 26."""
    return hashlib.md5(key.encode()).digest()[0] < HELD_OUT_BYTES
