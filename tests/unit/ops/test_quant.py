"""Weights in few bits: error bounds, packing, and products against the plain twin, forward and backward."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from twofold.ops import quant, reference

CASES = [(8, 64), (4, 32), (4, 64), (4, 128)]


def weight(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


@pytest.mark.parametrize(("bits", "group"), CASES)
def test_products_equal_the_reference_forward_and_backward(bits: int, group: int) -> None:
    values, scale = quant.quantise(weight(24, 2 * group), bits, 2 * group if bits == 8 else group)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(7, 2 * group, generator=generator).requires_grad_()
    upstream = torch.randn(7, 24, generator=generator)
    results = []
    for function in (quant.quant_linear, reference.quant_linear):
        out = function(x, values, scale)
        results.append((out, *torch.autograd.grad(out, x, upstream)))
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("bits", "group"), CASES)
def test_sizes_and_error_bounds(bits: int, group: int) -> None:
    w = weight(16, 256)
    values, scale = quant.quantise(w, bits, 256 if bits == 8 else group)
    assert values.nbytes == w.numel() * bits // 8
    assert scale.dtype == torch.float16 and scale.shape == (16, 1 if bits == 8 else 256 // group)
    step = scale.float().abs().repeat_interleave(256 // scale.shape[-1], -1)
    error = (quant.dequantise(values, scale, torch.float32) - w).abs()
    assert bool((error <= step * (0.51 if bits == 8 else 1.01)).all())
    inside = (w / step).abs() < (126 if bits == 8 else 7)
    assert bool((error <= 0.501 * step)[inside].all()), "only the end of the range may be clipped"


@given(st.lists(st.integers(-8, 7), min_size=32, max_size=32), st.sampled_from([2.0**-20, 2.0**-6, 1.0, 64.0]))
def test_values_on_the_grid_survive(grid: list[int], step: float) -> None:
    w = torch.tensor(grid, dtype=torch.float32)[None]
    w[0, 0] = -8
    for bits in (4, 8):
        exact = w * step * (1 if bits == 4 else 127 / 8)
        values, scale = quant.quantise(exact, bits, 32)
        back = quant.dequantise(values, scale, torch.float32)
        assert torch.allclose(back, exact, rtol=1e-3, atol=0) if bits == 4 else (back - exact).abs().max() <= step


def test_a_group_of_zeros_stays_zero_and_its_neighbours_do_not() -> None:
    w = weight(4, 64)
    w[1, :32] = 0
    for bits, group in ((4, 32), (8, 64)):
        back = quant.dequantise(*quant.quantise(w, bits, group), torch.float32)
        assert bool(torch.isfinite(back).all()) and bool((back[1, :32] == 0).all())
        assert all(float(row.abs().max()) > 0 for row in back)


def test_the_dequantised_weight_is_not_kept_for_the_backward_pass() -> None:
    values, scale = quant.quantise(weight(8, 64), 4, 32)
    x = torch.randn(3, 64).requires_grad_()
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        quant.quant_linear(x, values, scale)
    assert sorted(t.data_ptr() for t in kept) == sorted([values.data_ptr(), scale.data_ptr()])


def test_bf16_activations() -> None:
    values, scale = quant.quantise(weight(8, 64), 8, 64)
    x = torch.randn(3, 64)
    out = quant.quant_linear(x.bfloat16(), values, scale)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), quant.quant_linear(x, values, scale), atol=2e-2, rtol=2e-2)
