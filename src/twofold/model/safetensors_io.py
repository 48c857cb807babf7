"""Safetensors files, read straight into memory that already exists and written without a second copy.

The format is eight bytes of length, a JSON header and raw little-endian data. The safetensors library maps files into
memory or returns new tensors, so that a model being filled from it occupies the pages of the file, or its largest
tensor, once more; here bytes go from the file into their final place, in chunks only where the type or device differs.
Files come out byte for byte as that library writes them. Not here: which tensor is which (``weights.py``).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from twofold.base.files import readable
from twofold.base.records import InputError

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # what a model can be filled from
FP8 = "F8_E4M3"  # with scales beside it (``fp8.py``)
NAMES = {dtype: name for name, dtype in DTYPES.items()}
ORDER = ["F32", "BF16", "F16"]  # of tensors in a file: the library's order of types, then by name
CHUNK_BYTES = 16 << 20
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_POINTER_BYTES = 1024  # a file of Git LFS that was not fetched is shorter
_AGAIN = "copy or download the file again"


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a tensor lies: its type in safetensors' spelling, its shape, and offsets in bytes within the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> dict[str, Entry]:
    """All tensors of a file in the order of their bytes. No tensor data is read.

    Raises:
        InputError: no such file, or one whose header and length do not agree (a truncated download).
    """
    with readable(path):
        size = path.stat().st_size
        with open(path, "rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            text = handle.read(length) if 8 + length <= size and length <= _MAX_HEADER_BYTES else None
    if size < _POINTER_BYTES and path.read_bytes().startswith(b"version https://git-lfs"):
        raise InputError(f"{path} is only a pointer to the weights; fetch them: git lfs pull, or download the file")
    if text is None or size < 8:
        raise InputError(f"{path} is damaged: there is no whole header in its {size} bytes; {_AGAIN}")
    start = 8 + length
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        entries = {name: _entry(value, start) for name, value in header.items()}
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError, RecursionError):
        raise InputError(f"{path} is damaged: its header does not describe tensors; {_AGAIN}") from None
    _check_layout(path, entries, start, size)
    return dict(sorted(entries.items(), key=lambda item: item[1].begin))


def _entry(value: dict[str, Any], start: int) -> Entry:
    begin, end = (int(offset) for offset in value["data_offsets"])
    return Entry(str(value["dtype"]), tuple(int(n) for n in value["shape"]), start + begin, start + end)


def _check_layout(path: Path, entries: dict[str, Entry], start: int, size: int) -> None:
    """Tensors must follow one another without gaps up to the end of the file, each as long as its shape says."""
    end = start
    for name, entry in sorted(entries.items(), key=lambda item: item[1].begin):
        if entry.begin != end or entry.end < entry.begin:
            raise InputError(f"{path} is damaged: tensor {name!r} does not begin where the one before ends; {_AGAIN}")
        itemsize = 1 if entry.dtype == FP8 else DTYPES[entry.dtype].itemsize if entry.dtype in DTYPES else None
        if itemsize is not None and math.prod(entry.shape) * itemsize != entry.end - entry.begin:
            raise InputError(f"{path} is damaged: tensor {name!r} is not as long as its shape says; {_AGAIN}")
        end = entry.end
    if end > size:
        raise InputError(f"{path} is damaged: {end - size} bytes are missing at its end; {_AGAIN}")
    if end < size:
        raise InputError(f"{path} is damaged: {size - end} bytes too many at its end; {_AGAIN}")


def check_dtypes(path: Path, entries: Mapping[str, Entry], why: str = "") -> None:
    """Raise InputError, naming the tensor, when a type is none that a model can be filled from. ``why`` it may be."""
    for name, entry in entries.items():
        if entry.dtype not in DTYPES:
            raise InputError(
                f"{path}: tensor {name!r} is stored as {entry.dtype}{why}; only {', '.join(sorted(DTYPES))} can be "
                "loaded, and F8_E4M3 with weight_scale_inv; give the original checkpoint or a GGUF file of it"
            )


def read_into(path: Path, entry: Entry, out: torch.Tensor) -> None:
    """Fill ``out`` (contiguous, any float type and device, as many elements) with the tensor at ``entry``."""
    stored, into = DTYPES[entry.dtype], out.detach().view(-1)
    with open(path, "rb", buffering=0) as handle:
        if into.dtype == stored and into.device.type == "cpu":
            read_exactly(handle.fileno(), into, entry.begin, path)
            return
        step = CHUNK_BYTES // stored.itemsize
        chunk = torch.empty(min(step, into.numel()), dtype=stored, pin_memory=into.device.type == "cuda")
        for first in range(0, into.numel(), step):
            part = chunk[: into.numel() - first]
            read_exactly(handle.fileno(), part, entry.begin + first * stored.itemsize, path)
            into[first : first + len(part)].copy_(part)


def read_exactly(descriptor: int, flat: torch.Tensor, offset: int, path: Path) -> None:
    """Read bytes from ``offset`` into the whole of a contiguous CPU tensor."""
    if not flat.numel():
        return
    memory = flat.view(torch.uint8).numpy().data
    done = 0
    while done < len(memory):
        count = os.preadv(descriptor, [memory[done:]], offset + done)
        if count <= 0:
            raise InputError(f"{path} became shorter while it was read; {_AGAIN}")
        done += count


def write(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors (fp32, fp16 or bf16, any device) to ``path`` and wait until they are on the disk.

    Contiguous CPU tensors go out as they lie in memory; others are copied one at a time.

    Raises:
        InputError: a tensor of another type, named.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in NAMES:
            raise InputError(
                f"tensor {name!r} is {tensor.dtype}; model folders hold {', '.join(sorted(NAMES.values()))}"
            )
    names = sorted(tensors, key=lambda name: (ORDER.index(NAMES[tensors[name].dtype]), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.dtype.itemsize
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb", buffering=0) as handle:
        _write_all(handle.fileno(), memoryview(len(text).to_bytes(8, "little") + text))
        for name in names:
            flat = tensors[name].detach().to("cpu").contiguous().view(-1)
            _write_all(handle.fileno(), flat.view(torch.uint8).numpy().data)
        os.fsync(handle.fileno())


def _write_all(descriptor: int, memory: memoryview) -> None:
    done = 0
    while done < len(memory):
        done += os.write(descriptor, memory[done:])
