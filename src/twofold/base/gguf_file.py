"""A GGUF file as a container: its metadata as plain values and the table of its tensors; all parts of a split one.

One pass over the header, so that a vocabulary of 150,000 strings takes a moment; the gguf package's own reader makes
several objects of each string and keeps the whole file mapped. Neither that package nor torch is needed here. Not
here: which tensor is which (``gguf_config.py``), tensor data (``gguf_read.py``), the tokenizer (``text``).
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from dataclasses import dataclass, replace
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
_COUNT = "split.count"
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.gguf)", re.IGNORECASE)  # as llama-gguf-split names them
_AGAIN = "copy or download the file again"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor of the file: type by name, shape with rows first (as in torch), first byte and length in bytes.

    path: where its bytes lie, which in a split file is one of the parts.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    bytes: int
    path: Path


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
    """What a checkpoint calls itself, by its file or folder, the number of a part left out; a folder's name may have
    dots in it."""
    whole = path.resolve()
    if is_gguf(path) and not is_gguf(whole):  # a link to a file that is named by its hash, as in the hub's cache
        whole = path
    if not is_gguf(whole):
        return whole.name
    part = _PART.fullmatch(whole.name)
    return part[1] if part else whole.stem


def hint(folder: Path) -> str:
    """The end of a message about a folder that is no model: the first GGUF file in it, if there is one."""
    found = min((path.name for path in folder.iterdir() if is_gguf(path)), default=None) if folder.is_dir() else None
    return "" if found is None else f"; it holds {found}, give that file"


def read_gguf(path: Path) -> GGUFFile:
    """Read the header; no tensor data. Any part of a split file stands for all of them.

    Raises:
        InputError: no such file, not a GGUF of version 2 or 3, a part without the others, a damaged or truncated file.
    """
    file = _read_one(path)
    parts = file.metadata.get(_COUNT, 1)
    return file if parts in (0, 1) else _joined(file, parts)


def _read_one(path: Path) -> GGUFFile:
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


def _joined(file: GGUFFile, count: Any) -> GGUFFile:
    """The whole of which ``file`` is a part: the metadata of the first part, the tensors of all."""
    named = _PART.fullmatch(file.path.name)
    names = [f"{named[1]}-{i:05d}-of-{named[3]}{named[4]}" for i in range(1, count + 1)] if named else []
    paths = [file.path.with_name(name) for name in names]
    absent = next((path.name for path in paths if not path.is_file()), None)
    if named is None or int(named[3]) != count or absent is not None:
        why = f": {absent} is not there" if absent else ""
        raise InputError(
            f"{file.path} is one of {count} parts; join them: llama-gguf-split --merge, or put all of them into one "
            f"folder under the names that they had, NAME-00001-of-{count:05d}.gguf and so on{why}"
        )
    tensors: dict[str, TensorInfo] = {}
    parts = [_read_one(path) for path in paths]
    for number, part in enumerate(parts):
        said = part.metadata.get(_COUNT), part.metadata.get("split.no")
        if said != (count, number) or tensors.keys() & part.tensors.keys():
            raise InputError(f"{part.path} is not part {number + 1} of {count} of this model; {_AGAIN}")
        tensors |= part.tensors
    whole = parts[0].metadata.get("split.tensors.count", len(tensors))
    if whole != len(tensors):
        raise InputError(f"{paths[0]}: its parts hold {len(tensors)} of {whole} tensors; {_AGAIN}")
    return GGUFFile(file.path, parts[0].metadata, tensors)


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
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if not isinstance(metadata.get(_COUNT, 1), int):
        raise InputError(f"{path} is damaged: {_COUNT} is {metadata[_COUNT]!r:.60}; {_AGAIN}")
    if not isinstance(alignment, int) or alignment < 1:
        raise InputError(f"{path} is damaged: general.alignment is {alignment!r}; {_AGAIN}")
    infos = [_tensor_info(path, cursor) for _ in range(tensor_count)]
    start = -(-cursor.place // alignment) * alignment
    tensors = {info.name: replace(info, offset=start + info.offset) for info in infos}
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
    return TensorInfo(name, kind, shape, offset, math.prod(shape) // elements * block, path)
