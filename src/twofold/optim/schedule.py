"""Learning-rate schedules as one pure function of the step. Stateless, so resuming needs nothing."""

from __future__ import annotations

import math
from typing import Literal

Decay = Literal["constant", "linear", "cosine"]


def lr_scale(step: int, total: int, warmup: int, decay: Decay, start: float = 1.0, end: float = 1.0) -> float:
    """Multiplier of the peak learning rate at ``step`` (0-based) of ``total``.

    Linear warm-up from 0 over ``warmup`` steps to ``start``, then from ``start`` to ``end`` (constant ignores ``end``).
    """
    if step < warmup:
        return start * (step + 1) / warmup
    if decay == "constant":
        return start
    done = (step - warmup) / max(1, total - warmup)
    if decay == "cosine":
        return end + (start - end) * 0.5 * (1 + math.cos(math.pi * done))
    return start + (end - start) * done
