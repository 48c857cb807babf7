"""GGUF files in parts, as llama-gguf-split makes them: read as one, or named; folders that hold GGUF files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from twofold.base.gguf_file import name_of, read_gguf, read_metadata
from twofold.base.records import InputError
from twofold.model import gguf_read, gguf_write
from twofold.model.config import Context
from twofold.model.gguf_config import describe_gguf
from twofold.model.qwen3 import Qwen3
from twofold.model.weights import load_weights
from twofold.recipes.models import find_model
from twofold.text.tokenizer import Tokenizer

gguf = pytest.importorskip("gguf")
Make = Callable[..., Qwen3]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["the cat"], 290)


def split(source: Path, target: Path, tensors: int) -> list[Path]:
    """The parts of a file, as the gguf package splits it."""
    file = read_gguf(source)
    writer = gguf.GGUFWriter(target, str(file.metadata["general.architecture"]), split_max_tensors=tensors)
    for key, value in file.metadata.items():
        if key != "general.architecture":
            gguf_write._add(writer, key, value)
    for info in file.tensors.values():
        data = np.fromfile(source, np.float32, info.bytes // 4, offset=info.offset)
        writer.add_tensor(info.name, data.reshape(info.shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(target.parent.glob(f"{target.stem}-*-of-*.gguf"))


@pytest.mark.parametrize("opened", [0, -1])
def test_parts_are_read_as_one_file(opened: int, tokenizer: Tokenizer, make_model: Make, tmp_path: Path) -> None:
    context = Context(method="llama3", native=8192, target=65536)
    model = make_model(vocab_size=290, qk_norm=False, head_dim=64, initializer_range=0.02, context=context)
    gguf_write.save_gguf(model, tokenizer, tmp_path / "whole.gguf", "f32", "{{ messages }}", "tiny")
    parts = split(tmp_path / "whole.gguf", tmp_path / "big.gguf", 6)
    assert len(parts) > 2 and name_of(parts[1]) == "big"
    loaded = gguf_read.load_gguf(parts[opened])
    assert loaded.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    assert read_metadata(parts[opened])["tokenizer.chat_template"] == "{{ messages }}"
    assert len(describe_gguf(parts[opened]).tensors) == len(read_gguf(tmp_path / "whole.gguf").tensors)


def test_parts_that_are_no_whole_are_named(tokenizer: Tokenizer, make_model: Make, tmp_path: Path) -> None:
    gguf_write.save_gguf(make_model(vocab_size=290), tokenizer, tmp_path / "whole.gguf", "f32", "", "tiny")
    parts = split(tmp_path / "whole.gguf", tmp_path / "big.gguf", 10)
    count, last = len(parts), parts[-1].read_bytes()
    parts[-1].write_bytes(parts[1].read_bytes())
    with pytest.raises(InputError, match=rf"{parts[-1].name} is not part {count} of {count} of this model; copy"):
        read_gguf(parts[0])
    parts[-1].unlink()
    with pytest.raises(InputError, match=rf"one of {count} parts; join them: .* {parts[-1].name} is not there$"):
        read_gguf(parts[0])
    (tmp_path / "renamed.gguf").write_bytes(last)
    with pytest.raises(InputError, match=rf"renamed\.gguf is one of {count} parts; .* NAME-00001-of-0000{count}.gguf"):
        read_gguf(tmp_path / "renamed.gguf")


def test_a_folder_that_holds_a_gguf_file_names_it(tmp_path: Path) -> None:
    (tmp_path / "m.Q4_K_M.gguf").write_bytes(b"")
    for read in (load_weights, find_model):
        with pytest.raises(InputError, match=r"; it holds m\.Q4_K_M\.gguf, give that file$"):
            read(tmp_path)
