"""config.json in and out, for the four families that are settings of the one model definition.

qwen3 and qwen3_moe (QK-norm), qwen2 (QKV bias) and llama (neither), in the spelling of transformers 4 (rope_theta,
rope_scaling) and 5 (rope_parameters, layer_types). The spelling of 4 is written: everything reads it. A key that is
missing is an error, never a class default; a feature that the model does not have is an error by name. What Hugging
Face has no word for goes under ``twofold``. Not here: tensors (``weights.py``), tokenizers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from twofold.base.files import read_json, read_json_object, readable, write_json
from twofold.base.gguf_file import hint
from twofold.base.records import InputError
from twofold.model.config import LARGEST, ModelConfig

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
_QWEN3_OFF: dict[str, Any] = {"qkv_bias": False, "use_qk_norm": True}
# Keys of rope_scaling by its type, besides rope_type and rope_theta.
_SCALED = ("factor", "original_max_position_embeddings")
_NUMBERS = {"yarn": ("beta_fast", "beta_slow", "attention_factor"), "llama3": ("low_freq_factor", "high_freq_factor")}
_MSCALE = ("mscale", "mscale_all_dim")  # YaRN's attention factor in DeepSeek's words
_HARMLESS = (("truncate", True), ("partial_rotary_factor", 1.0))
_HINTS = {
    "head_dim": "rows of q_proj divided by num_attention_heads; hidden_size / num_attention_heads is wrong for Qwen3",
    "num_key_value_heads": "num_attention_heads where the model has no grouped queries",
    "norm_topk_prob": "true for every Qwen3",
    "tie_word_embeddings": "false where the weights hold an lm_head.weight of their own",
    "original_max_position_embeddings": "tokens of a sequence in training, before any scaling",
}


def model_type(config: ModelConfig) -> str:
    """Hugging Face's name of the family; InputError for a combination that has none."""
    moe, norm, bias = config.num_experts > 0, config.qk_norm, config.qkv_bias
    if norm and not bias:
        return "qwen3_moe" if moe else "qwen3"
    if moe or norm:
        raise InputError(
            f"qk_norm={norm}, qkv_bias={bias}, num_experts={config.num_experts}: Hugging Face has no such family; "
            "use qk_norm without qkv_bias (qwen3, qwen3_moe), or dense with qkv_bias (qwen2) or neither (llama)"
        )
    return "qwen2" if bias else "llama"


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
    known = {key: _required(values, key, origin) for key in _SHAPE}
    rope = _rope(values, origin)
    known["rope_theta"] = _required(rope, "rope_theta", origin)
    if values.get("head_dim") is None and family in ("qwen2", "llama"):
        known["head_dim"] = _head_dim(known, origin)
    else:
        known["head_dim"] = _required(values, "head_dim", origin)
    known |= {"qk_norm": family.startswith("qwen3"), "qkv_bias": family == "qwen2"}
    if family != "llama":
        known |= _window(values, family, origin)
    if family == "qwen3_moe":
        experts = values.get("num_experts", values.get("num_local_experts"))  # transformers 5 writes the latter
        known["num_experts"] = _required({"num_experts": experts}, "num_experts", origin)
        known |= {key: _required(values, key, origin) for key in _MOE}
        if "mlp_only_layers" not in values:
            raise InputError(_missing("mlp_only_layers", origin))
        known["mlp_only_layers"] = values["mlp_only_layers"] or ()
    try:
        return ModelConfig.model_validate(known | {"context": _context(values, rope, origin)})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "config"
        raise InputError(f"{origin}: {where}: {first['msg']} (got {first['input']!r})"[:400]) from None


def _required(values: Mapping[str, Any], key: str, origin: str) -> Any:
    if values.get(key) is None:
        raise InputError(_missing(key, origin))
    return values[key]


def _missing(key: str, origin: str) -> str:
    hint = f" ({_HINTS[key]})" if key in _HINTS else ""
    return f"{origin}: {key} is missing, and a library's default is not the model's value; add {key}{hint}"


def _head_dim(known: Mapping[str, Any], origin: str) -> int:
    """Qwen2 and Llama define the width of a head as hidden_size / num_attention_heads."""
    hidden, heads = known["hidden_size"], known["num_attention_heads"]
    if not (isinstance(hidden, int) and isinstance(heads, int) and heads > 0 and hidden % heads == 0):
        raise InputError(f"{origin}: hidden_size {hidden!r} is no multiple of {heads!r} heads; add head_dim")
    return hidden // heads


def _refuse_features(values: Mapping[str, Any], family: str, origin: str) -> None:
    if (act := _required(values, "hidden_act", origin)) != "silu":
        raise InputError(f"{origin}: hidden_act = {act!r} is not supported; the feed-forward is SwiGLU ('silu')")
    for key, value in (_OFF | (_QWEN3_OFF if family.startswith("qwen3") else {})).items():
        if family == "qwen2" and key == "attention_bias":
            continue  # biased by definition, whatever the file says
        given = values.get(key)
        if given is not None and given != value:
            raise InputError(f"{origin}: {key} = {given!r} is not supported; this model knows {key} = {value!r} only")


def _rope(values: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """rope_theta, rope_scaling (transformers 4) and rope_parameters (5) as one dictionary; they may not differ."""
    merged: dict[str, Any] = {}
    for key in ("rope_parameters", "rope_scaling"):
        given = _object(values, key, origin)
        if any(isinstance(value, Mapping) for value in given.values()):
            raise InputError(f"{origin}: {key} differs between layers, which is not supported; give one for all")
        renamed = {"rope_type" if name == "type" else name: v for name, v in given.items() if v is not None}
        _merge(merged, renamed, origin)
    _merge(merged, {"rope_theta": values["rope_theta"]} if values.get("rope_theta") is not None else {}, origin)
    return merged


def _object(values: Mapping[str, Any], key: str, origin: str) -> Mapping[str, Any]:
    """A nested object, empty where it is absent or null."""
    given = values.get(key)
    if given is not None and not isinstance(given, Mapping):
        raise InputError(f"{origin}: {key} must be an object or null, got {given!r}")
    return given or {}


def _merge(into: dict[str, Any], values: Mapping[str, Any], origin: str) -> None:
    for key, value in values.items():
        if into.setdefault(key, value) != value:
            raise InputError(f"{origin}: two values of {key}, {into[key]!r} and {value!r}; delete the wrong one")


def _window(values: Mapping[str, Any], family: str, origin: str) -> dict[str, Any]:
    """sliding_window and the first layer that has it. Class defaults (4096!) count for nothing."""
    kinds = values.get("layer_types")
    if not isinstance(kinds, list | None):
        raise InputError(f"{origin}: layer_types must be a list of names or null, got {kinds!r}")
    if not values.get("use_sliding_window"):
        if kinds and any(kind != "full_attention" for kind in kinds):
            raise InputError(f"{origin}: layer_types has windows but use_sliding_window is not true; make them agree")
        return {}
    window = {"sliding_window": _required(values, "sliding_window", origin)}
    if family == "qwen3_moe":  # transformers gives every layer of this family the window
        return window
    if kinds is None:
        return window | {"max_window_layers": _required(values, "max_window_layers", origin)}
    first = kinds.index("sliding_attention") if "sliding_attention" in kinds else len(kinds)
    if kinds != ["full_attention"] * first + ["sliding_attention"] * (len(kinds) - first):
        raise InputError(f"{origin}: layer_types is not full attention first and windows after; that is not supported")
    return window | {"max_window_layers": first}


def _context(values: Mapping[str, Any], rope: Mapping[str, Any], origin: str) -> dict[str, Any] | None:
    """The fields of Context from rope_scaling, dual_chunk_attention_config and our own key."""
    kind = rope.get("rope_type", "default")
    if kind not in ("default", *_NUMBERS):
        raise InputError(f"{origin}: rope_type = {kind!r} is not supported; this model knows default, yarn and llama3")
    known = ("rope_type", "rope_theta") + (_SCALED + _NUMBERS[kind] if kind in _NUMBERS else ())
    known += _MSCALE if kind == "yarn" else ()
    for key, value in rope.items():
        if key not in known and (key, value) not in _HARMLESS:
            raise InputError(
                f"{origin}: {key} = {value!r} of rope_type {kind!r} is not supported, and without it the model may "
                "compute something else; give a checkpoint that does not use it"
            )
    chunks = _object(values, "dual_chunk_attention_config", origin)
    if chunks and kind != "default":
        raise InputError(f"{origin}: both rope_type {kind!r} and dual_chunk_attention_config; delete one of them")
    if chunks:
        return (
            _chunks(chunks, origin)
            | {"target": values["max_position_embeddings"]}
            | _own(values, ("static", "target"), origin)
        )
    if kind == "default":
        return _own(values, (), origin) or None
    numbers = {key: rope[key] for key in _NUMBERS[kind] if key in rope}
    if kind == "llama3":
        numbers = {key: _required(rope, key, origin) for key in _NUMBERS[kind]}
    lengths = _lengths(rope, origin)
    if kind == "yarn" and "attention_factor" not in numbers:
        numbers |= _attention_factor(rope, origin)
    return {"method": kind, **lengths, **numbers, **_own(values, ("static",), origin)}


def _attention_factor(rope: Mapping[str, Any], origin: str) -> dict[str, float]:
    """What mscale and mscale_all_dim say together; transformers ignores one without the other, and 0."""
    scales = [rope.get(key) or 0 for key in _MSCALE]
    if not all(isinstance(scale, int | float) and 0 <= scale <= LARGEST for scale in scales):
        raise InputError(f"{origin}: mscale and mscale_all_dim must be numbers >= 0, got {scales[0]!r}, {scales[1]!r}")
    if not all(scales):
        return {}
    over, under = (0.1 * scale * math.log(rope["factor"]) + 1 for scale in scales)
    return {"attention_factor": over / under}


def _chunks(chunks: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Dual Chunk Attention in vLLM's keys; sizes that are Context's own defaults are left to it."""
    sizes = ("original_max_position_embeddings", "chunk_size", "local_size")
    native, size, local = (_required(chunks, key, origin) for key in sizes)
    if not all(isinstance(n, int) and n >= 0 for n in (native, size, local)):
        raise InputError(f"{origin}: dual_chunk_attention_config needs whole numbers, got {dict(chunks)!r}")
    found = {"method": "dca", "native": native}
    found |= {"chunk_size": size} if size != native * 3 // 4 else {}
    return found | ({"local_window": local} if local != native // 16 else {})


def _own(values: Mapping[str, Any], keys: tuple[str, ...], origin: str) -> dict[str, Any]:
    """What ``twofold.context`` adds to Hugging Face's keys; it may not contradict them."""
    own = dict(_object(_object(values, "twofold", origin), "context", origin))
    for key in own:
        if key not in keys:
            raise InputError(f"{origin}: twofold.context.{key} has no meaning beside this rope_scaling; delete it")
    return own


def _lengths(rope: Mapping[str, Any], origin: str) -> dict[str, int]:
    """native and target, in tokens, from the original length and the factor."""
    native, factor = (_required(rope, key, origin) for key in ("original_max_position_embeddings", "factor"))
    length = isinstance(native, int) and 0 < native <= LARGEST
    if not length or not isinstance(factor, int | float) or not 1 <= factor <= LARGEST:
        raise InputError(f"{origin}: original_max_position_embeddings = {native!r} and factor = {factor!r} do not fit")
    target = round(native * factor)
    if target / native != factor:
        raise InputError(
            f"{origin}: factor {factor} times {native} is no whole number of tokens; try {target}/{native}"
        )
    return {"native": native, "target": target}


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
        values["attention_bias"] = False
    values |= _context_to_hf(config)
    if family == "llama":
        if config.sliding_window is not None:
            raise InputError("Hugging Face's llama has no sliding_window; set it to null or use a Qwen family")
        # The class defaults are the ids of the first Llama's vocabulary.
        return values | {"mlp_bias": False, "bos_token_id": None, "eos_token_id": None}
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


def _context_to_hf(config: ModelConfig) -> dict[str, Any]:
    context = config.context
    if context is None:
        return {"rope_scaling": None}
    own: dict[str, Any] = {"static": True} if context.static else {}
    if context.method == "dca":
        chunks = {"chunk_size": context.dca_chunk_size, "local_size": context.dca_chunk_size - context.chunk_len}
        chunks["original_max_position_embeddings"] = context.native
        own["target"] = context.target
        return {"rope_scaling": None, "dual_chunk_attention_config": chunks, "twofold": {"context": own}}
    scaling: dict[str, Any] = {"rope_type": context.method, "factor": context.factor}
    scaling["original_max_position_embeddings"] = context.native
    for key in _NUMBERS[context.method]:
        if (value := getattr(context, key)) is not None:
            scaling[key] = value
    return {"rope_scaling": scaling} | ({"twofold": {"context": own}} if own else {})


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
