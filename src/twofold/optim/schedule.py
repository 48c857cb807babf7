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


def remark(total: int, warmup: int, decay: Decay, start: float = 1.0, end: float = 1.0) -> str | None:
    """What is odd about a schedule over ``total`` steps, in one sentence that names the setting; None if nothing is.

    A warm-up that takes the whole run, or a decay that never lowers the rate. "constant" says so itself.
    """
    if total < 1 or (total == 1 and warmup < 1):
        return None
    last = lr_scale(total - 1, total, warmup, decay, start, end)
    if warmup >= total:
        reached = f"the rate ends at {last:.0%} of what was asked for" if last < start else "there is no step after it"
        return f"the warm-up of {warmup} steps takes the whole run of {total}: {reached}; set warmup below {total}"
    if decay != "constant" and last >= start:
        why = (
            f"from start={start:g} to end={end:g}" if end >= start else f"there are {total - warmup} after the warm-up"
        )
        return f"decay={decay} never lowers the rate in {total} steps: {why}; set decay=constant if that is meant"
    return None
