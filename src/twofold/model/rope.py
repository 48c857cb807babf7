"""Rotary position angles. Inverse frequencies and angles in fp32; the rotation itself is an op.

Not here yet: scaling beyond the native length.
Shape legend: T tokens, H head dimension.
"""

from __future__ import annotations

import torch


def inverse_frequencies(theta: float, head_dim: int) -> torch.Tensor:
    """theta^(-2i/H) for i = 0 .. H/2-1, fp32 [H/2]."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    return 1.0 / (theta**exponent)


def angles(positions_T: torch.Tensor, inv_freq: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of every position, each angle twice (concatenated halves), [T, H] in ``dtype``."""
    angle = positions_T.float()[:, None] * inv_freq[None]
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos().to(dtype), angle.sin().to(dtype)
