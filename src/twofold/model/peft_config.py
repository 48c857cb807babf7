"""adapter_config.json of PEFT: read and checked, and what it says about the factors of one module.

A key that is not understood must be empty: what it asks for would be missing from the function. Not here: tensors.

Shape legend: r rank, I inputs, O outputs.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch

from twofold.base.files import read_json
from twofold.base.records import InputError
from twofold.model.lora import LowRank, Place

CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
ALL_EXPERTS = re.compile(r"(.+\.experts)(\.base_layer)?")
_SAVED = ("embed_tokens", "lm_head")
# Keys that say nothing about the function, or are honoured here; any other key must be empty, false or null.
_UNDERSTOOD = {
    *(
        "peft_type",
        "task_type",
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "lora_dropout",
        "bias",
    ),
    *("target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("trainable_token_indices", "modules_to_save", "ensure_weight_tying"),
    *("init_lora_weights", "inference_mode", "base_model_name_or_path", "revision", "auto_mapping", "peft_version"),
    *("megatron_core", "qalora_group_size", "runtime_config"),
}
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")  # ways to begin that leave the base as it is


def read_adapter_config(path: Path) -> dict[str, Any]:
    """What an adapter's configuration says.

    Raises:
        InputError: it is missing or damaged, of another kind of adapter, or asks for a feature that is not here.
    """
    if not path.is_file():
        raise InputError(f"{path.parent} is not an adapter folder: it has no {path.name}")
    try:
        config = read_json(path)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is damaged ({error}); copy the adapter again") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise InputError(f"{path}: peft_type {kind!r} is not supported; only LORA adapters can be loaded")
    missing = [key for key in ("r", "lora_alpha") if not isinstance(config.get(key), int | float)]
    if missing:
        raise InputError(f"{path}: {missing[0]} is missing; copy the adapter again")
    if config.get("init_lora_weights", True) not in _PLAIN_STARTS:
        raise InputError(
            f"{path}: init_lora_weights {config['init_lora_weights']!r} changes the base as well; convert the adapter "
            "to plain LoRA with PEFT first"
        )
    if config.get("bias", "none") != "none":
        raise InputError(f"{path}: bias {config['bias']!r} is not supported; merge the adapter with PEFT instead")
    saved = [str(name).rpartition(".")[2] for name in config.get("modules_to_save") or []]
    if others := [name for name in saved if name not in _SAVED]:
        raise InputError(
            f"{path}: modules_to_save {others[0]!r} is not supported, only {' and '.join(_SAVED)}; merge the adapter "
            "with PEFT instead"
        )
    strange = [key for key, value in config.items() if value and key not in _UNDERSTOOD]
    if strange:
        raise InputError(
            f"{path}: {strange[0]} = {config[strange[0]]!r} is not supported; merge the adapter with PEFT instead"
        )
    return config


def factor_of(
    module: str, pair: dict[str, torch.Tensor], place: Place, stack: int, config: dict[str, Any], path: Path
) -> LowRank:
    """The checked factors of one of PEFT's modules.

    Args:
        pair: A [r, I] and B [O, r], where ``stack`` experts lie one after another along r.

    Raises:
        InputError: one of the two is missing, or has another shape than ``place`` needs.
    """
    name = f"{module}.{place.part}" if ALL_EXPERTS.fullmatch(module) else module
    r = int(_by_pattern(config.get("rank_pattern"), name, config["r"]))
    alpha = float(_by_pattern(config.get("alpha_pattern"), name, config["lora_alpha"]))
    wanted = {"A": (r * stack, place.inputs), "B": (place.outputs, r * stack)}
    for side, shape in wanted.items():
        if side not in pair:
            raise InputError(f"{path}: tensor {f'{PREFIX}{module}.lora_{side}.weight'!r} is missing; copy it again")
        if pair[side].shape != shape:
            raise InputError(
                f"{path}: tensor {f'{PREFIX}{module}.lora_{side}.weight'!r} has shape {tuple(pair[side].shape)}, rank "
                f"{r} on this model needs {shape}; the adapter is for another base: "
                f"{config.get('base_model_name_or_path') or 'its config names none'}"
            )
    A_rI, B_Or = pair["A"], pair["B"]
    if stack > 1:
        A_rI, B_Or = A_rI.unflatten(0, (stack, r)), B_Or.unflatten(1, (r, stack)).permute(2, 0, 1)
    return LowRank(A_rI.contiguous(), B_Or.contiguous(), alpha, bool(config.get("use_rslora")))


def _by_pattern(patterns: dict[str, Any] | None, name: str, default: float) -> float:
    """PEFT's rule: the first pattern that matches the end of the name, from a dot or its beginning on."""
    return next((value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", name)), default)
