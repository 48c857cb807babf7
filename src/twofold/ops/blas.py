"""Single-threaded products of matrices by numpy's OpenBLAS: the second library beside torch's, for a few shapes only.

On one thread of an AMD processor, OpenBLAS multiplies a few rows by a large matrix up to twice as fast as torch's MKL,
most of all in a backward pass (``benchmarks/moe_speed.py``, part "torch"); not measured on other makes. It takes the
tensors' own memory, so nothing is copied. On several threads it is no faster, and its threads and torch's, which wait
for work by spinning, hold each other up: whole training steps of dense models were up to half as fast.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from threadpoolctl import ThreadpoolController

Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]  # two factors, and where the result goes


def torch_product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """``out`` [M, N] becomes ``a`` [M, K] times ``b`` [K, N], by torch."""
    torch.mm(a, b, out=out)


def numpy_product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """``torch_product`` of CPU tensors of one dtype that numpy has, by numpy. Gradients are not recorded.

    Infinities and NaN pass through without a word, as they do in torch.
    """
    with np.errstate(all="ignore"):
        np.matmul(a.detach().numpy(), b.detach().numpy(), out=out.numpy())


def thread_product(*tensors: torch.Tensor) -> Product:
    """What to multiply such tensors with on one thread: numpy for fp32 on a CPU, if its library is OpenBLAS."""
    known = all(
        type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.dtype == torch.float32 and tensor.is_cpu
        for tensor in tensors
    )
    return numpy_product if known and len(_openblas()) > 0 else torch_product


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """numpy's OpenBLAS on one thread a caller, process-wide, and then as it was. One caller enters at a time."""
    with _turn(os.getpid()), _openblas().limit(limits=1):
        yield


@functools.cache
def _turn(process: int) -> threading.Lock:
    """The library's limit can be put back only by the thread that set it. A forked process gets a free lock."""
    return threading.Lock()


@functools.cache
def _openblas() -> ThreadpoolController:
    """numpy's own copy of OpenBLAS, with threads of its own; of other libraries and copies it has none."""
    found, folder = ThreadpoolController(), str(Path(np.__file__).parent)  # wheels: numpy.libs, or numpy/.dylibs
    ours = [
        library["filepath"]
        for library in found.info()
        if library["internal_api"] == "openblas"
        and library["threading_layer"] == "pthreads"
        and library["filepath"].startswith(folder)
    ]
    return found.select(filepath=ours)
