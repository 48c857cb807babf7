"""What packing costs, on models whose difference is known."""

from __future__ import annotations

import math
import random

import pytest
import torch

from twofold.base.records import InputError
from twofold.eval.quality import compare, windows_of
from twofold.model.attn_inputs import AttnInputs
from twofold.model.config import ModelConfig
from twofold.model.quantised import quantise_model
from twofold.model.qwen3 import Qwen3

WINDOWS = [[random.Random(seed).randrange(60) for _ in range(151)] for seed in range(3)]


def model(seed: int = 1) -> Qwen3:
    built = Qwen3(
        ModelConfig(
            vocab_size=60, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=16, rms_norm_eps=1e-6, rope_theta=1e4, max_position_embeddings=256,
            tie_word_embeddings=False, initializer_range=0.2,
        )
    )  # fmt: skip
    built.init_weights(seed)
    return built


def test_a_model_equals_itself() -> None:
    seen: list[int] = []
    found = compare(model(), model(), WINDOWS, seen.append)
    assert (found.tokens, found.windows, seen) == (450, 3, [1, 2, 3])
    assert found.kl.value == found.kl_max == 0 and found.top1.value == 1
    assert found.nats == found.reference_nats and found.loss.value == 0


def test_figures_are_those_of_the_definition() -> None:
    """The other model's head is zero, so that its distribution is uniform."""
    one, other = model(), model()
    with torch.no_grad():
        other.lm_head.weight.zero_()
    found = compare(one, other, WINDOWS)
    ids = torch.tensor(WINDOWS)
    logp = one_by_one(one, ids[:, :-1])
    entropy = -(logp.exp() * logp).sum(-1)
    assert found.kl.value == pytest.approx(float((math.log(60) - entropy).mean()), abs=1e-5)
    assert found.kl_max == pytest.approx(float((math.log(60) - entropy).max()), abs=1e-4)
    assert found.nats == pytest.approx(math.log(60), abs=1e-5)
    loss = -logp.gather(-1, ids[:, 1:, None])[..., 0]
    assert found.reference_nats == pytest.approx(float(loss.mean()), abs=1e-5)
    assert found.loss.value == pytest.approx(math.log(60) - float(loss.mean()), abs=1e-5)
    assert found.top1.value == pytest.approx(float((logp.argmax(-1) == 0).float().mean()), abs=1e-6)


def one_by_one(of: Qwen3, ids_BT: torch.Tensor) -> torch.Tensor:
    rows = []
    for ids in ids_BT:
        hidden = of(ids, torch.arange(len(ids)), AttnInputs.packed([0, len(ids)]))
        rows.append(of.logits(hidden).log_softmax(-1).detach())
    return torch.stack(rows)


def test_int8_is_near_but_not_equal() -> None:
    packed = model()
    quantise_model(packed)
    found = compare(model(), packed, WINDOWS)
    assert 0 < found.kl.value < 0.02 and found.top1.value > 0.9
    assert found.kl.low <= found.kl.value <= found.kl.high


def test_windows_are_spread_and_do_not_overlap() -> None:
    assert windows_of(range(100), 9, 3) == [list(range(s, s + 10)) for s in (0, 33, 66)]
    assert windows_of(range(25), 9, 100) == [list(range(10)), list(range(12, 22))]
    with pytest.raises(InputError, match="give a longer text"):
        windows_of(range(19), 9, 100)
