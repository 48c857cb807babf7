"""Bits per byte and the retrieval probe on models whose predictions are known."""

from __future__ import annotations

import math

import pytest
import torch

from twofold.base.batch import pack
from twofold.eval.language import ProbeDocument, bits_per_byte, retrieval_accuracy, token_nats
from twofold.model.config import ModelConfig
from twofold.model.qwen3 import Qwen3

VOCABULARY = 16


@pytest.fixture
def model() -> Qwen3:
    made = Qwen3(
        ModelConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            rms_norm_eps=1e-6,
            rope_theta=1e4,
            max_position_embeddings=64,
            tie_word_embeddings=False,
            initializer_range=0.3,
        )
    )
    made.init_weights(0)
    return made


@pytest.fixture
def uniform(model: Qwen3) -> Qwen3:
    with torch.no_grad():
        model.lm_head.weight.zero_()
    return model


@pytest.fixture
def successor(model: Qwen3) -> Qwen3:
    """Always predicts the present token plus one: identity embedding, layers off, a shifted head."""
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(VOCABULARY))
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.lm_head.weight.copy_(torch.eye(VOCABULARY).roll(1, 0))
    return model


def windows(count: int, length: int) -> list:  # type: ignore[type-arg]
    generator = torch.Generator().manual_seed(0)
    return [pack([torch.randint(0, VOCABULARY, (length + 1,), generator=generator).tolist()]) for _ in range(count)]


def test_a_uniform_model_pays_log_v_for_every_token(uniform: Qwen3) -> None:
    window = windows(1, 8)[0]
    torch.testing.assert_close(token_nats(uniform, window), torch.full((8,), math.log(VOCABULARY)))
    assert not token_nats(uniform, window).requires_grad


def test_bits_per_byte_divide_by_the_bytes_of_the_targets(uniform: Qwen3) -> None:
    sizes = torch.arange(VOCABULARY) % 4 + 1
    some = windows(3, 12)
    spans = [(0, 12), (0, 4), (8, 12)]
    for (interval, values), (start, end) in zip(bits_per_byte(uniform, some, sizes, spans), spans, strict=True):
        expected = [4.0 * (end - start) / float(sizes[w.targets_T[start:end]].sum()) for w in some]
        assert values == pytest.approx(expected, rel=1e-5)
        assert interval.value == pytest.approx(sum(expected) / 3) and interval.low < interval.value < interval.high


def test_bits_per_byte_see_what_the_model_knows(successor: Qwen3) -> None:
    counting = [pack([[(start + i) % VOCABULARY for i in range(9)]]) for start in range(3)]
    sizes = torch.ones(VOCABULARY)
    known = bits_per_byte(successor, counting, sizes, [(0, 8)])[0][0].value
    unknown = bits_per_byte(successor, windows(3, 8), sizes, [(0, 8)])[0][0].value
    assert known < 0.8 * unknown


def test_retrieval_counts_only_facts_that_are_far_enough(successor: Qwen3) -> None:
    right = ProbeDocument([3, 4, 5, 9, 10, 2], [1, 4, 5], [50, 200, 300])  # 4 after 3: right, 10 after 9: right
    wrong = ProbeDocument([1, 7, 7], [2], [400])
    interval = retrieval_accuracy(successor, [right, wrong], 100)
    assert interval.value == pytest.approx(1 / 3)  # the near fact is not asked
    assert retrieval_accuracy(successor, [right, wrong], 10).value == pytest.approx(2 / 4)
    assert retrieval_accuracy(successor, [right], 10).value == pytest.approx(2 / 3)
