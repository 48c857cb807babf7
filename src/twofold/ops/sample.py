"""Sampling by inverse transform from counter-based random numbers.

One uniform number a row, a function of (seed, position) alone: a request's tokens do not depend on its batch mates,
on the number of steps run before, or on a generator's state. Cheaper than drawing V exponentials a row.

Shape legend: R rows, V vocabulary.
"""

from __future__ import annotations

import math

import torch

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical (unsigned) shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def counter_uniform(seed_R: torch.Tensor, position_R: torch.Tensor) -> torch.Tensor:
    """Uniform numbers in [0, 1), fp64 [R], from the splitmix64 hash of (seed, position)."""
    x = seed_R * _GOLDEN + position_R
    for _ in range(2):  # two rounds: nearby seeds and positions must not correlate
        x = x + _GOLDEN
        x = (x ^ _shift_right(x, 30)) * _MIX_1
        x = (x ^ _shift_right(x, 27)) * _MIX_2
        x = x ^ _shift_right(x, 31)
    return _shift_right(x, 11).double() * 2.0**-53


def filter_logits(logits_RV: torch.Tensor, top_k_R: torch.Tensor, top_p_R: torch.Tensor) -> torch.Tensor:
    """Set logits outside top-k (0 = off), then outside the top-p nucleus of what is left (1 = off), to -inf."""
    ordered, order = logits_RV.sort(dim=-1, descending=True, stable=True)
    limit = torch.where(top_k_R > 0, top_k_R, logits_RV.shape[-1])[:, None]
    ordered = ordered.masked_fill(torch.arange(ordered.shape[-1], device=ordered.device)[None] >= limit, -math.inf)
    probs = ordered.softmax(-1)
    # Off must be exactly off: a rounded cumulative sum reaches 1 before the last tokens do.
    share = torch.where(top_p_R < 1, top_p_R, math.inf)[:, None]
    ordered = ordered.masked_fill((probs.cumsum(-1) - probs) >= share, -math.inf)
    return torch.full_like(logits_RV, -math.inf).scatter(-1, order, ordered)


def sample(logits_RV: torch.Tensor, temperature_R: torch.Tensor, uniform_R: torch.Tensor) -> torch.Tensor:
    """Draw one token a row (int64 [R]); temperature 0 means the largest logit.

    The draw is the first token whose cumulative probability exceeds the uniform number.
    """
    greedy_R = logits_RV.argmax(-1)
    hot_R = temperature_R > 0
    if not bool(hot_R.any()):
        return greedy_R
    probs_RV = (logits_RV / torch.where(hot_R, temperature_R, 1.0)[:, None]).softmax(-1)
    cdf_RV = probs_RV.cumsum(-1)
    threshold_R = uniform_R.to(cdf_RV.dtype) * cdf_RV[:, -1]
    drawn_R = torch.searchsorted(cdf_RV, threshold_R[:, None], right=True).squeeze(-1)
    # Rounding can make uniform * total equal the total: fall back to the last token that has probability.
    last_R = logits_RV.shape[-1] - 1 - (probs_RV > 0).flip(-1).int().argmax(-1)
    return torch.where(hot_R, torch.minimum(drawn_R, last_R), greedy_R)
