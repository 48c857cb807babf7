"""A GGUF file as a container: its metadata as plain values and the table of its tensors.

One pass over the header, so that a vocabulary of 150,000 strings takes a moment; the gguf package's own reader makes
several objects of each string and keeps the whole file mapped. Neither that package nor torch is needed here. Not
here: which tensor is which (``gguf_config.py``), tensor data (``gguf_read.py``), the tokenizer (``text``).
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from twofold.base.records import InputError

# Number in the file -> name, elements in a block, bytes of a block.
TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
}  # fmt: skip
BLOCKS = {name: (elements, size) for name, elements, size in TYPES.values()}

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32  # unless general.alignment says otherwise
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_FLOAT32, _STRING, _ARRAY = 6, 8, 9
_MAX_DIMENSIONS = 4
_AGAIN = "copy or download the file again"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor of the file: type by name, shape with rows first (as in torch), first byte and length in bytes."""

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    bytes: int


@dataclass(frozen=True, slots=True)
class GGUFFile:
    """What the header says. metadata: numbers, strings, booleans and lists of them. tensors: by name, in file order."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


class _Truncated(Exception):
    """The header wants bytes that the file does not have."""


class _Cursor:
    """Reads little-endian values one after another."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.place = data, 0

    def take(self, count: int) -> bytes:
        end = self.place + count
        if end > len(self.data):
            raise _Truncated
        piece = self.data[self.place : end]
        self.place = end
        return piece

    def numbers(self, code: str, count: int) -> tuple[Any, ...]:
        return struct.unpack(f"<{count}{code}", self.take(struct.calcsize(code) * count))

    def number(self, code: str) -> Any:
        return self.numbers(code, 1)[0]

    def string(self) -> str:
        return self.take(int.from_bytes(self.take(8), "little")).decode()

    def value(self) -> Any:
        kind = self.number("I")
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self._array()
        value = self.number(_SCALARS[kind])
        # The shortest decimal that is the same fp32 number: 1e-06, not 9.999999974752427e-07.
        return float(str(np.float32(value))) if kind == _FLOAT32 else value

    def _array(self) -> list[Any]:
        kind, count = self.number("I"), self.number("Q")
        if kind == _STRING:
            if count > len(self.data):
                raise _Truncated
            return [self.string() for _ in range(count)]
        return list(self.numbers(_SCALARS[kind], count))


def is_gguf(path: Path) -> bool:
    """Whether a path's ending says that it is a GGUF file, in any case."""
    return path.suffix.lower() == ".gguf"


def name_of(path: Path) -> str:
    """What a checkpoint calls itself, by its file or folder; a folder's name may have dots in it."""
    whole = path.resolve()
    if is_gguf(path) and not is_gguf(whole):  # a link to a file that is named by its hash, as in the hub's cache
        whole = path
    return whole.stem if is_gguf(whole) else whole.name


def read_gguf(path: Path) -> GGUFFile:
    """Read the header; no tensor data.

    Raises:
        InputError: no such file, not a GGUF of version 2 or 3, one part of a split file, a damaged or truncated file.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as handle:
            if handle.read(4) != _MAGIC:
                raise InputError(f"{path} is not a GGUF file; give a .gguf file or a Hugging Face folder")
            with mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _read_header(path, _Cursor(data), size)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except (_Truncated, MemoryError, OverflowError):
        raise InputError(f"{path} is damaged: its header does not end within its {size} bytes; {_AGAIN}") from None
    except (KeyError, UnicodeDecodeError, ValueError, struct.error) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is damaged: its header makes no sense ({error}); {_AGAIN}") from None


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata alone, tokenizer and chat template included; raises as ``read_gguf`` does."""
    return read_gguf(path).metadata


def _read_header(path: Path, cursor: _Cursor, size: int) -> GGUFFile:
    cursor.take(len(_MAGIC))
    version = cursor.number("I")
    if version not in _VERSIONS:
        kind = "big-endian" if version & 0xFFFF == 0 else f"of version {version}"
        raise InputError(f"{path} is {kind}; convert it to a little-endian GGUF of version 3")
    tensor_count, value_count = cursor.numbers("Q", 2)
    metadata: dict[str, Any] = {}
    for _ in range(value_count):
        key = cursor.string()
        metadata[key] = cursor.value()
    parts, alignment = metadata.get("split.count", 0), metadata.get("general.alignment", _ALIGNMENT)
    if parts not in (0, 1):
        raise InputError(f"{path} is one of {parts} parts; join them: llama-gguf-split --merge")
    if not isinstance(alignment, int) or alignment < 1:
        raise InputError(f"{path} is damaged: general.alignment is {alignment!r}; {_AGAIN}")
    infos = [_tensor_info(path, cursor) for _ in range(tensor_count)]
    start = -(-cursor.place // alignment) * alignment
    tensors = {
        info.name: TensorInfo(info.name, info.type, info.shape, start + info.offset, info.bytes) for info in infos
    }
    if len(tensors) < tensor_count:
        raise InputError(f"{path} is damaged: two tensors have the same name; {_AGAIN}")
    end = max((info.offset + info.bytes for info in tensors.values()), default=0)
    if end > size:
        raise InputError(f"{path} is damaged: {end - size} bytes are missing at its end; {_AGAIN}")
    return GGUFFile(path, metadata, tensors)


def _tensor_info(path: Path, cursor: _Cursor) -> TensorInfo:
    name = cursor.string()
    dimensions = cursor.number("I")
    if not 0 < dimensions <= _MAX_DIMENSIONS:
        raise InputError(f"{path} is damaged: tensor {name!r} has {dimensions} dimensions; {_AGAIN}")
    shape = tuple(reversed(cursor.numbers("Q", dimensions)))
    number, offset = cursor.number("I"), cursor.number("Q")
    if number not in TYPES:
        raise InputError(f"{path}: tensor {name!r} has the unknown type {number}; convert the model to Q8_0 or F16")
    kind, elements, block = TYPES[number]
    if shape[-1] % elements:
        raise InputError(f"{path} is damaged: rows of {name!r} ({shape[-1]}) are no whole blocks of {kind}; {_AGAIN}")
    return TensorInfo(name, kind, shape, offset, math.prod(shape) // elements * block)
