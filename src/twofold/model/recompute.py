"""Activation checkpointing, applied to the layers of a model from outside: memory for time, same numbers.

"full" keeps the inputs of a layer and computes it again in the backward pass. "selective" keeps the results of matrix
products and attention as well, so that only cheap element-wise work is done twice; not those of large experts on a CPU,
which ``ops/moe.py`` makes out of autograd's sight. Not here: offloading.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, get_args

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from twofold.base.records import InputError
from twofold.model.qwen3 import Qwen3

Recompute = Literal["none", "selective", "full"]
_KEPT = frozenset(
    getattr(torch.ops.aten, name).default
    for name in (
        "mm",
        "addmm",
        "bmm",
        "linear",
        "_grouped_mm",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    )
)


def recompute(model: Qwen3, kind: Recompute) -> None:
    """Change, in place, what the layers of ``model`` keep for the backward pass.

    Raises:
        InputError: an unknown kind.
    """
    if kind not in get_args(Recompute):
        raise InputError(f"recompute={kind!r} is not one of {', '.join(get_args(Recompute))}")
    for layer in model.model.layers:
        layer.__dict__.pop("forward", None)
        if kind != "none":
            settings: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
            if kind == "selective":
                settings["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)
            layer.forward = functools.partial(checkpoint, layer.forward, **settings)


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE
