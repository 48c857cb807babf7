"""Muon for matrices: momentum, then orthogonalisation by Newton-Schulz iterations, batched over equal shapes.

torch.optim.Muon exists, but it orthogonalises one matrix at a time in bf16 (about 150 times slower than fp32 on CPUs
without fast bf16) and cannot see that one stored parameter holds several matrices (q, k and v; gate and up; experts).
Momentum stays sharded as its parameter is. Orthogonalisation needs whole matrices: where a matrix is cut, every rank
gathers the update, does the same work and keeps its part; experts that lie whole on a rank are not gathered.
Reference: Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch

from twofold.base.dist import is_sharded, local, piece, whole_of

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


@dataclass(frozen=True)
class MatrixParameter:
    """A parameter and the row counts of the matrices stacked in it; 3-D parameters hold one stack per expert.

    order: where rows are stored in another order, that order (``stored = whole[order]``).
    """

    parameter: torch.nn.Parameter
    split_sizes: tuple[int, ...] = ()
    order: torch.Tensor | None = None

    @property
    def cut(self) -> bool:
        """Whether some matrix lies on several ranks."""
        if not is_sharded(self.parameter):
            return False
        placements = cast(Any, self.parameter).placements
        cuts = [placement for placement in placements if not placement.is_replicate()]
        sharded = {getattr(placement, "dim", 0) for placement in cuts}  # FSDP over tensor ranks has a class of its own
        return bool(sharded) and (self.parameter.dim() < 3 or sharded != {0})


@torch.no_grad()
def orthogonalise(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Approximate U V^T of each matrix [B, rows, cols] by quintic Newton-Schulz steps (singular values ~0.7-1.2)."""
    a, b, c = _COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum + orthogonalised updates, scaled by sqrt(max(1, rows / cols)).

    Args:
        matrices: parameters with their inner structure. lr: step length in units of orthogonal matrices.
    """

    def __init__(
        self, matrices: Iterable[MatrixParameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        self._matrices = list(matrices)
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__([m.parameter for m in self._matrices], defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Apply one update to every parameter that has a gradient."""
        group = self.param_groups[0]
        by_shape: dict[tuple[int, ...], list[tuple[torch.Tensor, torch.Tensor]]] = defaultdict(list)
        gathered: list[tuple[MatrixParameter, torch.Tensor]] = []  # whole updates, of which a rank keeps its part
        for matrix in self._matrices:
            parameter, grad = matrix.parameter, matrix.parameter.grad
            if grad is None:
                continue
            state: dict[str, Any] = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            momentum, grad, stored = local(state["momentum"]), local(grad), local(parameter.data)
            momentum.lerp_(grad, 1 - group["momentum"])
            update = grad.lerp(momentum, group["momentum"])
            stored.mul_(1 - group["lr"] * group["weight_decay"])
            if matrix.cut:
                update = _gathered(update, matrix)
                stored = torch.zeros_like(update)
                gathered.append((matrix, stored))
            for part, target in zip(_parts(update, matrix), _parts(stored, matrix), strict=True):
                by_shape[tuple(part.shape[-2:])].append((part, target))
        for (rows, cols), pairs in by_shape.items():
            stacked = torch.cat([part for part, _ in pairs])
            updates = orthogonalise(stacked).mul_(-group["lr"] * max(1.0, rows / cols) ** 0.5)
            for (_, target), done in zip(pairs, updates.split([len(p) for p, _ in pairs]), strict=True):
                target.add_(done)
        for matrix, full in gathered:
            full = full if matrix.order is None else full[matrix.order]
            local(matrix.parameter.data).add_(piece(full, matrix.parameter))


def _gathered(update: torch.Tensor, matrix: MatrixParameter) -> torch.Tensor:
    """The whole update, rows in the order of ``split_sizes``; every rank must ask."""
    full = whole_of(update, matrix.parameter)
    return full if matrix.order is None else full[matrix.order.argsort()]


def _parts(tensor: torch.Tensor, matrix: MatrixParameter) -> list[torch.Tensor]:
    """Views [B, rows, cols] of the separate matrices inside one stored parameter."""
    stacked = tensor if tensor.dim() == 3 else tensor[None]
    return list(stacked.split(matrix.split_sizes, dim=1)) if matrix.split_sizes else [stacked]
