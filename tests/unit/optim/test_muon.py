"""Muon: near-orthogonal updates, and parts of a fused parameter treated as the matrices they are."""

from __future__ import annotations

import pytest
import torch

from twofold.optim.muon import MatrixParameter, Muon, orthogonalise


def matrix(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 4, 12), (2, 12, 4), (1, 1, 6)])
def test_orthogonalise_brings_singular_values_near_one_and_keeps_directions(shape: tuple[int, ...]) -> None:
    matrices = matrix(*shape) * 100
    out = orthogonalise(matrices, steps=8)
    values = torch.linalg.svdvals(out)
    assert float(values.min()) > 0.5 and float(values.max()) < 1.3
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    diagonal = left.mT @ out @ right.mT
    off = diagonal - torch.diag_embed(diagonal.diagonal(dim1=-2, dim2=-1))
    assert float(off.abs().max()) < 1e-3


def test_orthogonalise_does_not_depend_on_scale_or_batch_mates() -> None:
    a, b = matrix(2, 6, 5)
    both = orthogonalise(torch.stack((a, b)))
    torch.testing.assert_close(both[0], orthogonalise(a[None])[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(both[1], orthogonalise(1e-3 * b[None])[0], atol=1e-3, rtol=1e-3)
    assert torch.equal(orthogonalise(torch.zeros(1, 3, 3)), torch.zeros(1, 3, 3))


def run(parameters: list[torch.nn.Parameter], splits: tuple[int, ...], grads: list[list[torch.Tensor]]) -> None:
    optimizer = Muon([MatrixParameter(p, splits) for p in parameters], lr=0.1, weight_decay=0.01)
    for step in grads:
        for parameter, grad in zip(parameters, step, strict=True):
            parameter.grad = grad.clone()
        optimizer.step()


def test_muon_on_a_fused_qkv_equals_muon_on_separate_matrices() -> None:
    sizes = (8, 4, 4)
    start, steps = matrix(16, 6), [matrix(16, 6, seed=s) for s in range(1, 4)]
    fused = torch.nn.Parameter(start.clone())
    run([fused], sizes, [[grad] for grad in steps])
    separate = [torch.nn.Parameter(part.clone()) for part in start.split(sizes)]
    run(separate, (), [list(grad.split(sizes)) for grad in steps])
    torch.testing.assert_close(fused.data, torch.cat([p.data for p in separate]), atol=1e-5, rtol=1e-5)
    assert float((fused.data - start).abs().max()) > 0.05


def test_a_stack_of_experts_equals_one_parameter_an_expert() -> None:
    start, grad = matrix(3, 8, 5), matrix(3, 8, 5, seed=9)
    stack = torch.nn.Parameter(start.clone())
    run([stack], (4, 4), [[grad]])
    alone = [torch.nn.Parameter(part.clone()) for part in start]
    run(alone, (4, 4), [list(grad)])
    torch.testing.assert_close(stack.data, torch.stack([p.data for p in alone]), atol=1e-5, rtol=1e-5)


def test_tall_matrices_take_longer_steps_and_missing_gradients_are_left_alone() -> None:
    wide, tall, idle = (torch.nn.Parameter(torch.zeros(s)) for s in ((4, 16), (16, 4), (4, 4)))
    wide.grad, tall.grad = matrix(4, 16), matrix(4, 16).T.contiguous()
    Muon([MatrixParameter(p) for p in (wide, tall, idle)], lr=1.0).step()
    torch.testing.assert_close(tall.data, 2 * wide.data.T, atol=1e-5, rtol=1e-5)
    assert torch.equal(idle.data, torch.zeros(4, 4))
