"""Activation checkpointing: the same numbers, less kept, and only what was promised done twice."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from twofold.base.batch import TokenBatch, pack
from twofold.base.records import InputError
from twofold.model.config import ModelConfig
from twofold.model.qwen3 import Qwen3
from twofold.model.recompute import recompute
from twofold.train.objectives import CrossEntropy

KINDS = ["none", "selective", "full"]


def make_model(moe: bool) -> Qwen3:
    shape: dict[str, Any] = dict(
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-6, rope_theta=1e4, max_position_embeddings=64,
        tie_word_embeddings=True, initializer_range=0.1,
    )  # fmt: skip
    if moe:
        shape |= dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    model = Qwen3(ModelConfig(**shape))
    model.init_weights(0)
    return model


def batch() -> TokenBatch:
    generator = torch.Generator().manual_seed(0)
    return pack([torch.randint(0, 32, (n,), generator=generator).tolist() for n in (30, 12, 50)])


def run(kind: Any, moe: bool) -> tuple[list[torch.Tensor], int, int, int]:
    """Gradients, bytes kept outside layers for the backward pass, FLOPs forward and backward."""
    model, objective, kept = make_model(moe), CrossEntropy(balance=0.1 if moe else 0.0), 0
    recompute(model, kind)

    def count(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    with FlopCounterMode(display=False) as forward, torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        losses, _ = objective(model, batch())
        total = torch.stack(list(losses.values())).sum()
    with FlopCounterMode(display=False) as backward:
        total.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return gradients, kept, forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("kind", KINDS[1:])
def test_the_same_gradients_bit_for_bit(kind: str, moe: bool) -> None:
    plain, kept_plain, _, _ = run("none", moe)
    gradients, kept, _, _ = run(kind, moe)
    assert len(plain) == len(gradients)
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients, strict=True))
    if kind == "full":  # what "selective" keeps, it keeps inside layers
        assert kept < 0.3 * kept_plain


def test_products_are_done_twice_only_by_full() -> None:
    forward, backward = {}, {}
    for kind in KINDS:
        _, _, forward[kind], backward[kind] = run(kind, False)
    assert forward["none"] == forward["selective"] == forward["full"]
    assert backward["none"] == backward["selective"]
    assert backward["full"] > backward["none"] + 0.7 * forward["none"]


PEAK = """
import sys
import torch
from twofold.base.batch import pack
from twofold.base.log import peak_memory_bytes
from twofold.model.config import ModelConfig
from twofold.model.qwen3 import Qwen3
from twofold.model.recompute import recompute
from twofold.train.objectives import CrossEntropy

torch.set_num_threads(1)
model = Qwen3(ModelConfig(
    vocab_size=64, hidden_size=256, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=8,
    num_key_value_heads=4, head_dim=32, rms_norm_eps=1e-6, rope_theta=1e4, max_position_embeddings=64,
    tie_word_embeddings=True, initializer_range=0.1))
model.init_weights(0)
recompute(model, sys.argv[1])
before = peak_memory_bytes()
CrossEntropy()(model, pack([[i % 64 for i in range(257)]] * 16))[0]["loss"].backward()
print(peak_memory_bytes() - before)
"""


@pytest.mark.slow
def test_the_less_is_kept_the_less_memory_a_step_needs() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    peak = {}
    for kind in KINDS:
        done = subprocess.run(
            [sys.executable, "-c", PEAK, kind], env=environment, capture_output=True, text=True, check=True
        )
        peak[kind] = int(done.stdout)
    assert peak["selective"] < 0.85 * peak["none"] and peak["full"] < 0.6 * peak["none"], peak


def test_it_can_be_taken_back_and_names_stay() -> None:
    model = make_model(False)
    names = [name for name, _ in model.named_parameters()]
    recompute(model, "full")
    assert [name for name, _ in model.named_parameters()] == names
    recompute(model, "none")
    assert all("forward" not in layer.__dict__ for layer in model.model.layers)
    with pytest.raises(InputError, match="recompute='some' is not one of none, selective, full"):
        recompute(model, "some")  # type: ignore[arg-type]
