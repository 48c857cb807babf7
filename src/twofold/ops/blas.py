"""Single-threaded products of matrices by numpy's OpenBLAS: the second library beside torch's, for a few shapes only.

On one thread of an AMD processor, OpenBLAS multiplies a few rows by a large matrix up to twice as fast as torch's MKL,
most of all in a backward pass (``benchmarks/moe_speed.py``, part "torch"); not measured on other makes. It takes the
tensors' own memory, so nothing is copied. On several threads it is no faster, and its threads and torch's, which wait
for work by spinning, hold each other up: whole training steps of dense models were up to half as fast.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator

import numpy as np
import torch
from threadpoolctl import ThreadpoolController

Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]  # two factors, and where the result goes

_lock = threading.Lock()
_inside = 0  # callers within `one_thread`; the limit is the process's own, so the last one out lifts it
_limits = contextlib.ExitStack()


def torch_product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """``out`` [M, N] becomes ``a`` [M, K] times ``b`` [K, N], by torch."""
    torch.mm(a, b, out=out)


def numpy_product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """``torch_product`` of CPU tensors of one dtype that numpy has, by numpy. Gradients are not recorded."""
    np.matmul(a.detach().numpy(), b.detach().numpy(), out=out.numpy())


def thread_product(*tensors: torch.Tensor) -> Product:
    """What to multiply such tensors with on one thread: numpy for fp32 on a CPU, if its library is OpenBLAS."""
    known = all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in tensors)
    return numpy_product if known and len(_openblas()) > 0 else torch_product


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """OpenBLAS on one thread per caller in the whole process while any caller is inside; as it was afterwards."""
    global _inside
    with _lock:
        if _inside == 0:
            _limits.enter_context(_openblas().limit(limits=1))
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                _limits.close()


@functools.cache
def _openblas() -> ThreadpoolController:
    return ThreadpoolController().select(internal_api="openblas")
