"""config.json in and out, for the four families that are settings of the one model definition.

qwen3 and qwen3_moe (QK-norm), qwen2 (QKV bias) and llama (no norm; biases or none), in the spelling of transformers 4
(rope_theta, rope_scaling) and 5 (rope_parameters, layer_types). The spelling of 4 is written: everything reads it. A
key that is missing is an error, never a class default; a feature that the model does not have is an error by name. What
Hugging Face has no word for goes under ``twofold``. Not here: RoPE and context (``hf_context.py``), tensors
(``weights.py``), tokenizers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from twofold.base.files import read_json, read_json_object, readable, write_json
from twofold.base.gguf_file import hint
from twofold.base.records import InputError
from twofold.model.config import ModelConfig
from twofold.model.hf_context import context_to_hf, missing, read_context, read_rope, required

ARCHITECTURES = {
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "llama": "LlamaForCausalLM",
}
_SHAPE = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings", "initializer_range",
)  # fmt: skip
_MOE = ("num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "decoder_sparse_step")
# Features we lack, by the value that switches them off. An absent key is off too.
_OFF: dict[str, Any] = {
    "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0, "partial_rotary_factor": 1.0,
    "rope_interleaved": False, "shared_expert_intermediate_size": 0, "n_shared_experts": 0,
}  # fmt: skip
# Qwen2 is biased by definition, whatever the file says; of Llama the keys are read.
_BIASES = (("qwen2", "attention_bias"), ("llama", "attention_bias"), ("llama", "mlp_bias"))
_QWEN3_OFF: dict[str, Any] = {"qkv_bias": False, "use_qk_norm": True}


def model_type(config: ModelConfig) -> str:
    """Hugging Face's name of the family; InputError for a combination that has none."""
    moe, norm, bias, out = config.num_experts > 0, config.qk_norm, config.qkv_bias, config.o_bias
    if norm and not (bias or out or config.mlp_bias):
        return "qwen3_moe" if moe else "qwen3"
    if not (moe or norm) and (bias == out or not (out or config.mlp_bias)):
        return "llama" if bias == out else "qwen2"
    raise InputError(
        f"qk_norm={norm}, qkv_bias={bias}, o_bias={out}, mlp_bias={config.mlp_bias}, num_experts={config.num_experts}: "
        "Hugging Face has no such family; use qk_norm without biases (qwen3, qwen3_moe), or dense with qkv_bias alone "
        "(qwen2) or with o_bias too or neither (llama)"
    )


def read_config(folder: Path) -> ModelConfig:
    """The configuration of a Hugging Face folder.

    Raises:
        InputError: no such folder or file, damaged JSON, or what ``config_from_hf`` refuses.
    """
    return config_from_hf(config_values(folder), str(folder / "config.json"))


def config_values(folder: Path) -> dict[str, Any]:
    """config.json of a Hugging Face folder as it stands; InputError where it is missing or damaged."""
    return read_object(folder / "config.json", f"{folder} is not a model folder: it has no config.json{hint(folder)}")


def read_object(path: Path, absent: str) -> dict[str, Any]:
    """A JSON object; InputError with the words of ``absent`` where there is no file, or naming what is wrong."""
    with readable(path):
        there = path.is_file()
    if not there:
        raise InputError(absent)
    return read_json_object(path, "is damaged: {}; copy or download it again")


def config_from_hf(values: Mapping[str, Any], origin: str) -> ModelConfig:
    """Read the contents of config.json.

    Raises:
        InputError: another architecture, a feature this model does not have, a missing key or an impossible value.
    """
    family = values.get("model_type")
    if not isinstance(family, str) or family not in ARCHITECTURES:
        raise InputError(f"{origin}: model_type {family!r} is not supported; use one of {', '.join(ARCHITECTURES)}")
    _refuse_features(values, family, origin)
    known = {key: required(values, key, origin) for key in _SHAPE}
    rope = read_rope(values, origin)
    known["rope_theta"] = required(rope, "rope_theta", origin)
    if values.get("head_dim") is None and family in ("qwen2", "llama"):
        known["head_dim"] = _head_dim(known, origin)
    else:
        known["head_dim"] = required(values, "head_dim", origin)
    known |= {"qk_norm": family.startswith("qwen3"), "qkv_bias": family == "qwen2"}
    if family == "llama":
        bias = values.get("attention_bias") or False
        known |= {"qkv_bias": bias, "o_bias": bias, "mlp_bias": values.get("mlp_bias") or False}
    else:
        known |= _window(values, family, origin)
    if family == "qwen3_moe":
        experts = values.get("num_experts", values.get("num_local_experts"))  # transformers 5 writes the latter
        known["num_experts"] = required({"num_experts": experts}, "num_experts", origin)
        known |= {key: required(values, key, origin) for key in _MOE}
        if "mlp_only_layers" not in values:
            raise InputError(missing("mlp_only_layers", origin))
        known["mlp_only_layers"] = values["mlp_only_layers"] or ()
    try:
        return ModelConfig.model_validate(known | {"context": read_context(values, rope, origin)})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "config"
        raise InputError(f"{origin}: {where}: {first['msg']} (got {first['input']!r})"[:400]) from None


def _head_dim(known: Mapping[str, Any], origin: str) -> int:
    """Qwen2 and Llama define the width of a head as hidden_size / num_attention_heads."""
    hidden, heads = known["hidden_size"], known["num_attention_heads"]
    if not (isinstance(hidden, int) and isinstance(heads, int) and heads > 0 and hidden % heads == 0):
        raise InputError(f"{origin}: hidden_size {hidden!r} is no multiple of {heads!r} heads; add head_dim")
    return hidden // heads


def _refuse_features(values: Mapping[str, Any], family: str, origin: str) -> None:
    if (act := required(values, "hidden_act", origin)) != "silu":
        raise InputError(f"{origin}: hidden_act = {act!r} is not supported; the feed-forward is SwiGLU ('silu')")
    for key, value in (_OFF | (_QWEN3_OFF if family.startswith("qwen3") else {})).items():
        if (family, key) in _BIASES:
            continue
        given = values.get(key)
        if given is not None and given != value:
            raise InputError(f"{origin}: {key} = {given!r} is not supported; this model knows {key} = {value!r} only")


def _window(values: Mapping[str, Any], family: str, origin: str) -> dict[str, Any]:
    """sliding_window and the first layer that has it. Class defaults (4096!) count for nothing."""
    kinds = values.get("layer_types")
    if not isinstance(kinds, list | None):
        raise InputError(f"{origin}: layer_types must be a list of names or null, got {kinds!r}")
    if not values.get("use_sliding_window"):
        if kinds and any(kind != "full_attention" for kind in kinds):
            raise InputError(f"{origin}: layer_types has windows but use_sliding_window is not true; make them agree")
        return {}
    window = {"sliding_window": required(values, "sliding_window", origin)}
    if family == "qwen3_moe":  # transformers gives every layer of this family the window
        return window
    if kinds is None:
        return window | {"max_window_layers": required(values, "max_window_layers", origin)}
    first = kinds.index("sliding_attention") if "sliding_attention" in kinds else len(kinds)
    if kinds != ["full_attention"] * first + ["sliding_attention"] * (len(kinds) - first):
        raise InputError(f"{origin}: layer_types is not full attention first and windows after; that is not supported")
    return window | {"max_window_layers": first}


def config_to_hf(config: ModelConfig, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The contents of config.json for weights stored in ``dtype``, readable by transformers 4.51 and later.

    Raises:
        InputError: settings that Hugging Face's families cannot express.
    """
    family = model_type(config)
    values: dict[str, Any] = {"architectures": [ARCHITECTURES[family]], "model_type": family}
    values |= {key: getattr(config, key) for key in _SHAPE}
    values |= {"head_dim": config.head_dim, "hidden_act": "silu", "attention_dropout": 0.0, "use_cache": True}
    values |= {"rope_theta": config.rope_theta, "torch_dtype": str(dtype).removeprefix("torch.")}
    if family != "qwen2":
        values["attention_bias"] = config.o_bias
    values |= context_to_hf(config)
    if family == "llama":
        if config.sliding_window is not None:
            raise InputError("Hugging Face's llama has no sliding_window; set it to null or use a Qwen family")
        # The class defaults are the ids of the first Llama's vocabulary.
        return values | {"mlp_bias": config.mlp_bias, "bos_token_id": None, "eos_token_id": None}
    window = config.sliding_window
    first = config.max_window_layers if window is not None else config.num_hidden_layers
    values |= {"use_sliding_window": window is not None, "sliding_window": window, "max_window_layers": first}
    if family == "qwen3_moe":
        if window is not None and first:
            raise InputError("Hugging Face's qwen3_moe gives every layer the window; set max_window_layers to 0")
        values |= {"num_experts": config.num_experts, "mlp_only_layers": list(config.mlp_only_layers)}
        values |= {key: getattr(config, key) for key in _MOE}
        values |= {"output_router_logits": False, "router_aux_loss_coef": 0.001}
    return values


def write_generation_config(folder: Path, values: Mapping[str, Any]) -> None:
    """Write generation_config.json: the caller's sampling defaults and token ids (eos_token_id, pad_token_id)."""
    write_json(folder / "generation_config.json", dict(values))


def read_about(folder: Path) -> dict[str, Any] | None:
    """What is on record about what a model can do, {"can": [...], "cannot": "..."}, or None where nothing is.

    Raises:
        InputError: about.json is damaged.
    """
    path = folder / "about.json"
    if not path.is_file():
        return None
    try:
        about = read_json(path)
        return {"can": [str(line) for line in about["can"]], "cannot": str(about["cannot"])}
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path} is damaged") from None


def read_generation_config(folder: Path) -> dict[str, Any]:
    """The sampling defaults and token ids of a model folder; empty where it has none."""
    path = folder / "generation_config.json"
    return read_object(path, "") if path.is_file() else {}


def said_ends(folder: Path) -> list[tuple[str, Any]]:
    """What a folder's files say about the tokens that end a reply, as (where, value), for ``Tokenizer.ends``.

    Raises:
        InputError: a file cannot be read.
    """
    files = {"generation_config.json": read_generation_config(folder), "config.json": config_values(folder)}
    return [(f"{folder / name}: eos_token_id", values.get("eos_token_id")) for name, values in files.items()]
