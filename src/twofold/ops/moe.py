"""Mixture of experts by sorting: tokens are grouped by expert, each expert is one matrix product over its rows.

Same result as ``reference.moe`` (the loop with masks), same code for training and decoding; no capacity limit, no
dropped tokens, no padding and no copy of weights: extra memory is a few activations a chosen expert. Small experts and
GPUs take torch's grouped matrix product. Large experts on a CPU with several threads are shared out, one expert to one
thread: a product of a few rows is slower on all threads than on one (torch 2.13: 0.4 to 2 GB/s of weights against 5 to
9 at 2 to 16 rows). Routing itself is ``reference.route``: it is small.

Shape legend: T tokens, D width, E experts, k experts per token, I expert width, J = 2I, A = T * k chosen experts,
sorted by expert.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from twofold.ops.reference import swiglu

_SHARED_OUT = 2**18  # weights of an expert from which threads take whole experts
_SPLIT_ROWS = 64  # rows from which an expert with more than one thread's share is worth all threads

_Group = tuple[int, int, int]  # expert, first row, end


def moe(
    x_TD: torch.Tensor,
    weights_Tk: torch.Tensor,
    ids_Tk: torch.Tensor,
    gate_up_EJD: torch.Tensor,
    down_EDI: torch.Tensor,
) -> torch.Tensor:
    """Sum of the chosen experts' SwiGLU outputs, [T, D]. Experts without tokens keep a zero gradient.

    Args:
        weights_Tk, ids_Tk: as ``reference.route`` gives them; weights in the dtype of ``x_TD``.
    """
    tokens, k = ids_Tk.shape
    sorted_A, order_A = ids_Tk.flatten().sort(stable=True)
    place_A = torch.empty_like(order_A)
    place_A[order_A] = torch.arange(len(order_A), device=order_A.device)
    ends_E = torch.searchsorted(sorted_A, torch.arange(len(gate_up_EJD), device=sorted_A.device), right=True)
    x_AD = _Take.apply(x_TD, order_A.div(k, rounding_mode="floor"), place_A)
    if _grouped(x_AD, gate_up_EJD, down_EDI):
        offsets_E = ends_E.int()
        inner_AI = swiglu(F.grouped_mm(x_AD, gate_up_EJD.transpose(1, 2), offs=offsets_E))
        out_AD = F.grouped_mm(inner_AI, down_EDI.transpose(1, 2), offs=offsets_E)
    else:
        out_AD = _Experts.apply(x_AD, gate_up_EJD, down_EDI, ends_E.tolist())
    per_choice = _Take.apply(out_AD, place_A, order_A).unflatten(0, (tokens, k))
    return (per_choice * weights_Tk[..., None]).sum(1)


def _grouped(x_AD: torch.Tensor, gate_up_EJD: torch.Tensor, down_EDI: torch.Tensor) -> bool:
    """Whether torch's grouped product takes these tensors, and is the fastest way."""
    width, inner = down_EDI.shape[1:]
    known = x_AD.dtype in (torch.float32, torch.bfloat16, torch.float16) and x_AD.dtype == gate_up_EJD.dtype
    aligned = width * x_AD.element_size() % 16 == 0 and inner * x_AD.element_size() % 16 == 0
    if not known or not aligned or not len(x_AD):
        return False
    if x_AD.device.type == "cuda":
        return torch.cuda.get_device_capability(x_AD.device) >= (8, 0)
    return x_AD.device.type == "cpu" and not _shared_out(down_EDI)


def _shared_out(down_EDI: torch.Tensor) -> bool:
    """Whether threads take whole experts."""
    large = 3 * down_EDI[0].numel() >= _SHARED_OUT
    return down_EDI.device.type == "cpu" and large and torch.get_num_threads() > 1


class _Take(torch.autograd.Function):
    """Rows of ``x`` by ``source``, each row of ``x`` equally often. ``place`` says where they went, in order of rows.

    The backward pass is a gather and a sum: same order every time, and no atomic additions.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, source_A: torch.Tensor, place_A: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(place_A)
        ctx.shape = (len(x), len(source_A) // max(len(x), 1))
        return x.index_select(0, source_A)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_AD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (place_A,) = ctx.saved_tensors
        return grad_AD.index_select(0, place_A).unflatten(0, ctx.shape).sum(1), None, None


class _Experts(torch.autograd.Function):
    """SwiGLU of each expert on its rows; ``ends`` are the E places where experts' rows end."""

    @staticmethod
    def forward(
        ctx: Any, x_AD: torch.Tensor, gate_up_EJD: torch.Tensor, down_EDI: torch.Tensor, ends: list[int]
    ) -> torch.Tensor:
        gate_up_AJ = x_AD.new_empty(len(x_AD), gate_up_EJD.shape[1])
        out_AD = torch.empty_like(x_AD)
        spans = zip(range(len(ends)), [0, *ends], ends, strict=False)
        groups = [(expert, start, end) for expert, start, end in spans if end > start]

        def run(group: _Group) -> None:
            expert, start, end = group
            gate_up = torch.mm(x_AD[start:end], gate_up_EJD[expert].t(), out=gate_up_AJ[start:end])
            torch.mm(swiglu(gate_up), down_EDI[expert].t(), out=out_AD[start:end])

        _each(run, groups, _shared_out(down_EDI))
        ctx.save_for_backward(x_AD, gate_up_AJ, gate_up_EJD, down_EDI)
        ctx.groups = groups
        return out_AD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_AD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_AD, gate_up_AJ, gate_up_EJD, down_EDI = ctx.saved_tensors
        inner = down_EDI.shape[2]
        grad_x_AD, grad_gate_up_EJD, grad_down_EDI = (
            torch.empty_like(tensor) if needed else None
            for tensor, needed in zip((x_AD, gate_up_EJD, down_EDI), ctx.needs_input_grad[:3], strict=True)
        )
        used = {expert for expert, _, _ in ctx.groups}
        for expert in set(range(len(down_EDI))) - used:
            for grad in (grad_gate_up_EJD, grad_down_EDI):
                if grad is not None:
                    grad[expert].zero_()

        def run(group: _Group) -> None:
            expert, start, end = group
            grad, (gate, up) = grad_AD[start:end], gate_up_AJ[start:end].chunk(2, dim=-1)
            activated = F.silu(gate)
            if grad_down_EDI is not None:
                torch.mm(grad.t(), activated * up, out=grad_down_EDI[expert])
            grad_inner = grad @ down_EDI[expert]
            grad_gate_up = torch.empty_like(gate_up_AJ[start:end])
            grad_gate_up[:, :inner] = torch.ops.aten.silu_backward(grad_inner * up, gate)
            torch.mul(grad_inner, activated, out=grad_gate_up[:, inner:])
            if grad_gate_up_EJD is not None:
                torch.mm(grad_gate_up.t(), x_AD[start:end], out=grad_gate_up_EJD[expert])
            if grad_x_AD is not None:
                torch.mm(grad_gate_up, gate_up_EJD[expert], out=grad_x_AD[start:end])

        _each(run, ctx.groups, _shared_out(down_EDI))
        return grad_x_AD, grad_gate_up_EJD, grad_down_EDI, None


def _each(run: Callable[[_Group], None], groups: list[_Group], shared_out: bool) -> None:
    """Run every group: in turn, or shared out among threads, those with most rows first.

    A group that alone is more than one thread's share gets all threads, before the others.
    """
    threads = torch.get_num_threads()
    waiting = []
    rows = sum(end - start for _, start, end in groups)
    for group in sorted(groups, key=lambda group: group[1] - group[2]):
        size = group[2] - group[1]
        if not shared_out or len(groups) == 1 or (size >= _SPLIT_ROWS and size * threads > rows):
            run(group)
        else:
            waiting.append(group)
    if waiting:
        queue, lock = iter(waiting), threading.Lock()
        pool = _pool(os.getpid(), threads)
        list(pool.map(lambda _: _drain(run, queue, lock), range(min(threads, len(waiting)))))


@torch.inference_mode()  # both grad mode and inference mode are the thread's own
def _drain(run: Callable[[_Group], None], queue: Iterator[_Group], lock: threading.Lock) -> None:
    while True:
        with lock:
            group = next(queue, None)
        if group is None:
            return
        run(group)


@functools.cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads that use one core each. A forked process gets its own: threads do not survive a fork."""
    started = threading.Barrier(threads)

    def start() -> None:
        torch.set_num_threads(1)
        started.wait()

    pool = ThreadPoolExecutor(threads, "experts", start)
    list(pool.map(lambda _: None, range(threads)))
    torch.set_num_threads(threads)  # what they set is the default of threads to come as well; theirs stays 1
    return pool
