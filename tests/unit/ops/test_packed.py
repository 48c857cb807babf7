"""Weights packed for the processor's kernels: each product against its definition, written out here."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
import torch.nn.functional as F

from twofold.ops import quant

pytestmark = pytest.mark.skipif(not quant.can_pack("cpu"), reason="needs an x86 processor")

OUT, IN = 48, 96


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rows", [1, 2, 7, 33, 300])
@pytest.mark.parametrize("kind", ["float32", "float16"])
def test_floats_multiply_as_their_unpacked_weight(kind: quant.Kind, rows: int) -> None:
    weight, x = normal(OUT, IN), normal(rows, IN, seed=1)
    packed = quant.pack(weight, kind)
    stored = quant.unpack(packed)
    assert torch.equal(stored, weight if kind == "float32" else weight.half().float())
    torch.testing.assert_close(quant.packed_linear(x, packed), F.linear(x, stored), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("rows", [2, 129, 300])
def test_int8_products_are_those_of_rounded_activations(rows: int, groups: int) -> None:
    weight, x = normal(OUT, IN) * 0.05, normal(rows, IN, seed=1)
    x[:, 5] *= 30  # an outlier: it takes its own group's steps only
    packed = quant.pack(weight, "int8", groups)
    rounded = torch.cat([by_definition(part) for part in x.chunk(groups, -1)], -1)
    out = quant.packed_linear(x, packed)
    expected = F.linear(rounded, quant.unpack(packed))
    wrong = ((out - expected).abs() > 2e-3).any(-1)  # a value half-way between two steps may go to either
    assert int(wrong.sum()) <= rows // 50


def by_definition(x_TI: torch.Tensor) -> torch.Tensor:
    """Each row rounded to 255 equal steps between its lowest and highest value."""
    low, high = x_TI.amin(-1, keepdim=True).double(), x_TI.amax(-1, keepdim=True).double()
    return (low + ((x_TI.double() - low) / (high - low) * 255).round() / 255 * (high - low)).float()


def test_a_row_is_multiplied_the_same_whatever_its_companions_hold() -> None:
    packed = quant.pack(normal(OUT, IN), "int8", 2)
    x = normal(40, IN, seed=1)
    alone = torch.cat([quant.packed_linear(x[i : i + 2], packed) for i in range(0, 40, 2)])
    huge = torch.cat([x[:20], 1000 * x[20:]])  # with one range for all rows, the first would round to nothing
    torch.testing.assert_close(quant.packed_linear(huge, packed)[:20], alone[:20], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("kind", get_args(quant.Kind))
def test_constant_zero_and_shaped_inputs(kind: quant.Kind) -> None:
    packed = quant.pack(normal(OUT, IN), kind)
    for value in (0.0, 3.0, -2.0):
        x = torch.full((3, IN), value)
        expected = F.linear(x, quant.unpack(packed))
        torch.testing.assert_close(quant.packed_linear(x, packed), expected, atol=1e-3, rtol=1e-3)
    x = normal(2, 3, IN, seed=2).bfloat16()
    y = quant.packed_linear(x, packed)
    assert y.shape == (2, 3, OUT) and y.dtype == torch.bfloat16


@pytest.mark.parametrize("inputs", [96, 97, 1])
def test_no_pair_of_neighbours_can_overflow_sixteen_bits(inputs: int) -> None:
    same_sign = torch.ones(4, inputs)
    same_sign[1] *= -1
    same_sign[2] = normal(1, inputs)[0].abs()
    same_sign[3] = 0
    values, scale = quant.round_int8(same_sign)
    pairs = values[:, : inputs // 2 * 2].int().unflatten(1, (-1, 2)).sum(-1)
    assert int(pairs.abs().max() if pairs.numel() else 0) <= 128  # 255 * 128 < 2^15
    error = (values * scale[:, None] - same_sign).abs().amax(-1) / same_sign.abs().amax(-1).clamp(min=1e-9)
    assert float(error[:3].max()) < 1 / 64 and torch.equal(values[3], torch.zeros(inputs, dtype=torch.int8))


def test_int8_weights_lose_little() -> None:
    weight = normal(200, 512)
    stored = quant.unpack(quant.pack(weight, "int8"))
    assert float((stored - weight).norm() / weight.norm()) < 0.02
