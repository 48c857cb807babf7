"""Vectors and relevance against transformers: last hidden state and next-token probabilities of a tiny random model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from twofold.engine import embed
from twofold.model.config import ModelConfig
from twofold.model.qwen3 import Qwen3
from twofold.model.weights import save_weights

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("moe", [False, True])
def test_vectors_and_relevance_equal_transformers(moe: bool, tmp_path: Path) -> None:
    experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24) if moe else {}
    model = Qwen3(
        ModelConfig(
            vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-6, rope_theta=1e6, max_position_embeddings=128,
            tie_word_embeddings=True, initializer_range=0.2, **experts,
        )
    )  # fmt: skip
    model.init_weights(seed=3)
    save_weights(model, tmp_path)
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(0, 97, (n,), generator=generator).tolist() for n in (5, 23, 1, 17)]
    body = transformers.AutoModel.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        states = torch.stack([body(torch.tensor([text])).last_hidden_state[0, -1] for text in texts])
    expected = torch.nn.functional.normalize(states, dim=-1)
    torch.testing.assert_close(embed.embed(model, texts, tokens_per_batch=20), expected, atol=1e-5, rtol=1e-5)
    half = torch.nn.functional.normalize(states[:, :24], dim=-1)
    torch.testing.assert_close(embed.embed(model, texts, dimensions=24), half, atol=1e-5, rtol=1e-5)
    head = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        logits = torch.stack([head(torch.tensor([text])).logits[0, -1] for text in texts])
    answers = torch.stack((logits[:, 11], logits[:, 60]), 1).log_softmax(1)[:, 1].exp()
    torch.testing.assert_close(embed.relevance(model, texts, yes_id=60, no_id=11), answers, atol=1e-5, rtol=1e-5)
