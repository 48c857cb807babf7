"""config.json: what is written reads back the same, and every misfit is an error that names the key and the fix."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from twofold.base.records import InputError
from twofold.model.config import Context, ModelConfig
from twofold.model.hf_config import (
    config_from_hf,
    config_to_hf,
    model_type,
    read_config,
    read_generation_config,
    write_generation_config,
)

MakeConfig = Callable[..., ModelConfig]
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "qwen3_moe": {"moe": True},
    "qwen2": {"qk_norm": False, "qkv_bias": True},
    "llama": {"qk_norm": False},
    "llama_biased": {"qk_norm": False, "qkv_bias": True, "o_bias": True, "mlp_bias": True},
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


def values_of(config: ModelConfig) -> dict[str, Any]:
    return json.loads(json.dumps(config_to_hf(config)))


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """Keyword arguments of ``make_config``: any family with any context and window that it can express."""
    family = draw(st.sampled_from(sorted(FAMILIES)))
    changes = dict(FAMILIES[family])
    changes |= {"tie_word_embeddings": draw(st.booleans()), "head_dim": draw(st.sampled_from([4, 6]))}
    method = draw(st.sampled_from([None, "yarn", "llama3", "dca"]))
    if method:
        native = draw(st.integers(8, 4096))
        target = native + draw(st.integers(0, 40000))
        changes["context"] = {"native": native, "target": target, "method": method, "static": draw(st.booleans())}
    if method == "dca" and draw(st.booleans()):
        changes["context"] |= {"chunk_size": native, "local_window": draw(st.integers(1, native - 1))}
    if method == "yarn":
        changes["context"] |= {"attention_factor": draw(st.sampled_from([None, 1.25])), "beta_fast": 16.0}
    if not family.startswith("llama") and method != "dca" and draw(st.booleans()):
        changes["sliding_window"] = draw(st.integers(1, 99))
        changes["max_window_layers"] = 0 if family == "qwen3_moe" else draw(st.integers(0, 2))
    if family == "qwen3_moe":
        changes |= {
            "decoder_sparse_step": draw(st.integers(1, 2)),
            "mlp_only_layers": draw(st.sampled_from([(), (1,)])),
        }
        changes |= {"norm_topk_prob": draw(st.booleans())}
    return changes


@given(configs())
def test_what_is_written_reads_back_the_same(make_config: MakeConfig, changes: dict[str, Any]) -> None:
    config = make_config(**changes)
    assert config_from_hf(values_of(config), "here") == config


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, make_config: MakeConfig) -> None:
    config = make_config(**FAMILIES[family])
    values = values_of(config)
    assert values["model_type"] == model_type(config) == family.removesuffix("_biased")
    assert not {"qk_norm", "context", "twofold"} & values.keys(), "no private field where Hugging Face has a word"
    assert config_to_hf(config, torch.bfloat16)["torch_dtype"] == "bfloat16"


def test_only_twofold_holds_what_hugging_face_has_no_word_for(make_config: MakeConfig) -> None:
    context = Context(native=64, target=256, static=True)
    assert values_of(make_config(context=context))["twofold"] == {"context": {"static": True}}
    dca = values_of(make_config(context=context.model_copy(update={"method": "dca"})))
    assert dca["dual_chunk_attention_config"] == {
        "chunk_size": 48, "local_size": 4, "original_max_position_embeddings": 64,
    }  # fmt: skip
    assert dca["twofold"] == {"context": {"static": True, "target": 256}} and dca["rope_scaling"] is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"qkv_bias": True}, "qk_norm=True, qkv_bias=True"),
        ({"moe": True, "qk_norm": False}, "no such family"),
        ({"o_bias": True}, "o_bias=True, .* no such family"),
        ({"qk_norm": False, "o_bias": True}, "no such family"),
        ({"qk_norm": False, "qkv_bias": True, "mlp_bias": True}, "no such family"),
        ({"qk_norm": False, "sliding_window": 4}, "llama has no sliding_window"),
        ({"moe": True, "sliding_window": 4, "max_window_layers": 1}, "qwen3_moe gives every layer the window"),
    ],
)
def test_what_hugging_face_cannot_express(changes: dict[str, Any], words: str, make_config: MakeConfig) -> None:
    with pytest.raises(InputError, match=words):
        config_to_hf(make_config(**changes))


REQUIRED = [
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "max_position_embeddings",
    "tie_word_embeddings", "initializer_range", "hidden_act",
]  # fmt: skip
REQUIRED_MOE = [
    "num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "decoder_sparse_step",
    "mlp_only_layers",
]  # fmt: skip


@pytest.mark.parametrize("key", REQUIRED + REQUIRED_MOE)
def test_a_missing_key_is_an_error_and_not_a_default(key: str, make_config: MakeConfig) -> None:
    values = values_of(make_config(moe=key in REQUIRED_MOE))
    del values[key]
    with pytest.raises(InputError, match=rf"^here: {key} is missing, .*; add {key}"):
        config_from_hf(values, "here")


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_head_dim_is_defined_for_qwen2_and_llama(family: str, make_config: MakeConfig) -> None:
    values = values_of(make_config(**FAMILIES[family])) | {"head_dim": None}
    assert config_from_hf(values, "here").head_dim == 4  # 16 / 4
    with pytest.raises(InputError, match="18 is no multiple of 4 heads; add head_dim"):
        config_from_hf(values | {"hidden_size": 18}, "here")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "mistral"}, "model_type 'mistral' is not supported; use one of qwen3, qwen3_moe, qwen2, llama"),
        ({"attention_bias": True}, "attention_bias = True is not supported"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"use_qk_norm": False}, "use_qk_norm"),
        ({"qkv_bias": True}, "qkv_bias"),
        ({"shared_expert_intermediate_size": 8}, "shared_expert"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"head_dim": 5}, "head_dim must be even"),
        ({"hidden_size": "wide"}, "hidden_size: .*got 'wide'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type = 'linear' is not supported"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "original_max_position_embeddings is missing"),
        ({"rope_scaling": YARN | {"mscale": "a", "mscale_all_dim": 1.0}}, "must be numbers >= 0, got 'a', 1.0"),
        ({"rope_scaling": YARN | {"truncate": False}}, "truncate = False .* compute something else; give a checkpoint"),
        ({"rope_scaling": YARN | {"factor": 3.7}}, r"factor 3.7 times 32 is no whole number of tokens; try 118/32"),
        ({"rope_scaling": YARN | {"factor": "4"}}, "do not fit"),
        ({"rope_scaling": YARN | {"factor": 10**400}}, "do not fit"),
        ({"rope_scaling": YARN | {"original_max_position_embeddings": 2**62}}, "do not fit"),
        ({"rope_scaling": YARN | {"factor": 2.0**31}}, "target must be <= 2147483648"),
        ({"vocab_size": 2**62}, "vocab_size must be <= 2147483648"),
        ({"vocab_size": 2**31, "hidden_size": 2**31}, r"these sizes make .*e\+18 parameters"),
        ({"rope_scaling": YARN | {"rope_type": "llama3"}}, "low_freq_factor is missing"),
        ({"rope_scaling": [4]}, "rope_scaling must be an object"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters differs between layers"),
        ({"rope_parameters": {"rope_theta": 2e4}}, "two values of rope_theta, 20000.0 and 10000.0"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
        ({"rope_scaling": YARN, "dual_chunk_attention_config": {"chunk_size": 8}}, "both rope_type 'yarn' and dual"),
        ({"twofold": {"context": {"static": True}}}, "twofold.context.static has no meaning"),
        ({"rope_scaling": YARN, "twofold": {"context": {"target": 9}}}, "twofold.context.target has no meaning"),
        ({"use_sliding_window": True}, "sliding_window is missing"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "use_sliding_window is not true"),
        (
            {"use_sliding_window": True, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
            "not full attention first",
        ),
        ({"layer_types": "full_attention"}, "layer_types must be a list"),
    ],
)
def test_configurations_that_are_refused(changes: dict[str, Any], words: str, make_config: MakeConfig) -> None:
    with pytest.raises(InputError, match=f"^here: .*{words}"):
        config_from_hf(values_of(make_config()) | changes, "here")


def test_both_spellings_of_rope(make_config: MakeConfig) -> None:
    config = make_config()
    values = values_of(config)
    del values["rope_theta"], values["rope_scaling"]
    five = values | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    assert config_from_hf(five, "here") == config
    yarn = Context(native=32, target=128)
    four = values_of(config) | {"rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 32}}
    assert config_from_hf(four, "here") == make_config(context=yarn)
    five = values | {"rope_parameters": YARN | {"rope_theta": 1e4, "truncate": True}}
    assert config_from_hf(five, "here") == make_config(context=yarn)


@pytest.mark.parametrize(
    ("keys", "factor"),
    [
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1.0),
        ({"mscale": 0.5, "mscale_all_dim": 2}, (0.05 * math.log(4) + 1) / (0.2 * math.log(4) + 1)),
        ({"mscale": 0.5, "mscale_all_dim": 2, "attention_factor": 1.5}, 1.5),
        ({"mscale": 0.5}, None),
        ({"mscale": 0.5, "mscale_all_dim": 0}, None),
    ],
)
def test_mscale_is_an_attention_factor(keys: dict[str, float], factor: float | None, make_config: MakeConfig) -> None:
    """As transformers reads it (tests/parity/test_families.py)."""
    context = config_from_hf(values_of(make_config()) | {"rope_scaling": YARN | keys}, "here").context
    assert context is not None and context.attention_factor == factor


def test_attn_factor_multiplies_the_attention_factor(make_config: MakeConfig) -> None:
    """DeepSeek-R1-0528-Qwen3-8B's rope_scaling; 1 / (0.1 ln 4 + 1) takes YaRN's own factor back."""
    official = {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768,
        "attn_factor": 0.8782488562869419,
    }  # fmt: skip
    values = values_of(make_config(max_position_embeddings=131072))
    config = config_from_hf(values | {"rope_scaling": official}, "here")
    assert config.context is not None and config.context.attention_factor == pytest.approx(1.0, abs=1e-12)
    assert (config.context.native, config.context.target) == (32768, 131072)
    assert config_from_hf(values_of(config), "here") == config
    both = official | {"attention_factor": 1.0}
    assert config_from_hf(values | {"rope_scaling": both}, "here").context == config.context
    scaled = YARN | {"mscale": 1.0, "mscale_all_dim": 1.0, "attn_factor": 1.25}
    context = config_from_hf(values_of(make_config()) | {"rope_scaling": scaled}, "here").context
    assert context is not None and context.attention_factor == 1.25


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (
            {"attn_factor": 0.9, "attention_factor": 0.9},
            r"attention_factor 0\.9 and attn_factor 0\.9 differ: .* 1\.138629",
        ),
        ({"attn_factor": "x"}, "attn_factor must be a number above 0, got 'x'"),
        ({"attn_factor": 0}, "attn_factor must be a number above 0, got 0"),
        ({"attention_factor": 0.0}, r"attention_factor must be a number above 0, got 0\.0"),
        ({"attention_factor": float("inf")}, "attention_factor must be a number above 0, got inf"),
        ({"attention_factor": "x"}, "attention_factor"),
        ({"extrapolation_factor": 0.5}, "extrapolation_factor = 0.5 of rope_type 'yarn' is not supported"),
    ],
)
def test_attention_factors_that_are_refused(keys: dict[str, Any], words: str, make_config: MakeConfig) -> None:
    with pytest.raises(InputError, match=f"^here: .*{words}"):
        config_from_hf(values_of(make_config()) | {"rope_scaling": YARN | keys}, "here")


def test_windows_in_both_spellings(make_config: MakeConfig) -> None:
    values = values_of(make_config()) | {"use_sliding_window": True, "sliding_window": 4}
    expected = make_config(sliding_window=4, max_window_layers=1)
    assert config_from_hf(values | {"max_window_layers": 1}, "here") == expected
    kinds = ["full_attention", "sliding_attention"]
    assert config_from_hf(values | {"layer_types": kinds, "max_window_layers": 28}, "here") == expected
    off = values | {"use_sliding_window": False, "sliding_window": 4096, "layer_types": ["full_attention"] * 2}
    assert config_from_hf(off, "here") == make_config()


def test_released_configurations(make_config: MakeConfig) -> None:
    """Keys as in the released files that are easy to get wrong."""
    coder = values_of(make_config(moe=True)) | {
        "qkv_bias": False, "use_qk_norm": True, "shared_expert_intermediate_size": 0, "mlp_only_layers": None,
    }  # fmt: skip
    assert config_from_hf(coder, "here") == make_config(moe=True)
    five = coder | {"num_local_experts": coder["num_experts"]}
    del five["num_experts"]
    assert config_from_hf(five, "here") == make_config(moe=True)
    million = values_of(make_config(**FAMILIES["qwen2"])) | {
        "dual_chunk_attention_config": {
            "chunk_size": 262144, "local_size": 8192, "original_max_position_embeddings": 262144,
        },
        "max_position_embeddings": 1010000,
    }  # fmt: skip
    context = config_from_hf(million, "here").context
    assert context == Context(native=262144, target=1010000, method="dca", chunk_size=262144, local_window=8192)


def test_folders_that_cannot_be_read(tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"^[^:]* is not a model folder: it has no config\.json$"):
        read_config(tmp_path)
    path = tmp_path / "config.json"
    for damaged in (b"{", b"\xff\xfe\x00", b"[]", b'{"a":' * 100_000, b'{"a": ' + b"9" * 5000 + b"}"):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=rf"^{path} is damaged"):
            read_config(tmp_path)
    path.write_text(json.dumps(config_to_hf(make_config())))
    assert read_config(tmp_path) == make_config()

    def refuse(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(InputError, match=rf"^{path} cannot be read: Permission denied$"):
        read_config(tmp_path)


def test_generation_config(tmp_path: Path) -> None:
    assert read_generation_config(tmp_path) == {}
    values = {"do_sample": True, "temperature": 0.6, "eos_token_id": [2, 1], "pad_token_id": 1}
    write_generation_config(tmp_path, values)
    assert read_generation_config(tmp_path) == values
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(InputError, match=r"generation_config\.json is damaged"):
        read_generation_config(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": ["qwen3"]}, "model_type"),
        ({"rope_scaling": YARN | {"factor": float("inf")}}, "factor = inf"),
        ({"num_key_value_heads": 0}, "num_key_value_heads must be >= 1"),
        ({"hidden_size": -1}, "hidden_size must be >= 1"),
    ],
)
def test_values_that_no_model_has(changes: dict[str, Any], words: str, make_config: MakeConfig) -> None:
    with pytest.raises(InputError, match=words):
        config_from_hf(values_of(make_config()) | changes, "config.json")
