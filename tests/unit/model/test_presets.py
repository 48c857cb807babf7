"""Released shapes: parameters, active parameters, cache bytes and FLOPs against published and counted numbers."""

from __future__ import annotations

import pytest

from twofold.base.records import InputError
from twofold.model.hf_config import config_from_hf, config_to_hf, model_type
from twofold.model.presets import PRESETS, preset
from twofold.model.weights import empty_model, to_hf

# Parameters, and non-embedding (dense) or active (MoE) ones, bf16 cache bytes a token.
DENSE = {
    "Qwen3-0.6B": (596_049_920, 440_467_456, 114_688),
    "Qwen3-1.7B": (1_720_574_976, 1_409_410_048, 114_688),
    "Qwen3-4B": (4_022_468_096, 3_633_511_936, 147_456),
    "Qwen3-8B": (8_190_735_360, 6_946_075_648, 147_456),
    "Qwen3-14B": (14_768_307_200, 13_212_482_560, 163_840),
    "Qwen3-32B": (32_762_123_264, 31_206_298_624, 262_144),
}
MOE = {
    "Qwen3-30B-A3B": (30_532_122_624, 3_353_032_704, 98_304),
    "Qwen3-235B-A22B": (235_093_634_560, 22_190_763_520, 192_512),
    "Qwen3-Coder-480B-A35B": (480_154_875_392, 35_474_765_312, 253_952),
}
# Published sizes in billions, with and without embeddings (arXiv 2412.15115 and the model cards).
QWEN25 = {
    "Qwen2.5-0.5B": (0.49, 0.36), "Qwen2.5-1.5B": (1.54, 1.31), "Qwen2.5-3B": (3.09, 2.77), "Qwen2.5-7B": (7.61, 6.53),
    "Qwen2.5-14B": (14.7, 13.1), "Qwen2.5-32B": (32.5, 31.0), "Qwen2.5-72B": (72.7, 70.0),
}  # fmt: skip


def embedding(name: str) -> int:
    config = PRESETS[name]
    return config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)


@pytest.mark.parametrize("name", DENSE)
def test_dense_numbers(name: str) -> None:
    config, (total, without, cache) = PRESETS[name], DENSE[name]
    assert config.num_parameters() == config.num_parameters(active=True) == total
    assert total - embedding(name) == without
    assert config.kv_bytes_per_token() == cache and config.kv_bytes_per_token(4) == 2 * cache


@pytest.mark.parametrize("name", MOE)
def test_moe_numbers(name: str) -> None:
    config, (total, active, cache) = PRESETS[name], MOE[name]
    assert config.num_parameters() == total and config.num_parameters(active=True) == active
    assert config.kv_bytes_per_token() == cache


@pytest.mark.parametrize("name", QWEN25)
def test_qwen25_numbers(name: str) -> None:
    total, without = QWEN25[name]
    assert PRESETS[name].num_parameters() / 1e9 == pytest.approx(total, rel=0.011)
    assert (PRESETS[name].num_parameters() - embedding(name)) / 1e9 == pytest.approx(without, rel=0.011)


@pytest.mark.parametrize("name", ["Qwen3-0.6B", "Qwen3-8B", "Qwen3-30B-A3B", "Qwen2.5-0.5B", "Qwen2.5-7B"])
def test_formulas_equal_the_model_itself(name: str) -> None:
    """Counted on a model without memory; FLOPs are 2 for every weight that multiplies, and attention."""
    config = PRESETS[name]
    tensors = to_hf(empty_model(config, device="meta"))
    assert sum(tensor.numel() for tensor in tensors.values()) == config.num_parameters()
    moe = max(config.num_experts, 1)
    used = config.num_experts_per_tok or 1
    multiplied = config.vocab_size * config.hidden_size  # the head
    for tensor_name, tensor in tensors.items():
        if ".layers." in tensor_name:
            multiplied += tensor.numel() * (used if ".experts." in tensor_name else moe) // moe
    vectors = (
        config.num_parameters(active=True) - multiplied - (0 if config.tie_word_embeddings else embedding(name) // 2)
    )
    assert vectors == config.hidden_size  # the final norm, which the formula counts too
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    for context in (0, 1000):
        flops = config.flops_per_token(context, backward=False)
        assert flops == 2 * (multiplied + vectors) + attention * context
        assert config.flops_per_token(context, backward=True) == 3 * flops


def test_tensor_counts() -> None:
    """11 L + 2 (+ 1 untied) for dense models, 9 L + 3 E L + 3 for mixtures."""
    counts = {name: len(to_hf(empty_model(PRESETS[name], device="meta"))) for name in ("Qwen3-0.6B", "Qwen3-30B-A3B")}
    assert counts == {"Qwen3-0.6B": 11 * 28 + 2, "Qwen3-30B-A3B": 9 * 48 + 3 * 128 * 48 + 3}


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_hugging_face_configuration(name: str) -> None:
    config = PRESETS[name]
    assert config_from_hf(config_to_hf(config), "here") == config
    expected = "qwen2" if name.startswith("Qwen2.5") else "qwen3_moe" if config.num_experts else "qwen3"
    assert model_type(config) == expected
    assert config.head_dim == (64 if name == "Qwen2.5-0.5B" else 128)


def test_later_variants_differ_in_what_they_should() -> None:
    for size, theta in (("4B", 5e6), ("30B-A3B", 1e7), ("235B-A22B", 5e6)):
        old = PRESETS[f"Qwen3-{size}"]
        for kind in ("Instruct", "Thinking"):
            new = PRESETS[f"Qwen3-{size}-{kind}-2507"]
            changed = {"rope_theta": theta, "max_position_embeddings": 262144}
            assert new == old.model_copy(update=changed)
    coder = PRESETS["Qwen3-Coder-30B-A3B"]
    assert coder.num_parameters() == PRESETS["Qwen3-30B-A3B"].num_parameters() and coder.intermediate_size == 5472


def test_names() -> None:
    assert preset("qwen/qwen3-0.6b") is PRESETS["Qwen3-0.6B"]
    with pytest.raises(InputError, match=r"no preset is called 'Qwen3-30B'; did you mean Qwen3-30B-A3B\?"):
        preset("Qwen3-30B")
    with pytest.raises(InputError, match=r"no preset is called '!'; known: Qwen3-0\.6B, "):
        preset("!")
