"""Mixture-of-experts by sorting: tokens are grouped by expert, each expert is one matrix product over its slice.

Same result as ``reference.moe`` (the loop with masks), same code for training and decoding; no capacity limit and no
dropped tokens. Routing itself is ``reference.route``: it is small.

Shape legend: T tokens, D width, E experts, k experts per token, I expert width, J = 2I.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from twofold.ops.reference import swiglu


def moe(
    x_TD: torch.Tensor,
    weights_Tk: torch.Tensor,
    ids_Tk: torch.Tensor,
    gate_up_EJD: torch.Tensor,
    down_EDI: torch.Tensor,
) -> torch.Tensor:
    """Sum of the chosen experts' SwiGLU outputs, [T, D]. Experts without tokens keep a zero gradient."""
    tokens, k = ids_Tk.shape
    order = ids_Tk.flatten().argsort(stable=True)
    source = order.div(k, rounding_mode="floor")
    counts = torch.bincount(ids_Tk.flatten(), minlength=gate_up_EJD.shape[0]).tolist()
    slices = x_TD.index_select(0, source).split(counts)
    outputs = [
        F.linear(swiglu(F.linear(x, gate_up)), down)
        for x, gate_up, down in zip(slices, gate_up_EJD.unbind(0), down_EDI.unbind(0), strict=True)
    ]
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    per_choice = torch.cat(outputs).index_select(0, inverse).view(tokens, k, -1)
    return (per_choice * weights_Tk[..., None]).sum(1)
