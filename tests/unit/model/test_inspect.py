"""What ``inspect`` says about folders, without reading weights."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from twofold.base.records import InputError
from twofold.model import safetensors_io
from twofold.model.hf_config import config_to_hf
from twofold.model.inspect import Checkpoint, describe, gigabytes, memory_bytes, read_folder, show
from twofold.model.presets import preset
from twofold.model.qwen3 import Qwen3
from twofold.model.weights import load_weights, save_weights, to_hf
from twofold.text.tokenizer import Tokenizer

Make = Callable[..., Qwen3]


def text_of(checkpoint: Checkpoint, **options: Any) -> dict[str, str]:
    lines: dict[str, str] = {}
    for label, text in describe(checkpoint, **options):
        lines[label] = f"{lines[label]}\n{text}" if label in lines else text
    return lines


def test_a_folder(tmp_path: Path, make_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(True, tie_word_embeddings=False, context={"native": 32, "target": 128}, decoder_sparse_step=2)
    save_weights(model.to(torch.bfloat16), tmp_path, 3000)
    (tmp_path / "tokenizer.json").write_text(Tokenizer.train(["a"], 282).to_json())
    (tmp_path / "chat_template.jinja").write_text("\n{# first #}\n{% if enable_thinking %}<think>{% endif %}")
    monkeypatch.setattr(safetensors_io, "read_into", None)  # no weight may be read
    lines = text_of(read_folder(tmp_path))
    total, active = model.config.num_parameters(), model.config.num_parameters(active=True)
    assert lines["family"] == "qwen3_moe, 4 experts of which 2 see a token, in 1 of 2 layers"
    assert lines["parameters"] == f"{total:,} ({active:,} active); embedding and head separate"
    assert lines["on disk"] == f"BF16: {len(to_hf(model))} tensors, {gigabytes(2 * total)}"
    assert "native 32, target 128 by yarn, factor 4 (attention factor 1.1386), for sequences" in lines["context"]
    assert lines["chat template"].startswith("thinking on and off; sha256 ")
    assert lines["chat template"].endswith("begins '{# first #}'")
    assert lines["loads"] == "yes"


def test_memory_of_a_released_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twofold.model.inspect.ram_bytes", lambda: 3_000_000_000)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    checkpoint = Checkpoint("somewhere.gguf", "GGUF", preset("Qwen3-0.6B"), {"Q4_0": (3, 10**8)})
    assert memory_bytes(checkpoint.config, 1000, 2, torch.bfloat16) == (2 * 596_049_920, 2 * 1000 * 114_688)
    lines = text_of(checkpoint, context=1000, batch=2)
    assert lines["checkpoint"] == "somewhere.gguf (GGUF)" and lines["chat template"] == "none"
    assert lines["family"] == "qwen3, dense (the shape of Qwen3-0.6B)"
    cpu, gpu = lines["runs on"].splitlines()
    assert cpu.startswith("CPU: float32 (bfloat16 products are far slower")
    assert cpu.endswith("2.38 GB + keys and values 0.46 GB for 2 x 1,000 tokens = 2.84 GB of 3.00 GB: fits")
    assert gpu.startswith("a GPU (none here): bfloat16") and gpu.endswith("= 1.42 GB")
    assert "does not fit" in text_of(checkpoint)["runs on"], "40,960 tokens of keys and values take 9.4 GB"
    assert "are more than the 40,960" in text_of(checkpoint, context=50000)["warning"]
    assert text_of(checkpoint, context=1, dtype="float16")["runs on"].startswith("CPU: float16 (as asked)")


def test_gpus_are_listed(monkeypatch: pytest.MonkeyPatch, make_model: Make) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (1, 2 * 10**9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Big")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    lines = text_of(Checkpoint("x", "y", make_model().config, {}))
    assert lines["runs on"].splitlines()[1].startswith("GPU 0 (Big): bfloat16 (this GPU multiplies")
    assert lines["runs on"].endswith("of 2.00 GB: fits")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model.norm.weight": torch.ones(16, dtype=torch.float8_e4m3fn)}, "stored as F8_E4M3"),
        ({"model.norm.weight": torch.ones(17)}, "has shape"),
        ({"model.norm.bias": torch.ones(16)}, "unexpected tensor"),
    ],
)
def test_weights_that_do_not_load_are_described_all_the_same(
    changes: dict[str, torch.Tensor], words: str, tmp_path: Path, make_model: Make
) -> None:
    model = make_model()
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(model.config)))
    assert text_of(read_folder(tmp_path))["loads"].startswith(f"no: {tmp_path} has no model.safetensors")
    save_file({name: t.contiguous() for name, t in to_hf(model).items()} | changes, tmp_path / "model.safetensors")
    lines = text_of(read_folder(tmp_path))
    assert lines["loads"].startswith("no: ") and words in lines["loads"] and "F32" in lines["on disk"]


def test_whatever_loading_refuses_is_said(tmp_path: Path, make_model: Make) -> None:
    save_weights(make_model(vocab_size=282), tmp_path)
    assert "no tokenizer files" in text_of(read_folder(tmp_path))["warning"], "and token ids are enough"
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    assert "not a readable tokenizer.json" in text_of(read_folder(tmp_path))["loads"]
    (tmp_path / "tokenizer.json").write_text(Tokenizer.train(["a"], 282).to_json())
    assert text_of(read_folder(tmp_path))["loads"] == "yes"
    (tmp_path / "generation_config.json").write_text("{")
    assert "generation_config.json is damaged" in text_of(read_folder(tmp_path))["loads"]


def test_what_loads_and_cannot_do_everything(
    tmp_path: Path, make_model: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a head, or with a tokenizer too large."""
    model = make_model(tie_word_embeddings=False)
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(model.config)))
    tensors = {name.removeprefix("model."): t.contiguous() for name, t in to_hf(model).items() if name[:2] != "lm"}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "tokenizer.json").write_text(Tokenizer.train(["a"], 282).to_json())
    lines = text_of(read_folder(tmp_path))
    assert lines["loads"] == "yes" and "embedding and head tied" in lines["parameters"]
    first, second = lines["warning"].splitlines()
    assert "no lm_head" in first and "282 tokens and the embedding 40 rows" in second
    assert lines["chat template"] == "none"
    assert not caplog.messages, "said in the description alone"
    assert load_weights(tmp_path).config.tie_word_embeddings and "has no lm_head" in caplog.text
    (tmp_path / "tokenizer_config.json").write_text("{")
    assert "not a readable tokenizer_config.json" in text_of(read_folder(tmp_path))["loads"]


def test_a_vocabulary_extended_by_hand_is_said(tmp_path: Path, make_model: Make) -> None:
    save_weights(make_model(vocab_size=282), tmp_path)
    contents = json.loads(Tokenizer.train(["a"], 282).to_json())
    contents["model"]["vocab"]["鲢"] = contents["model"]["vocab"].pop("Ġ")
    (tmp_path / "tokenizer.json").write_text(json.dumps(contents))
    lines = text_of(read_folder(tmp_path))
    assert lines["loads"] == "yes" and lines["warning"].startswith(
        "1 tokens of the vocabulary, '鲢' (id 220) the first"
    )


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, "none"),
        ({"chat_template": "<think>"}, "mentions <think>; sha256"),
        ({"chat_template": [{"name": "tool", "template": "a"}, {"name": "default", "template": "b"}]}, "no thinking;"),
    ],
)
def test_templates_in_the_tokenizer_configuration(
    values: dict[str, Any], expected: str, tmp_path: Path, make_model: Make
) -> None:
    save_weights(make_model(), tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(values))
    assert text_of(read_folder(tmp_path))["chat template"].startswith(expected)


def test_windows_and_families_of_ones_own(make_model: Make) -> None:
    config = make_model().config.model_copy(update={"qkv_bias": True, "sliding_window": 8, "max_window_layers": 1})
    lines = text_of(Checkpoint("x", "y", config, {}))
    assert lines["family"] == "of its own, dense"
    assert lines["context"].endswith("sliding window of 8 tokens in 1 layers")


def test_showing_and_refusing(make_model: Make) -> None:
    checkpoint = Checkpoint("[x]", "y", make_model().config, {})
    console = Console(width=60, record=True, file=io.StringIO())
    show(describe(checkpoint), console)
    lines = console.export_text().splitlines()
    assert lines[0] == "checkpoint     [x] (y)" and sum(line.startswith("runs on") for line in lines) == 1
    for options in ({"context": 0}, {"batch": 0}):
        with pytest.raises(InputError, match="must be >= 1"):
            describe(checkpoint, **options)
    with pytest.raises(InputError, match="'int4' is none to compute in"):
        describe(checkpoint, dtype="int4")


def test_the_shape_is_named_whatever_the_context(make_model: Make) -> None:
    base = preset("Qwen3-8B").model_copy(update={"max_position_embeddings": 32768})
    assert "the shape of Qwen3-8B" in text_of(Checkpoint("x", "folder", base, {}))["family"]
