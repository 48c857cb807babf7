"""Weights in and out: every misfit is an error that names the tensor, and nothing is held twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from twofold.base.records import InputError
from twofold.model import safetensors_io
from twofold.model.qwen3 import Qwen3
from twofold.model.weights import (
    FolderSource,
    empty_model,
    from_hf,
    load_weights,
    resolve_dtype,
    save_weights,
    split_sizes,
    to_hf,
)

Make = Callable[..., Qwen3]
KINDS: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "moe": {"moe": True},
    "qwen2": {"qk_norm": False, "qkv_bias": True},
    "llama": {"qk_norm": False, "tie_word_embeddings": False},
}


def assert_equal(ours: Qwen3, theirs: Qwen3) -> None:
    assert ours.config == theirs.config
    for (name, a), (other, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == other and a.dtype == b.dtype and torch.equal(a, b), name


def test_names_are_hugging_faces(make_model: Make) -> None:
    dense, moe = to_hf(make_model()), to_hf(make_model(True, tie_word_embeddings=False))
    assert dense["model.layers.1.self_attn.k_proj.weight"].shape == (12, 16)
    assert dense["model.layers.0.mlp.up_proj.weight"].shape == (24, 16) and "lm_head.weight" not in dense
    assert moe["model.layers.0.mlp.experts.3.down_proj.weight"].shape == (16, 10)
    assert {"model.layers.0.mlp.gate.weight", "lm_head.weight", "model.norm.weight"} <= set(moe)
    assert not any("qkv" in name or "gate_up" in name for name in [*dense, *moe])


def test_biases_are_split_like_their_matrices(make_model: Make) -> None:
    model = make_model(qk_norm=False, qkv_bias=True)
    tensors = to_hf(model)
    shapes = [tuple(tensors[f"model.layers.0.self_attn.{part}_proj.bias"].shape) for part in "qkv"]
    assert shapes == [(24,), (12,), (12,)] and not any("q_norm" in name for name in tensors)
    bias = model.model.layers[0].self_attn.qkv_proj.bias
    assert torch.equal(torch.cat([tensors[f"model.layers.0.self_attn.{p}_proj.bias"] for p in "qkv"]), bias)


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_and_split_sizes(kind: str, make_model: Make) -> None:
    model, other = make_model(**KINDS[kind]), make_model(**KINDS[kind], seed=9)
    from_hf(other, to_hf(model), "here")
    assert_equal(model, other)
    for name, parameter in model.named_parameters():
        sizes = split_sizes(model.config, name)
        assert not sizes or sum(sizes) == parameter.shape[-2 if parameter.dim() > 1 else -1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shard_bytes", [1 << 30, 3000])
def test_folders_round_trip(kind: str, shard_bytes: int, tmp_path: Path, make_model: Make) -> None:
    model = make_model(**KINDS[kind])
    save_weights(model, tmp_path, shard_bytes)
    assert_equal(load_weights(tmp_path), model)
    files = sorted(path.name for path in tmp_path.iterdir())
    if shard_bytes > 10**6:
        assert files == ["config.json", "model.safetensors"]
        return
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = [file for file in files if file.startswith("model-")]
    assert len(shards) > 2 and files == ["config.json", *shards, "model.safetensors.index.json"]
    assert set(index["weight_map"].values()) == set(shards)
    assert index["metadata"]["total_size"] == 4 * model.config.num_parameters()
    assert all(len(load_file(tmp_path / s)) == list(index["weight_map"].values()).count(s) for s in shards)


@pytest.mark.parametrize("stored", safetensors_io.NAMES)
@pytest.mark.parametrize("wanted", safetensors_io.NAMES)
def test_types_on_disk_and_in_memory(
    stored: torch.dtype, wanted: torch.dtype, tmp_path: Path, make_model: Make
) -> None:
    model = make_model().to(stored)
    save_weights(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == str(stored).removeprefix("torch.")
    assert_equal(load_weights(tmp_path, wanted), model.to(wanted))


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_model_is_built_in_its_final_type(kind: str, make_model: Make) -> None:
    built = make_model(**KINDS[kind])
    empty = empty_model(built.config, torch.bfloat16)
    assert {n: t.shape for n, t in empty.state_dict().items()} == {n: t.shape for n, t in built.state_dict().items()}
    assert all(p.dtype == torch.bfloat16 and p.requires_grad and not p.is_meta for p in empty.parameters())
    assert all(p.is_meta for p in empty_model(built.config, device="meta").parameters())
    assert all(p.dtype == torch.float32 for p in Qwen3(built.config).parameters()), "the mode ends with the block"


def test_loading_draws_no_random_numbers(tmp_path: Path, make_model: Make) -> None:
    """The default initialisation of a large model takes seconds, and would move the global generator."""
    save_weights(make_model(True, tie_word_embeddings=False), tmp_path)
    state = torch.get_rng_state()
    load_weights(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)


LOAD = """
import sys, torch
from pathlib import Path
from twofold.model.weights import load_weights
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
modules, before = set(sys.modules), peak()
model = load_weights(Path(sys.argv[1]), torch.bfloat16)
print(peak() - before, len(set(sys.modules) - modules))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_loading_needs_one_copy_and_no_compiler(stored: torch.dtype, tmp_path: Path, make_model: Make) -> None:
    """torch's compiler, which some operations on the meta device import, takes seconds to load."""
    model = make_model(vocab_size=200_000, hidden_size=512).to(stored)
    save_weights(model, tmp_path)
    command = [sys.executable, "-c", LOAD, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, modules = map(int, done.stdout.split())
    size = 2 * model.config.num_parameters()
    chunks = 0 if stored == torch.bfloat16 else safetensors_io.CHUNK_BYTES
    assert size < peak < 1.05 * size + chunks and modules < 30


def test_fused_experts_are_read_too(tmp_path: Path, make_model: Make) -> None:
    """The layout in which transformers 5 holds experts in memory."""
    model = make_model(True)
    save_weights(model, tmp_path)
    fused = {name: t for name, t in load_file(tmp_path / "model.safetensors").items() if ".experts." not in name}
    own = model.state_dict()
    fused |= {name: tensor.clone() for name, tensor in own.items() if ".experts." in name}
    save_file(fused, tmp_path / "model.safetensors")
    assert_equal(load_weights(tmp_path), model)


@pytest.mark.parametrize(
    "name", ["model.layers.1.self_attn.v_proj.weight", "model.layers.0.mlp.experts.2.up_proj.weight"]
)
def test_missing_and_misshapen_tensors_are_named(name: str, make_model: Make) -> None:
    model, before = make_model(True), make_model(True)
    tensors = {key: torch.zeros_like(tensor) for key, tensor in to_hf(model).items()}
    with pytest.raises(InputError, match=rf"here: tensor '{name}' has shape .*; use the config.json that belongs"):
        from_hf(model, tensors | {name: tensors[name][:-1]}, "here")
    del tensors[name]
    with pytest.raises(InputError, match=rf"here: tensor '{name}' is missing"):
        from_hf(model, tensors, "here")
    assert_equal(model, before)  # nothing was read before everything fitted


def test_left_over_tensors_are_named(make_model: Make) -> None:
    model = make_model()
    extra = {"model.layers.7.x": torch.zeros(1), "model.layers.0.self_attn.q_proj.bias": torch.zeros(24)}
    with pytest.raises(InputError, match=r"unexpected tensor 'model.layers.0.self_attn.q_proj.bias' \(2 in all\)"):
        from_hf(model, to_hf(model) | extra, "here")
    untied = to_hf(make_model(tie_word_embeddings=False))
    with pytest.raises(InputError, match=r"lm_head\.weight differs .*; set tie_word_embeddings to false"):
        from_hf(model, untied, "here")
    from_hf(make_model(), to_hf(model) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(3)}, "here")


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
        with pytest.raises(InputError, match=rf"^{weights} is damaged: .*; copy or download the file again$"):
            load_weights(tmp_path)
    weights.unlink()
    with pytest.raises(InputError, match=r"no model.safetensors and no model.safetensors.index.json; copy or download"):
        load_weights(tmp_path)
    save_file(to_hf(make_model()) | {"model.norm.weight": torch.ones(16, dtype=torch.int8)}, weights)
    with pytest.raises(
        InputError, match=rf"^{weights}: tensor 'model.norm.weight' is stored as I8; .* give the original"
    ):
        load_weights(tmp_path)


def test_shards_that_do_not_fit_their_index(tmp_path: Path, make_model: Make) -> None:
    save_weights(make_model(), tmp_path, 3000)
    index = tmp_path / "model.safetensors.index.json"
    text = index.read_text()
    shard = tmp_path / next(iter(json.loads(text)["weight_map"].values()))
    whole = shard.read_bytes()

    def refused(words: str) -> None:
        with pytest.raises(InputError, match=words):
            load_weights(tmp_path)

    shard.unlink()
    refused(rf"index.json names {shard.name} for tensor .*, but there is no such file; copy or download it")
    shard.write_bytes(whole[:-1])
    refused(rf"^{shard} is damaged: 1 bytes are missing")
    shard.write_bytes(whole)
    (tmp_path / "model.safetensors").write_bytes(whole)
    refused("holds both model.safetensors and model.safetensors.index.json; delete the one that is out of date")
    (tmp_path / "model.safetensors").unlink()
    other = next(path for path in tmp_path.glob("model-*") if path != shard)
    kept = other.read_bytes()
    other.write_bytes(whole)
    refused(rf"^{tmp_path}.*(expects tensor|is also in)")
    other.write_bytes(kept)
    for damaged in ("{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}'):
        index.write_text(damaged)
        refused(rf"^{index} is damaged")
    index.write_text(text.replace(shard.name, f"../{shard.name}"))
    refused("there is no such file")
    index.write_text(text)
    assert_equal(load_weights(tmp_path), make_model())


def test_saving_again_leaves_no_old_files(tmp_path: Path, make_model: Make) -> None:
    for shard_bytes in (3000, 1 << 30, 6000, 3000):
        save_weights(make_model(), tmp_path, shard_bytes)
        assert_equal(load_weights(tmp_path), make_model())
        assert not list(tmp_path.glob(".*"))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    save_weights(make_model(), tmp_path, 3000)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_failed_save_leaves_what_was_there(tmp_path: Path, make_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    save_weights(make_model(), tmp_path, 3000)
    write, calls = safetensors_io.write, []

    def full(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        calls.append(path)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        write(path, tensors)

    monkeypatch.setattr(safetensors_io, "write", full)
    with pytest.raises(OSError, match="No space"):
        save_weights(make_model(seed=5), tmp_path, 3000)
    assert_equal(load_weights(tmp_path), make_model())
    assert not list(tmp_path.glob(".*"))


def test_a_save_killed_between_renames_is_refused(
    tmp_path: Path, make_model: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New shards beside old ones would be a mixture that nothing notices; without config.json it is no model."""
    save_weights(make_model(), tmp_path, 3000)
    replace, calls = os.replace, []

    def killed(temporary: Path, path: Path) -> None:
        calls.append(path.name)
        if len(calls) == 4:  # config.json and the index under their temporary names, then the first two shards
            raise KeyboardInterrupt
        replace(temporary, path)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_weights(make_model(seed=5), tmp_path, 3000)
    monkeypatch.undo()
    assert calls[-1].startswith("model-")
    with pytest.raises(InputError, match=r"no config\.json"):
        load_weights(tmp_path)


def test_saving_copies_nothing(make_model: Make) -> None:
    """What goes to disk are views: a second copy of a large model may not fit."""
    for kind in KINDS.values():
        model = make_model(**kind)
        storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
        for name, tensor in to_hf(model).items():
            assert tensor.untyped_storage().data_ptr() in storages and tensor.is_contiguous(), name


def test_reading_follows_the_order_on_disk(tmp_path: Path, make_model: Make) -> None:
    save_weights(make_model(True), tmp_path)
    entries = FolderSource(tmp_path).entries
    begins = [entries[name][1].begin for name in FolderSource(tmp_path).shapes()]
    assert begins == sorted(begins)


def test_the_type_to_compute_in(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_dtype("auto", "cpu")[0] == torch.float32 and "CPU" in resolve_dtype("auto", "cpu")[1]
    assert resolve_dtype("bfloat16", "cpu") == (torch.bfloat16, "as asked")
    assert resolve_dtype(torch.float16, "cuda") == (torch.float16, "as asked")
    for native, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native)
        assert resolve_dtype("auto", "cuda")[0] == dtype
    with pytest.raises(InputError, match="'int8' is none to compute in; use one of auto, float32, float16, bfloat16"):
        resolve_dtype("int8", "cpu")


def test_a_folder_saved_without_the_prefix_loads(make_model: Make, tmp_path: Path) -> None:
    """Qwen3-Embedding's files come from a model without a head, whose names have no ``model.`` in front."""
    model = make_model()
    save_weights(model, tmp_path)
    bare = {name.removeprefix("model."): tensor.clone() for name, tensor in to_hf(model).items()}
    save_file(bare, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_equal(load_weights(tmp_path), model)


def test_a_misfit_takes_no_memory(make_model: Make, tmp_path: Path) -> None:
    save_weights(make_model(), tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"vocab_size": 2 * 10**9}))
    with pytest.raises(InputError, match=r"embed_tokens.weight' has shape \(40, 16\)"):
        load_weights(tmp_path)
