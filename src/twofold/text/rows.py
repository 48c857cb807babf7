"""Files of conversations: each row as the views that it is trained as.

A row that cannot be used comes out as its error, with its place in the file, so that a caller chooses whether to stop
or to skip and count. Not here: kinds of files (``data_files.py``), formats of rows (``formats.py``) and tokens
(``chat.py``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from twofold.base.records import InputError
from twofold.text.chat import Rendered, Renderer
from twofold.text.data_files import read_rows
from twofold.text.formats import read_example

__all__ = ["read_rows", "read_views"]


def read_views(
    path: Path,
    renderer: Renderer,
    *,
    empty_think_trained: bool = False,
    ignore: Collection[str] = (),
    ignored: Counter[str] | None = None,
) -> Iterator[tuple[str, tuple[Rendered, ...] | InputError]]:
    """Place and views of every row of a file, or what is wrong with the row; plain text is one view.

    Args:
        ignore: columns that are left out of every row.
        ignored: counts, by name, the columns that were not used.

    Raises:
        InputError: as ``read_rows``.
    """
    for place, row in read_rows(path):
        if isinstance(row, InputError):
            yield place, row
            continue
        if isinstance(row, Mapping):
            row = {key: value for key, value in row.items() if key not in ignore}
        try:
            views, unused = _views(row, renderer, empty_think_trained)
        except InputError as error:
            yield place, error
            continue
        except RecursionError as error:
            yield place, InputError(str(error))
            continue
        if ignored is not None:
            ignored.update(unused)
        yield place, views


def _views(row: Any, renderer: Renderer, empty_think_trained: bool) -> tuple[tuple[Rendered, ...], tuple[str, ...]]:
    spec = renderer.policy.spec
    example = read_example(row, inline_thinking=spec.thinks, inline_calls=spec.tools)
    if example.segments:
        return (renderer.render_text(example.segments),), example.ignored
    views = renderer.views(
        example.messages, example.tools, empty_think_trained=empty_think_trained, weights=example.weights
    )
    return tuple(views), example.ignored
