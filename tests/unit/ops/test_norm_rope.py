"""Hand-written backward passes of RMSNorm and QK-norm + RoPE against autograd through the reference."""

from __future__ import annotations

import pytest
import torch

from twofold.model import rope
from twofold.ops import norm_rope, reference

EPS = 1e-6


def check(fast: torch.Tensor, slow: torch.Tensor, inputs: list[torch.Tensor], atol: float) -> None:
    torch.testing.assert_close(fast, slow, atol=atol, rtol=1e-5)
    upstream = torch.randn(fast.shape, dtype=fast.dtype, generator=torch.Generator().manual_seed(7))
    grads = [torch.autograd.grad(out, inputs, upstream) for out in (fast, slow)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=10 * atol, rtol=1e-4)


@pytest.mark.parametrize("shape", [(1, 8), (11, 16), (3, 4, 8)])
def test_rms_norm_equals_the_reference(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(shape, generator=generator)).requires_grad_()
    weight = torch.rand(shape[-1], generator=generator).add(0.5).requires_grad_()
    check(norm_rope.rms_norm(x, weight, EPS), reference.rms_norm(x, weight, EPS), [x, weight], 1e-6)


def test_rms_norm_of_zeros_is_zero_and_finite() -> None:
    x = torch.zeros(2, 8, requires_grad=True)
    out = norm_rope.rms_norm(x, torch.ones(8), EPS)
    out.sum().backward()
    assert torch.equal(out, torch.zeros(2, 8)) and x.grad is not None and torch.isfinite(x.grad).all()


def test_rms_norm_takes_statistics_in_fp32() -> None:
    x = torch.full((1, 64), 300.0, dtype=torch.float16)  # the square overflows fp16
    out = norm_rope.rms_norm(x, torch.ones(64, dtype=torch.float16), EPS)
    assert out.dtype == torch.float16
    torch.testing.assert_close(out, torch.ones(1, 64, dtype=torch.float16), atol=1e-3, rtol=0)


def test_qk_norm_rope_equals_the_reference() -> None:
    generator = torch.Generator().manual_seed(2)
    qk = torch.randn(9, 6, 8, generator=generator).requires_grad_()
    weight = torch.rand(6, 8, generator=generator).add(0.5).requires_grad_()
    positions = torch.tensor([0, 1, 2, 3, 0, 1, 100, 7, 1000])
    cos, sin = rope.angles(positions, rope.inverse_frequencies(1e4, 8), torch.float32)
    fast = norm_rope.qk_norm_rope(qk, weight, cos, sin, EPS)
    check(fast, reference.qk_norm_rope(qk, weight, cos, sin, EPS), [qk, weight], 1e-6)


def test_rope_keeps_lengths_and_depends_on_distance_only() -> None:
    inverse = rope.inverse_frequencies(1e4, 8)
    q, k = torch.randn(2, 1, 1, 8, generator=torch.Generator().manual_seed(4)).unbind()

    def rotated(x: torch.Tensor, position: int) -> torch.Tensor:
        return reference.rope(x, *rope.angles(torch.tensor([position]), inverse, torch.float32))

    torch.testing.assert_close(rotated(q, 57).norm(), q.norm())
    near, far = (rotated(q, p + 3).flatten() @ rotated(k, p).flatten() for p in (0, 40))
    torch.testing.assert_close(near, far, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rotated(q, 0), q)


def test_rope_without_norm_equals_the_reference_scaled_or_not() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(4, 9, 8, generator=generator).requires_grad_()
    positions = torch.tensor([0, 1, 100, 7])
    cos, sin = rope.angles(positions, rope.inverse_frequencies(1e4, 8), torch.float32, torch.tensor([1, 1.3, 1, 0.9]))
    qk = x[:, :6]  # not contiguous, as the projection's slice is
    check(norm_rope.rope(qk, cos, sin), reference.rope(qk, cos, sin), [x], 1e-6)


def test_rope_at_equals_rope_and_rotations_add_up() -> None:
    x, inverse = torch.randn(5, 2, 8, generator=torch.Generator().manual_seed(1)), rope.inverse_frequencies(1e4, 8)
    first, second = torch.tensor([0, 3, 50, 7, 1]), torch.tensor([4, 4, 0, 1, 9])
    assert torch.equal(
        reference.rope_at(x, first, inverse), reference.rope(x, *rope.angles(first, inverse, torch.float32))
    )
    twice = reference.rope_at(reference.rope_at(x, first, inverse), second, inverse)
    torch.testing.assert_close(twice, reference.rope_at(x, first + second, inverse), atol=1e-5, rtol=1e-5)
