"""Whole tables in adapter files: embedding and head under PEFT's ``modules_to_save``, and LoRA on them.

Both become rows of tokens, one for every row of the table, which an adapter brings already (``vocab.py``). LoRA on a
table is added to it in fp32, so it can be used and merged, but not trained on as factors. Where embedding and head are
one here, an adapter that changes one of them alone is refused. Not here: the factors of layers (``peft_io.py``).

Shape legend: r rank, V vocabulary rows, D width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from twofold.base.records import InputError
from twofold.model.lora import Place
from twofold.model.peft_config import PREFIX, factor_of
from twofold.model.qwen3 import Qwen3, TokenRows

TABLES = {"embed_tokens": "model.embed_tokens", "lm_head": "lm_head"}  # PEFT's names: ours
_WHOLE = (".weight", ".base_layer.weight")
_FACTORS = {"embed_tokens": ".lora_embedding_{}", "lm_head": ".lora_{}.weight"}
_WAY_OUT = "merge the adapter with PEFT instead"


@torch.no_grad()
def take_tables(
    model: Qwen3, tensors: dict[str, torch.Tensor], config: dict[str, Any], path: Path, train: bool
) -> list[TokenRows]:
    """All rows of the tables that an adapter changes as a whole; their tensors are taken out of ``tensors``.

    Raises:
        InputError: a table that is listed and missing, factors of another shape or to be trained on, or a change of
            only one of embedding and head where they are tied.
    """
    found: dict[str, torch.Tensor] = {}
    factored = False
    for name, ours in TABLES.items():
        module = PREFIX + ours
        whole = [_table(model, tensors, module + ending, path) for ending in _WHOLE if module + ending in tensors]
        keys = {side: module + _FACTORS[name].format(side) for side in "AB"}
        pair = {side: tensors.pop(key).float() for side, key in keys.items() if key in tensors}
        if (_lists(config, "modules_to_save", name) and not whole) or (
            _lists(config, "target_modules", name) and not pair
        ):
            raise InputError(f"{path}: no tensors for {name}, which the adapter's configuration lists; copy it again")
        if whole:
            found[ours] = whole[0]
        if pair:
            factored = True
            found[ours] = _with_factors(model, name, pair, found.get(ours), config, path)
    if factored and train:
        raise InputError(f"{path}: LoRA on embedding or head cannot be trained on; pass train=False, or {_WAY_OUT}")
    if model.config.tie_word_embeddings and found:
        found = {TABLES["embed_tokens"]: _one_table(found, factored, config, path)}
    return [TokenRows(ours, list(range(len(table_VD))), table_VD) for ours, table_VD in found.items()]


def _table(model: Qwen3, tensors: dict[str, torch.Tensor], key: str, path: Path) -> torch.Tensor:
    table = tensors.pop(key)
    width = model.config.hidden_size
    if table.dim() != 2 or table.shape[1] != width:
        raise InputError(f"{path}: tensor {key!r} is {tuple(table.shape)}, not a table of rows of {width}; wrong base")
    return table


def _lists(config: dict[str, Any], key: str, name: str) -> bool:
    listed = config.get(key)
    return isinstance(listed, list) and any(str(each).rpartition(".")[2] == name for each in listed)


def _with_factors(
    model: Qwen3,
    name: str,
    pair: dict[str, torch.Tensor],
    whole: torch.Tensor | None,
    config: dict[str, Any],
    path: Path,
) -> torch.Tensor:
    """A table [V, D], the adapter's own or the model's, and its low-rank update."""
    table_VD = model.model.embed_tokens.weight if name == "embed_tokens" else model.head_weight
    rows, width = table_VD.shape if whole is None else whole.shape
    place = Place(name, "weight", 0, width, rows) if name == "embed_tokens" else Place(name, "weight", 0, rows, width)
    factor = factor_of(TABLES[name], pair, place, 1, config, path)
    update = factor.lora_B @ factor.lora_A * factor.scale
    update_VD = update.T if name == "embed_tokens" else update
    return (table_VD if whole is None else whole).cpu().float() + update_VD


def _one_table(found: dict[str, torch.Tensor], factored: bool, config: dict[str, Any], path: Path) -> torch.Tensor:
    """The table of a model whose embedding is its head; PEFT trains two copies unless it is told to tie them."""
    tables = list(found.values())
    # Not listed, the embedding was only saved because it had grown, and PEFT puts it back where both see it.
    alone = len(tables) == 1 and config.get("modules_to_save") and not config.get("ensure_weight_tying")
    if factored or alone or not all(torch.equal(table, tables[0]) for table in tables):
        raise InputError(
            f"{path}: its modules_to_save or LoRA factors change {' and '.join(found)} alone or apart, which in this "
            f"model are one table; {_WAY_OUT}, with tie_word_embeddings false"
        )
    return tables[0]
