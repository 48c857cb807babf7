"""Weights in FP8 (e4m3) with a scale for every block, as Qwen3's and DeepSeek's FP8 releases store them, dequantised.

A weight [R, C] has ``weight_scale_inv`` [ceil(R / r), ceil(C / c)] for blocks of r by c, and stands for weight times
scale. The product is taken in fp32; nothing stays quantised, and activations are not quantised either. Other kinds of
FP8 (a scale for a tensor or a row, static activations, e5m2) are refused by name. Not here: which tensors a model
needs (``weights.py``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from twofold.base.records import InputError
from twofold.model import safetensors_io
from twofold.model.safetensors_io import FP8, Entry

Stored = tuple[Path, Entry]  # a tensor: its file and its place there
_SUFFIX = "_scale_inv"
_WAY_OUT = "give the checkpoint that it was made from"


def take_scales(entries: dict[str, Stored]) -> dict[str, Stored]:
    """The scales of FP8 tensors, under the names of these, taken out of ``entries``."""
    owners = [name for name, (_, entry) in entries.items() if entry.dtype == FP8 and name + _SUFFIX in entries]
    return {name: entries.pop(name + _SUFFIX) for name in owners}


def block_size(said: Any, origin: str) -> tuple[int, int]:
    """Rows and columns of a block, from the ``quantization_config`` of config.json.

    Raises:
        InputError: the key is missing, or says something that is not block-wise FP8 with dynamic activations.
    """
    values = said if isinstance(said, dict) else {}
    for key, wanted in (("quant_method", "fp8"), ("activation_scheme", "dynamic")):
        if values.get(key) != wanted:
            found = f"is {values[key]!r}" if key in values else "is missing: add it where it belongs there"
            raise InputError(
                f"{origin}: quantization_config: FP8 weights are read with {key} = {wanted!r} only, and it {found}; or "
                f"{_WAY_OUT}"
            )
    blocks = values.get("weight_block_size")
    if values.get("fmt", "e4m3") != "e4m3" or not (
        isinstance(blocks, list) and len(blocks) == 2 and all(type(n) is int and n > 0 for n in blocks)
    ):
        raise InputError(
            f"{origin}: quantization_config: fmt {values.get('fmt')!r} with weight_block_size {blocks!r} is not "
            f"supported, only e4m3 with two whole numbers; {_WAY_OUT}"
        )
    return blocks[0], blocks[1]


def check(name: str, weight: Stored, scale: Stored, blocks: tuple[int, int]) -> None:
    """Raise InputError where a scale does not fit its weight."""
    shape, found = weight[1].shape, scale[1]
    wanted = tuple(-(-n // block) for n, block in zip(shape, blocks, strict=False))
    if len(shape) != 2 or found.shape != wanted or found.dtype not in safetensors_io.DTYPES:
        raise InputError(
            f"{scale[0]}: the scale of FP8 tensor {name!r} {shape} is {found.dtype} {found.shape}, blocks of {blocks} "
            f"need a float {wanted}; {_WAY_OUT}"
        )


def read_into(weight: Stored, scale: Stored, blocks: tuple[int, int], out: torch.Tensor) -> None:
    """Fill ``out`` (contiguous, any float type and device, [R, C]) with weight times scale."""
    (path, entry), (down, across) = weight, blocks
    rows, columns = entry.shape
    scales = torch.empty(scale[1].shape, dtype=torch.float32)
    safetensors_io.read_into(*scale, scales)
    into = out.detach().view(rows, columns)
    step = max(1, safetensors_io.CHUNK_BYTES // (4 * columns * down)) * down
    chunk = torch.empty(min(step, rows), columns, dtype=torch.float8_e4m3fn)
    with open(path, "rb", buffering=0) as handle:
        for first in range(0, rows, step):
            part = chunk[: rows - first]
            safetensors_io.read_exactly(handle.fileno(), part.view(-1), entry.begin + first * columns, path)
            factors = scales[first // down : -(-(first + len(part)) // down)].repeat_interleave(down, 0)[: len(part)]
            into[first : first + len(part)].copy_(part.float() * factors.repeat_interleave(across, 1)[:, :columns])
