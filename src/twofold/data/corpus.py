"""Text corpora that every installation already has: the Python standard library and its language reference.

They need no download and no account, and their licence (PSF-2.0) travels with every document.
Not here: crawling, large corpora, language detection, tokenisation. The order is deterministic; the content depends
on the installed Python version, which is written in ``source``.
"""

from __future__ import annotations

import ast
import platform
import pydoc_data.topics
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from twofold.base.records import InputError
from twofold.base.split import held_out

LICENCE = "PSF-2.0"
_EXCLUDED_FOLDERS = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idlelib",
    "idle_test",
    "turtledemo",
    "ensurepip",
    "pydoc_data",
    "__pycache__",
}
_EXCLUDED_FILES = {"html/entities.py", "sre_constants.py", "sre_compile.py", "sre_parse.py"}
_MAX_BYTES = 400_000
_MIN_CHARS = 200


@dataclass(frozen=True, slots=True)
class Document:
    """One text. ``id`` is unique in its corpus; parts of one file are named ``file#part`` and split together."""

    id: str
    text: str
    source: str
    licence: str


def split_documents(documents: Iterable[Document], salt: str = "") -> tuple[list[Document], list[Document]]:
    """Split into (train, held out) by the id before ``#``, so that parts of one file stay on one side.

    salt: another one holds out other documents, so that what settings were chosen on is not what they are judged on.
    """
    train: list[Document] = []
    test: list[Document] = []
    for document in documents:
        (test if held_out(salt + document.id.split("#")[0]) else train).append(document)
    return train, test


def python_stdlib_documents(root: Path | None = None) -> list[Document]:
    """Sources of the installed standard library, sorted by path.

    Left out: installed packages, tests, demos, generated tables (codec maps, build data) and files over 400 kB.

    Args:
        root: library folder; None means that of the running interpreter.

    Raises:
        InputError: the folder holds no Python sources.
    """
    folder = root or Path(sysconfig.get_paths()["stdlib"])
    documents = []
    for relative in sorted(path.relative_to(folder).as_posix() for path in _source_files(folder)):
        text = _read(folder / relative)
        if text is not None and not _is_table(relative, text):
            documents.append(Document(f"stdlib/{relative}", text, _source_name(), LICENCE))
    if not documents:
        raise InputError(f"no Python sources under {folder}; install the standard library's .py files or give a root")
    return documents


def docstring_documents(documents: Iterable[Document]) -> list[Document]:
    """One document for each Python document that has docstrings: its names and docstrings, in source order.

    The id is ``<id>#docstrings``, so the split follows the file. Files that do not parse are skipped.
    """
    found = []
    for document in documents:
        try:
            tree = ast.parse(document.text)
        except (SyntaxError, ValueError):
            continue
        text = "\n\n".join(_docstrings(tree, ""))
        if len(text) >= _MIN_CHARS:
            found.append(Document(f"{document.id}#docstrings", text + "\n", document.source, document.licence))
    return found


def pydoc_topic_documents() -> list[Document]:
    """The language reference chapters that ``help()`` shows, sorted by topic."""
    topics: dict[str, str] = pydoc_data.topics.topics
    return [
        Document(f"pydoc/{name}", topics[name].strip() + "\n", _source_name(), LICENCE)
        for name in sorted(topics)
        if len(topics[name]) >= _MIN_CHARS
    ]


def _source_name() -> str:
    return f"cpython-{platform.python_version()}"


def _source_files(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.is_dir():
            if path.name not in _EXCLUDED_FOLDERS and not path.name.startswith("config-"):
                yield from _source_files(path)
        elif path.suffix == ".py" and not path.name.startswith("_sysconfigdata"):
            yield path


def _read(path: Path) -> str | None:
    data = path.read_bytes()
    if len(data) > _MAX_BYTES:
        return None
    try:
        text = data.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError:
        return None
    return text if len(text) >= _MIN_CHARS else None


def _is_table(relative: str, text: str) -> bool:
    if relative in _EXCLUDED_FILES:
        return True
    return relative.startswith("encodings/") and ("decoding_table" in text or "decoding_map" in text)


def _docstrings(node: ast.AST, prefix: str) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        name = f"{prefix}{child.name}"
        text = ast.get_docstring(child)
        if text and not child.name.startswith("_"):
            yield f"{name}\n{text}"
        if isinstance(child, ast.ClassDef):
            yield from _docstrings(child, f"{name}.")
