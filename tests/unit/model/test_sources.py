"""What a folder's weights may be: FP8 with block scales is dequantised, everything else is named with a way out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from twofold.base.records import InputError
from twofold.model import safetensors_io
from twofold.model.hf_config import config_to_hf
from twofold.model.quantised import load_quantised
from twofold.model.qwen3 import Qwen3
from twofold.model.weights import empty_model, load_weights, open_folder, save_weights, to_hf

Make = Callable[..., Qwen3]
OFFICIAL = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [8, 6]}
SHAPE = {"hidden_size": 16, "intermediate_size": 20, "head_dim": 6}  # no multiples of a block


def fp8_folder(model: Qwen3, folder: Path, **changes: Any) -> dict[str, torch.Tensor]:
    """A folder with every linear layer in FP8, and its tensors dequantised the slow way, block by block."""
    down, across = 8, 6
    generator = torch.Generator().manual_seed(3)
    stored, truth = {}, {}
    for name, tensor in to_hf(model).items():
        if not name.endswith("_proj.weight"):
            stored[name] = truth[name] = tensor.clone()
            continue
        shape = tuple(-(-n // block) for n, block in zip(tensor.shape, (down, across), strict=True))
        scale = torch.rand(shape, generator=generator).to(torch.bfloat16) + 0.5
        small = (torch.rand(tensor.shape, generator=generator) * 400 - 200).to(torch.float8_e4m3fn)
        values = small.float()
        for i in range(shape[0]):
            for j in range(shape[1]):
                values[i * down : (i + 1) * down, j * across : (j + 1) * across] *= scale[i, j].float()
        stored[name], stored[f"{name}_scale_inv"], truth[name] = small, scale, values
    save_file(stored, folder / "model.safetensors")
    config = config_to_hf(model.config) | {"quantization_config": OFFICIAL | changes}
    (folder / "config.json").write_text(json.dumps(config))
    return truth


@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("chunk", [1, 1 << 24])
def test_fp8_blocks_are_dequantised(
    moe: bool, chunk: int, make_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensors_io, "CHUNK_BYTES", chunk if chunk > 1 else 600)
    truth = fp8_folder(make_model(moe, **SHAPE), tmp_path)
    loaded = load_weights(tmp_path)
    assert len(truth) > 10 and all(torch.equal(tensor, truth[name]) for name, tensor in to_hf(loaded).items())
    half = load_weights(tmp_path, torch.bfloat16)
    assert all(torch.equal(tensor, truth[name].bfloat16()) for name, tensor in to_hf(half).items())
    save_weights(loaded, tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert all(torch.equal(t, truth[name]) for name, t in to_hf(load_weights(tmp_path / "plain")).items())


def test_fp8_weights_can_be_packed_as_they_are_read(make_model: Make, tmp_path: Path) -> None:
    fp8_folder(make_model(), tmp_path)
    load_quantised(*open_folder(tmp_path), "float16", torch.float32, "cpu")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"activation_scheme": "static"}, "activation_scheme = 'dynamic' only, and it is 'static'; or give the check"),
        ({"quant_method": "compressed-tensors"}, "quant_method = 'fp8' only, and it is 'compressed-tensors'; or give"),
        ({"fmt": "e5m2"}, "fmt 'e5m2' with weight_block_size"),
        ({"weight_block_size": None}, "weight_block_size None is not supported, only e4m3"),
        ({"weight_block_size": [8, 0]}, r"weight_block_size \[8, 0\] is not supported"),
        ({"weight_block_size": [8, 8]}, r"the scale of FP8 tensor .* need a float \(\d, \d\); give the checkpoint"),
    ],
)
def test_other_kinds_of_fp8_are_named(changes: dict[str, Any], words: str, make_model: Make, tmp_path: Path) -> None:
    fp8_folder(make_model(), tmp_path, **changes)
    with pytest.raises(InputError, match=words) as caught:
        load_weights(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_key_that_is_missing_is_no_default(make_model: Make, tmp_path: Path) -> None:
    fp8_folder(make_model(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]["activation_scheme"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"activation_scheme = 'dynamic' only, and it is missing: add it where"):
        load_weights(tmp_path)


@pytest.mark.parametrize(
    ("keys", "how"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, " (quantised by 'gptq')"),
        ({"quantization": {"bits": 4}}, " (quantised by 'mlx')"),
        ({}, ""),
    ],
)
def test_quantised_tensors_are_said_to_be(keys: dict[str, Any], how: str, make_model: Make, tmp_path: Path) -> None:
    model = make_model()
    save_file(to_hf(model) | {"x.qweight": torch.zeros(2, 2, dtype=torch.int32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(model.config) | keys))
    with pytest.raises(InputError) as caught:
        load_weights(tmp_path)
    assert f"tensor 'x.qweight' is stored as I32{how}; only BF16, F16, F32 can be loaded" in str(caught.value)


def test_a_stale_quantization_config_beside_plain_weights_does_no_harm(make_model: Make, tmp_path: Path) -> None:
    model = make_model()
    save_weights(model, tmp_path)
    values = config_to_hf(model.config) | {"quantization_config": {"quant_method": "bitsandbytes"}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert all(torch.equal(a, b) for a, b in zip(load_weights(tmp_path).parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("pytorch_model.bin", "its pytorch_model.bin is not read: a pickle of torch .*from_pretrained"),
        ("pytorch_model-00001-of-00002.bin", "its pytorch_model-00001-of-00002.bin is not read: a pickle"),
        ("consolidated.00.pth", "its consolidated.00.pth is not read: Meta's own form; download"),
        ("consolidated.safetensors", "its consolidated.safetensors is not read: Mistral's own form"),
        ("model-00001-of-00002.safetensors", "a shard without model.safetensors.index.json; copy or download"),
        ("model.fp16.safetensors", "if it is the whole model, rename it to model.safetensors"),
        ("adapter_model.safetensors", "an adapter; load the model it was made for"),
        ("tf_model.h5", "TensorFlow's; download the safetensors"),
        ("m.gguf", "copy or download the weights; it holds m.gguf, give that file"),
        ("training_args.bin", "index.json; copy or download the weights$"),
    ],
)
def test_other_weights_are_named(file: str, words: str, make_model: Make, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(empty_model(make_model().config).config)))
    (tmp_path / file).write_bytes(b"")
    with pytest.raises(InputError, match=rf"^{tmp_path} has no model.safetensors and no .*{words}"):
        load_weights(tmp_path)


def test_a_pointer_of_git_lfs_is_named(make_model: Make, tmp_path: Path) -> None:
    save_weights(make_model(), tmp_path)
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 1503300328\n"
    (tmp_path / "model.safetensors").write_bytes(pointer)
    with pytest.raises(InputError, match=r"model\.safetensors is only a pointer to the weights; fetch them: git lfs"):
        load_weights(tmp_path)
