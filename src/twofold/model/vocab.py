"""New tokens: rows for them in embedding and head, and training those rows alone.

``add_tokens`` fills rows that a padded table already has and enlarges it only when needed. ``train_new_rows`` makes the
new rows a parameter of their own: whatever the optimiser does to its parameters (weight decay included), the old rows
stay as they are to the bit. Rows that belong to an adapter come and go with it. Not here: the tokenizer's side of a new
token.

Shape legend: V vocabulary rows, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import nn
from torch.nn.utils import parametrize

from twofold.base.records import InputError
from twofold.model.qwen3 import Adapter, Qwen3, TokenRows

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
        InputError: numbers that leave a gap or cannot be, or a model whose new rows are being trained, that carries an
            adapter with rows, or whose head is packed.
    """
    _refuse_packed(model)
    rows = model.config.vocab_size
    if not 0 < first <= rows or count < 1 or multiple < 1 or noise < 0:
        raise InputError(f"cannot add {count} tokens from {first} on to a table of {rows} rows; check both numbers")
    if _training_rows(model):
        raise InputError("new rows are being trained; call keep_new_rows before adding tokens")
    owners = [adapter.name for adapter in model.adapters.named.values() if adapter.rows]
    if owners:
        raise InputError(f"adapter {owners[0]!r} brings rows of tokens; merge or detach it before adding others")
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

    The table is put together anew wherever it is used; call ``keep_new_rows`` before saving the model or long
    generation. An adapter can be saved before that or after: the rows are saved with it.

    Raises:
        InputError: rows that the table does not have, rows being trained already, or a model whose head is packed.
    """
    _refuse_packed(model)
    if not 0 <= first < first + count <= model.config.vocab_size:
        raise InputError(f"the table has {model.config.vocab_size} rows; add tokens {first}..{first + count - 1} first")
    if _training_rows(model):
        raise InputError("new rows are being trained already; call keep_new_rows first")
    for table in _tables(model):
        parametrize.register_parametrization(table, "weight", NewRows(table.weight, first, count))
    freeze_base(model)


@torch.no_grad()
def keep_new_rows(model: Qwen3) -> None:
    """Write trained rows into the tables, which are plain again; without adapters everything can be trained again.

    If an adapter takes part the rows are its own from now on: saved with it, and gone from the tables without it.
    """
    for rows in trained_rows(model):
        table = _tables_by_path(model)[rows.path]
        rows.base = _stored(table)[rows.ids]
        parametrize.remove_parametrizations(table, "weight", leave_parametrized=True)
        if model.adapters.active is not None:
            model.adapters.active.rows.append(rows)
    if not model.adapters.named:
        thaw(model)


def trained_rows(model: Qwen3) -> list[TokenRows]:
    """The rows that are being trained, one entry a table."""
    found = []
    for path, table in _tables_by_path(model).items():
        if parametrize.is_parametrized(table, "weight"):
            new = cast(NewRows, _parametrisation(table)[0])
            ids = range(new.first, new.first + len(new.rows))
            found.append(TokenRows(path, list(ids), new.rows.detach()))
    return found


def adapter_rows(model: Qwen3, adapter: Adapter) -> list[TokenRows]:
    """All rows that an adapter is saved with, those being trained included, one entry a table."""
    found: dict[str, dict[int, torch.Tensor]] = {}
    for rows in (*adapter.rows, *trained_rows(model)):
        found.setdefault(rows.path, {}).update(zip(rows.ids, rows.own.cpu(), strict=True))
    return [TokenRows(path, list(by_id), torch.stack(list(by_id.values()))) for path, by_id in found.items()]


def check_rows(model: Qwen3, rows: Sequence[TokenRows], origin: str) -> None:
    """See that an adapter from ``origin`` can bring these rows to the model.

    Raises:
        InputError: no such table, rows that it does not have, another width, rows being trained, or a packed head.
    """
    if not rows:
        return
    _refuse_packed(model)
    if _training_rows(model):
        raise InputError(f"{origin} has rows of tokens, and such are being trained here; call keep_new_rows first")
    tables = _tables_by_path(model)
    for each in rows:
        if each.path not in tables:
            raise InputError(
                f"{origin}: rows for {each.path}, which this model has not (its tables: {', '.join(tables)})"
            )
        count, width = tables[each.path].weight.shape
        if tuple(each.own.shape) != (len(each.ids), width) or not all(0 <= i < count for i in each.ids):
            raise InputError(
                f"{origin}: rows of shape {tuple(each.own.shape)} for tokens {min(each.ids, default=0)}.."
                f"{max(each.ids, default=0)} do not fit {each.path} of {count} rows of {width}; load the base that has "
                "these tokens"
            )


@torch.no_grad()
def put_rows(model: Qwen3, adapter: Adapter) -> None:
    """Write an adapter's rows into the tables, and remember what was there."""
    for rows in adapter.rows:
        table_VD = _stored(_tables_by_path(model)[rows.path])
        rows.base = table_VD[rows.ids]
        table_VD[rows.ids] = rows.own.to(table_VD)


@torch.no_grad()
def take_rows(model: Qwen3, adapter: Adapter) -> None:
    """Give the tables back what an adapter's rows replaced."""
    for rows in reversed(adapter.rows):
        assert rows.base is not None, "these rows are not in the table"
        table_VD = _stored(_tables_by_path(model)[rows.path])
        table_VD[rows.ids] = rows.base.to(table_VD)
        rows.base = None


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


def _refuse_packed(model: Qwen3) -> None:
    if model.packed_head is not None:
        raise InputError("rows of tokens cannot be changed in a model packed for inference; load it without quantize")


def _parametrisation(table: nn.Embedding | nn.Linear) -> nn.ModuleList:
    return cast(nn.ModuleList, cast(nn.ModuleDict, table.parametrizations)["weight"])


def _stored(table: nn.Embedding | nn.Linear) -> torch.Tensor:
    """The table that is stored, under the new rows where such are being trained."""
    if parametrize.is_parametrized(table, "weight"):
        return cast(torch.Tensor, _parametrisation(table).original)
    return table.weight


def _tables(model: Qwen3) -> list[nn.Embedding | nn.Linear]:
    return list(_tables_by_path(model).values())


def _tables_by_path(model: Qwen3) -> dict[str, nn.Embedding | nn.Linear]:
    tables: dict[str, nn.Embedding | nn.Linear] = {"model.embed_tokens": model.model.embed_tokens}
    return tables if model.config.tie_word_embeddings else tables | {"lm_head": model.lm_head}
