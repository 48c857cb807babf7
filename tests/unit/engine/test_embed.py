"""Vectors: length one, independent of batch mates and batch sizes; relevance: a probability of two answers."""

from __future__ import annotations

import pytest
import torch

from twofold.base.records import InputError
from twofold.engine import embed
from twofold.model.config import ModelConfig
from twofold.model.quantised import KINDS, quantise_model
from twofold.model.qwen3 import Qwen3


@pytest.fixture(scope="module")
def model() -> Qwen3:
    built = Qwen3(
        ModelConfig(
            vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-6, rope_theta=1e4, max_position_embeddings=64,
            tie_word_embeddings=False, initializer_range=0.2,
        )
    )  # fmt: skip
    built.init_weights(seed=0)
    return built


TEXTS = [[3, 4, 5, 1], [7, 1], [9, 8, 7, 6, 5, 4, 1], [3, 4, 5, 1], [1]]


def test_a_vector_does_not_depend_on_its_batch_mates(model: Qwen3) -> None:
    together = embed.embed(model, TEXTS)
    assert together.dtype == torch.float32 and together.shape == (5, 32) and not together.requires_grad
    torch.testing.assert_close(together.norm(dim=-1), torch.ones(5))
    alone = torch.cat([embed.embed(model, [text]) for text in TEXTS])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-5)
    for tokens_per_batch in (1, 6, 1000):
        again = embed.embed(model, TEXTS[::-1], tokens_per_batch=tokens_per_batch).flip(0)
        torch.testing.assert_close(again, together, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(together[0], together[3], atol=1e-6, rtol=1e-5)
    cosines = together @ together.T
    assert float(cosines[0, 1]) < 0.99, "different texts, different vectors"


def test_leading_components_are_normalised_anew(model: Qwen3) -> None:
    whole, short = embed.embed(model, TEXTS), embed.embed(model, TEXTS, dimensions=8)
    torch.testing.assert_close(short, torch.nn.functional.normalize(whole[:, :8], dim=-1))


def test_relevance_is_the_share_of_yes(model: Qwen3) -> None:
    yes = embed.relevance(model, TEXTS, yes_id=11, no_id=12)
    no = embed.relevance(model, TEXTS, yes_id=12, no_id=11, tokens_per_batch=3)
    torch.testing.assert_close(yes + no, torch.ones(5))
    assert yes.dtype == torch.float32 and float(yes.std()) > 0.01


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [True, False])
def test_packed_models_judge_as_well(model: Qwen3, kind: str, tied: bool) -> None:
    packed = Qwen3(model.config.override([f"tie_word_embeddings={str(tied).lower()}"]))
    packed.init_weights(seed=0)
    plain = embed.relevance(packed, TEXTS, yes_id=11, no_id=12)
    quantise_model(packed, kind)
    atol = 0.05 if kind == "int8" else 1e-3
    torch.testing.assert_close(embed.relevance(packed, TEXTS, yes_id=11, no_id=12), plain, atol=atol, rtol=0)


def test_nothing_and_what_cannot_be(model: Qwen3) -> None:
    assert embed.embed(model, []).shape == (0, 32) and embed.relevance(model, [], 1, 2).shape == (0,)
    for dimensions in (0, 33):
        with pytest.raises(InputError, match=r"dimensions must be a whole number in 1\.\.32"):
            embed.embed(model, TEXTS, dimensions=dimensions)
    for call in (lambda: embed.embed(model, [[1], []]), lambda: embed.relevance(model, [[1], []], 1, 2)):
        with pytest.raises(InputError, match="text 1 has no tokens"):
            call()
