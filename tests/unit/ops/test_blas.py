"""numpy's products: same results as torch's, and numpy's own number of threads is put back."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest
import torch

from twofold.ops import blas
from twofold.ops.blas import numpy_product, thread_product, torch_product

needs_openblas = pytest.mark.skipif(len(blas._openblas()) == 0, reason="numpy multiplies with another library here")


@pytest.mark.parametrize("rows", [1, 2, 16, 33])
def test_every_orientation_into_a_part_of_a_tensor(rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    x, grad = torch.randn(rows, 24, generator=generator), torch.randn(rows, 40, generator=generator)
    weight = torch.randn(3, 40, 24, generator=generator).requires_grad_()
    for a, b in ((x, weight[1].t()), (grad, weight[1]), (grad.t(), x)):
        out = torch.full((2, len(a), b.shape[1]), 7.0)
        expected = torch.empty(len(a), b.shape[1])
        numpy_product(a, b, out[1])
        torch_product(a.detach(), b.detach(), expected)
        torch.testing.assert_close(out[1], expected, atol=1e-5, rtol=1e-5)
        assert bool((out[0] == 7).all()) and not out.requires_grad


def test_infinities_pass_as_quietly_as_in_torch() -> None:
    a, out = torch.tensor([[float("inf"), 1e38]]), torch.empty(1, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        numpy_product(a, torch.tensor([[1.0], [1e38]]), out)
        assert out.isinf().all()
        numpy_product(a, torch.tensor([[0.0], [1.0]]), out)
        assert out.isnan().all()


@needs_openblas
def test_numpy_takes_plain_fp32_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    single, half = torch.ones(2), torch.ones(2, dtype=torch.bfloat16)
    assert thread_product(single, torch.nn.Parameter(single)) is numpy_product
    assert thread_product(single, half) is torch_product
    assert thread_product(single, torch.ones(2, device="meta")) is torch_product
    assert thread_product(single, single.as_subclass(type("Odd", (torch.Tensor,), {}))) is torch_product
    monkeypatch.setattr(blas, "_openblas", lambda: [])
    assert thread_product(single) is torch_product


THREADS = """
import threading
from threadpoolctl import threadpool_info
from twofold.ops.blas import one_thread

def threads():
    return [library["num_threads"] for library in threadpool_info() if library["internal_api"] == "openblas"]

entered, leave, waiting, inside = threading.Event(), threading.Event(), threading.Event(), []

def first():
    with one_thread():
        entered.set()
        leave.wait()

def second():
    entered.wait()
    waiting.set()
    with one_thread():
        inside.append(threads())

both = [threading.Thread(target=target) for target in (first, second)]
assert threads() == [2], threads()
for thread in both:
    thread.start()
waiting.wait()
assert threads() == [1] and not inside
leave.set()
for thread in both:
    thread.join()
assert inside == [[1]] and threads() == [2], (inside, threads())
for _ in range(2):
    try:
        with one_thread():
            assert threads() == [1]
            raise KeyError
    except KeyError:
        pass
    assert threads() == [2]
"""


@needs_openblas
def test_the_number_of_threads_is_put_back_whoever_leaves_last() -> None:
    """In a process of its own, because the tests' has one thread anyway."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", THREADS], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
