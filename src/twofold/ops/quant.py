"""Weights in 8 or 4 bits, and products with them: stored small, dequantised for the moment of use.

int8 has one scale a row, int4 one a group of consecutive inputs, two values a byte. Symmetric, no zero points; in 4
bits a group's value of largest magnitude maps to -8, the longer end. The gradient flows to the inputs, never to the
weights, and no dequantised weight outlives its product. Not here: activations in low precision, calibration.

Shape legend: O outputs, I inputs, P stored bytes along the inputs (I, or I / 2 in 4 bits), G groups a row.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

_LARGEST = {8: 127, 4: 8}


def quantise(w_OI: torch.Tensor, bits: int, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a weight to ``bits`` bits (8 or 4), each ``group`` inputs sharing a scale; ``group`` divides I.

    Returns:
        (values [..., O, P], int8, or uint8 with an even input in the low half of a byte; scales [..., O, G] fp16).
        Rounding uses the fp16 scale, so its own rounding is made up for. Error per value: at most half a scale, but
        up to one scale at the end of the 4-bit range opposite to the largest value.
    """
    grouped = w_OI.float().unflatten(-1, (-1, group))
    extreme = grouped.gather(-1, grouped.abs().argmax(-1, keepdim=True))
    if bits == 8:
        extreme = extreme.abs()
    scale = (extreme / (_LARGEST[bits] if bits == 8 else -_LARGEST[bits])).half()
    step = scale.float()
    rounded = torch.where(step == 0, 0.0, grouped / step).round()
    low, high = (-127, 127) if bits == 8 else (-8, 7)
    q_OI = rounded.clamp_(low, high).flatten(-2)
    if bits == 8:
        return q_OI.to(torch.int8), scale.squeeze(-1)
    nibbles = (q_OI + 8).to(torch.uint8)
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4), scale.squeeze(-1)


def dequantise(values: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The weight [..., O, I] in ``dtype``; products with the scale are fp32. uint8 ``values`` hold 4 bits each."""
    if values.dtype == torch.uint8:
        values = torch.stack((values & 15, values >> 4), -1).flatten(-2).to(torch.int8) - 8
    grouped = values.unflatten(-1, (scale.shape[-1], -1))
    return (grouped * scale.float()[..., None]).flatten(-2).to(dtype)


class _QuantLinear(torch.autograd.Function):
    """x W^T that keeps W's bytes for the backward pass and dequantises them again there."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(values, scale)
        return F.linear(x, dequantise(values, scale, x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        values, scale = ctx.saved_tensors
        return grads[0] @ dequantise(values, scale, grads[0].dtype), None, None


def quant_linear(x: torch.Tensor, values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x [..., I] times the transposed weight, [..., O] in the dtype of ``x``."""
    return _QuantLinear.apply(x, values, scale)
