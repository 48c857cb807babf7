"""New tokens: rows for them in embedding and head, and training those rows alone.

``add_tokens`` fills rows that a padded table already has and enlarges it only when needed. ``train_new_rows`` makes the
new rows a parameter of their own: whatever the optimiser does to its parameters (weight decay included), the old rows
stay as they are to the bit. Not here: the tokenizer's side of a new token.

Shape legend: V vocabulary rows, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import nn
from torch.nn.utils import parametrize

from twofold.base.records import InputError
from twofold.model.qwen3 import Qwen3

_ROWS = ".parametrizations.weight.0.rows"


class NewRows(nn.Module):
    """Parametrisation of a table [V, D]: rows ``first`` and after, ``count`` of them, come from a parameter."""

    def __init__(self, table_VD: torch.Tensor, first: int, count: int) -> None:
        super().__init__()
        self.first = first
        self.rows = nn.Parameter(table_VD.detach()[first : first + count].clone())

    def forward(self, table_VD: torch.Tensor) -> torch.Tensor:
        return torch.cat((table_VD[: self.first], self.rows, table_VD[self.first + len(self.rows) :]))


@torch.no_grad()
def add_tokens(model: Qwen3, first: int, count: int, noise: float = 0.1, seed: int = 0, multiple: int = 1) -> None:
    """Give tokens ``first`` .. ``first + count - 1`` rows of their own, in embedding and head, tied or not.

    A new row is the mean of the rows below ``first``, so that a new token is no surprise to the layers and takes little
    probability from others, plus normal noise of ``noise`` standard deviations of the rows, from ``seed`` alone.

    Args:
        first: number of tokens so far; rows from there on are padding and may be overwritten.
        multiple: the table grows to a multiple of this many rows; rows beyond the new tokens are filled alike.

    Raises:
        InputError: numbers that leave a gap or cannot be, or a model whose new rows are being trained.
    """
    rows = model.config.vocab_size
    if not 0 < first <= rows or count < 1 or multiple < 1 or noise < 0:
        raise InputError(f"cannot add {count} tokens from {first} on to a table of {rows} rows; check both numbers")
    if _training_rows(model):
        raise InputError("new rows are being trained; call keep_new_rows before adding tokens")
    total = max(rows, -(-(first + count) // multiple) * multiple)
    generator = torch.Generator().manual_seed(seed)
    for table in _tables(model):
        old_VD = table.weight
        spread_D, mean_D = torch.std_mean(old_VD[:first].float(), 0, correction=0)
        end = total if total > rows else first + count
        fresh = torch.randn(end - first, old_VD.shape[1], generator=generator).to(old_VD.device)
        fresh = (mean_D + noise * spread_D * fresh).to(old_VD.dtype)
        table.weight = nn.Parameter(torch.cat((old_VD[:first], fresh, old_VD[end:])), old_VD.requires_grad)
        if isinstance(table, nn.Embedding):
            table.num_embeddings = total
        else:
            table.out_features = total
    model.config = model.config.model_copy(update={"vocab_size": total})


def train_new_rows(model: Qwen3, first: int, count: int) -> None:
    """Let only rows ``first`` .. ``first + count - 1`` of embedding and head be trained (and adapters, if attached).

    The table is put together anew wherever it is used; call ``keep_new_rows`` before saving or long generation.

    Raises:
        InputError: rows that the table does not have, or rows being trained already.
    """
    if not 0 <= first < first + count <= model.config.vocab_size:
        raise InputError(f"the table has {model.config.vocab_size} rows; add tokens {first}..{first + count - 1} first")
    if _training_rows(model):
        raise InputError("new rows are being trained already; call keep_new_rows first")
    for table in _tables(model):
        parametrize.register_parametrization(table, "weight", NewRows(table.weight, first, count))
    freeze_base(model)


def keep_new_rows(model: Qwen3) -> None:
    """Write trained rows into the tables: a plain model again. Without adapters everything can be trained again."""
    for table in _tables(model):
        if parametrize.is_parametrized(table, "weight"):
            parametrize.remove_parametrizations(table, "weight", leave_parametrized=True)
    if not any(".adapters." in name for name, _ in model.named_parameters()):
        thaw(model)


def trained_rows(model: Qwen3) -> dict[str, tuple[int, torch.Tensor]]:
    """The rows that are being trained: the first one's number and all values [count, D], by the table's path."""
    found = {}
    for path, table in _tables_by_path(model).items():
        if parametrize.is_parametrized(table, "weight"):
            new = cast(NewRows, cast(nn.ModuleList, cast(nn.ModuleDict, table.parametrizations)["weight"])[0])
            found[path] = (new.first, new.rows.detach())
    return found


@torch.no_grad()
def put_rows(model: Qwen3, path: str, ids: Sequence[int], rows: torch.Tensor) -> None:
    """Write rows [count, D] over those of the tokens ``ids``, in the table at ``path``.

    Raises:
        InputError: no such table, rows that it does not have, or another width.
    """
    table = _tables_by_path(model).get(path)
    if table is None:
        raise InputError(f"rows for {path}, which this model has not (its tables: {', '.join(_tables_by_path(model))})")
    count, width = table.weight.shape
    if tuple(rows.shape) != (len(ids), width) or not all(0 <= i < count for i in ids):
        raise InputError(
            f"rows of shape {tuple(rows.shape)} for tokens {min(ids, default=0)}..{max(ids, default=0)} do not fit "
            f"{path} of {count} rows of {width}; load the base that has these tokens"
        )
    table.weight[list(ids)] = rows.to(table.weight)


def freeze_base(model: Qwen3) -> None:
    """Freeze every parameter but factors of adapters and new rows."""
    for name, parameter in model.named_parameters():
        if ".adapters." not in name and not name.endswith(_ROWS):
            parameter.requires_grad_(False)


def thaw(model: Qwen3) -> None:
    """Let every parameter be trained; while new rows are being trained, only those."""
    model.requires_grad_(True)
    if _training_rows(model):
        freeze_base(model)


def _training_rows(model: Qwen3) -> bool:
    return any(parametrize.is_parametrized(table, "weight") for table in _tables(model))


def _tables(model: Qwen3) -> list[nn.Embedding | nn.Linear]:
    return list(_tables_by_path(model).values())


def _tables_by_path(model: Qwen3) -> dict[str, nn.Embedding | nn.Linear]:
    tables: dict[str, nn.Embedding | nn.Linear] = {"model.embed_tokens": model.model.embed_tokens}
    return tables if model.config.tie_word_embeddings else tables | {"lm_head": model.lm_head}
