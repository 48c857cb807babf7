"""Weights in and out: the small table that fuses projections, and Hugging Face folders streamed both ways.

A model is allocated once and filled tensor by tensor from a ``TensorSource`` (a folder or a GGUF file), each
tensor going straight into its part of a fused parameter. Leftover, missing or misshapen tensors are errors that name
the tensor, found before any data is read. Saving writes from the parameters themselves. Not here: config.json
(``hf_config.py``), the sources (``sources.py``), adapters.

Shape legend: N query heads, K key/value heads, H head dimension, E experts, I expert width, D model width.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from twofold.base.files import atomic_path, write_json
from twofold.base.records import InputError
from twofold.model import safetensors_io
from twofold.model.config import ModelConfig
from twofold.model.hf_config import config_to_hf, read_config
from twofold.model.qwen3 import Qwen3
from twofold.model.sources import CONFIG, INDEX, WEIGHTS, DictSource, FolderSource, TensorSource

logger = logging.getLogger("twofold")

# Fused parameter -> Hugging Face parts, stacked in this order along the output axis (weights and biases alike).
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
READERS = min(4, os.cpu_count() or 1)  # tensors read at the same time
MAX_SHARD_BYTES = 5 << 30
NO_HEAD = "no lm_head; it gives embeddings, but no text to rely on"
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_EXPERTS = re.compile(r"(.*\.mlp\.experts\.)(gate_up_proj|down_proj)$")
# Old Llama files carry what rope_theta already says.
_DERIVED = ".rotary_emb.inv_freq"


def split_sizes(config: ModelConfig, name: str) -> list[int]:
    """Rows of each Hugging Face part of the fused parameter ``name``; one entry when it is not fused."""
    if "qkv_proj" in name:
        q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        return [q, kv, kv]
    if "gate_up_proj" in name:
        inner = config.moe_intermediate_size if ".experts." in name else config.intermediate_size
        return [inner, inner]
    return []


def to_hf(model: Qwen3) -> dict[str, torch.Tensor]:
    """Views of the model's tensors under Hugging Face's on-disk names (per-expert, unfused; tied head absent)."""
    plain = empty_model(model.config, device="meta").state_dict().keys()
    strange = [name for name in model.state_dict() if name not in plain]
    if strange:
        raise InputError(
            f"a model with {strange[0]!r} cannot be saved: merge or detach adapters, call keep_new_rows, and save "
            "before quantising"
        )
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        tensors |= _unfuse(model.config, name, tensor)
    return tensors


def _unfuse(config: ModelConfig, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    experts = _EXPERTS.match(name)
    if experts:
        prefix, kind = experts.groups()
        parts: dict[str, torch.Tensor] = {}
        for e, matrix in enumerate(tensor.unbind(0)):
            parts |= _unfuse(config, f"{prefix}{e}.{kind}.weight", matrix)
        return parts
    for fused, names in FUSED.items():
        if f".{fused}." in name:
            pieces = tensor.split(split_sizes(config, name))
            return {name.replace(fused, part): piece for part, piece in zip(names, pieces, strict=True)}
    return {name: tensor}


def match(model: Qwen3, source: TensorSource) -> dict[str, torch.Tensor]:
    """Stored name -> the part of a parameter that it fills (works on the meta device; reads no data).

    Raises:
        InputError: a missing, left-over or misshapen tensor, named.
    """
    shapes = source.shapes()
    targets: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        targets |= _targets(model.config, shapes, name, tensor)
    for name, part in targets.items():
        if name not in shapes:
            raise InputError(f"{source.origin}: tensor {source.called(name)} is missing; the checkpoint is incomplete")
        if shapes[name] != tuple(part.shape):
            raise InputError(
                f"{source.origin}: tensor {source.called(name)} has shape {shapes[name]}, the configuration implies "
                f"{tuple(part.shape)}; {source.remedy}"
            )
    left = sorted(name for name in shapes.keys() - targets.keys() if not name.endswith(_DERIVED))
    if model.config.tie_word_embeddings and "lm_head.weight" in left:
        left.remove("lm_head.weight")
    if left:
        raise InputError(
            f"{source.origin}: unexpected tensor {source.called(left[0])} ({len(left)} in all); the configuration "
            f"describes a model without it, {source.remedy}"
        )
    return targets


def _targets(
    config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], name: str, tensor: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Stored name -> the part of parameter ``name`` that it fills."""
    fused = _EXPERTS.match(name) and name in shapes  # all experts in one tensor, as transformers 5 holds them
    return {name: tensor} if fused else _unfuse(config, name, tensor)


@torch.no_grad()
def fill(model: Qwen3, source: TensorSource) -> None:
    """Copy every tensor of ``source`` into the model's parameters, a few at a time.

    A stored though tied ``lm_head.weight`` is accepted when it equals the embedding (in the model's type).

    Raises:
        InputError: a missing, left-over or misshapen tensor, or a tied head that differs.
    """
    targets = match(model, source)
    _read(source, {name: targets[name] for name in source.shapes() if name in targets})
    check_tied(model, source)


def _read(source: TensorSource, targets: Mapping[str, torch.Tensor]) -> None:
    largest_first = sorted(targets, key=lambda name: -targets[name].numel())
    with ThreadPoolExecutor(READERS) as pool:  # most of reading is the system's copying into fresh pages
        for done in [pool.submit(source.read_into, name, targets[name]) for name in largest_first]:
            done.result()


def read_parameter(config: ModelConfig, source: TensorSource, name: str, out: torch.Tensor) -> None:
    """Fill one parameter of a model that ``match`` has accepted, given by its name."""
    _read(source, _targets(config, source.shapes(), name, out))


def check_tied(model: Qwen3, source: TensorSource) -> None:
    """Raise InputError where a stored though tied ``lm_head.weight`` differs from the embedding."""
    shapes = source.shapes()
    if model.config.tie_word_embeddings and "lm_head.weight" in shapes:
        embedding = model.model.embed_tokens.weight
        head = torch.empty(shapes["lm_head.weight"], dtype=embedding.dtype, device=embedding.device)
        source.read_into("lm_head.weight", head)
        if not torch.equal(head, embedding):
            raise InputError(
                f"{source.origin}: lm_head.weight differs from the embedding although the configuration ties them; "
                "set tie_word_embeddings to false"
            )


def from_hf(model: Qwen3, tensors: Mapping[str, torch.Tensor], origin: str) -> None:
    """``fill`` from tensors that are already in memory under Hugging Face's names."""
    fill(model, DictSource(tensors, origin))


class _Uninitialised(TorchFunctionMode):
    """New modules take ``dtype`` and keep whatever their memory holds: they are filled anyway, and need no cast."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        if func in (torch.empty, torch.ones) and kwargs.get("dtype") is None:
            kwargs["dtype"] = self.dtype
        return func(*args, **kwargs)


def empty_model(config: ModelConfig, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Qwen3:
    """A model whose parameters are allocated once, in their final type and place, and hold anything.

    On the device "meta" it has names, shapes and views but no memory.
    """
    with torch.device(device), _Uninitialised(dtype):
        return Qwen3(config)


def load_weights(folder: Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Qwen3:
    """Build the model that a Hugging Face folder describes and fill it; memory peaks at about one copy.

    Raises:
        InputError: no such folder or file, unreadable contents, or tensors that do not fit.
    """
    return build(*open_folder(folder), dtype, device)


def open_folder(folder: Path) -> tuple[ModelConfig, FolderSource]:
    """Configuration and tensors of a Hugging Face folder, none of them read yet.

    Raises:
        InputError: no such folder or file, or unreadable contents.
    """
    config = read_config(folder)
    source = FolderSource(folder)
    if source.headless and not config.tie_word_embeddings:
        logger.warning("%s has %s", folder, NO_HEAD)
    return fitted(config, source), source


def fitted(config: ModelConfig, source: FolderSource) -> ModelConfig:
    """The configuration under which the tensors of ``source`` are loaded: without a head the embedding is the head.

    Raises:
        InputError: a tensor in a type that no model can be filled from.
    """
    source.check_dtypes()
    return config.model_copy(update={"tie_word_embeddings": True}) if source.headless else config


def build(config: ModelConfig, source: TensorSource, dtype: torch.dtype, device: torch.device | str) -> Qwen3:
    """The model of a configuration, filled; tensors that do not fit it are refused before memory is taken."""
    match(empty_model(config, device="meta"), source)
    model = empty_model(config, dtype, device)
    fill(model, source)
    return model


def check_device(device: torch.device | str) -> torch.device:
    """The device of that name.

    Raises:
        InputError: torch does not find it on this machine.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    count = 0 if accelerator is None else torch.accelerator.device_count()
    found = ["cpu", *(f"{accelerator}:{number}" for number in range(count))]
    with suppress(RuntimeError):  # it may be no name of a device at all
        named = torch.device(device)
        place = "cpu" if named.type == "cpu" else f"{named.type}:{named.index or 0}"
        if place in found:
            return named
    raise InputError(f"device {str(device)!r} is not on this machine; torch finds {', '.join(found)}")


def resolve_dtype(dtype: str | torch.dtype, device: torch.device | str) -> tuple[torch.dtype, str]:
    """The type to compute in, and the reason in words. "auto" is bf16 on GPUs that have it and fp32 elsewhere.

    Raises:
        InputError: a type that is none of auto, float32, bfloat16, float16.
    """
    device = torch.device(device)
    name = str(dtype).removeprefix("torch.")
    if name != "auto":
        named = {str(known).removeprefix("torch."): known for known in safetensors_io.NAMES}
        if name not in named:
            raise InputError(f"dtype {name!r} is none to compute in; use one of auto, {', '.join(named)}")
        return named[name], "as asked"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "this GPU multiplies bfloat16 natively"
        return torch.float32, "this GPU only emulates bfloat16"
    if device.type == "cpu":
        return torch.float32, "bfloat16 products are far slower on most CPUs; weights on disk may be bfloat16"
    return torch.float32, f"nothing else has been tried on {device.type}"


def save_weights(model: Qwen3, folder: Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write config.json and the weights, in the model's own types, into ``folder``; no second copy in memory.

    A model of up to ``max_shard_bytes`` becomes one file, a larger one shards with an index. Everything is written
    and flushed under temporary names first, so that a failure leaves what was there; config.json comes last, so that
    a folder caught in the middle is refused rather than read as a mixture.

    Raises:
        InputError: a model packed for inference, which no longer has its weights as they were.
    """
    tensors = to_hf(model)
    if to_hf(empty_model(model.config, device="meta")).keys() - tensors.keys():
        raise InputError("a model packed for inference cannot be saved; load it without quantize")
    shards = _shards(tensors, max_shard_bytes)
    values = config_to_hf(model.config, model.model.embed_tokens.weight.dtype)
    weight_map = {name: file for file, names in shards.items() for name in names}
    total = sum(tensor.numel() * tensor.dtype.itemsize for tensor in tensors.values())
    with ExitStack() as finish:  # renames in reverse order: shards, index, config.json
        write_json(finish.enter_context(atomic_path(folder / CONFIG)), values)
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            write_json(finish.enter_context(atomic_path(folder / INDEX)), index)
        for file, names in shards.items():
            path = finish.enter_context(atomic_path(folder / file))
            safetensors_io.write(path, {name: tensors[name] for name in names})
        _remove_old(folder)


def _shards(tensors: Mapping[str, torch.Tensor], max_bytes: int) -> dict[str, list[str]]:
    """File name -> tensors, in the model's order, each file up to ``max_bytes`` (or one tensor)."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        bytes_ = tensor.numel() * tensor.dtype.itemsize
        if groups[-1] and size + bytes_ > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += bytes_
    if len(groups) == 1:
        return {WEIGHTS: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def _remove_old(folder: Path) -> None:
    """Remove the files of an earlier save, config.json first: without it the folder is no model."""
    old = [path for path in folder.iterdir() if path.name in (INDEX, WEIGHTS) or _SHARD.fullmatch(path.name)]
    for path in (folder / CONFIG, *old):
        path.unlink(missing_ok=True)
