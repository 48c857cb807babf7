"""Experts that are not plain matrices: each token is sent to its experts, whatever those do, and the results summed.

For experts stored in few bits or carrying adapters. Same result as ``reference.moe``, which is the case of plain
matrices (``ops/moe.py`` has the fast form of that); no capacity limit and no dropped tokens.

Shape legend: T tokens, D width, E experts, k experts per token.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Expert = Callable[[int, torch.Tensor], torch.Tensor]


def by_expert(
    x_TD: torch.Tensor, weights_Tk: torch.Tensor, ids_Tk: torch.Tensor, experts: int, run: Expert
) -> torch.Tensor:
    """Weighted sum [T, D] of ``run(expert, its rows of x_TD)``; ``run`` is called only for experts that have tokens."""
    tokens, k = ids_Tk.shape
    order = ids_Tk.flatten().argsort(stable=True)
    counts = torch.bincount(ids_Tk.flatten(), minlength=experts).tolist()
    slices = x_TD.index_select(0, order.div(k, rounding_mode="floor")).split(counts)
    outputs = torch.cat([run(expert, x) for expert, x in enumerate(slices) if len(x)])
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    per_choice = outputs.index_select(0, inverse).view(tokens, k, -1)
    return (per_choice * weights_Tk[..., None]).sum(1)
