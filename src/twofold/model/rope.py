"""Rotary position codes: frequencies of plain RoPE, YaRN and Llama 3, and the angles of a step's tokens.

Frequencies and angles are fp32 whatever the model computes in; the rotation itself is an op. All that is kept is H/2
frequencies a method, so memory does not grow with the length a model is stretched to; the factor comes from
``Context`` and never from ``max_position_embeddings``. Which tokens are stretched is ``AttnInputs``'s to say, and what
Dual Chunk Attention does beyond angles is an op.

Shape legend: T tokens, H head dimension.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

from twofold.model.config import Context


@dataclass(frozen=True, slots=True)
class Frequencies:
    """fp32 [H/2] inverse frequencies of tokens coded natively and of extended ones; equal where nothing is stretched.

    factor: multiplies cos and sin of extended tokens, so their attention scores by its square.
    """

    native: torch.Tensor
    extended: torch.Tensor
    factor: float


@lru_cache(maxsize=32)
def frequencies(theta: float, head_dim: int, context: Context | None, device: torch.device) -> Frequencies:
    """Both codings of a model, computed on the CPU so that every device gets the same numbers."""
    native = inverse_frequencies(theta, head_dim)
    extended, factor = native, 1.0
    if context is not None and context.method == "yarn":
        extended, factor = yarn(native, theta, context), attention_factor(context)
    elif context is not None and context.method == "llama3":
        extended = llama3(native, context)
    return Frequencies(native.to(device), extended.to(device), factor)


def inverse_frequencies(theta: float, head_dim: int) -> torch.Tensor:
    """theta^(-2i/H) for i = 0 .. H/2-1, fp32 [H/2]."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64, device="cpu").float() / head_dim
    return 1.0 / (theta**exponent)


def yarn_range(theta: float, head_dim: int, context: Context) -> tuple[int, int]:
    """First and last pair of YaRN's ramp: pairs before it keep their frequency, pairs after it are interpolated."""

    def pair(rotations: float) -> float:
        """Index of the pair that makes this many rotations within the native length."""
        return head_dim * math.log(context.native / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = math.floor(pair(context.beta_fast)), math.ceil(pair(context.beta_slow))
    return max(low, 0), min(high, head_dim - 1)


def yarn(native: torch.Tensor, theta: float, context: Context) -> torch.Tensor:
    """YaRN's inverse frequencies, fp32 [H/2] (NTK by parts, arXiv 2309.00071, section 3.2)."""
    low, high = yarn_range(theta, 2 * len(native), context)
    ramp = (torch.arange(len(native), device="cpu").float() - low) / (high - low if high != low else 1e-3)
    stretched = ramp.clamp(0, 1)
    return native / context.factor * stretched + native * (1 - stretched)


def attention_factor(context: Context) -> float:
    """What YaRN multiplies cos and sin by: the given factor, or 0.1 ln(s) + 1 (arXiv 2309.00071, section 3.4)."""
    return 0.1 * math.log(context.factor) + 1 if context.attention_factor is None else context.attention_factor


def llama3(native: torch.Tensor, context: Context) -> torch.Tensor:
    """Llama 3.1's inverse frequencies, fp32 [H/2]: long waves are divided by the factor, short ones kept, a ramp
    between them."""
    rotations = context.native * native / (2 * math.pi)
    low, high = context.low_freq_factor, context.high_freq_factor
    kept = ((rotations - low) / (high - low)).clamp(0, 1)
    return native / context.factor * (1 - kept) + native * kept


def angles(
    positions_T: torch.Tensor, inv_freq: torch.Tensor, dtype: torch.dtype, factor_T: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of every position, each angle twice (concatenated halves), [T, H] in ``dtype``.

    Args:
        inv_freq: fp32 [H/2], or [T, H/2] where tokens differ. factor_T: fp32, multiplies cos and sin.
    """
    angle = positions_T.float()[:, None] * inv_freq
    angle = torch.cat((angle, angle), dim=-1)
    cos, sin = angle.cos(), angle.sin()
    if factor_T is not None:
        cos, sin = cos * factor_T[:, None], sin * factor_T[:, None]
    return cos.to(dtype), sin.to(dtype)


def mixed_angles(
    positions_T: torch.Tensor, coding: Frequencies, extended_T: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """``angles`` of a step in which ``extended_T`` marks the tokens that are coded beyond the native length.

    The others get the very numbers that ``angles`` gives them.
    """
    inv_freq = torch.where(extended_T[:, None], coding.extended, coding.native)
    factor_T = torch.ones(len(extended_T), dtype=torch.float32, device=extended_T.device)
    return angles(positions_T, inv_freq, dtype, factor_T.masked_fill_(extended_T, coding.factor))
