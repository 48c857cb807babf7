"""Hugging Face folders in and out: config.json, safetensors, and the small table that fuses projections.

Leftover, missing or misshapen tensors are errors that name the tensor. Not here: sharded files, GGUF, adapters.

Shape legend: N query heads, K key/value heads, H head dimension, E experts, I expert width.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from twofold.base.files import atomic_path, read_json, write_json
from twofold.base.records import InputError
from twofold.model.config import ModelConfig
from twofold.model.qwen3 import Qwen3

# Fused parameter -> Hugging Face parts, stacked in this order along the output axis.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_EXPERTS = re.compile(r"(.*\.mlp\.experts\.)(gate_up_proj|down_proj)$")


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
    """The model's tensors under Hugging Face's on-disk names (per-expert, unfused; tied head absent)."""
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        for hf_name, part in _unfuse(model.config, name, tensor):
            tensors[hf_name] = part.contiguous()
    return tensors


def _unfuse(config: ModelConfig, name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    experts = _EXPERTS.match(name)
    if experts:
        prefix, kind = experts.groups()
        out = []
        for e, matrix in enumerate(tensor.unbind(0)):
            for part_name, part in _unfuse(config, f"{prefix}{e}.{kind}.weight", matrix):
                out.append((part_name, part))
        return out
    for fused, parts in FUSED.items():
        if f".{fused}." in name:
            pieces = tensor.split(split_sizes(config, name))
            return [(name.replace(fused, part), piece) for part, piece in zip(parts, pieces, strict=True)]
    return [(name, tensor)]


@torch.no_grad()
def from_hf(model: Qwen3, tensors: dict[str, torch.Tensor], origin: str) -> None:
    """Copy Hugging Face tensors into the model.

    Raises:
        InputError: a missing, left-over or misshapen tensor, named. A stored though tied ``lm_head.weight`` is
            accepted when it equals the embedding.
    """
    left = dict(tensors)
    for name, target in model.state_dict().items():
        for hf_name, part in _unfuse(model.config, name, target):
            if hf_name not in left:
                raise InputError(f"{origin}: tensor {hf_name!r} is missing; the checkpoint is incomplete")
            source = left.pop(hf_name)
            if source.shape != part.shape:
                raise InputError(
                    f"{origin}: tensor {hf_name!r} has shape {tuple(source.shape)}, config.json implies "
                    f"{tuple(part.shape)}"
                )
            part.copy_(source)
    head = left.pop("lm_head.weight", None) if model.config.tie_word_embeddings else None
    if head is not None and not torch.equal(head, tensors["model.embed_tokens.weight"]):
        raise InputError(f"{origin}: lm_head.weight differs from the embedding although the config ties them")
    if left:
        raise InputError(f"{origin}: unexpected tensor {sorted(left)[0]!r} ({len(left)} in all)")


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The contents of config.json, readable by transformers 4.51 and later."""
    moe = config.num_experts > 0
    values: dict[str, Any] = {
        "architectures": ["Qwen3MoeForCausalLM" if moe else "Qwen3ForCausalLM"],
        "model_type": "qwen3_moe" if moe else "qwen3",
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rope_scaling": None,
        "sliding_window": None,
        "use_sliding_window": False,
        "max_window_layers": config.num_hidden_layers,
        "torch_dtype": "float32",
        "use_cache": True,
    }
    fields = config.model_dump(mode="json")
    if not moe:
        for key in ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"):
            del fields[key]
        del fields["decoder_sparse_step"], fields["mlp_only_layers"]
    else:
        values |= {"output_router_logits": False, "router_aux_loss_coef": 0.001}
    return values | fields


def config_from_hf(values: dict[str, Any], origin: str) -> ModelConfig:
    """Read config.json.

    Raises:
        InputError: another architecture, a feature this model does not have, or a missing key.
    """
    model_type = values.get("model_type")
    if model_type not in ("qwen3", "qwen3_moe"):
        raise InputError(f"{origin}: model_type {model_type!r} is not supported; expected qwen3 or qwen3_moe")
    supported = {"rope_scaling": None, "attention_bias": False, "use_sliding_window": False, "hidden_act": "silu"}
    for key, value in supported.items():
        if values.get(key, value) != value:
            raise InputError(f"{origin}: {key} = {values[key]!r} is not supported yet")
    known = {name: values[name] for name in ModelConfig.model_fields if name in values}
    rope = values.get("rope_parameters") or {}  # where transformers 5 keeps the base and any scaling
    if rope.get("rope_type", "default") != "default":
        raise InputError(f"{origin}: rope_type = {rope['rope_type']!r} is not supported yet")
    if "rope_theta" not in known and "rope_theta" in rope:
        known["rope_theta"] = rope["rope_theta"]
    if model_type == "qwen3":
        known["num_experts"] = 0
    try:
        return ModelConfig.model_validate(known)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "config"
        raise InputError(f"{origin}: {where}: {first['msg']}") from None


def save_weights(model: Qwen3, folder: Path) -> None:
    """Write config.json and model.safetensors into ``folder`` (each atomically)."""
    write_json(folder / "config.json", config_to_hf(model.config))
    with atomic_path(folder / "model.safetensors") as path:
        path.write_bytes(save(to_hf(model), metadata={"format": "pt"}))


def load_weights(folder: Path) -> Qwen3:
    """Build the model a Hugging Face folder describes and fill it (fp32).

    Raises:
        InputError: no such folder or file, unreadable contents, or tensors that do not fit.
    """
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} is not a model folder: it has no config.json")
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise InputError(f"{folder} has a config.json but no model.safetensors")
    try:
        config = config_from_hf(read_json(folder / "config.json"), str(folder / "config.json"))
        tensors = load_file(weights)
    except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as error:
        raise InputError(f"{folder} is damaged: {error}") from None
    model = Qwen3(config)
    from_hf(model, tensors, str(weights))
    return model
