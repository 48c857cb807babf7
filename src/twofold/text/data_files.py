"""Files of rows by kind: JSON Lines, JSON, both also with gzip, CSV and Parquet; other kinds are refused by name.

What a file is decides how it begins, not how it is called; only CSV has no beginning of its own. Not here: what a row
means (``formats.py``).
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from twofold.base.records import InputError

_GZIP, _PARQUET = b"\x1f\x8b", b"PAR1"
_REFUSED = {  # first bytes of what people have as well
    b"PK\x03\x04": "a zip archive or a spreadsheet",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
    b"BZh": "compressed by bzip2",
    b"\xfd7zXZ": "compressed by xz",
    b"ARROW1": "an Arrow file",
    b"\xff\xff\xff\xff": "an Arrow stream",
    b"SQLite format 3": "an SQLite database",
    b"\x93NUMPY": "a numpy array",
    b"\x89HDF": "an HDF5 file",
    b"\xff\xfe": "UTF-16, not UTF-8",
    b"\xfe\xff": "UTF-16, not UTF-8",
    b"%PDF": "a PDF",
}
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_MOST_CELL = 2**30  # characters of a CSV cell; the library's own limit is below long conversations
_BLANK = re.compile(r"\s*")
_ASK = "give JSON Lines (.jsonl, also .gz), a JSON array, .csv or .parquet"


def read_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Place in the file and row, or the ``InputError`` of a broken one.

    A place is ":3" for a line, "[2]" for an index where lines say nothing (JSON over many lines, Parquet).

    Raises:
        InputError: the file cannot be read, is not UTF-8, is of another kind, or is an array that is not JSON.
    """
    with _readable(path):
        with open(path, "rb") as file:
            head = file.read(16)
        kind = next((kind for mark, kind in _REFUSED.items() if head.startswith(mark)), "")
        if kind:
            raise InputError(f"{path} is {kind}; {_ASK}")
        name = path.name.lower().removesuffix(".gz")
        if head.startswith(_PARQUET) or name.endswith(".parquet"):
            yield from _parquet(path)
            return
        delimiter = _DELIMITERS.get(Path(name).suffix)
        opened = gzip.open if head.startswith(_GZIP) else open
        with opened(path, "rt", encoding="utf-8-sig", newline=None if delimiter is None else "") as lines:
            yield from _json(path, lines) if delimiter is None else _table(path, lines, delimiter)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8; {_ASK}") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path} is damaged ({error}); copy it again") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); {_ASK}") from None


def _json(path: Path, lines: TextIO) -> Iterator[tuple[str, Any]]:
    first = next((line for line in lines if line.strip()), "").strip()
    lines.seek(0)
    if first.startswith("["):
        rows = _row(lines.read())
        if isinstance(rows, InputError):
            raise InputError(f"{path}: {rows}")
        yield from ((f"[{index}]", row) for index, row in enumerate(rows))
        return
    if first.startswith("{") and isinstance(_row(first), InputError):  # perhaps objects over many lines
        values = _values(lines.read())
        lines.seek(0)
        if values is not None:
            yield from ((f"[{index}]", value) for index, value in enumerate(values))
            return
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield f":{number}", _row(line)


def _row(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return InputError(f"not JSON ({error}); give one JSON object a line, or one JSON array")


def _values(text: str) -> list[Any] | None:
    """JSON values one after the other, None if there is anything else."""
    decoder, values, at = json.JSONDecoder(), [], 0
    try:
        while (at := _BLANK.match(text, at).end()) < len(text):  # type: ignore[union-attr]
            value, at = decoder.raw_decode(text, at)
            values.append(value)
    except (ValueError, RecursionError):
        return None
    return values


def _table(path: Path, lines: TextIO, delimiter: str) -> Iterator[tuple[str, Any]]:
    """Rows of a table with a line of names; an empty cell says nothing."""
    csv.field_size_limit(_MOST_CELL)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        names = [name.strip() for name in next(reader, [])]
        if len(set(names)) < len(names) or "" in names:
            raise InputError(f"{path}:1: a column has no name, or two have the same; give every column a name")
        line = reader.line_num + 1
        for cells in reader:
            if len(cells) == len(names):
                yield f":{line}", {name: cell or None for name, cell in zip(names, cells, strict=True)}
            elif cells:
                yield f":{line}", InputError(f"{len(cells)} cells under {len(names)} names; quote cells with commas")
            line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{path}:{reader.line_num}: not CSV ({error}); mend the line, or give JSON Lines") from None


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(f"{path} needs pyarrow; install it with: pip install 'twofold[parquet]'") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            rows = chain.from_iterable(batch.to_pylist() for batch in file.iter_batches(batch_size=64))
            # Dates and bytes, which no row of a conversation needs, become text: rows are JSON.
            yield from ((f"[{index}]", json.loads(json.dumps(row, default=str))) for index, row in enumerate(rows))
    except pyarrow.ArrowException as error:
        raise InputError(f"{path} is not a readable Parquet file ({error}); copy it again") from None
