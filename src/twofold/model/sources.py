"""Where weights come from: a dictionary, or the safetensors of a Hugging Face folder, FP8 with block scales included.

A source names tensors as Hugging Face does and fills memory that already exists. What a folder holds besides is said
by name: weights of other programs, a missing index, tensors that are quantised in ways that are not read. Not here:
which parameter a tensor fills (``weights.py``), GGUF (``gguf_read.py``), the file format (``safetensors_io.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch

from twofold.base.gguf_file import hint
from twofold.base.records import InputError
from twofold.model import fp8, safetensors_io
from twofold.model.hf_config import config_values, read_object

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
_CONVERT = "from transformers import AutoModelForCausalLM as M; M.from_pretrained('{folder}').save_pretrained('OUT')"
# Weights that are not read, and the way out, by the pattern of a file's name.
_OTHERS = {
    "pytorch_model*.bin": "a pickle of torch may run code when it is opened; where you trust it, run in Python: "
    f"{_CONVERT}, and copy the tokenizer's files",
    "adapter_model.safetensors": "an adapter; load the model it was made for, then the adapter",
    "consolidated*.pth": "Meta's own form; download the model's Hugging Face version",
    "consolidated*.safetensors": "Mistral's own form; download the model's Hugging Face version",
    "model-*-of-*.safetensors": f"a shard without {INDEX}; copy or download that file",
    "*.safetensors": f"not a name that is looked for; if it is the whole model, rename it to {WEIGHTS}",
    "tf_model.h5": "TensorFlow's; download the safetensors",
    "flax_model*.msgpack": "Flax's; download the safetensors",
    "*.npz": "MLX's; download the safetensors",
    "*.onnx": "ONNX; download the safetensors",
}


class TensorSource(Protocol):
    """Where weights come from. ``origin`` begins error messages, ``remedy`` says what to do where tensors do not fit.

    called: a tensor in the words of the file, given Hugging Face's name.
    shapes: every tensor under Hugging Face's on-disk name, in the order in which reading is cheapest.
    read_into: fills ``out``, contiguous and of the tensor's shape, converting to its type and device.
    """

    origin: str
    remedy: str

    def called(self, name: str) -> str: ...

    def shapes(self) -> dict[str, tuple[int, ...]]: ...

    def read_into(self, name: str, out: torch.Tensor) -> None: ...  # called from several threads


class _HuggingFace:
    """What sources under Hugging Face's own names have in common."""

    remedy = f"use the {CONFIG} that belongs to these weights"

    def called(self, name: str) -> str:
        return repr(name)


class DictSource(_HuggingFace):
    """Tensors that are already in memory, under Hugging Face's names."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], origin: str) -> None:
        self.tensors, self.origin = tensors, origin

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def read_into(self, name: str, out: torch.Tensor) -> None:
        out.copy_(self.tensors[name])


class FolderSource(_HuggingFace):
    """The safetensors of a Hugging Face folder: one file, or shards with an index.

    Opening reads headers only. ``entries`` has, for every tensor, its file and its place in it; ``scales`` has those of
    the scales of FP8 tensors, under the names of these tensors.

    Raises:
        InputError: a file that is absent or damaged, or an index that does not fit its files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.origin = folder, str(folder)
        self.entries: dict[str, fp8.Stored] = {}
        listed = _index(folder)
        for file in sorted(set(listed.values())) or [WEIGHTS]:
            header = safetensors_io.read_header(folder / file)
            for name, entry in header.items():
                if name in self.entries:
                    raise InputError(f"{folder / file}: tensor {name!r} is also in {self.entries[name][0].name}")
                self.entries[name] = (folder / file, entry)
            for name in (name for name, place in listed.items() if place == file and name not in header):
                raise InputError(f"{folder / INDEX} expects tensor {name!r} in {file}, which lacks it; copy both again")
        self.headless = "embed_tokens.weight" in self.entries  # as Qwen3-Embedding is: no prefix, no head
        if self.headless:
            self.entries = {f"model.{name}": entry for name, entry in self.entries.items()}
        self.scales = fp8.take_scales(self.entries)
        self._blocks: tuple[int, int] | None = None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for name, (_, entry) in self.entries.items()}

    def check_dtypes(self) -> None:
        """Raise InputError, naming tensor and file, for weights in a type that no model can be filled from."""
        config = config_values(self.folder)
        said = config.get("quantization_config")
        how = said.get("quant_method") if isinstance(said, dict) else "mlx" if "quantization" in config else None
        for name, (path, entry) in self.entries.items():
            if name not in self.scales:
                safetensors_io.check_dtypes(path, {name: entry}, "" if how is None else f" (quantised by {how!r})")
        if self.scales:
            self._blocks = fp8.block_size(said, str(self.folder / CONFIG))
            for name, scale in self.scales.items():
                fp8.check(name, self.entries[name], scale, self._blocks)

    def read_into(self, name: str, out: torch.Tensor) -> None:
        if name in self.scales:
            assert self._blocks is not None, "check_dtypes comes first"
            fp8.read_into(self.entries[name], self.scales[name], self._blocks, out)
        else:
            safetensors_io.read_into(*self.entries[name], out)


def _index(folder: Path) -> dict[str, str]:
    """Tensor -> file from the index of a sharded checkpoint; empty when there is a single file."""
    single, index = folder / WEIGHTS, folder / INDEX
    if not index.is_file():
        if not single.is_file():
            raise InputError(f"{folder} has no {WEIGHTS} and no {INDEX}; {_instead(folder)}")
        return {}
    listed = read_object(index, "").get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(file, str) for file in listed.values()):
        raise InputError(f"{index} is damaged: its weight_map does not map tensors to files; copy it again")
    if single.is_file() and WEIGHTS not in listed.values():
        raise InputError(f"{folder} holds both {WEIGHTS} and {INDEX}; delete the one that is out of date")
    for name, file in listed.items():
        if Path(file).name != file or not (folder / file).is_file():
            raise InputError(
                f"{index} names {file} for tensor {name!r}, but there is no such file; copy or download it"
            )
    return listed


def _instead(folder: Path) -> str:
    """The weights that a folder has instead of those that are read, and what to do."""
    for pattern, way_out in _OTHERS.items():
        if found := sorted(path.name for path in folder.glob(pattern)):
            return f"its {found[0]} is not read: {way_out.replace('{folder}', str(folder))}"
    return f"copy or download the weights{hint(folder)}"
