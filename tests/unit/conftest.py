"""Fixtures of the tests of the package's top floor: what opens a model. The folders below have their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def save_tiny_model() -> Callable[[Path], Path]:
    """Writes a model of one layer and 330 tokens, with random weights and the default chat format, into a folder."""
    from twofold.model.config import ModelConfig
    from twofold.model.qwen3 import Qwen3
    from twofold.recipes.pretrain import save_model
    from twofold.text.tokenizer import Tokenizer

    def save(folder: Path) -> Path:
        tokenizer = Tokenizer.train(["sum mod 10: E1 B5 user assistant 0123456789 /think /no_think"] * 4, 330)
        model = Qwen3(
            ModelConfig(
                vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                num_attention_heads=2, num_key_value_heads=1, head_dim=16, rms_norm_eps=1e-6, rope_theta=1e4,
                max_position_embeddings=160, tie_word_embeddings=True, initializer_range=0.2,
            )
        )  # fmt: skip
        model.init_weights(1)
        save_model(model, tokenizer, folder)
        return folder

    return save
