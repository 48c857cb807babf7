"""Sorted mixture of experts against the loop with masks; routing rules."""

from __future__ import annotations

import pytest
import torch

from twofold.ops import moe, reference


def weights(experts: int, width: int = 8, inner: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(experts)
    gate_up = torch.randn(experts, 2 * inner, width, generator=generator).requires_grad_()
    return gate_up, torch.randn(experts, width, inner, generator=generator).requires_grad_()


@pytest.mark.parametrize(("tokens", "experts", "k"), [(1, 4, 2), (17, 5, 2), (6, 16, 1), (8, 3, 3)])
def test_moe_equals_the_reference_forward_and_backward(tokens: int, experts: int, k: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, 8, generator=generator).requires_grad_()
    logits = torch.randn(tokens, experts, generator=generator).requires_grad_()
    gate_up, down = weights(experts)
    upstream = torch.randn(tokens, 8, generator=generator)
    inputs = [x, logits, gate_up, down]
    results = []
    for function in (moe.moe, reference.moe):
        _, weights_Tk, ids_Tk = reference.route(logits, k, True)
        out = function(x, weights_Tk, ids_Tk, gate_up, down)
        results.append((out, *torch.autograd.grad(out, inputs, upstream)))
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-4)


def test_experts_without_tokens_have_a_zero_gradient_and_do_no_harm() -> None:
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    gate_up, down = weights(6)
    ids = torch.tensor([[1, 4]] * 5)
    shares = torch.full((5, 2), 0.5)
    out = moe.moe(x, shares, ids, gate_up, down)
    torch.testing.assert_close(out, reference.moe(x, shares, ids, gate_up, down), atol=1e-5, rtol=1e-5)
    out.sum().backward()
    assert gate_up.grad is not None and down.grad is not None
    used = gate_up.grad.abs().sum((1, 2)) > 0
    assert used.tolist() == [False, True, False, False, True, False]
    assert torch.equal(down.grad.abs().sum((1, 2)) > 0, used)


def test_route_applies_one_softmax_and_renormalises_on_request() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    probs, kept, ids = reference.route(logits, 2, True)
    torch.testing.assert_close(probs, logits.softmax(-1))
    assert ids.tolist() == [[0, 1]]
    torch.testing.assert_close(kept, torch.tensor([[2.0, 1.0]]).softmax(-1))
    _, raw, _ = reference.route(logits, 2, False)
    torch.testing.assert_close(raw, logits.softmax(-1)[:, :2])


def test_load_balancing_loss_is_one_at_balance_and_grows_with_imbalance() -> None:
    even = torch.full((4,), 0.25)
    assert float(reference.load_balancing_loss(even, even)) == pytest.approx(1.0)
    all_on_one = torch.tensor([1.0, 0, 0, 0])
    assert float(reference.load_balancing_loss(all_on_one, all_on_one)) == pytest.approx(4.0)
