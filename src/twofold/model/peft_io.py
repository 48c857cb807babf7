"""Adapters as files, in PEFT's format: adapter_config.json and adapter_model.safetensors, read and written.

Stacked experts are read in both of PEFT's forms: factors of each expert under its own name (PEFT on transformers 4,
vLLM), and one tensor for all experts of a layer (PEFT's target_parameters on transformers 5). Rows of tokens that are
trained with an adapter are part of it (PEFT's trainable_token_indices), and so are whole tables (``peft_tables.py``).
What an adapter needs and this model has not (DoRA, biases, other modules saved beside it) is an error. Imports no peft.

Shape legend: r rank, I inputs, O outputs, E experts.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from twofold.base.files import atomic_path, write_json
from twofold.base.records import InputError
from twofold.model.lora import LowRank, Place, activate, adaptable, adapter_factors, all_places, install
from twofold.model.peft_config import ALL_EXPERTS, CONFIG, PREFIX, factor_of, read_adapter_config
from twofold.model.peft_tables import TABLES, take_tables
from twofold.model.quantised import QuantExperts, QuantLinear
from twofold.model.qwen3 import Qwen3, TokenRows
from twofold.model.vocab import adapter_rows, check_rows, train_new_rows

WEIGHTS = "adapter_model.safetensors"
OTHER_BASE = "other_base"  # code of the error for an adapter of other base weights
_FINGERPRINT = "twofold_base"  # key in the header of the weights
_TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_ONE_EXPERT = re.compile(r"(.+\.experts)\.(\d+)(\.\w+)")
_ROWS = re.compile(r"base_model\.model\.(.+)\.token_adapter\.trainable_tokens_delta")  # the rows, whatever it says
Factors = dict[str, LowRank]


def save_adapter(model: Qwen3, name: str, folder: Path, base: str | None = None, per_expert: bool = False) -> None:
    """Write adapter ``name`` as a folder that PEFT loads, with rows of tokens that it brings or that are in training.

    Args:
        base: what ``base_model_name_or_path`` says, a hub id or a folder. per_expert: write a shared "gate_up_proj" of
            experts as gate_proj and up_proj of each expert, the names that vLLM reads; the function is the same.

    Raises:
        InputError: no such adapter, or one that changes embedding and head alone.
    """
    factors = adapter_factors(model, name)
    if not factors:
        raise InputError(f"adapter {name!r} has no factors in any layer, and cannot be saved; merge it instead")
    if per_expert:
        factors = {path: factor for pair in factors.items() for path, factor in _apart(*pair)}
    stacked = any(path.endswith(".experts.gate_up_proj") for path in factors)
    tensors: dict[str, torch.Tensor] = {}
    for path, factor in factors.items():
        for key, A_rI, B_Or in _to_peft(path, factor, stacked, set(factors)):
            tensors[f"{PREFIX}{key}.lora_A.weight"] = A_rI.detach().cpu().contiguous()
            tensors[f"{PREFIX}{key}.lora_B.weight"] = B_Or.detach().cpu().contiguous()
    rows = adapter_rows(model, model.adapters.named[name])
    tensors |= {f"{PREFIX}{each.path}.token_adapter.trainable_tokens_delta": each.own for each in rows}
    indices = {each.path.rpartition(".")[2]: each.ids for each in sorted(rows, key=lambda each: each.path)}
    fingerprint = base_fingerprint(model)
    data = save(tensors, metadata={"format": "pt"})
    with atomic_path(Path(folder) / WEIGHTS) as temporary:
        temporary.write_bytes(_labelled(data, fingerprint) if fingerprint else data)
    config = _config(model, factors, base, stacked) | ({"trainable_token_indices": indices} if indices else {})
    write_json(Path(folder) / CONFIG, config)


def load_adapter(model: Qwen3, name: str, folder: Path, train: bool = False, same_base: bool = True) -> None:
    """Attach and activate the adapter in ``folder`` under ``name``, with the rows of tokens in it; all or nothing.

    Args:
        train: its factors and rows take gradients; otherwise nothing does. same_base: refuse an adapter that was
            written here for other base weights. That catches a base into which the adapter is merged already. Pass
            False for a sibling of its base; quantised bases and adapters written by PEFT cannot be checked so.

    Raises:
        InputError: missing or damaged files, a feature or a module that this model does not have, tensors of another
            shape, rows of tokens while others are being trained; when training, dropout, or rows that are not one run
            of tokens in every table. The message names file, tensor and remedy.
    """
    config = read_adapter_config(Path(folder) / CONFIG)
    if train and config.get("lora_dropout"):
        raise InputError(
            f"{folder / CONFIG}: lora_dropout is not supported in training; set it to 0 there, or train=False"
        )
    tensors, fingerprint = _read_weights(Path(folder) / WEIGHTS)
    rows = _token_rows(tensors, config, Path(folder) / WEIGHTS)
    rows += take_tables(model, tensors, config, Path(folder) / WEIGHTS, train)
    factors = _to_factors(model, tensors, config, Path(folder) / WEIGHTS)
    _check_complete(all_places(model), factors, config, Path(folder) / WEIGHTS)
    check_rows(model, rows, str(Path(folder) / WEIGHTS))
    here = base_fingerprint(model)
    if same_base and fingerprint and here and fingerprint != here:
        raise InputError(
            f"{Path(folder) / WEIGHTS}: the adapter was trained on other base weights, or is merged into these "
            f"already; load its base ({config.get('base_model_name_or_path') or 'not named'})",
            hint="or pass same_base=False",
            code=OTHER_BASE,
        )
    run = _one_run(model, rows, Path(folder) / WEIGHTS) if train and rows else None
    install(model, name, factors, rows)
    activate(model, name, train)
    if run is not None:
        train_new_rows(model, run[0], len(run))


@torch.no_grad()
def base_fingerprint(model: Qwen3) -> str | None:
    """Hash of a sample of the base's adaptable weights, rounded to bf16; None for a quantised base."""
    digest = hashlib.sha256()
    for site in adaptable(model):
        if isinstance(site.base, QuantLinear | QuantExperts):
            return None
        for weight in site.base.parameters():
            sample = weight.flatten()[:: max(1, weight.numel() // 256)].to(torch.bfloat16)
            digest.update(sample.cpu().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def _labelled(data: bytes, fingerprint: str) -> bytes:
    """A safetensors file with the base's fingerprint in its header (the library puts several entries in no order)."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"][_FINGERPRINT] = fingerprint
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[end:]


def _apart(path: str, factor: LowRank) -> list[tuple[str, LowRank]]:
    """A shared gate_up_proj as gate_proj and up_proj with the same A."""
    if not path.endswith(".experts.gate_up_proj"):
        return [(path, factor)]
    names = (path.replace("gate_up_proj", part) for part in ("gate_proj", "up_proj"))
    halves = factor.lora_B.chunk(2, dim=-2)
    return [
        (n, LowRank(factor.lora_A.data.clone(), half.data, factor.alpha, factor.rslora))
        for n, half in zip(names, halves, strict=True)
    ]


def _to_peft(
    path: str, factor: LowRank, stacked: bool, present: set[str]
) -> Iterable[tuple[str, torch.Tensor, torch.Tensor]]:
    """PEFT's (module, A [r, I], B [O, r]) for one of our parts."""
    prefix, _, part = path.rpartition(".")
    if not prefix.endswith(".experts"):
        return [(path, factor.lora_A, factor.lora_B)]
    if not stacked:
        pairs = zip(factor.lora_A.unbind(0), factor.lora_B.unbind(0), strict=True)
        return [(f"{prefix}.{expert}.{part}", A, B) for expert, (A, B) in enumerate(pairs)]
    inner = part == "gate_up_proj" and f"{prefix}.down_proj" in present
    A_rI = factor.lora_A.flatten(0, 1)
    B_Or = factor.lora_B.permute(1, 2, 0).flatten(1)  # PEFT keeps the experts innermost here
    return [(prefix + (".base_layer" if inner else ""), A_rI, B_Or)]


def _config(model: Qwen3, factors: Factors, base: str | None, stacked: bool) -> dict[str, Any]:
    ranks = Counter((factor.r, factor.alpha) for factor in factors.values())
    r, alpha = ranks.most_common(1)[0][0]
    others = {re.escape(path): factor for path, factor in factors.items() if (factor.r, factor.alpha) != (r, alpha)}
    modules, parameters = _targets(model, factors, stacked)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": r,
        "lora_alpha": _whole(alpha),
        "lora_dropout": 0.0,
        "use_rslora": next(iter(factors.values())).rslora,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "rank_pattern": {path: factor.r for path, factor in others.items()},
        "alpha_pattern": {path: _whole(factor.alpha) for path, factor in others.items()},
        "target_modules": modules,
    } | ({"target_parameters": parameters} if parameters else {})


def _targets(model: Qwen3, factors: Factors, stacked: bool) -> tuple[list[str], list[str]]:
    """target_modules and target_parameters: a bare name where every part of that name is adapted, else whole paths."""
    places = all_places(model)
    modules, parameters = set(), set()
    for path in factors:
        part = path.rpartition(".")[2]
        experts = ".experts." in path
        alike = {p for p in places if p.endswith(f".{part}") and not (stacked and (".experts." in p) != experts)}
        everywhere = alike <= factors.keys()
        if experts and stacked:
            parameters.add(f"mlp.experts.{part}" if everywhere else path)
        elif not experts and ".mlp." in path and part != "gate" and model.config.num_experts:
            parameters.add(f"{path}.weight")  # PEFT takes the bare names of a sparse model to mean its experts
        elif everywhere:
            modules.add(part)
        else:
            prefix = path.removesuffix(f".{part}")
            experts_here = range(model.config.num_experts) if experts else ()
            modules |= {f"{prefix}.{e}.{part}" for e in experts_here} or {path}
    return sorted(modules), sorted(parameters)


def _whole(value: float) -> float | int:
    return int(value) if value == int(value) else value


def _read_weights(path: Path) -> tuple[dict[str, torch.Tensor], str | None]:
    if not path.is_file():
        raise InputError(f"{path.parent} has no {path.name}; save the adapter with PEFT's safetensors format")
    try:
        with safe_open(path, framework="pt") as handle:
            header = handle.metadata() or {}
            return {key: handle.get_tensor(key) for key in handle.keys()}, header.get(_FINGERPRINT)  # noqa: SIM118
    except SafetensorError as error:
        raise InputError(f"{path} is damaged ({error}); copy the adapter again") from None


def _token_rows(tensors: dict[str, torch.Tensor], config: dict[str, Any], path: Path) -> list[TokenRows]:
    """The rows of tokens, taken out of ``tensors``; all that the configuration lists."""
    found = {match[1]: tensors.pop(key) for key in list(tensors) if (match := _ROWS.fullmatch(key))}
    listed = config.get("trainable_token_indices") or {}
    by_table = listed if isinstance(listed, dict) else {"embed_tokens": listed}
    absent = [table for table, ids in by_table.items() if ids and not any(f".{p}".endswith(f".{table}") for p in found)]
    if absent:
        raise InputError(
            f"{path}: no rows for {absent[0]}, for which {CONFIG} lists trainable_token_indices; copy it again"
        )
    return [TokenRows(p, list(by_table.get(p.rpartition(".")[2], ())), rows_ND) for p, rows_ND in found.items()]


def _one_run(model: Qwen3, rows: list[TokenRows], path: Path) -> range:
    """The tokens whose rows are to be trained on, the same in every table."""
    runs = [range(min(each.ids), max(each.ids) + 1) for each in rows]
    tables = 1 if model.config.tie_word_embeddings else 2
    if len(rows) != tables or runs != runs[:1] * tables or any(sorted(r.ids) != [*runs[0]] for r in rows):
        raise InputError(
            f"{path}: rows of tokens that are not one run, the same in every table, cannot be trained; pass train=False"
        )
    return runs[0]


def _to_factors(model: Qwen3, tensors: dict[str, torch.Tensor], config: dict[str, Any], path: Path) -> Factors:
    """Factors by our paths, every tensor used and of the right shape."""
    places = all_places(model)
    experts = model.config.num_experts
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        match = _TENSOR.fullmatch(key)
        if not match:
            raise InputError(
                f"{path}: tensor {key!r} is not a LoRA factor of a layer; merge the adapter with PEFT instead"
            )
        pairs.setdefault(match[1], {})[match[2]] = tensor.float()
    stacks: dict[str, dict[int, LowRank]] = {}
    for module, pair in pairs.items():
        ours, expert = _ours(module, pairs, config)
        place = places.get(ours)
        if place is None:
            raise InputError(
                f"{path}: tensor {PREFIX + module!r} has no counterpart here; this model can adapt "
                f"{', '.join(sorted({p.part for p in places.values()}))} in {model.config.num_hidden_layers} layers"
            )
        stack = experts if ".experts." in ours and expert is None else 1
        factor = factor_of(module, pair, place, stack, config, path)
        stacks.setdefault(ours, {})[-1 if expert is None else expert] = factor
    return {ours: _stacked(ours, found, experts, path) for ours, found in stacks.items()}


def _ours(module: str, pairs: dict[str, Any], config: dict[str, Any]) -> tuple[str, int | None]:
    """Our path of PEFT's module, and which expert of the stack it is, None for all or where there are none."""
    one = _ONE_EXPERT.fullmatch(module)
    if one:
        return one[1] + one[3], int(one[2])
    everyone = ALL_EXPERTS.fullmatch(module)
    if not everyone:
        return module, None
    if everyone[2]:
        return f"{everyone[1]}.gate_up_proj", None
    names = config.get("target_parameters") or []
    only_gate_up = f"{module}.base_layer" not in pairs and not any(n.rpartition(".")[2] == "down_proj" for n in names)
    return f"{module}.{'gate_up_proj' if only_gate_up else 'down_proj'}", None


def _stacked(ours: str, found: dict[int, LowRank], experts: int, path: Path) -> LowRank:
    if -1 in found and len(found) == 1:
        return found[-1]
    odd = sorted(set(range(experts)) ^ found.keys())
    if odd:
        raise InputError(
            f"{path}: {ours} has factors for experts {sorted(found)}, this model has {experts}; wrong base"
        )
    if len({(factor.r, factor.alpha) for factor in found.values()}) > 1:
        raise InputError(f"{path}: experts of {ours} differ in rank or alpha; merge the adapter with PEFT instead")
    ordered = [found[expert] for expert in range(experts)]
    A, B = (torch.stack([getattr(factor, side).data for factor in ordered]) for side in ("lora_A", "lora_B"))
    return LowRank(A, B, ordered[0].alpha, ordered[0].rslora)


def _check_complete(places: dict[str, Place], factors: Factors, config: dict[str, Any], path: Path) -> None:
    """Every module that the configuration lists must have its tensors, as far as it lists them by name."""
    if config.get("layers_to_transform") is not None or config.get("exclude_modules"):
        return
    modules = config.get("target_modules") or []
    wanted: list[tuple[str, bool | None]]  # name, and whether it means experts where that is known
    wanted = [] if isinstance(modules, str) else [(str(name), None) for name in modules]
    wanted = [(name, experts) for name, experts in wanted if name.rpartition(".")[2] not in TABLES]
    wanted += [
        (name.removesuffix(".weight"), not name.endswith(".weight")) for name in config.get("target_parameters") or []
    ]
    for name, experts in wanted:
        plain = re.sub(r"\.experts\.\d+\.", ".experts.", name)
        meant = [p for p in places if (p == plain or p.endswith(f".{plain}")) and experts in (None, ".experts." in p)]
        if not meant:
            raise InputError(f"{path.parent / CONFIG}: target {name!r} is no module of this model; wrong base")
        absent = [p for p in meant if p not in factors]
        if absent:
            raise InputError(f"{path}: no tensors for {absent[0]}, which {CONFIG} lists as {name!r}; copy it again")
