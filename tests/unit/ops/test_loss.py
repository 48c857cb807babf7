"""Log-probabilities, entropy and KL against the reference, forward and backward."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

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


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_linear_logprobs_in_chunks(chunk: int) -> None:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(7, 5, generator=generator, requires_grad=True)
    head = torch.randn(13, 5, generator=generator, requires_grad=True)
    targets = torch.tensor([0, 3, 12, 5, 5, 1, 0])
    logp, hits = loss.linear_logprobs(hidden, head, targets, chunk)
    logits = loss.head_logits(hidden, head)
    same(logp, reference.token_logprobs(logits, targets), [hidden, head])
    assert torch.equal(hits, logits.argmax(-1) == targets) and not hits.requires_grad


def test_linear_logprobs_never_hold_all_logits() -> None:
    rows, vocabulary, largest = 512, 4096, 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return out

    hidden, head = torch.randn(rows, 8, requires_grad=True), torch.randn(vocabulary, 8, requires_grad=True)
    with Watch():
        loss.linear_logprobs(hidden, head, torch.zeros(rows, dtype=torch.int64), 32)[0].sum().backward()
    assert largest == 32 * vocabulary
