"""Weights in 8 or 4 bits, and products with them.

For adapters to stand on: stored small, dequantised for the moment of use. int8 has one scale a row, int4 one a group of
consecutive inputs, two values a byte. Symmetric, no zero points; in 4 bits a group's value of largest magnitude maps to
-8, the longer end. The gradient flows to the inputs, never to the weights, and no dequantised weight outlives its
product.

For inference on x86, packed once: float32 for oneDNN's kernels, on few rows up to three times as fast as plain ones;
float16 with products in fp32, and int8 with each row of activations rounded to 8 bits, for FBGEMM's. No gradient.

Shape legend: O outputs, I inputs, P stored bytes along the inputs (I, or I / 2 in 4 bits), G groups of inputs, T rows
of activations.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F

Kind = Literal["int8", "float16", "float32"]

_LARGEST = {8: 127, 4: 8}
_PAIR = 128  # most that two neighbours of one sign may add up to: 255 * 128 fits the 16 bits of their sum in AVX2
_ENDS = (127, 108, 92, 64)  # what a row's largest weight may become; at 64 no pair is too large
_STEPS = 255  # of a row of activations, from its lowest value to its highest
MOST_ROWS = 128  # of activations multiplied at once: outputs stay in the processor's cache
_BLOCK = 1 << 17  # weights rounded at once
_FEW = 8  # rows of activations that oneDNN's layout is chosen for; it serves other numbers as well

_int8_product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32


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
    """A weight in the layout of a library's kernels: for each group of inputs torch's opaque object.

    sums_GO: int8 only, of each row of each group, fp32; they stand for an input that is constant.
    """

    kind: Kind
    parts: tuple[Any, ...]
    sums_GO: torch.Tensor


def can_pack(device: torch.device | str) -> bool:
    """Whether there are kernels for weights on ``device``: on x86 processors."""
    here = torch.backends.mkldnn.is_available() and "fbgemm" in torch.backends.quantized.supported_engines
    return torch.device(device).type == "cpu" and here


@torch.no_grad()
def pack(w_OI: torch.Tensor, kind: Kind, groups: int = 1) -> Packed:
    """Pack a weight for ``packed_linear``. Memory peaks at the packed weight and one copy of it.

    groups: int8 only, of inputs, each with scales of its own; their number divides I.
    """
    if kind == "float32":
        dense = w_OI.detach().float().contiguous()
        return Packed(kind, (torch.ops.mkldnn._reorder_linear_weight(dense, _FEW),), torch.empty(0))
    if kind == "float16":
        return Packed(kind, (torch.ops.quantized.linear_prepack_fp16(w_OI.detach().float(), None),), torch.empty(0))
    parts, sums = [], []
    for w in w_OI.detach().chunk(groups, dim=-1):
        values_OI, scale_O = round_int8(w)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # deprecated in torch 2.13 without another way to pack
            zero_O = torch.zeros_like(scale_O, dtype=torch.int64)
            quantised = torch._make_per_channel_quantized_tensor(values_OI, scale_O.double(), zero_O, 0)
        parts.append(torch.ops.quantized.linear_prepack(quantised, None))
        sums.append(values_OI.sum(-1, dtype=torch.int32) * scale_O)
    return Packed(kind, tuple(parts), torch.stack(sums))


def unpack(packed: Packed) -> torch.Tensor:
    """The weight [O, I] that ``packed_linear`` multiplies with, fp32."""
    if packed.kind == "float32":
        weight: torch.Tensor = packed.parts[0].to_dense()
        return weight
    if packed.kind == "float16":
        return torch.ops.quantized.linear_unpack_fp16(packed.parts[0])[0].float()
    return torch.cat([torch.ops.quantized.linear_unpack(part)[0].dequantize() for part in packed.parts], dim=-1)


def round_int8(w_OI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 values [O, I] and fp32 scales [O] such that no product with activations overflows.

    Processors without VNNI add the products of two neighbours (inputs 2j and 2j + 1) in 16 bits and cut off what is
    beyond: with activations up to 255, pairs of one sign that add up to more than 128 would come out wrong on one
    machine and right on the next. Such pairs are lowered here. A row takes the scale that costs the smallest error.
    """
    values_OI = torch.empty(w_OI.shape, dtype=torch.int8)
    scale_O = torch.empty(len(w_OI))
    step = max(1, _BLOCK // w_OI.shape[-1])
    for w, values, scale in zip(w_OI.split(step), values_OI.split(step), scale_O.split(step), strict=True):
        w = w.float()
        extreme = w.abs().amax(-1).clamp_(min=torch.finfo(torch.float32).tiny)
        least = torch.full_like(extreme, torch.inf)
        for end in _ENDS:
            rounded = _fit_pairs((w / (extreme / end)[:, None]).round_())
            error = torch.linalg.vector_norm(rounded * (extreme / end)[:, None] - w, dim=-1)
            better = error < least
            values[better], scale[better] = rounded[better].to(torch.int8), extreme[better] / end
            least = torch.minimum(least, error)
    return values_OI, scale_O


def _fit_pairs(values_OI: torch.Tensor) -> torch.Tensor:
    """Neighbours of one sign lowered, each by half of what is too much, until together they are at most 128."""
    even = values_OI.shape[-1] // 2 * 2
    first, second = values_OI[:, 0:even:2], values_OI[:, 1:even:2]
    together = first + second
    excess = together - together.clamp(-_PAIR, _PAIR)
    half = (excess / 2).trunc_()
    first -= excess - half
    second -= half
    return values_OI


def packed_linear(x: torch.Tensor, packed: Packed) -> torch.Tensor:
    """x [..., I] times the transposed weight, [..., O] in the dtype of ``x``; no gradient.

    int8: every group of a row of x is rounded to 256 steps between its lowest and highest value, whatever other rows
    hold, and multiplied in whole numbers. A single row takes torch's own rounding, whose range has 0 on a step.
    """
    x_TI = x.float().reshape(-1, x.shape[-1])
    if packed.kind == "float32":
        y_TO = torch.ops.mkldnn._linear_pointwise(x_TI, packed.parts[0], None, "none", [], "")
    elif packed.kind == "float16":
        y_TO = torch.ops.quantized.linear_dynamic_fp16(x_TI, packed.parts[0])
    elif x_TI.shape[0] == 1:
        pairs = zip(x_TI.chunk(len(packed.parts), dim=-1), packed.parts, strict=True)
        y_TO = functools.reduce(torch.Tensor.add_, (torch.ops.quantized.linear_dynamic(*pair) for pair in pairs))
    elif x_TI.shape[0] <= MOST_ROWS:
        y_TO = _int8_rows(x_TI, packed)
    else:
        y_TO = x_TI.new_empty(x_TI.shape[0], packed.sums_GO.shape[-1])
        for rows_TI, out_TO in zip(x_TI.split(MOST_ROWS), y_TO.split(MOST_ROWS), strict=True):
            _int8_rows(rows_TI, packed, out_TO)
    return y_TO.to(x.dtype).view(*x.shape[:-1], -1)


def _int8_rows(x_TI: torch.Tensor, packed: Packed, out_TO: torch.Tensor | None = None) -> torch.Tensor:
    """x = low + span * unit in every group, unit in [0, 1]; so W x = low * (sums of W) + span * W unit."""
    x_TGi = x_TI.unflatten(-1, (len(packed.parts), -1))
    low_TG1 = x_TGi.amin(-1, keepdim=True)  # both at once, aminmax, takes several times as long
    span_TG1 = (x_TGi.amax(-1, keepdim=True) - low_TG1).clamp_(min=torch.finfo(torch.float32).tiny)
    unit_TGi = (x_TGi - low_TG1).div_(span_TG1)
    y_TO = torch.mm(low_TG1.squeeze(-1), packed.sums_GO, out=out_TO)
    for unit, span, part in zip(unit_TGi.unbind(1), span_TG1.unbind(1), packed.parts, strict=True):
        y_TO.addcmul_(_int8_product(unit, 1 / _STEPS, 0, part), span)
    return y_TO
