"""Log-probabilities recorded while sampling equal those the trainer computes, for dense and MoE models."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from twofold.base.batch import pack
from twofold.base.records import Request, SamplingParams
from twofold.engine.engine import Engine
from twofold.engine.sampling import ThinkTokens
from twofold.model.attn_inputs import AttnInputs
from twofold.model.config import ModelConfig
from twofold.model.qwen3 import Qwen3
from twofold.ops.loss import token_logprobs

THINK = ThinkTokens(1, 2, (5, 6, 2, 7))


def make_model(moe: bool) -> Qwen3:
    shape: dict[str, Any] = dict(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-6, rope_theta=1e4, max_position_embeddings=256,
        tie_word_embeddings=True, initializer_range=0.15,
    )  # fmt: skip
    if moe:
        shape |= dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=16)
    model = Qwen3(ModelConfig(**shape))
    model.init_weights(1)
    return model


def rollouts(model: Qwen3, max_rows: int) -> tuple[list[list[int]], list[list[float]], list[list[float]]]:
    """Sequences, sampled log-probabilities and weights; prompts of many lengths, several samples, forced tokens."""
    generator = torch.Generator().manual_seed(0)
    engine = Engine(model, (0,), THINK, max_rows=max_rows)
    requests = []
    for number in range(7):
        prompt = torch.randint(3, 64, (3 + 5 * number,), generator=generator).tolist()
        params = SamplingParams(1.0, max_tokens=40, n=4, seed=10 * number, thinking_budget=6 if number % 2 else None)
        requests.append(Request((*prompt, THINK.opening), params, in_think=True))
    sequences, old, weights = [], [], []
    for completion in engine.generate(requests):
        prompt_ids = list(requests[completion.request_index].prompt_ids)
        sequences.append(prompt_ids + completion.token_ids)
        old.append([0.0] * len(prompt_ids) + completion.logprobs)
        weights.append([0.0] * len(prompt_ids) + [1.0] * len(completion.token_ids))
    return sequences, old, weights


def largest_gap(model: Qwen3, max_rows: int) -> float:
    sequences, old, weights = rollouts(model, max_rows)
    batch = pack(sequences, weights, {"old_logprobs": old})
    hidden = model(batch.tokens_T, batch.positions_T, AttnInputs.packed(batch.cu_seqlens))
    assert hidden.requires_grad
    difference = (token_logprobs(model.logits(hidden), batch.targets_T) - batch.extras["old_logprobs"]).abs()
    assert len(sequences) == 28 and int(batch.weights_T.sum()) > 300
    return float(difference.detach()[batch.weights_T > 0].max())


@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("max_rows", [3, 64])
def test_rollout_logprobs_equal_trainer_logprobs(moe: bool, max_rows: int) -> None:
    assert largest_gap(make_model(moe), max_rows) <= 1e-5


@pytest.mark.parametrize("moe", [False, True])
def test_exact_attention_brings_them_closer_still(moe: bool) -> None:
    model = make_model(moe)
    model.set_attention_dtype(torch.float64)
    assert largest_gap(model, 16) <= 3e-6


def test_weights_changed_by_the_trainer_are_what_the_engine_samples_with() -> None:
    model = make_model(False)
    engine = Engine(model, (0,))
    request = Request((4, 5, 6), SamplingParams(temperature=0, max_tokens=12))
    before = engine.generate([request])[0]
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(-3.0)
    engine.update_weights()
    after = engine.generate([request])[0]
    assert (before.policy_version, after.policy_version) == (0, 1) and before.token_ids != after.token_ids
    scores = engine.score([[4, 5, 6, *after.token_ids]])[0][2:]
    torch.testing.assert_close(torch.tensor(after.logprobs), scores, atol=1e-5, rtol=0)
