"""RMSNorm, RoPE and fused QK-norm + RoPE with hand-written backward passes.

Small models on a CPU are bound by element-wise passes over memory, and autograd through the plain formula makes about
three times as many as needed. Same signatures and results as ``ops.reference``; statistics in fp32.

Shape legend: T tokens, D width, M heads (queries and keys together), H head dimension.
"""

from __future__ import annotations

from typing import Any

import torch


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        normed, inverse = _normalise(x, eps)
        ctx.save_for_backward(normed, inverse, weight)
        return normed * weight

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        normed, inverse, weight = ctx.saved_tensors
        grad = grads[0]
        grad_weight = (grad * normed).flatten(0, -2).sum(0) if weight.dim() == 1 else (grad * normed).sum(0)
        return _norm_backward(grad * weight, normed, inverse), grad_weight, None


class _QKNormRope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qk: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float
    ) -> torch.Tensor:
        normed, inverse = _normalise(qk, eps)
        ctx.save_for_backward(normed, inverse, weight, cos, sin)
        return _rotate(normed * weight, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        normed, inverse, weight, cos, sin = ctx.saved_tensors
        grad = _rotate(grads[0], cos, -sin)  # a rotation's transpose is the rotation back
        grad_weight = (grad * normed).sum(0)
        return _norm_backward(grad.mul_(weight), normed, inverse), grad_weight, None, None, None


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _rotate(grads[0], cos, -sin), None, None


def _normalise(x: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """x over its root mean square, and one over that (fp32)."""
    x32 = x.float()
    inverse = torch.linalg.vecdot(x32, x32).div_(x.shape[-1]).add_(eps).rsqrt_().unsqueeze(-1)
    return (x32 * inverse).to(x.dtype), inverse


def _norm_backward(grad: torch.Tensor, normed: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    projection = torch.linalg.vecdot(grad, normed).div_(normed.shape[-1]).unsqueeze(-1)
    return torch.addcmul(grad, normed, projection, value=-1).mul_(inverse.to(grad.dtype))


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    out = torch.empty_like(x)
    cos, sin = cos[:, None, :half], sin[:, None, :half]
    first, second = x[..., :half], x[..., half:]
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out[..., half:]).addcmul_(first, sin)
    return out


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm over the last axis; ``weight`` is [D]. Equals ``reference.rms_norm``."""
    if not torch.is_grad_enabled():  # the same numbers without autograd's own costs
        return _normalise(x, eps)[0] * weight
    return _RMSNorm.apply(x, weight, eps)


def rope(x_TMH: torch.Tensor, cos_TH: torch.Tensor, sin_TH: torch.Tensor) -> torch.Tensor:
    """RoPE of heads that have no norm. Equals ``reference.rope``; no gradient for the angles."""
    if not torch.is_grad_enabled():
        return _rotate(x_TMH, cos_TH, sin_TH)
    return _Rope.apply(x_TMH, cos_TH, sin_TH)


def qk_norm_rope(
    qk_TMH: torch.Tensor, weight_MH: torch.Tensor, cos_TH: torch.Tensor, sin_TH: torch.Tensor, eps: float
) -> torch.Tensor:
    """Per-head RMSNorm, then RoPE. Equals ``reference.qk_norm_rope``; no gradient for the angles."""
    if not torch.is_grad_enabled():
        return _rotate(_normalise(qk_TMH, eps)[0] * weight_MH, cos_TH, sin_TH)
    return _QKNormRope.apply(qk_TMH, weight_MH, cos_TH, sin_TH, eps)
