"""Long context and RoPE in config.json, in and out: rope_scaling (transformers 4), rope_parameters (5), vLLM's
dual_chunk_attention_config, and our own ``twofold.context``.

Keys that could change what the model computes and are not known here are errors by name. Not here: the other keys
(``hf_config.py``), the frequencies themselves (``rope.py``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from twofold.base.records import InputError
from twofold.model.config import LARGEST, ModelConfig

# Keys of rope_scaling by its type, besides rope_type and rope_theta.
_SCALED = ("factor", "original_max_position_embeddings")
_NUMBERS = {"yarn": ("beta_fast", "beta_slow", "attention_factor"), "llama3": ("low_freq_factor", "high_freq_factor")}
# YaRN's attention factor in DeepSeek's words, and what multiplies it in the words of YaRN's authors and vLLM.
_MSCALE, _TIMES = ("mscale", "mscale_all_dim"), "attn_factor"
_HARMLESS = (("truncate", True), ("partial_rotary_factor", 1.0), ("extrapolation_factor", 1.0))
_HINTS = {
    "head_dim": "rows of q_proj divided by num_attention_heads; hidden_size / num_attention_heads is wrong for Qwen3",
    "num_key_value_heads": "num_attention_heads where the model has no grouped queries",
    "norm_topk_prob": "true for every Qwen3",
    "tie_word_embeddings": "false where the weights hold an lm_head.weight of their own",
    "original_max_position_embeddings": "tokens of a sequence in training, before any scaling",
}


def required(values: Mapping[str, Any], key: str, origin: str) -> Any:
    """A value that must be there and not null; InputError with what it could be."""
    if values.get(key) is None:
        raise InputError(missing(key, origin))
    return values[key]


def missing(key: str, origin: str) -> str:
    """The words for a key that is not there."""
    hint = f" ({_HINTS[key]})" if key in _HINTS else ""
    return f"{origin}: {key} is missing, and a library's default is not the model's value; add {key}{hint}"


def read_rope(values: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """rope_theta, rope_scaling (transformers 4) and rope_parameters (5) as one dictionary; they may not differ."""
    merged: dict[str, Any] = {}
    for key in ("rope_parameters", "rope_scaling"):
        given = nested(values, key, origin)
        if any(isinstance(value, Mapping) for value in given.values()):
            raise InputError(f"{origin}: {key} differs between layers, which is not supported; give one for all")
        renamed = {"rope_type" if name == "type" else name: v for name, v in given.items() if v is not None}
        _merge(merged, renamed, origin)
    _merge(merged, {"rope_theta": values["rope_theta"]} if values.get("rope_theta") is not None else {}, origin)
    return merged


def nested(values: Mapping[str, Any], key: str, origin: str) -> Mapping[str, Any]:
    """A nested object, empty where it is absent or null."""
    given = values.get(key)
    if given is not None and not isinstance(given, Mapping):
        raise InputError(f"{origin}: {key} must be an object or null, got {given!r}")
    return given or {}


def _merge(into: dict[str, Any], values: Mapping[str, Any], origin: str) -> None:
    for key, value in values.items():
        if into.setdefault(key, value) != value:
            raise InputError(f"{origin}: two values of {key}, {into[key]!r} and {value!r}; delete the wrong one")


def read_context(values: Mapping[str, Any], rope: Mapping[str, Any], origin: str) -> dict[str, Any] | None:
    """The fields of Context from rope_scaling, dual_chunk_attention_config and our own key."""
    kind = rope.get("rope_type", "default")
    if kind not in ("default", *_NUMBERS):
        raise InputError(f"{origin}: rope_type = {kind!r} is not supported; this model knows default, yarn and llama3")
    known = ("rope_type", "rope_theta") + (_SCALED + _NUMBERS[kind] if kind in _NUMBERS else ())
    known += (*_MSCALE, _TIMES) if kind == "yarn" else ()
    for key, value in rope.items():
        if key not in known and (key, value) not in _HARMLESS:
            raise InputError(
                f"{origin}: {key} = {value!r} of rope_type {kind!r} is not supported, and without it the model may "
                "compute something else; give a checkpoint that does not use it"
            )
    chunks = nested(values, "dual_chunk_attention_config", origin)
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
        numbers = {key: required(rope, key, origin) for key in _NUMBERS[kind]}
    lengths = _lengths(rope, origin)
    if kind == "yarn":
        numbers |= _attention_factor(rope, origin)
    return {"method": kind, **lengths, **numbers, **_own(values, ("static",), origin)}


def _attention_factor(rope: Mapping[str, Any], origin: str) -> dict[str, float]:
    """The attention factor that the keys beside it say, empty where they say nothing.

    attn_factor multiplies YaRN's own: DeepSeek-R1-0528-Qwen3-8B has 0.878 for a whole of 1. transformers does not know
    the key and warns; vLLM, SGLang and llama.cpp compute what is computed here.
    """
    whole = rope.get("attention_factor")
    if (times := rope.get(_TIMES)) is None:
        return _mscale(rope, origin) if whole is None else {}
    if isinstance(times, bool) or not isinstance(times, int | float) or not 0 < times <= LARGEST:
        raise InputError(f"{origin}: {_TIMES} must be a number above 0, got {times!r}")
    own = _mscale(rope, origin).get("attention_factor", 0.1 * math.log(rope["factor"]) + 1)
    if whole is not None and not (isinstance(whole, int | float) and math.isclose(whole, own * times, rel_tol=1e-6)):
        raise InputError(
            f"{origin}: attention_factor {whole!r} and {_TIMES} {times!r} differ: the latter multiplies YaRN's own "
            f"{own:.6f}; delete the wrong one"
        )
    return {"attention_factor": own * times}


def _mscale(rope: Mapping[str, Any], origin: str) -> dict[str, float]:
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
    native, size, local = (required(chunks, key, origin) for key in sizes)
    if not all(isinstance(n, int) and n >= 0 for n in (native, size, local)):
        raise InputError(f"{origin}: dual_chunk_attention_config needs whole numbers, got {dict(chunks)!r}")
    found = {"method": "dca", "native": native}
    found |= {"chunk_size": size} if size != native * 3 // 4 else {}
    return found | ({"local_window": local} if local != native // 16 else {})


def _own(values: Mapping[str, Any], keys: tuple[str, ...], origin: str) -> dict[str, Any]:
    """What ``twofold.context`` adds to Hugging Face's keys; it may not contradict them."""
    own = dict(nested(nested(values, "twofold", origin), "context", origin))
    for key in own:
        if key not in keys:
            raise InputError(f"{origin}: twofold.context.{key} has no meaning beside this rope_scaling; delete it")
    return own


def _lengths(rope: Mapping[str, Any], origin: str) -> dict[str, int]:
    """native and target, in tokens, from the original length and the factor."""
    native, factor = (required(rope, key, origin) for key in ("original_max_position_embeddings", "factor"))
    length = isinstance(native, int) and 0 < native <= LARGEST
    if not length or not isinstance(factor, int | float) or not 1 <= factor <= LARGEST:
        raise InputError(f"{origin}: original_max_position_embeddings = {native!r} and factor = {factor!r} do not fit")
    target = round(native * factor)
    if target / native != factor:
        raise InputError(
            f"{origin}: factor {factor} times {native} is no whole number of tokens; try {target}/{native}"
        )
    return {"native": native, "target": target}


def context_to_hf(config: ModelConfig) -> dict[str, Any]:
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
