"""A tiny model, random batches and a source whose whole state is one counter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from twofold.base.batch import TokenBatch, pack
from twofold.model.config import ModelConfig
from twofold.model.qwen3 import Qwen3

VOCABULARY = 32


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Qwen3]:
    """(moe=False, seed=0, **changes) -> a model with random weights."""

    def make(moe: bool = False, seed: int = 0, **changes: Any) -> Qwen3:
        shape: dict[str, Any] = dict(
            vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, rms_norm_eps=1e-6, rope_theta=1e4, max_position_embeddings=64,
            tie_word_embeddings=True, initializer_range=0.2,
        )  # fmt: skip
        if moe:
            shape |= dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8)
        model = Qwen3(ModelConfig(**(shape | changes)))
        model.init_weights(seed)
        return model

    return make


@pytest.fixture(scope="session")
def make_batch() -> Callable[..., TokenBatch]:
    """(lengths, seed=0, weights=None, **extras) -> random sequences packed into one batch."""

    def make(lengths: list[int], seed: int = 0, weights: Any = None, **extras: Any) -> TokenBatch:
        generator = torch.Generator().manual_seed(seed)
        rows = [torch.randint(0, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]
        return pack(rows, weights, extras or None)

    return make


class CountingSource:
    """Step i gives ``parts`` random micro-batches that depend on i alone."""

    can_checkpoint = True

    def __init__(self, make: Callable[..., TokenBatch], parts: int = 2) -> None:
        self.make, self.parts, self.taken = make, parts, 0

    def next_step(self) -> list[TokenBatch]:
        self.taken += 1
        return [self.make([9, 6], seed=100 * self.taken + part) for part in range(self.parts)]

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.taken = state["taken"]


@pytest.fixture
def make_source(make_batch: Callable[..., TokenBatch]) -> Callable[..., CountingSource]:
    return lambda parts=2: CountingSource(make_batch, parts)
