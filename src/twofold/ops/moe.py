"""Mixture of experts by sorting: tokens are grouped by expert, each expert is one matrix product over its rows.

Same result as ``reference.moe`` (the loop with masks), same code for training and decoding; no capacity limit, no
dropped tokens, no padding and no copy of weights: extra memory is a few activations a chosen expert. Small experts and
GPUs take torch's grouped matrix product. Large experts on a CPU with several threads are shared out, one expert to one
thread, because a product of a few rows is often slower on all threads than on one; in fp32 numpy multiplies them
(``ops/blas.py``). Routing itself is ``reference.route``: it is small.

Shape legend: T tokens, D width, E experts, k experts per token, I expert width, J = 2I, A = T * k chosen experts,
sorted by expert.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from twofold.ops.blas import Product, numpy_product, one_thread, thread_product, torch_product
from twofold.ops.reference import swiglu

_SHARED_OUT = 2**18  # weights of an expert from which threads take whole experts
_SPLIT_ROWS = 64  # rows from which an expert with more than one thread's share is worth all threads

_Group = tuple[int, int, int]  # expert, first row, end
_Run = Callable[[_Group, Product], None]


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
    sorted_A, order_A = ids_Tk.flatten().sort(stable=True)
    place_A = torch.empty_like(order_A)
    place_A[order_A] = torch.arange(len(order_A), device=order_A.device)
    ends_E = torch.searchsorted(sorted_A, torch.arange(len(gate_up_EJD), device=sorted_A.device), right=True)
    source_A, place_Tk = order_A.div(ids_Tk.shape[1], rounding_mode="floor"), place_A.view_as(ids_Tk)
    x_AD = _Spread.apply(x_TD, source_A, place_Tk)
    weights_A = weights_Tk.flatten().index_select(0, order_A)
    if _grouped(x_AD, gate_up_EJD, down_EDI):
        offsets_E = ends_E.int()
        inner_AI = swiglu(F.grouped_mm(x_AD, gate_up_EJD.transpose(1, 2), offs=offsets_E)) * weights_A[:, None]
        out_AD = F.grouped_mm(inner_AI, down_EDI.transpose(1, 2), offs=offsets_E)
    else:
        out_AD = _Experts.apply(x_AD, weights_A, gate_up_EJD, down_EDI, ends_E.tolist())
    return _Collect.apply(out_AD, source_A, place_Tk)


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


class _Spread(torch.autograd.Function):
    """Each token's row for each of its experts. Backward is ``_Collect``: the same order always, nothing atomic."""

    @staticmethod
    def forward(ctx: Any, x_TD: torch.Tensor, source_A: torch.Tensor, place_Tk: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(place_Tk)
        return x_TD.index_select(0, source_A)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_AD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _sum_of_places(grad_AD, *ctx.saved_tensors), None, None


class _Collect(torch.autograd.Function):
    """Each token's rows summed. Backward is ``_Spread``."""

    @staticmethod
    def forward(ctx: Any, x_AD: torch.Tensor, source_A: torch.Tensor, place_Tk: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(source_A)
        return _sum_of_places(x_AD, place_Tk)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (source_A,) = ctx.saved_tensors
        return grad_TD.index_select(0, source_A), None, None


def _sum_of_places(x_AD: torch.Tensor, place_Tk: torch.Tensor) -> torch.Tensor:
    return x_AD.index_select(0, place_Tk.flatten()).unflatten(0, place_Tk.shape).sum(1)


class _Experts(torch.autograd.Function):
    """Weighted SwiGLU of each expert on its rows; ``ends`` are the E places where experts' rows end.

    An expert's rows are weighted where they are narrowest, between its two products.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_AD: torch.Tensor,
        weights_A: torch.Tensor,
        gate_up_EJD: torch.Tensor,
        down_EDI: torch.Tensor,
        ends: list[int],
    ) -> torch.Tensor:
        inputs = (x_AD, weights_A, gate_up_EJD, down_EDI)
        gate_up_AJ = x_AD.new_empty(len(x_AD), gate_up_EJD.shape[1])
        out_AD = torch.empty_like(x_AD)
        spans = zip(range(len(ends)), [0, *ends], ends, strict=False)
        groups = [(expert, start, end) for expert, start, end in spans if end > start]

        def run(group: _Group, product: Product) -> None:
            expert, start, end = group
            product(x_AD[start:end], gate_up_EJD[expert].t(), gate_up_AJ[start:end])
            inner = swiglu(gate_up_AJ[start:end]).mul_(weights_A[start:end, None])
            product(inner, down_EDI[expert].t(), out_AD[start:end])

        _each(run, groups, _shared_out(down_EDI), thread_product(*inputs))
        ctx.save_for_backward(*inputs, gate_up_AJ)
        ctx.groups = groups
        return out_AD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_AD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *inputs, gate_up_AJ = ctx.saved_tensors
        x_AD, weights_A, gate_up_EJD, down_EDI = inputs
        grads = [
            torch.empty_like(tensor) if needed else None
            for tensor, needed in zip(inputs, ctx.needs_input_grad, strict=False)
        ]
        grad_x_AD, grad_weights_A, grad_gate_up_EJD, grad_down_EDI = grads
        for expert in set(range(len(down_EDI))) - {expert for expert, _, _ in ctx.groups}:
            for grad_E in grads[2:]:
                if grad_E is not None:
                    grad_E[expert].zero_()

        def run(group: _Group, product: Product) -> None:
            expert, start, end = group
            grad, (gate, up) = grad_AD[start:end], gate_up_AJ[start:end].chunk(2, dim=-1)
            activated, weights = F.silu(gate), weights_A[start:end, None]
            inner, grad_inner = activated * up, torch.empty_like(activated)
            product(grad, down_EDI[expert], grad_inner)
            if grad_weights_A is not None:
                torch.linalg.vecdot(grad_inner, inner, out=grad_weights_A[start:end])
            if grad_down_EDI is not None:
                product(grad.t(), inner.mul_(weights), grad_down_EDI[expert])
            grad_inner.mul_(weights)
            grad_gate = torch.ops.aten.silu_backward(grad_inner * up, gate)
            grad_gate_up = torch.cat((grad_gate, grad_inner.mul_(activated)), dim=-1)
            if grad_gate_up_EJD is not None:
                product(grad_gate_up.t(), x_AD[start:end], grad_gate_up_EJD[expert])
            if grad_x_AD is not None:
                product(grad_gate_up, gate_up_EJD[expert], grad_x_AD[start:end])

        _each(run, ctx.groups, _shared_out(down_EDI), thread_product(grad_AD, *inputs))
        return (*grads, None)


def _each(run: _Run, groups: list[_Group], shared_out: bool, product: Product) -> None:
    """Run every group: in turn by torch, or by ``product`` and shared out among threads, those with most rows first.

    A group that alone is more than one thread's share gets all threads and torch's product, before the others.
    """
    threads = torch.get_num_threads()
    waiting = []
    rows = sum(map(_rows, groups))
    for group in sorted(groups, key=_rows, reverse=True):
        size = _rows(group)
        if not shared_out or len(groups) == 1 or (size >= _SPLIT_ROWS and size * threads > rows):
            run(group, torch_product)
        else:
            waiting.append(group)
    if waiting:
        queue, lock = iter(waiting), threading.Lock()
        pool = _pool(os.getpid(), threads)
        by_numpy = product is numpy_product and _rows(waiting[0]) > 1
        with one_thread() if by_numpy else contextlib.nullcontext():
            running = [pool.submit(_drain, run, product, queue, lock) for _ in range(min(threads, len(waiting)))]
            wait(running)
        for thread in running:
            thread.result()


def _rows(group: _Group) -> int:
    _, start, end = group
    return end - start


@torch.inference_mode()  # both grad mode and inference mode are the thread's own
def _drain(run: _Run, product: Product, queue: Iterator[_Group], lock: threading.Lock) -> None:
    while True:
        with lock:
            group = next(queue, None)
        if group is None:
            return
        run(group, product if _rows(group) > 1 else torch_product)  # one row is as fast or faster by torch


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
