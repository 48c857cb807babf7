"""Sorted mixture of experts, by every route, against the loop with masks; routing rules."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twofold.ops import moe, reference
from twofold.ops.blas import Product, numpy_product, torch_product

ROUTES = ("grouped", "in turn", "shared out")


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Leave the number of threads as it was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def force(route: str, patch: pytest.MonkeyPatch) -> None:
    """Make ``moe.moe`` take one route whatever the size; work is shared out between two threads."""
    torch.set_num_threads(2 if route == "shared out" else 1)
    patch.setattr(moe, "_SHARED_OUT", 0 if route == "shared out" else 2**62)
    if route == "in turn":
        patch.setattr(moe, "_grouped", lambda *_: False)


def weights(experts: int, width: int = 8, inner: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(experts)
    gate_up = torch.randn(experts, 2 * inner, width, generator=generator).div_(width**0.5)
    down = torch.randn(experts, width, inner, generator=generator).div_(inner**0.5)
    return gate_up.requires_grad_(), down.requires_grad_()


def compare(tokens: int, experts: int, k: int, skew: float = 0.0, width: int = 8, inner: int = 12) -> None:
    """Values and all gradients of ``moe.moe`` against the reference. ``skew`` draws tokens to the first experts."""
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, width, generator=generator).requires_grad_()
    logits = torch.randn(tokens, experts, generator=generator)
    logits = (logits - skew * torch.arange(experts)).requires_grad_()
    gate_up, down = weights(experts, width, inner)
    upstream = torch.randn(tokens, width, generator=generator)
    inputs = [x, logits, gate_up, down]
    results = []
    for function in (moe.moe, reference.moe):
        _, weights_Tk, ids_Tk = reference.route(logits, k, True)
        out = function(x, weights_Tk, ids_Tk, gate_up, down)
        results.append((out, *torch.autograd.grad(out, inputs, upstream)))
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("route", ROUTES)
@settings(max_examples=15)
@given(
    tokens=st.integers(1, 300),
    experts=st.sampled_from((2, 3, 8, 17, 64, 128)),
    k=st.integers(1, 8),
    skew=st.sampled_from((0.0, 1.0, 100.0)),  # even; some experts idle; all tokens to the first k
)
def test_moe_equals_the_reference_forward_and_backward(
    route: str, tokens: int, experts: int, k: int, skew: float
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        force(route, patch)
        compare(tokens, experts, min(k, experts), skew)


@pytest.mark.parametrize("route", ROUTES)
def test_one_token_one_expert_and_no_token(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    force(route, monkeypatch)
    compare(1, 1, 1)
    gate_up, down = weights(4)
    ids = torch.zeros(0, 2, dtype=torch.int64)
    assert moe.moe(torch.zeros(0, 8), torch.zeros(0, 2), ids, gate_up, down).shape == (0, 8)


def test_sizes_that_grouped_products_refuse_take_another_way() -> None:
    compare(17, 5, 2, width=6, inner=10)  # rows of 24 bytes, where 16 or a multiple is asked for


def test_an_expert_with_most_tokens_gets_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    force("shared out", monkeypatch)
    seen: list[tuple[int, bool, Product]] = []

    def run(group: tuple[int, int, int], product: Product) -> None:
        seen.append((group[0], threading.current_thread() is threading.main_thread(), product))

    moe._each(run, [(0, 0, 5), (1, 5, 205), (2, 205, 210)], True, numpy_product)
    assert seen[0] == (1, True, torch_product)
    assert {group[:2] for group in seen[1:]} == {(0, False), (2, False)}
    assert all(product is numpy_product for _, _, product in seen[1:])


@pytest.mark.parametrize("route", ROUTES)
def test_experts_without_tokens_have_a_zero_gradient_and_do_no_harm(
    route: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(route, monkeypatch)
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


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("frozen", [(0,), (2, 3), (0, 2), (0, 3)])
def test_what_is_frozen_gets_no_gradient(route: str, frozen: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    force(route, monkeypatch)
    grads = []
    for function in (moe.moe, reference.moe):
        inputs = [torch.ones(4, 8), torch.full((4, 1), 0.5), *(w.detach() for w in weights(3))]
        for index, tensor in enumerate(inputs):
            tensor.requires_grad_(index not in frozen)
        function(inputs[0], inputs[1], torch.tensor([[0], [2], [2], [0]]), *inputs[2:]).sum().backward()
        grads.append([tensor.grad for tensor in inputs])
    for index, (fast, slow) in enumerate(zip(*grads, strict=True)):
        assert (fast is None) == (slow is None) == (index in frozen)
        if fast is not None and slow is not None:
            torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_decoding_needs_no_graph(route: str, mode: type, monkeypatch: pytest.MonkeyPatch) -> None:
    force(route, monkeypatch)
    gate_up, down = weights(3)
    ids = torch.tensor([[0, 2], [2, 1]])
    arguments = (torch.ones(2, 8), torch.full((2, 2), 0.5), ids, gate_up, down)
    with mode():
        out = moe.moe(*arguments)
    assert not out.requires_grad
    torch.testing.assert_close(out.clone(), reference.moe(*arguments).detach(), atol=1e-5, rtol=1e-4)


def test_sharing_out_leaves_the_number_of_threads_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    force("shared out", monkeypatch)
    compare(9, 4, 2)
    counts: list[int] = []
    fresh = threading.Thread(target=lambda: counts.append(torch.get_num_threads()))
    fresh.start()
    fresh.join()
    assert [*counts, torch.get_num_threads()] == [2, 2]


def test_a_failure_in_a_thread_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    force("shared out", monkeypatch)
    gate_up, down = weights(4)
    with pytest.raises(RuntimeError, match="dtype"):
        moe.moe(torch.ones(4, 8), torch.ones(4, 1), torch.arange(4)[:, None], gate_up.double(), down.double())


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
