"""Files of conversations: rows of JSON Lines or of one JSON array, and each row as the views that it is trained as.

A row that cannot be used comes out as its error, with its place in the file, so that a caller chooses whether to stop
or to skip and count. Not here: formats of rows (``formats.py``) and tokens (``chat.py``).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from twofold.base.records import InputError
from twofold.text.chat import Rendered, Renderer
from twofold.text.formats import read_example


def read_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Place in the file (":3" is a line, "[2]" an index of the array) and row, or the ``InputError`` of a broken line.

    Raises:
        InputError: the file cannot be read, is not UTF-8, or is an array that is not JSON.
    """
    try:
        with open(path, encoding="utf-8-sig") as lines:
            is_array = lines.read(1) == "["
            lines.seek(0)
            if is_array:
                rows = _json(lines.read())
                if isinstance(rows, InputError):
                    raise InputError(f"{path}: {rows}")
                yield from ((f"[{index}]", row) for index, row in enumerate(rows))
                return
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f":{number}", _json(line)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); give a JSON Lines file") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8; give a JSON Lines file") from None


def read_views(
    path: Path, renderer: Renderer, *, empty_think_trained: bool = False
) -> Iterator[tuple[str, tuple[Rendered, ...] | InputError]]:
    """Place and views of every row of a file, or what is wrong with the row; plain text is one view.

    Raises:
        InputError: as ``read_rows``.
    """
    for place, row in read_rows(path):
        if isinstance(row, InputError):
            yield place, row
            continue
        try:
            yield place, _views(row, renderer, empty_think_trained)
        except (InputError, RecursionError) as error:
            yield place, InputError(str(error))


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return InputError(f"not JSON ({error}); give one JSON object a line, or one JSON array")


def _views(row: Any, renderer: Renderer, empty_think_trained: bool) -> tuple[Rendered, ...]:
    example = read_example(row, inline_thinking=renderer.policy.spec.thinks)
    if example.segments:
        return (renderer.render_text(example.segments),)
    views = renderer.views(
        example.messages, example.tools, empty_think_trained=empty_think_trained, weights=example.weights
    )
    return tuple(views)
