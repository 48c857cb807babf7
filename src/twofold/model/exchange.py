"""What tensor, expert and context parallel ranks exchange inside a forward pass, each with its backward pass.

Not here: gradients of weights, which FSDP or ``parallel.Parallel`` add up.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from twofold.base.dist import Ranks


class _Copied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, ranks: Ranks) -> torch.Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return ctx.ranks.sum(grads[0].contiguous()), None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, ranks: Ranks) -> torch.Tensor:
        return ranks.sum(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return grads[0], None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, sent: list[int], received: list[int], ranks: Ranks) -> torch.Tensor:
        ctx.sent, ctx.received, ctx.ranks = sent, received, ranks
        return _exchange(x, sent, received, ranks)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _exchange(grads[0], ctx.received, ctx.sent, ctx.ranks), None, None, None


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rows: int, ranks: Ranks) -> torch.Tensor:
        ctx.own, ctx.ranks = len(x), ranks
        padded = x.new_zeros(rows, *x.shape[1:])
        padded[: len(x)] = x
        out = x.new_empty(ranks.size * rows, *x.shape[1:])
        dist.all_gather_into_tensor(out, padded, group=ranks.group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad = grads[0].contiguous()
        out = grad.new_empty(len(grad) // ctx.ranks.size, *grad.shape[1:])
        dist.reduce_scatter_tensor(out, grad, group=ctx.ranks.group)
        return out[: ctx.own], None, None


def copied(x: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """``x``, the same on all ranks, of which each uses it for its part of the work: gradients are summed."""
    return _Copied.apply(x, ranks)


def summed(x: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """The sum of all ranks' ``x``, the same on each; every rank's part gets the whole gradient."""
    return _Summed.apply(x, ranks)


def all_to_all(x: torch.Tensor, sent: list[int], received: list[int], ranks: Ranks) -> torch.Tensor:
    """Rows of ``x`` to all ranks, the first ``sent[0]`` to rank 0 and so on; returns theirs in the order of ranks."""
    return _AllToAll.apply(x, sent, received, ranks)


def gathered(x: torch.Tensor, rows: int, ranks: Ranks) -> torch.Tensor:
    """All ranks' rows, each padded with zeros to ``rows``; gradients of a row are summed over the ranks."""
    return _Gathered.apply(x, rows, ranks)


def _exchange(x: torch.Tensor, sent: list[int], received: list[int], ranks: Ranks) -> torch.Tensor:
    out = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), received, sent, group=ranks.group)
    return out
