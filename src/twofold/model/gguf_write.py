"""Models written as GGUF files that llama.cpp loads and runs: F32, F16, BF16, Q8_0 and Q4_0.

Norms, biases and the router stay F32; embedding and head are Q8_0 in the quantised kinds, because everything depends
on them. Tensors are converted and written one after another, so memory grows by one of them. What llama.cpp cannot
express (sliding windows, Dual Chunk Attention, dense layers among sparse ones) is refused. Not here: finding good
quantised values (this is round-to-nearest), the header's meaning (``gguf_config.py``).

Shape legend: H head dimension.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from twofold.base.files import atomic_path
from twofold.base.gguf_file import BLOCKS
from twofold.base.records import InputError
from twofold.model import rope, weights
from twofold.model.config import Context, ModelConfig
from twofold.model.gguf_config import (
    ARCHITECTURES,
    EXPERTS,
    HEAD,
    LAYER,
    ROPE_FACTORS,
    STATIC,
    TOP,
    is_permuted,
    rope_factors,
)
from twofold.model.gguf_read import PLAIN, SLICE, gguf, require_package
from twofold.model.hf_config import model_type
from twofold.model.qwen3 import Qwen3
from twofold.text.gguf_tokenizer import gguf_vocabulary
from twofold.text.tokenizer import Tokenizer

KINDS = ("f32", "f16", "bf16", "q8_0", "q4_0")
_FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7, "bf16": 32}  # general.file_type
_QUANTISATION_VERSION = 2
_LARGEST_F16 = 65504.0
_LAYER = {theirs: ours for ours, theirs in LAYER.items()}
_TOP = {theirs: ours for ours, theirs in TOP.items()} | {"lm_head.weight": HEAD}
_EXPERTS = {theirs: ours for ours, theirs in EXPERTS.items()}
_NAME = re.compile(r"model\.layers\.(\d+)\.(?:mlp\.experts\.\d+\.(\w+)\.weight|(.+))")


@dataclass(slots=True)
class _Tensor:
    """A tensor to write: its parts (the experts of a stack, else one), type, shape, and Llama's head width or 0."""

    name: str
    parts: list[torch.Tensor]
    type: str
    head_dim: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        one = tuple(self.parts[0].shape)
        return (len(self.parts), *one) if "_exps." in self.name else one

    @property
    def bytes(self) -> int:
        elements, size = BLOCKS[self.type]
        return math.prod(self.shape) // elements * size


def save_gguf(
    model: Qwen3,
    tokenizer: Tokenizer,
    path: Path,
    kind: str,
    chat_template: str | None,
    name: str,
    ends: Sequence[int] | None = None,
) -> list[str]:
    """Write a model, its tokenizer and its chat template as one GGUF file; ``path`` is whole or untouched.

    Args:
        model: of any float type, any device. kind: f32, f16, bf16, q8_0 or q4_0. chat_template: None for a model
            without. name: shown by other programs. ends: the tokens that end a reply; None for those that the tokenizer
            knows.

    Returns:
        The tensors kept as F16 in a quantised kind because their rows are no multiple of 32.

    Raises:
        InputError: an unknown kind, the gguf package missing, a tokenizer that does not belong to the model, a setting
            that llama.cpp cannot express, or weights that the kind cannot hold.
    """
    require_package(path)
    if kind not in KINDS:
        raise InputError(f"{path}: kind {kind!r} is unknown; use one of {', '.join(KINDS)}")
    config = model.config
    arch = ARCHITECTURES[model_type(config)]
    _refuse(config, path)
    vocabulary = gguf_vocabulary(tokenizer, config.vocab_size, ends)
    tensors = _tensors(model, arch, kind)
    with atomic_path(path) as temporary:
        writer = gguf.GGUFWriter(temporary, arch)
        try:
            _add_metadata(writer, config, arch, {"general.name": name, "general.file_type": _FILE_TYPES[kind]})
            template = {} if chat_template is None else {"tokenizer.chat_template": chat_template}
            for key, value in (vocabulary | template).items():
                _add(writer, key, value)
            for tensor in tensors:
                stored = gguf.GGMLQuantizationType[tensor.type]
                writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.bytes, stored)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor in tensors:
                writer.write_tensor_data(_converted(tensor, path))
        finally:
            writer.close()
    return [tensor.name for tensor in tensors if kind.startswith("q") and tensor.type == "F16"]


def _refuse(config: ModelConfig, path: Path) -> None:
    """Raise InputError for settings that llama.cpp would ignore or lacks."""
    context = config.context
    if config.sliding_window is not None:
        raise InputError(f"{path}: llama.cpp has no sliding_window for this family; set it to null first")
    if context is not None and context.method == "dca":
        raise InputError(f"{path}: GGUF cannot express Dual Chunk Attention; set context to null or to yarn first")
    if context is not None and context.method == "llama3" and model_type(config) != "llama":
        raise InputError(f"{path}: llama.cpp reads Llama 3's RoPE scaling for Llama only; set context to null first")
    if config.num_experts and not all(config.is_moe_layer(i) for i in range(config.num_hidden_layers)):
        raise InputError(f"{path}: llama.cpp's qwen3moe has experts in every layer; this model has dense layers too")
    if config.num_experts and not config.norm_topk_prob:
        raise InputError(
            f"{path}: llama.cpp's qwen3moe renormalises expert weights; this model has norm_topk_prob false"
        )


def _tensors(model: Qwen3, arch: str, kind: str) -> list[_Tensor]:
    """All tensors in the model's order under llama.cpp's names."""
    parts: dict[str, list[torch.Tensor]] = {}
    for name, tensor in weights.to_hf(model).items():
        parts.setdefault(_gguf_name(name), []).append(tensor.detach())
    head_dim = model.config.head_dim
    tensors = [
        _Tensor(name, stack, _type(name, stack[0].shape, kind), head_dim if is_permuted(arch, name) else 0)
        for name, stack in parts.items()
    ]
    context = model.config.context
    if context is not None and context.method == "llama3":
        tensors.append(_Tensor(ROPE_FACTORS, [rope_factors(model.config.rope_theta, head_dim, context)], "F32"))
    return tensors


def _gguf_name(name: str) -> str:
    found = _NAME.fullmatch(name)
    ours = _TOP.get(name)
    if found:
        layer, expert, other = found.groups()
        ending = _EXPERTS.get(expert) if expert else _LAYER.get(other)
        ours = f"blk.{layer}.{ending}" if ending else None
    if ours is None:
        raise InputError(f"tensor {name!r} has no place in a GGUF file; merge adapters into the model first")
    return ours


def _type(name: str, shape: torch.Size, kind: str) -> str:
    """How a tensor is stored."""
    if len(shape) == 1 or name.endswith("ffn_gate_inp.weight"):
        return "F32"
    if not kind.startswith("q"):
        return kind.upper()
    stored = "Q8_0" if name in (*TOP, HEAD) else kind.upper()
    return stored if shape[-1] % BLOCKS[stored][0] == 0 else "F16"


def _add_metadata(writer: gguf.GGUFWriter, config: ModelConfig, arch: str, general: dict[str, Any]) -> None:
    """Everything but the tokenizer."""
    for key, value in {"general.type": "model", **general}.items():
        _add(writer, key, value)
    _add(writer, "general.quantization_version", _QUANTISATION_VERSION)
    values: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope_theta),
    }
    if config.num_experts:
        values["expert_count"] = config.num_experts
        values["expert_used_count"] = config.num_experts_per_tok
        values["expert_feed_forward_length"] = config.moe_intermediate_size
    if config.context is not None and config.context.method == "yarn":
        values |= _yarn(config.context)
        if config.context.static:
            _add(writer, STATIC, True)
    for key, value in values.items():
        _add(writer, f"{arch}.{key}", value)


def _yarn(context: Context) -> dict[str, Any]:
    values: dict[str, Any] = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(context.factor),
        "rope.scaling.original_context_length": context.native,
    }
    usual = Context(native=context.native, target=context.target)
    for field in ("beta_fast", "beta_slow"):
        if getattr(context, field) != getattr(usual, field):
            values[f"rope.scaling.yarn_{field}"] = float(getattr(context, field))
    if context.attention_factor is not None:  # llama.cpp multiplies its own by this
        values["rope.scaling.attn_factor"] = context.attention_factor / rope.attention_factor(usual)
    return values


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_array(key, value)


def _converted(tensor: _Tensor, path: Path) -> np.ndarray:
    """The bytes of a tensor, converted a slice at a time."""
    out = np.empty(tensor.bytes, dtype=np.uint8)
    done = 0
    for rows in _slices(tensor):
        data = quantise(rows, tensor.type)
        if tensor.type not in ("F32", "BF16") and not float(rows.abs().max()) <= _LARGEST_F16:
            raise InputError(f"{path}: tensor {tensor.name!r} has values that {tensor.type} cannot hold; use kind bf16")
        out[done : done + len(data)] = data
        done += len(data)
    return out


def _slices(tensor: _Tensor) -> Iterator[torch.Tensor]:
    """fp32 slices [rows, columns] on the CPU, in the order of the file."""
    for part in tensor.parts:
        rows = part.reshape(len(part), -1)
        group = tensor.head_dim or 1
        step = max(1, SLICE // (rows.shape[-1] * group)) * group
        for first in range(0, len(rows), step):
            piece = rows[first : first + step].to("cpu", torch.float32)
            yield halves_to_neighbours(piece, tensor.head_dim) if tensor.head_dim else piece


def quantise(rows: torch.Tensor, kind: str) -> np.ndarray:
    """Bytes of fp32 rows in one of the types of ``KINDS``; whole blocks."""
    if kind in PLAIN:
        return rows.to(PLAIN[kind]).contiguous().view(-1).view(torch.uint8).numpy()
    return gguf.quants.quantize(rows.reshape(1, -1).numpy(), gguf.GGMLQuantizationType[kind])[0]


def halves_to_neighbours(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of whole heads in the order 0, H/2, 1, H/2 + 1, … that llama.cpp's Llama rotates in neighbouring pairs."""
    return rows.view(-1, 2, head_dim // 2, rows.shape[-1]).transpose(1, 2).reshape(rows.shape)
