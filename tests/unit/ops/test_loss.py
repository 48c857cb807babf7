"""Log-probabilities, entropy and KL against the reference, forward and backward."""

from __future__ import annotations

import math

import pytest
import torch

from twofold.ops import loss, reference


def logits(rows: int = 7, vocabulary: int = 13, seed: int = 0) -> torch.Tensor:
    return (4 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))).requires_grad_()


def same(fast: torch.Tensor, slow: torch.Tensor, inputs: list[torch.Tensor]) -> None:
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-5)
    upstream = torch.randn(fast.shape, generator=torch.Generator().manual_seed(5))
    grads = [torch.autograd.grad(out, inputs, upstream) for out in (fast, slow)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_token_logprobs() -> None:
    x, targets = logits(), torch.tensor([0, 3, 12, 5, 5, 1, 0])
    same(loss.token_logprobs(x, targets), reference.token_logprobs(x, targets), [x])


def test_entropy_with_and_without_gradient() -> None:
    x = logits()
    same(loss.entropy_with_grad(x), reference.entropy(x), [x])
    plain = loss.entropy(x)
    assert not plain.requires_grad
    torch.testing.assert_close(plain, reference.entropy(x).detach(), atol=1e-5, rtol=1e-5)
    assert float(loss.entropy(torch.zeros(1, 8))) == pytest.approx(math.log(8), abs=1e-6)


def test_kl_divergence() -> None:
    p, q = logits(seed=1), logits(seed=2)
    same(loss.kl_divergence(p, q), reference.kl_divergence(p, q), [p, q])
    assert (loss.kl_divergence(p, q) > 0).all()
    torch.testing.assert_close(loss.kl_divergence(p, p), torch.zeros(7), atol=1e-6, rtol=0)


def test_head_logits_are_fp32_whatever_the_weights_are() -> None:
    hidden, head = torch.randn(3, 4, dtype=torch.bfloat16), torch.randn(9, 4, dtype=torch.bfloat16)
    out = loss.head_logits(hidden, head)
    assert out.dtype == torch.float32 and out.shape == (3, 9)
