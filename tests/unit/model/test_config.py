"""The configuration: parameter counts, cost, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError

from twofold.model.config import Context, ModelConfig
from twofold.model.qwen3 import Qwen3

SHAPES: list[dict[str, Any]] = [
    {},
    {"tie_word_embeddings": False},
    {"num_key_value_heads": 4, "head_dim": 2, "num_hidden_layers": 1},
    {"moe": True},
    {"moe": True, "decoder_sparse_step": 2, "num_hidden_layers": 4, "tie_word_embeddings": False},
    {"moe": True, "mlp_only_layers": (0,), "num_experts_per_tok": 4},
    {"qk_norm": False, "qkv_bias": True, "o_bias": True, "mlp_bias": True},
]


@pytest.mark.parametrize("changes", SHAPES)
def test_parameter_count_equals_the_model(changes: dict[str, Any], make_config: Callable[..., ModelConfig]) -> None:
    config = make_config(**changes)
    model = Qwen3(config)
    assert config.num_parameters() == sum(p.numel() for p in model.parameters())
    per_expert = 3 * config.hidden_size * config.moe_intermediate_size
    layers = sum(config.is_moe_layer(i) for i in range(config.num_hidden_layers))
    idle = layers * (config.num_experts - config.num_experts_per_tok) * per_expert
    assert config.num_parameters(active=True) == config.num_parameters() - idle


def test_layers_with_experts(make_config: Callable[..., ModelConfig]) -> None:
    config = make_config(True, num_hidden_layers=5, decoder_sparse_step=2, mlp_only_layers=(3,))
    assert [config.is_moe_layer(i) for i in range(5)] == [False, True, False, False, False]
    assert not make_config().is_moe_layer(1)


def test_flops_count_matrices_attention_and_the_backward_pass(make_config: Callable[..., ModelConfig]) -> None:
    tied, untied = make_config(), make_config(tie_word_embeddings=False)
    forward = tied.flops_per_token(10, backward=False)
    assert forward == 2 * tied.num_parameters() + 4 * 2 * 4 * 6 * 10
    assert untied.flops_per_token(10, backward=False) == forward  # the look-up costs nothing
    assert tied.flops_per_token(10, backward=True) == 3 * forward


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_key_value_heads": 3}, "multiple of num_key_value_heads"),
        ({"head_dim": 7}, "even"),
        ({"moe": True, "num_experts_per_tok": 0}, "num_experts_per_tok must be in 1..4"),
        ({"moe": True, "num_experts_per_tok": 5}, "num_experts_per_tok must be in 1..4"),
        ({"moe": True, "moe_intermediate_size": 0}, "moe_intermediate_size"),
        ({"moe": True, "decoder_sparse_step": 0}, "decoder_sparse_step"),
        ({"moe": True, "mlp_bias": True}, "mlp_bias is for dense models"),
        ({"hiden_size": 8}, "hiden_size"),
        ({"vocab_size": "many"}, "vocab_size"),
    ],
)
def test_bad_shapes_are_refused_by_name(
    changes: dict[str, Any], words: str, make_config: Callable[..., ModelConfig]
) -> None:
    with pytest.raises(ValidationError, match=words):
        make_config(**changes)


def test_the_longest_sequence_and_how_it_is_reached(make_config: Callable[..., ModelConfig]) -> None:
    context = Context(native=32768, target=131072)
    assert make_config().longest == 128 and make_config(context=context).longest == 131072
    assert context.describe() == ("YaRN from 32768 to 131072 tokens, factor 4, for sequences beyond the native length")
    chunked = Context(native=64, target=96, method="dca", static=True)
    assert chunked.describe() == "Dual Chunk Attention from 64 to 96 tokens, for every sequence"


def test_a_missing_key_is_an_error() -> None:
    with pytest.raises(ValidationError, match="rope_theta"):
        ModelConfig(vocab_size=1)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_key_value_heads", 0),
        ("hidden_size", -16),
        ("num_hidden_layers", 0),
        ("num_hidden_layers", 10**9),
        ("head_dim", 0),
        ("rope_theta", 1.0),
    ],
)
def test_impossible_sizes_are_refused_by_name(
    field: str, value: float, make_config: Callable[..., ModelConfig]
) -> None:
    with pytest.raises(ValidationError, match=field):
        make_config(**{field: value})


def test_yarn_needs_rotations_in_order() -> None:
    with pytest.raises(ValidationError, match="beta_slow"):
        Context(native=32, target=64, beta_fast=0.0)


def test_llama3_scaling_does_not_bound_the_length(make_config: Callable[..., ModelConfig]) -> None:
    context = {"native": 8192, "target": 65536, "method": "llama3"}
    assert make_config(max_position_embeddings=131072, context=context).longest == 131072
    assert make_config(context={"native": 32, "target": 256}).longest == 256
