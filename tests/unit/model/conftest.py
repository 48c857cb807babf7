"""Tiny model shapes for the model tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from twofold.model.config import ModelConfig
from twofold.model.qwen3 import Qwen3

BASE: dict[str, Any] = dict(
    vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=6, rms_norm_eps=1e-6, rope_theta=1e4, max_position_embeddings=128,
    tie_word_embeddings=True, initializer_range=0.2,
)  # fmt: skip
MOE: dict[str, Any] = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=10)


@pytest.fixture(scope="session")
def make_config() -> Callable[..., ModelConfig]:
    """(moe=False, **changes) -> a tiny configuration."""

    def make(moe: bool = False, **changes: Any) -> ModelConfig:
        return ModelConfig(**(BASE | (MOE if moe else {}) | changes))

    return make


@pytest.fixture(scope="session")
def make_model(make_config: Callable[..., ModelConfig]) -> Callable[..., Qwen3]:
    """(moe=False, seed=0, **changes) -> a model with random weights, norms included."""

    def make(moe: bool = False, seed: int = 0, **changes: Any) -> Qwen3:
        model = Qwen3(make_config(moe, **changes))
        model.init_weights(seed)
        generator = torch.Generator().manual_seed(seed + 1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.uniform_(0.5, 1.5, generator=generator)
        return model

    return make
