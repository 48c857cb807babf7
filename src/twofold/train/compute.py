"""How a step is computed: in which type, and compiled or not. Applied from outside, for as long as a run lasts.

"bf16" takes every product of a step, forward and backward, in bf16, on copies made of the fp32 weights once a step;
gradients arrive in fp32, moments and updates never see bf16. That is FSDP2's mixed precision on one process, and the
model computes as a bf16 model does when it samples, statistics in fp32. torch's autocast is not used: it would take the
statistics of RMSNorm in bf16 and does not reach backward passes written by hand. Not here: fp8, scaling of fp16.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch.func import functional_call

from twofold.base.records import InputError
from twofold.model.qwen3 import DenseMLP, Qwen3, RMSNorm

T = TypeVar("T")
Precision = Literal["fp32", "bf16"]
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class _Running(nn.Module):
    """Runs a function while the parameters of ``model`` are others."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, run: Callable[[], Any]) -> Any:
        return run()


def in_precision(model: nn.Module, precision: Precision, run: Callable[[], T]) -> T:
    """``run()``, in which the fp32 parameters of ``model`` are seen in ``precision``; gradients reach them in fp32.

    The backward pass belongs into ``run`` too: layers that are computed again must find the same parameters.
    """
    if precision == "fp32":
        return run()
    kind = TYPES[precision]
    seen = {f"model.{name}": p.to(kind) for name, p in model.named_parameters() if p.dtype == torch.float32}
    result: T = functional_call(_Running(model), seen, (run,))
    return result


@contextmanager
def compiled(model: Qwen3, wanted: bool) -> Iterator[None]:
    """Inside, norms and dense feed-forwards run compiled: what is element-wise work between matrix products.

    Attention plans and experts differ from step to step and would be compiled again and again, so they stay as they
    are. One compilation serves all lengths, so a resumed run computes what an uninterrupted one does.

    Raises:
        InputError: torch cannot compile on this machine.
    """
    if not wanted:
        yield
        return
    _check_compiler(model.model.embed_tokens.weight.device)
    modules = [module for module in model.modules() if isinstance(module, RMSNorm | DenseMLP)]
    for module in modules:
        module.forward = torch.compile(module.forward, dynamic=True)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in modules:
            del module.__dict__["forward"]


def _check_compiler(device: torch.device) -> None:
    try:
        torch.compile(torch.neg, dynamic=True)(torch.ones(2, device=device))
    except Exception as error:  # whatever the compiler that is missing makes of it
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        found = "" if shutil.which("c++") or device.type != "cpu" else "install g++ (apt install g++), or "
        raise InputError(f"compile=true: torch cannot compile here ({reason}); {found}leave it out") from None
