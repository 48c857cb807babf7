"""Weights in 8 or 4 bits, and products with them.

For adapters to stand on: stored small, dequantised for the moment of use. int8 has one scale a row, int4 one a group of
consecutive inputs, two values a byte. Symmetric, no zero points; in 4 bits a group's value of largest magnitude maps to
-8, the longer end. The gradient flows to the inputs, never to the weights, and no dequantised weight outlives its
product.

For inference on x86: packed once for FBGEMM's kernels, int8 with activations in 8 bits, one range a token, or float16
with products in fp32. No gradient. Not here: calibration.

Shape legend: O outputs, I inputs, P stored bytes along the inputs (I, or I / 2 in 4 bits), G groups a row, T rows of
activations.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F

Kind = Literal["int8", "float16"]

_LARGEST = {8: 127, 4: 8}
_PAIR = 128  # most that two neighbours of one sign may add up to: 255 * 128 fits the 16 bits of their sum in AVX2
_ROWS = 128  # rows of activations multiplied at once: outputs stay in the processor's cache
_STEPS = 255  # of a row of activations, from its lowest value to its highest


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


@dataclass(frozen=True, slots=True)
class Packed:
    """A weight in the layout of FBGEMM's kernels. sums_O: of each row, fp32; they stand for a constant input."""

    kind: Kind
    weight: Any
    sums_O: torch.Tensor


def can_pack(weight: torch.Tensor) -> bool:
    """Whether this processor has the kernels, and the weight lies in its memory."""
    return weight.device.type == "cpu" and "fbgemm" in torch.backends.quantized.supported_engines


def pack(w_OI: torch.Tensor, kind: Kind) -> Packed:
    """Pack a weight for ``packed_linear``. Peak memory: the packed weight, and a copy of it as it is made."""
    if kind == "float16":
        packed = torch.ops.quantized.linear_prepack_fp16(w_OI.detach().float(), None)
        return Packed(kind, packed, torch.empty(0))
    values_OI, scale_O1 = quantise(w_OI.detach(), 8, w_OI.shape[-1])
    fit_pairs(values_OI)
    scale_O = scale_O1.flatten().float()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch will move this function, in a version not allowed yet
        quantised = torch._make_per_channel_quantized_tensor(
            values_OI, scale_O.double(), torch.zeros_like(scale_O, dtype=torch.int64), 0
        )
    sums_O = values_OI.sum(-1, dtype=torch.int64).float() * scale_O
    return Packed(kind, torch.ops.quantized.linear_prepack(quantised, None), sums_O)


def unpack(packed: Packed) -> torch.Tensor:
    """The weight [O, I] that ``packed_linear`` multiplies with, fp32."""
    if packed.kind == "float16":
        return torch.ops.quantized.linear_unpack_fp16(packed.weight)[0].float()
    return torch.ops.quantized.linear_unpack(packed.weight)[0].dequantize()


def fit_pairs(values_OI: torch.Tensor) -> None:
    """Lower int8 neighbours (inputs 2j and 2j + 1) of one sign, in place, until together they are at most 128.

    Processors without VNNI add the products of two neighbours in 16 bits, saturated: with activations up to 255 larger
    pairs would come out wrong, on this machine and not on the next. About one pair in a hundred is lowered.
    """
    even = values_OI.shape[-1] // 2 * 2
    pairs = values_OI[..., :even].unflatten(-1, (-1, 2)).short()
    first, second = pairs.unbind(-1)
    excess = ((first + second).abs() - _PAIR).clamp_(min=0)
    sign = (first + second).sign()
    for half, part in enumerate((first, second)):
        values_OI[..., half:even:2] = part - sign * (excess + 1 - half).div(2, rounding_mode="floor")


def packed_linear(x: torch.Tensor, packed: Packed) -> torch.Tensor:
    """x [..., I] times the transposed weight, [..., O] in the dtype of ``x``; no gradient.

    int8: each row of x is rounded to 256 steps between its lowest and highest value, whatever other rows hold, and
    multiplied in whole numbers. A single row takes torch's own rounding, whose range has 0 on a step.
    """
    x_TI = x.float().reshape(-1, x.shape[-1])
    if packed.kind == "float16":
        y_TO = torch.ops.quantized.linear_dynamic_fp16(x_TI, packed.weight)
    elif len(x_TI) == 1:
        y_TO = torch.ops.quantized.linear_dynamic(x_TI, packed.weight)
    else:
        y_TO = _by_rows(x_TI, packed)
    return y_TO.to(x.dtype).view(*x.shape[:-1], -1)


def _by_rows(x_TI: torch.Tensor, packed: Packed) -> torch.Tensor:
    """x = low + span * unit, row by row, with unit in [0, 1]; so W x = low * (sums of W) + span * W unit."""
    y_TO = x_TI.new_empty(len(x_TI), len(packed.sums_O))
    low_T1, high_T1 = x_TI.aminmax(dim=-1, keepdim=True)
    span_T1 = (high_T1 - low_T1).clamp_(min=torch.finfo(torch.float32).tiny)
    for x, low, span, y in zip(*(t.split(_ROWS) for t in (x_TI, low_T1, span_T1, y_TO)), strict=True):
        unit = (x - low).div_(span)
        product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(unit, 1 / _STEPS, 0, packed.weight)
        torch.mul(product, span, out=y).addcmul_(low, packed.sums_O)
    return y_TO
