"""Learning-rate schedules as pure functions of step and tokens. Stateless, so resuming needs nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

Decay = Literal["constant", "linear", "cosine", "wsd"]
STABLE = 0.8  # share of the steps after warm-up that "wsd" holds the rate


def lr_scale(step: int, total: int, warmup: int, decay: Decay, start: float = 1.0, end: float = 1.0) -> float:
    """Multiplier of the peak learning rate at ``step`` (0-based) of ``total``.

    Linear warm-up from 0 over ``warmup`` steps to ``start``, then from ``start`` to ``end`` (constant ignores ``end``).
    "wsd" (warm-up, stable, decay; arXiv 2404.06395) holds ``start`` for STABLE of the way and then falls linearly.
    """
    if step < warmup:
        return start * (step + 1) / warmup
    if decay == "constant":
        return start
    done = (step - warmup) / max(1, total - warmup)
    if decay == "cosine":
        return end + (start - end) * 0.5 * (1 + math.cos(math.pi * done))
    if decay == "wsd":
        done = max(0.0, done - STABLE) / (1 - STABLE)
    return start + (end - start) * done


def piecewise(tokens: int, points: Sequence[tuple[float, float]]) -> float:
    """Multiplier after ``tokens`` trained tokens: linear between (tokens, multiplier) points, level outside them."""
    if tokens <= points[0][0]:
        return points[0][1]
    for (begin, low), (end, high) in zip(points, points[1:], strict=False):
        if tokens <= end:
            return low + (high - low) * (tokens - begin) / (end - begin)
    return points[-1][1]
