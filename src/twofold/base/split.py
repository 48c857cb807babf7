"""The one rule that keeps data out of training: a hash of its key decides, for task items and documents alike.

What a key is (a canonical prompt, a document's id) is known where the data is. Imports no torch.
"""

from __future__ import annotations

import hashlib

HELD_OUT = 26 / 256  # of all keys are never used for training


def held_out(key: str, share: float = HELD_OUT) -> bool:
    """Whether a key belongs to the held-out share: its MD5, as a fraction of all, is below it."""
    return int.from_bytes(hashlib.md5(key.encode()).digest()) < share * 2**128
