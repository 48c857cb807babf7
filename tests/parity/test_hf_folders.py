"""Folders go to transformers and come back bit-equal: all families, tied and not, one file and shards."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twofold.model.attn_inputs import AttnInputs
from twofold.model.config import ModelConfig
from twofold.model.hf_config import write_generation_config
from twofold.model.qwen3 import Qwen3
from twofold.model.weights import load_weights, save_weights

transformers = pytest.importorskip("transformers")

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "qwen3_moe": {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 12},
    "qwen2": {"qk_norm": False, "qkv_bias": True},
    "llama": {"qk_norm": False},
    "llama_biased": {"qk_norm": False, "qkv_bias": True, "o_bias": True},
    "llama_mlp_biased": {"qk_norm": False, "mlp_bias": True},
}


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    """Small shapes of every family with every setting that transformers knows too."""
    family = draw(st.sampled_from(sorted(FAMILIES)))
    kv, groups = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2, 3]))
    values: dict[str, Any] = {
        "vocab_size": draw(st.integers(20, 60)),
        "hidden_size": 4 * kv * groups,
        "intermediate_size": draw(st.integers(4, 20)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": kv * groups,
        "num_key_value_heads": kv,
        "head_dim": 4 if family.startswith("llama") else draw(st.sampled_from([4, 8])),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5])),
        "rope_theta": draw(st.sampled_from([1e4, 1e6])),
        "max_position_embeddings": 64,
        "tie_word_embeddings": draw(st.booleans()),
        "initializer_range": 0.3,
    }
    scaling = draw(st.sampled_from([None, None, "yarn", "llama3"]))
    if scaling:
        values["context"] = {"native": 16, "target": 16 * draw(st.sampled_from([2, 4])), "method": scaling}
    if not family.startswith("llama") and draw(st.booleans()):
        values["sliding_window"] = draw(st.integers(2, 9))
        values["max_window_layers"] = 0 if family == "qwen3_moe" else draw(st.integers(0, values["num_hidden_layers"]))
    if family == "qwen3_moe":
        values |= {"decoder_sparse_step": draw(st.integers(1, 2)), "norm_topk_prob": draw(st.booleans())}
    return ModelConfig(**(values | FAMILIES[family]))


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("folders")


@settings(max_examples=12)
@given(configs(), st.sampled_from([torch.float32, torch.bfloat16]), st.sampled_from([1 << 30, 2500]))
def test_ours_to_transformers_to_ours(scratch: Path, config: ModelConfig, dtype: torch.dtype, shard: int) -> None:
    ours = Qwen3(config)
    ours.init_weights(seed=4)
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
    ours.to(dtype)
    save_weights(ours, scratch / "ours", shard)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        scratch / "ours", dtype="auto", output_loading_info=True
    )
    assert theirs.dtype == dtype and not any(info.values()), info
    for path in (scratch / "theirs").glob("*"):
        path.unlink()
    theirs.save_pretrained(scratch / "theirs", max_shard_size=shard)
    again = load_weights(scratch / "theirs", dtype)
    assert again.config == config
    for (name, a), (_, b) in zip(ours.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shard", [1 << 30, 2500])
def test_transformers_gives_the_same_logits(family: str, shard: int, tmp_path: Path) -> None:
    values: dict[str, Any] = dict(
        vocab_size=50, hidden_size=24, intermediate_size=20, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, head_dim=4, rms_norm_eps=1e-6, rope_theta=1e4, max_position_embeddings=64,
        tie_word_embeddings=False, initializer_range=0.3,
    )  # fmt: skip
    ours = Qwen3(ModelConfig(**(values | FAMILIES[family])))
    ours.init_weights(seed=4)
    for name, parameter in ours.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.uniform_(parameter, -0.5, 0.5)
    save_weights(ours, tmp_path, shard)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    )
    tokens = torch.randint(0, 50, (19,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = ours.logits(ours(tokens, torch.arange(19), AttnInputs.packed([0, 19])))
        expected = theirs(tokens[None]).logits[0]
    torch.testing.assert_close(logits, expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-5)


def test_generation_config_is_read(tmp_path: Path) -> None:
    values = {
        "do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "eos_token_id": [5, 3], "pad_token_id": 3,
    }  # fmt: skip
    write_generation_config(tmp_path, values)
    theirs = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert json.loads(theirs.to_json_string()).items() >= values.items()
