"""Files that are either whole or absent: atomic writes, hashes, JSON and JSON Lines; paths that people type.

Every file Twofold writes goes through here: a temporary name beside the target, fsync, rename. A path whose bytes the
locale cannot read has lone surrogates in Python; files stay UTF-8 all the same. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from twofold.base.records import InputError

_LONE = re.compile(r"[\ud800-\udfff]")


def named_path(text: str) -> Path:
    """The absolute path that somebody typed; ``~`` and ``~name`` at its start are homes.

    What lies there under the very name comes first, and ``~name`` of no user is a name like any other.
    """
    path = Path(text)
    if not os.path.lexists(path):
        with suppress(RuntimeError):  # no such user, or no home
            path = path.expanduser()
    return path.absolute()


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Reading of a file or folder that somebody named: what the system refuses becomes one line."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it replaces ``path``, on any error it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically; bytes of paths that the locale could not read come out as they were."""
    with atomic_path(path) as temporary:
        temporary.write_text(_mended(text) if _LONE.search(text) else text, encoding="utf-8")


def _mended(text: str) -> str:
    """Text without lone surrogates: those that stand for bytes are read as UTF-8, the rest is replaced."""
    bytes_alone = re.sub(r"[\ud800-\udc7f\udd00-\udfff]", "\ufffd", text)
    return bytes_alone.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically."""
    write_text(path, _json(value, indent=1) + "\n")


def _json(value: Any, indent: int | None = None) -> str:
    """JSON in which a lone surrogate is an escape, so that what is read again is the very same text."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    return text if text.isascii() else _LONE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def read_json(path: Path) -> Any:
    """Read one JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_json_object(path: Path, broken: str) -> dict[str, Any]:
    """Read one JSON object that somebody else wrote.

    Args:
        broken: what the message says of other contents, after the path, with {} for what is wrong.

    Raises:
        InputError: the file cannot be read or holds something else.
    """
    with readable(path):
        try:
            values = read_json(path)
        except (ValueError, RecursionError) as error:  # ValueError: JSON, UTF-8, numbers without end
            raise InputError(f"{path} {broken.format(error)}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} {broken.format('it holds no JSON object')}")
    return values


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """Write one JSON value a line, atomically."""
    write_text(path, "".join(_json(row) + "\n" for row in rows))


def read_jsonl(path: Path) -> list[Any]:
    """Read all rows of a JSON Lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as 64 hex digits."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
