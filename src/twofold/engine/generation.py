"""Sampling defaults of a checkpoint: what its generation_config.json says, and which mode they are for.

Keys that the engine honours become sampling parameters; keys about ids and files say nothing about sampling; every
other key is named in a warning, so that none is dropped silently. Not here: the file itself (``model/hf_config.py``),
and end tokens (``text/roles.py``). Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from twofold.base.records import InputError, SamplingParams

# Qwen3's recommendations for its two modes (model cards; technical report, section 4.7).
THINKING = {"temperature": 0.6, "top_p": 0.95, "top_k": 20}
ANSWERING = {"temperature": 0.7, "top_p": 0.8, "top_k": 20}

_NAMES = {  # Hugging Face's key -> ours
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "stop_strings": "stop",
}
_DRAWING = ("temperature", "top_p", "top_k", "min_p")  # mean nothing to a model that is decoded greedily
_OTHER = frozenset(
    [
        *("do_sample", "eos_token_id", "bos_token_id", "pad_token_id", "transformers_version", "_from_model_config"),
        *("use_cache", "cache_implementation", "cache_config", "return_dict_in_generate", "output_scores"),
        *("output_attentions", "output_hidden_states", "output_logits", "chat_format"),
    ]
)
_OFF: dict[str, Any] = {  # values under which an unsupported key changes nothing
    "max_length": 20,  # the library's default, which max_new_tokens replaces
    "min_length": 0,
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "length_penalty": 1.0,
    "diversity_penalty": 0.0,
    "encoder_repetition_penalty": 1.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "early_stopping": False,
    "renormalize_logits": False,
    "remove_invalid_values": False,
}


def sampling_defaults(config: Mapping[str, Any], thinking: bool | None) -> dict[str, Any]:
    """Fields of ``SamplingParams`` that the checkpoint wants.

    A checkpoint with two modes has one generation_config.json, made for thinking: where it says what Qwen3 recommends
    for thinking, replies without thinking are sampled as Qwen3 recommends for those. Other values hold in both modes.

    Args:
        config: generation_config.json. thinking: the mode; None for text without modes.
    """
    own: dict[str, Any] = {ours: config[key] for key, ours in _NAMES.items() if config.get(key) is not None}
    if "stop" in own:
        own["stop"] = (own["stop"],) if isinstance(own["stop"], str) else tuple(own["stop"])
    if config.get("do_sample") is False:
        return {name: value for name, value in own.items() if name not in _DRAWING} | {"temperature": 0.0}
    said = {name: own[name] for name in THINKING if name in own}
    if thinking is not None and not said:
        return own | (THINKING if thinking else ANSWERING)
    return own | ANSWERING if thinking is False and said == THINKING else own


def config_warnings(config: Mapping[str, Any]) -> list[str]:
    """One line for each key that changes how text is generated elsewhere and not here, and for impossible values."""
    lines = []
    for key, value in config.items():
        if value is None or key in _NAMES or key in _OTHER or (key in _OFF and value == _OFF[key]):
            continue
        lines.append(f"{key} of generation_config.json is not supported and has no effect")
    try:
        SamplingParams(**({"max_tokens": 2**31} | sampling_defaults(config, None)))
    except (InputError, TypeError) as error:
        lines.append(f"generation_config.json has a value that cannot be used ({error}); mend it")
    return lines
