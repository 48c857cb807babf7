"""Model folders: every misfit is an error that names the tensor or the key."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from twofold.base.records import InputError
from twofold.model.qwen3 import Qwen3
from twofold.model.weights import config_from_hf, config_to_hf, from_hf, load_weights, save_weights, split_sizes, to_hf

Make = Callable[..., Qwen3]


def test_names_are_hugging_faces(make_model: Make) -> None:
    dense, moe = to_hf(make_model()), to_hf(make_model(True, tie_word_embeddings=False))
    assert dense["model.layers.1.self_attn.k_proj.weight"].shape == (12, 16)
    assert dense["model.layers.0.mlp.up_proj.weight"].shape == (24, 16) and "lm_head.weight" not in dense
    assert moe["model.layers.0.mlp.experts.3.down_proj.weight"].shape == (16, 10)
    assert {"model.layers.0.mlp.gate.weight", "lm_head.weight", "model.norm.weight"} <= set(moe)
    assert not any("qkv" in name or "gate_up" in name for name in [*dense, *moe])


@pytest.mark.parametrize("moe", [False, True])
def test_round_trip_and_split_sizes(moe: bool, make_model: Make) -> None:
    model, other = make_model(moe), make_model(moe, seed=9)
    from_hf(other, to_hf(model), "here")
    for (name, a), (_, b) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(a, b), name
        sizes = split_sizes(model.config, name)
        assert not sizes or sum(sizes) == a.shape[-2]


@pytest.mark.parametrize(
    "name", ["model.layers.1.self_attn.v_proj.weight", "model.layers.0.mlp.experts.2.up_proj.weight"]
)
def test_missing_and_misshapen_tensors_are_named(name: str, make_model: Make) -> None:
    model = make_model(True)
    tensors = to_hf(model)
    wrong = tensors | {name: tensors[name][:-1]}
    with pytest.raises(InputError, match=rf"here: tensor '{name}' has shape"):
        from_hf(model, wrong, "here")
    del tensors[name]
    with pytest.raises(InputError, match=rf"here: tensor '{name}' is missing"):
        from_hf(model, tensors, "here")


def test_left_over_tensors_are_named(make_model: Make) -> None:
    model = make_model()
    extra = {"model.layers.7.x": torch.zeros(1), "model.layers.0.self_attn.q_proj.bias": torch.zeros(24)}
    with pytest.raises(InputError, match=r"unexpected tensor 'model.layers.0.self_attn.q_proj.bias' \(2 in all\)"):
        from_hf(model, to_hf(model) | extra, "here")


def test_a_stored_tied_head_must_equal_the_embedding(make_model: Make) -> None:
    model = make_model()
    tensors = to_hf(model)
    embedding = tensors["model.embed_tokens.weight"]
    from_hf(make_model(seed=2), tensors | {"lm_head.weight": embedding.clone()}, "here")
    with pytest.raises(InputError, match=r"lm_head\.weight differs"):
        from_hf(make_model(seed=2), tensors | {"lm_head.weight": embedding + 1}, "here")


def test_folders_that_cannot_be_read(tmp_path: Path, make_model: Make) -> None:
    with pytest.raises(InputError, match=r"no config\.json"):
        load_weights(tmp_path / "nowhere")
    save_weights(make_model(), tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    for damaged in (b"", whole[:100], whole[:-8]):
        weights.write_bytes(damaged)
        with pytest.raises(InputError, match="is damaged"):
            load_weights(tmp_path)
    weights.unlink()
    with pytest.raises(InputError, match=r"no model.safetensors"):
        load_weights(tmp_path)
    weights.write_bytes(whole)
    for damaged in (b"{", b"\xff\xfe\x00"):
        (tmp_path / "config.json").write_bytes(damaged)
        with pytest.raises(InputError, match="is damaged"):
            load_weights(tmp_path)


@pytest.mark.parametrize("moe", [False, True])
def test_config_round_trip(moe: bool, make_model: Make) -> None:
    config = make_model(moe).config
    values = json.loads(json.dumps(config_to_hf(config)))
    assert config_from_hf(values, "here") == config


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "llama"}, "model_type 'llama' is not supported"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, "rope_scaling"),
        ({"attention_bias": True}, "attention_bias"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"head_dim": 5}, "head_dim"),
        ({"rope_theta": None}, "rope_theta"),
    ],
)
def test_configurations_that_are_refused(changes: dict[str, Any], words: str, make_model: Make) -> None:
    with pytest.raises(InputError, match=f"here: .*{words}"):
        config_from_hf(config_to_hf(make_model().config) | changes, "here")


def test_the_newer_place_of_rope_theta(make_model: Make) -> None:
    config = make_model().config
    values = config_to_hf(config)
    del values["rope_theta"]
    with pytest.raises(InputError, match="here: rope_theta"):
        config_from_hf(values, "here")
    plain = {"rope_type": "default", "rope_theta": 1e4}
    assert config_from_hf(values | {"rope_parameters": plain}, "here") == config
    with pytest.raises(InputError, match="rope_theta"):
        config_from_hf(values | {"rope_parameters": {"rope_type": "default"}}, "here")
    with pytest.raises(InputError, match="yarn"):
        config_from_hf(values | {"rope_parameters": plain | {"rope_type": "yarn", "factor": 4.0}}, "here")
