"""Experts that are functions give what the loop with masks gives, and idle ones are not called."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from twofold.ops import dispatch, reference


@pytest.mark.parametrize(("tokens", "experts", "k"), [(1, 4, 2), (17, 5, 2), (6, 16, 1), (8, 3, 3)])
def test_plain_matrices_equal_the_reference_forward_and_backward(tokens: int, experts: int, k: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    x, logits = (torch.randn(tokens, n, generator=generator).requires_grad_() for n in (8, experts))
    gate_up = torch.randn(experts, 12, 8, generator=generator)
    down = torch.randn(experts, 8, 6, generator=generator)
    upstream = torch.randn(tokens, 8, generator=generator)
    called: list[int] = []

    def run(expert: int, rows: torch.Tensor) -> torch.Tensor:
        called.append(expert)
        return F.linear(reference.swiglu(F.linear(rows, gate_up[expert])), down[expert])

    results = []
    for sent in (True, False):
        _, weights_Tk, ids_Tk = reference.route(logits, k, True)
        if sent:
            out = dispatch.by_expert(x, weights_Tk, ids_Tk, experts, run)
            assert called == sorted(set(ids_Tk.flatten().tolist()))
        else:
            out = reference.moe(x, weights_Tk, ids_Tk, gate_up, down)
        results.append((out, *torch.autograd.grad(out, (x, logits), upstream)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
