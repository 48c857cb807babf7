"""numpy's products on one thread: same results as torch's, and the number of OpenBLAS threads is put back."""

from __future__ import annotations

import threading

import pytest
import torch
from threadpoolctl import threadpool_info

from twofold.ops import blas
from twofold.ops.blas import numpy_product, one_thread, thread_product, torch_product


def openblas_threads() -> list[int]:
    return [library["num_threads"] for library in threadpool_info() if library["internal_api"] == "openblas"]


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


def test_numpy_takes_fp32_on_a_cpu_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    single, half = torch.ones(2), torch.ones(2, dtype=torch.bfloat16)
    assert openblas_threads(), "numpy's wheels bring OpenBLAS"
    assert thread_product(single, single) is numpy_product
    assert thread_product(single, half) is torch_product
    assert thread_product(single, torch.ones(2, device="meta")) is torch_product
    monkeypatch.setattr(blas, "_openblas", lambda: [])
    assert thread_product(single) is torch_product


def test_the_limit_lasts_until_the_last_caller_leaves() -> None:
    before = openblas_threads()
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with one_thread():
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with one_thread():
        thread.start()
        assert entered.wait(10)
        assert set(openblas_threads()) == {1}
    assert set(openblas_threads()) == {1}
    leave.set()
    thread.join()
    assert openblas_threads() == before
    with pytest.raises(KeyError), one_thread():
        raise KeyError
    assert openblas_threads() == before
