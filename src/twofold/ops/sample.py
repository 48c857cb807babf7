"""Sampling: penalties, masks and filters on logits, then inverse transform from counter-based random numbers.

One uniform number a row, a function of (seed, position) alone: a request's tokens do not depend on its batch mates,
on the number of steps run before, or on a generator's state. Cheaper than drawing V exponentials a row.

Shape legend: R rows, V vocabulary, F few largest logits, W words of 32 bits.
"""

from __future__ import annotations

import math

import torch

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB
_FEW = 64  # rows with a top-k below this are drawn from their largest logits alone
_SORTED = 8192  # vocabularies up to this size are sorted for a nucleus, all rows at once
_MARGIN = 0.01  # in nats, for rounding


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


def filter_logits(
    logits_RV: torch.Tensor, top_k_R: torch.Tensor, top_p_R: torch.Tensor, min_p_R: torch.Tensor | None = None
) -> torch.Tensor:
    """-inf for logits below min-p (0 = off), then outside top-k (0 = off), then outside the top-p nucleus (1 = off).

    min-p is a share of the largest probability; a nucleus is one of what the filters before it leave.
    """
    if min_p_R is not None:
        least_R1 = logits_RV.amax(-1, keepdim=True) + min_p_R.log()[:, None]
        logits_RV = logits_RV.masked_fill(logits_RV < least_R1, -math.inf)
    if not bool(((top_k_R > 0) | (top_p_R < 1)).any()):
        return logits_RV
    ordered, order = logits_RV.sort(dim=-1, descending=True, stable=True)
    ordered = _nucleus(ordered, torch.where(top_k_R > 0, top_k_R, logits_RV.shape[-1]), top_p_R)
    return torch.full_like(logits_RV, -math.inf).scatter(-1, order, ordered)


def _nucleus(ordered_RV: torch.Tensor, top_k_R: torch.Tensor, top_p_R: torch.Tensor) -> torch.Tensor:
    """Top-k, then top-p, of rows in descending order."""
    places_V = torch.arange(ordered_RV.shape[-1], device=ordered_RV.device)
    ordered_RV = ordered_RV.masked_fill(places_V >= top_k_R[:, None], -math.inf)
    probs_RV = ordered_RV.softmax(-1)
    # Off must be exactly off: a rounded cumulative sum reaches 1 before the last tokens do.
    share_R1 = torch.where(top_p_R < 1, top_p_R, math.inf)[:, None]
    return ordered_RV.masked_fill((probs_RV.cumsum(-1) - probs_RV) >= share_R1, -math.inf)


def sample(logits_RV: torch.Tensor, temperature_R: torch.Tensor, uniform_R: torch.Tensor) -> torch.Tensor:
    """Draw one token a row (int64 [R]); temperature 0 means the largest logit.

    The draw is the first token whose cumulative probability exceeds the uniform number.
    """
    hot_R = temperature_R > 0
    some_hot, all_hot = bool(hot_R.any()), bool(hot_R.all())
    if not some_hot:
        return logits_RV.argmax(-1)
    probs_RV = (logits_RV / torch.where(hot_R, temperature_R, 1.0)[:, None]).softmax(-1)
    cdf_RV = probs_RV.cumsum(-1)
    threshold_R = uniform_R.to(cdf_RV.dtype) * cdf_RV[:, -1]
    drawn_R = torch.searchsorted(cdf_RV, threshold_R[:, None], right=True).squeeze(-1)
    if bool((drawn_R == logits_RV.shape[-1]).any()):
        # Rounding made uniform * total equal the total: fall back to the last token that has probability.
        last_R = logits_RV.shape[-1] - 1 - (probs_RV > 0).flip(-1).int().argmax(-1)
        drawn_R = torch.minimum(drawn_R, last_R)
    return drawn_R if all_hot else torch.where(hot_R, drawn_R, logits_RV.argmax(-1))


def sample_filtered(
    logits_RV: torch.Tensor,
    temperature_R: torch.Tensor,
    top_k_R: torch.Tensor,
    top_p_R: torch.Tensor,
    min_p_R: torch.Tensor,
    uniform_R: torch.Tensor,
) -> torch.Tensor:
    """Draw one token a row (int64 [R]) from what the filters leave of the distribution at each row's temperature.

    Rows with a small top-k are drawn from their few largest logits, those with only a nucleus of a large vocabulary
    from the tokens that can be in it, the others from all. How a row is drawn depends on that row alone, so its token
    does not depend on its batch mates.
    """
    hot_R = temperature_R > 0
    tokens_R = torch.empty_like(top_k_R) if bool(hot_R.all()) else logits_RV.argmax(-1)
    scaled_RV = logits_RV / torch.where(hot_R, temperature_R, 1.0)[:, None]
    filters_4R = torch.stack((top_k_R.double(), top_p_R.double(), min_p_R.double(), uniform_R))
    few_R = hot_R & (top_k_R > 0) & (top_k_R < _FEW)
    rows = few_R.nonzero().flatten()
    if len(rows):
        few_RV = scaled_RV if len(rows) == len(few_R) else scaled_RV[rows]
        tokens_R[rows], unsure_R = _sample_few(few_RV, filters_4R[:, rows])
        few_R[rows] = ~unsure_R
    nucleus_R = hot_R & (top_k_R == 0) & (top_p_R < 1) & (logits_RV.shape[-1] > _SORTED)
    for row in nucleus_R.nonzero().flatten().tolist():
        tokens_R[row] = _sample_nucleus(scaled_RV[row], *filters_4R[1:, row])
    rows = (hot_R & ~few_R & ~nucleus_R).nonzero().flatten()
    if len(rows):
        top_k, top_p, min_p, uniform = filters_4R[:, rows]
        left_RV = filter_logits(scaled_RV[rows], top_k.long(), top_p.float(), min_p.float())
        tokens_R[rows] = sample(left_RV, torch.ones_like(uniform), uniform)
    return tokens_R


def _sample_nucleus(
    logits_V: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor, uniform: torch.Tensor
) -> torch.Tensor:
    """Draw one token of a nucleus without sorting the vocabulary.

    All tokens with less than (1 - p) / V together have less than 1 - p: none of them is needed to come to p.
    """
    logits_V = logits_V.masked_fill(logits_V < logits_V.max() + min_p.float().log(), -math.inf)
    total = logits_V.logsumexp(-1)
    least = total + ((1 - top_p) / len(logits_V)).log().float() - _MARGIN
    ids = (logits_V >= least).nonzero().flatten()
    ordered, order = logits_V[ids].sort(descending=True, stable=True)
    probs = (ordered - total).exp()
    kept = order[(probs.cumsum(-1) - probs) < top_p.float()].sort().values
    one = torch.ones_like(uniform)[None]
    return ids[kept[sample(logits_V[ids[kept]][None], one, uniform[None])]].squeeze(0)


def _sample_few(scaled_RV: torch.Tensor, filters_4R: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw from the few largest logits. Also says (bool [R]) where a tie at their end leaves the top-k undecided."""
    top_k_R, top_p_R, min_p_R, uniform_R = filters_4R
    few = min(_FEW, scaled_RV.shape[-1])
    values_RF, ids_RF = scaled_RV.topk(few, dim=-1)
    kth_R = values_RF.gather(-1, (top_k_R.long() - 1).clamp(max=few - 1)[:, None]).squeeze(-1)
    unsure_R = (kth_R == values_RF[:, -1]) & kth_R.isfinite() & (few < scaled_RV.shape[-1])
    ids_RF, order = ids_RF.sort(-1)
    values_RF, order = values_RF.gather(-1, order).sort(dim=-1, descending=True, stable=True)  # ties: the earlier token
    ids_RF = ids_RF.gather(-1, order)
    values_RF = values_RF.masked_fill(values_RF < values_RF[:, :1] + min_p_R.float().log()[:, None], -math.inf)
    values_RF = _nucleus(values_RF, top_k_R.long(), top_p_R.float())
    ids_RF, order = ids_RF.sort(-1)  # in the order in which a draw from the whole vocabulary goes
    drawn_R = sample(values_RF.gather(-1, order), torch.ones_like(uniform_R), uniform_R)
    return ids_RF.gather(-1, drawn_R[:, None]).squeeze(-1), unsure_R


def penalise(
    logits_RV: torch.Tensor,
    made_RV: torch.Tensor,
    prompt_RV: torch.Tensor,
    presence_R: torch.Tensor,
    frequency_R: torch.Tensor,
    repetition_R: torch.Tensor,
) -> torch.Tensor:
    """Make tokens that have occurred less likely (or more, with negative penalties).

    Args:
        made_RV: how often each token was generated. prompt_RV: which tokens the prompt has (bool).
        presence_R, frequency_R: subtracted once, and once for each time, a token was generated (OpenAI's definitions).
        repetition_R: divides positive and multiplies negative logits of tokens in prompt or generated text
            (arXiv 1909.05858), before the other two.
    """
    repetition_RV = torch.where(prompt_RV | (made_RV > 0), repetition_R[:, None], 1.0)
    logits_RV = torch.where(logits_RV > 0, logits_RV / repetition_RV, logits_RV * repetition_RV)
    return logits_RV - frequency_R[:, None] * made_RV - presence_R[:, None] * (made_RV > 0)


def allow(logits_RV: torch.Tensor, bits_RW: torch.Tensor) -> torch.Tensor:
    """Set logits to -inf where a token's bit is 0: bit t % 32 of word t // 32 (int32), or the word is missing."""
    bits_RW32 = (bits_RW[:, :, None] >> torch.arange(32, dtype=torch.int32, device=bits_RW.device)) & 1
    allowed_RV = bits_RW32.flatten(1)[:, : logits_RV.shape[-1]].bool()
    missing = logits_RV.shape[-1] - allowed_RV.shape[-1]
    return logits_RV.masked_fill(~torch.nn.functional.pad(allowed_RV, (0, missing)), -math.inf)
