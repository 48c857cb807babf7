"""Best of several samples by the model's own log-probability. Not here: judging answers (``tasks``), sampling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from twofold.base.records import Completion, InputError

By = Literal["mean", "sum"]


def score(completion: Completion, by: By = "mean") -> float:
    """Mean or summed natural-log probability of the tokens that the model chose; -inf for an aborted completion.

    Forced tokens count neither way. A sum favours short completions, a mean does not.
    """
    if completion.finish_reason == "aborted":
        return -math.inf
    chosen = [value for value, forced in zip(completion.logprobs, completion.forced, strict=True) if not forced]
    total = math.fsum(chosen)
    return total / max(1, len(chosen)) if by == "mean" else total


def best_of(completions: Sequence[Completion], keep: int = 1, by: By = "mean") -> list[Completion]:
    """The ``keep`` likeliest of one request's completions, likeliest first; of equals, the earlier sample.

    Ask the engine for as many samples as are to be chosen from (``SamplingParams.n``).

    Raises:
        InputError: fewer completions than are to be kept, or another ``by`` than "mean" and "sum".
    """
    if by not in ("mean", "sum"):
        raise InputError(f"completions are ranked by 'mean' or 'sum' of log-probabilities, got {by!r}")
    if not 1 <= keep <= len(completions):
        raise InputError(f"{keep} of {len(completions)} completions cannot be kept; sample at least as many")
    return sorted(completions, key=lambda completion: -score(completion, by))[:keep]
