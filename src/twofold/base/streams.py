"""A program whatever its locale: paths are UTF-8, and what a terminal's or a pipe's encoding lacks is printed as ``?``.

Not here: what is printed, and files, which are UTF-8 everywhere.
"""

from __future__ import annotations

import codecs
import io
import os
import sys

from twofold.base.malloc import start_again

_FAILING = ("strict", "surrogateescape")  # error handlers that raise for some text


def ensure_utf8_paths() -> None:
    """Start this process again in Python's UTF-8 mode where its locale has another encoding for the names of files.

    Libraries written in Rust take paths as UTF-8 alone, so they would not find ``modèle`` in such a locale. The streams
    keep the encoding that they had. Call it first thing in ``main``.
    """
    in_vain = sys.flags.ignore_environment or os.environ.get("PYTHONUTF8") == "1"
    if sys.getfilesystemencoding() == "utf-8" or in_vain:
        return
    streams = os.environ.get("PYTHONIOENCODING") or f"{sys.stdout.encoding}:replace"
    start_again({**os.environ, "PYTHONUTF8": "1", "PYTHONIOENCODING": streams})


def forgiving_streams() -> None:
    """Make output replace what it cannot encode; read UTF-8 where input is said to be ASCII, which is part of it.

    Error handlers that the user chose (``PYTHONIOENCODING=ascii:backslashreplace``) stay. Call it first thing in
    ``main``. Bytes that are no text then raise UnicodeDecodeError where they are read.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in _FAILING:
            stream.reconfigure(errors="replace")
    if isinstance(sys.stdin, io.TextIOWrapper):
        name = codecs.lookup(sys.stdin.encoding).name
        if name == "ascii":
            sys.stdin.reconfigure(encoding="utf-8", errors="strict")
        elif sys.stdin.errors == "surrogateescape":
            sys.stdin.reconfigure(errors="strict")
