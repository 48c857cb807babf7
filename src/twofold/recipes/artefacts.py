"""Finished stage folders: manifest, verification, atomic publication, the folder lock and one-line disk errors.

An artefact is the folder a stage wrote plus ``manifest.json``. It appears by renames that an interruption at any
moment leaves repairable: ``out`` with a manifest is finished work still to be moved; a work folder without ``out``
has been published. Not here: which stage runs when (``chain``). Imports no torch.
"""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

import twofold
from twofold.base.config import digest
from twofold.base.files import read_json, sha256_file, write_json

MANIFEST = "manifest.json"
WORK = ".work"
VOLATILE = "volatile"
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class ChainError(Exception):
    """A run cannot go on; the message is one line that names the stage or file and what mends it."""


class FileEntry(BaseModel):
    """Size in bytes and SHA-256 of one file of an artefact."""

    model_config = ConfigDict(frozen=True)
    sha256: str
    size: int


class Cost(BaseModel):
    """What a stage took, summed over its resumed attempts.

    seconds: wall clock. cpu_seconds: this process and its finished children. peak_memory_bytes: largest resident
    set of the process seen during the stage (the process may have reached it in an earlier stage).
    """

    model_config = ConfigDict(frozen=True)
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_memory_bytes: int = 0
    attempts: int = 0


class Manifest(BaseModel):
    """What is known about a finished artefact. ``files`` maps a relative POSIX path to its entry."""

    model_config = ConfigDict(frozen=True)
    stage: str
    key: str
    files: dict[str, FileEntry]
    cost: Cost
    finished: str
    versions: dict[str, str]
    code: str
    seed: int
    config: dict[str, Any]

    @property
    def content(self) -> str:
        """Hash of the files' contents; what lies under ``volatile/`` (timings and the like) does not count."""
        stable = {name: entry.sha256 for name, entry in self.files.items() if not name.startswith(f"{VOLATILE}/")}
        return digest(stable)


def read_manifest(artefact: Path) -> Manifest | None:
    """The manifest of an artefact folder, or None when the folder does not exist.

    Raises:
        ChainError: the folder has no readable manifest.
    """
    if not artefact.exists():
        return None
    path = artefact / MANIFEST
    try:
        return Manifest.model_validate(read_json(path))
    except (FileNotFoundError, NotADirectoryError):
        raise ChainError(
            f"{artefact} has no {MANIFEST}: move it away, or make it afresh with {_redo(artefact)}"
        ) from None
    except (ValueError, ValidationError):
        raise ChainError(f"{path} is damaged: make the stage afresh with {_redo(artefact)}") from None


def verify(artefact: Path, manifest: Manifest) -> None:
    """Check every file of an artefact against its manifest: presence, size, SHA-256.

    Raises:
        ChainError: naming the first file that differs and the option that mends it.
    """
    for name, entry in manifest.files.items():
        path = artefact / name
        if not path.is_file():
            raise ChainError(f"{path} is missing: make the stage afresh with {_redo(artefact)}")
        size = path.stat().st_size
        if size != entry.size:
            raise ChainError(
                f"{path} is damaged ({size} bytes, not {entry.size}): make the stage afresh with {_redo(artefact)}"
            )
        if sha256_file(path) != entry.sha256:
            raise ChainError(f"{path} is damaged (its SHA-256 differs): make the stage afresh with {_redo(artefact)}")


def list_files(folder: Path) -> dict[str, FileEntry]:
    """Hash every regular file below a folder (the manifest excepted) and push it to the disk."""
    entries: dict[str, FileEntry] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or name == MANIFEST:
            continue
        with open(path, "rb") as handle:
            os.fsync(handle.fileno())
        entries[name] = FileEntry(sha256=sha256_file(path), size=path.stat().st_size)
    return entries


def work_folder(folder: Path, stage: str, key: str) -> Path:
    """Where a stage with this key keeps what it has so far: ``out`` and ``work`` below it."""
    return folder / WORK / f"{stage}-{key}"


def seal(work: Path, manifest: Manifest) -> None:
    """Declare the files in ``work/out`` finished; from here on only ``publish`` is left to do."""
    write_json(work / "out" / MANIFEST, manifest.model_dump())
    _fsync_folder(work / "out")


def publish(work: Path, artefact: Path) -> None:
    """Move finished work into its place, the previous artefact out of the way first; safe to repeat."""
    old = work / "old"
    if artefact.exists():
        if old.exists():
            shutil.rmtree(old)
        os.rename(artefact, old)
    os.rename(work / "out", artefact)
    _fsync_folder(artefact.parent)
    discard(work)


def discard(work: Path) -> None:
    """Remove a work folder; a removal cut short can never be taken for resumable work."""
    if not work.exists():
        return
    trash = work.with_name(f".trash-{work.name}-{os.getpid()}-{time.monotonic_ns()}")
    os.rename(work, trash)
    shutil.rmtree(trash)


def discard_other_work(folder: Path, stage: str, key: str) -> None:
    """Remove a stage's unfinished work under other keys (left by configurations since changed)."""
    pattern = re.compile(re.escape(stage) + r"-[0-9a-f]{16}")
    for path in list((folder / WORK).glob("*")):
        if pattern.fullmatch(path.name) and path != work_folder(folder, stage, key):
            discard(path)


def repair(folder: Path) -> None:
    """Finish what an interrupted run left half moved or half removed."""
    for work in sorted((folder / WORK).glob("*")):
        if work.name.startswith(".trash-"):
            shutil.rmtree(work)
        elif not (work / "out").exists():
            discard(work)
        elif (work / "out" / MANIFEST).exists():
            publish(work, folder / work.name[:-17])  # the name is <stage>-<16 hex digits>


def empty_folder(folder: Path) -> None:
    """Remove what a folder holds and keep the folder."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold the run folder for this process; the lock ends with the process, however that ends.

    Raises:
        ChainError: another process holds it; the message names its id.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
            raise ChainError(
                f"another run (process {holder}) is using {folder}: wait for it, or choose another folder with --out"
            ) from None
        with suppress(OSError):  # the process id is a courtesy; a full disk must not forbid a run with nothing to do
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"{os.getpid()}\n".encode())
        yield
    finally:
        os.close(descriptor)


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn operating-system errors inside the block into one clear line."""
    try:
        yield
    except OSError as error:
        line = disk_problem(error, folder)
        raise ChainError(line or f"{error.strerror or error}: {error.filename or folder}") from error


def disk_problem(error: BaseException, folder: Path) -> str | None:
    """One line for a full disk, a missing permission or a read-only file system anywhere in the chain of causes."""
    current: BaseException | None = error
    for _ in range(16):
        if current is None:
            return None
        if isinstance(current, OSError):
            where = current.filename or folder
            if current.errno in _NO_SPACE:
                return f"the disk is full (writing {where}): free some space and run the same command"
            if current.errno in (errno.EACCES, errno.EPERM):
                return f"no permission for {where}: change its owner or mode, or choose another folder with --out"
            if current.errno == errno.EROFS:
                return f"{where} is on a read-only file system: choose another folder with --out"
        if "No space left on device" in str(current):  # native writers wrap the errno in their own exception
            return f"the disk is full (writing below {folder}): free some space and run the same command"
        current = current.__cause__ or current.__context__
    return None


def now_text() -> str:
    """The present moment in UTC, ISO 8601 to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def versions() -> dict[str, str]:
    """Versions of Python, Twofold and torch, without importing torch."""
    found = {"python": platform.python_version()}
    for name in ("twofold", "torch"):
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


@cache
def code_fingerprint() -> str:
    """Hash of the package's own Python sources."""
    root = Path(twofold.__file__).parent
    return digest({path.relative_to(root).as_posix(): sha256_file(path) for path in sorted(root.rglob("*.py"))})


def _redo(artefact: Path) -> str:
    return f"--redo {artefact.name}"


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
