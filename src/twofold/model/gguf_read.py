"""Weights from GGUF files: every tensor is dequantised, a slice at a time, straight into its place in the model.

F32, F16 and BF16 are read as they are; the arithmetic of all other types in ``gguf_file.py``'s table is the gguf
package's. The model computes with the dequantised numbers: nothing stays quantised. Memory peaks at the model and one
slice. Not here: the header (``gguf_file.py``), names and configuration (``gguf_config.py``), writing.

Shape legend: H head dimension.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from twofold.base.gguf_file import BLOCKS, GGUFFile, TensorInfo, read_gguf
from twofold.base.records import InputError
from twofold.model import weights
from twofold.model.config import ModelConfig
from twofold.model.gguf_config import ROPE_FACTORS, architecture, config_from_gguf, hugging_face_name, is_permuted
from twofold.model.qwen3 import Qwen3

try:
    import gguf
except ImportError:
    gguf = None  # type: ignore[assignment]

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SLICE = 1 << 16  # elements dequantised at once: larger slices leave the cache of most processors


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor of the model lies in the file. head_dim: of Llama's permuted rows, 0 for others."""

    info: TensorInfo
    offset: int
    shape: tuple[int, ...]
    head_dim: int


class GGUFSource:
    """The tensors of a GGUF file under Hugging Face's names (a ``TensorSource``); stacked experts one by one.

    Raises:
        InputError: the gguf package is missing, or a tensor has no place in the architecture.
    """

    remedy = "convert the model again with a recent llama.cpp, or load its Hugging Face folder"

    def __init__(self, file: GGUFFile, head_dim: int) -> None:
        require_package(file.path)
        self.file, self.origin = file, str(file.path)
        self.places: dict[str, _Place] = {}
        arch = architecture(file)
        for info in sorted(file.tensors.values(), key=lambda info: (info.path, info.offset)):
            if info.type not in gguf.GGMLQuantizationType.__members__:
                raise InputError(
                    f"{info.path}: tensor {info.name!r} is {info.type}, which cannot be read: the gguf package here "
                    "is too old; run: pip install -U gguf"
                )
            if info.name == ROPE_FACTORS:
                continue  # part of the configuration
            name = hugging_face_name(file, info.name)
            if "{}" not in name:
                permuted = head_dim if is_permuted(arch, info.name) else 0
                self.places[name] = _Place(info, info.offset, info.shape, permuted)
                continue
            experts, shape = info.shape[0], info.shape[1:]
            for expert in range(experts):
                offset = info.offset + expert * (info.bytes // experts)
                self.places[name.format(expert)] = _Place(info, offset, shape, 0)

    def called(self, name: str) -> str:
        return repr(self.places[name].info.name) if name in self.places else f"for {name!r} (Hugging Face's name)"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: place.shape for name, place in self.places.items()}

    def read_into(self, name: str, out: torch.Tensor) -> None:
        place = self.places[name]
        elements, size = BLOCKS[place.info.type]
        columns = place.shape[-1] if len(place.shape) > 1 else 1
        group = place.head_dim or (1 if columns > 1 else 256)  # rows that must stay together: a head, or whole blocks
        step = max(1, SLICE // (columns * group)) * group
        rows = out.detach().view(-1, columns)
        with open(place.info.path, "rb", buffering=0) as handle:
            for first in range(0, len(rows), step):
                target = rows[first : first + step]
                begin = place.offset + first * columns // elements * size
                data = _read(handle.fileno(), begin, target.numel() // elements * size, place.info.path)
                values = dequantise(data, place.info.type).view(-1, columns)
                target.copy_(neighbours_to_halves(values, place.head_dim) if place.head_dim else values)


def load_gguf(path: Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Qwen3:
    """The model of a GGUF file, its weights dequantised to ``dtype``.

    Raises:
        InputError: not a GGUF file, a damaged one, the gguf package missing, an architecture or feature that is
            not supported, a missing key, or tensors that do not fit the configuration.
    """
    return weights.build(*open_gguf(path), dtype, device)


def open_gguf(path: Path) -> tuple[ModelConfig, GGUFSource]:
    """Configuration and tensors of a GGUF file, none of them read yet; errors are those of ``load_gguf``."""
    file = read_gguf(path)
    config = config_from_gguf(file)
    return config, GGUFSource(file, config.head_dim)


def require_package(path: Path) -> None:
    """Raise InputError where the gguf package is not installed."""
    if gguf is None:
        raise InputError(f"{path}: GGUF weights need the gguf package; run: pip install 'twofold[gguf]'")


def dequantise(data: bytearray, kind: str) -> torch.Tensor:
    """The values of whole blocks, flat: fp32, or the stored type for F32, F16 and BF16."""
    if kind in PLAIN:
        return torch.frombuffer(data, dtype=PLAIN[kind])
    blocks = np.frombuffer(data, dtype=np.uint8)[None]
    return torch.from_numpy(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind])[0])


def neighbours_to_halves(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of whole heads from the order 0, H/2, 1, H/2 + 1, … of llama.cpp's Llama back to 0, 1, 2, …"""
    return rows.view(-1, head_dim // 2, 2, rows.shape[-1]).transpose(1, 2).reshape(rows.shape)


def _read(descriptor: int, offset: int, count: int, path: Path) -> bytearray:
    data = bytearray(count)
    done = 0
    while done < count:
        read = os.preadv(descriptor, [memoryview(data)[done:]], offset + done)
        if read <= 0:
            raise InputError(f"{path} became shorter while it was read; copy or download the file again")
        done += read
    return data
