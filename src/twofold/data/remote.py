"""Copies of remote shards in a local cache: fetched whole, compared with their SHA-256, then renamed into place.

Addresses are fsspec's (``s3://``, ``gs://``, ``hf://``, ``https://``, …); some need a package of their own, which its
error names. Paths without ``://`` never load fsspec. Not here: reading shards, which happens in the copies (shards.py).
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from twofold.base.files import atomic_path, write_text
from twofold.base.records import InputError
from twofold.data.shards import FILES, MANIFEST, parse_manifest, remember_verified

_TRIES = 3
_PIECE = 4 << 20  # bytes
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


def is_address(place: str | Path) -> bool:
    """Whether a place is an address for fsspec and not a path."""
    return isinstance(place, str) and "://" in place


def local_copies(address: str, cache: Path) -> list[Path]:
    """Fetch the shard at an address, or all shards in the folder there, unless the cache has them.

    A copy is used again while the manifest at the address is the same; where that cannot be asked, with a warning.
    Several processes may call this for one cache.

    Returns:
        Folders of whole, verified shards, in the order of their names.

    Raises:
        InputError: fsspec or a protocol is missing, there is no shard, the download breaks or differs from its SHA-256,
            or there is no space.
    """
    filesystem, root = _filesystem(address)
    try:
        roots = _shard_roots(filesystem, root)
    except Exception as error:  # every protocol has its own
        known = _cached(address, cache)
        if known is None:
            raise InputError(f"{address} cannot be read ({_line(error)}); check the address and your access") from None
        warnings.warn(f"{address} cannot be reached ({_line(error)}); using the copies in {cache}", stacklevel=2)
        return known
    if not roots:
        raise InputError(f"{address} holds no shard ({MANIFEST} is missing); check the address, or list its shards")
    folder = cache / _key(address)
    copies = [_copy(filesystem, root, folder / root.rsplit("/", 1)[-1]) for root in roots]
    write_text(folder / "shards.txt", "".join(f"{copy.name}\n" for copy in copies))
    return copies


def _filesystem(address: str) -> tuple[Any, str]:
    try:
        import fsspec
    except ImportError:
        raise InputError(f"{address} needs fsspec; install it with: pip install 'twofold[remote]'") from None
    try:
        filesystem, root = fsspec.core.url_to_fs(address.rstrip("/"))
    except (ImportError, ValueError) as error:
        raise InputError(
            f"{address} cannot be opened ({_line(error)}); install its package or mend the address"
        ) from None
    return filesystem, root


def _shard_roots(filesystem: Any, root: str) -> list[str]:
    """The shard at a place, or those in the folder there."""
    try:
        filesystem.info(f"{root}/{MANIFEST}")
        return [root]
    except FileNotFoundError:
        pass
    try:
        return sorted(path.rsplit("/", 1)[0] for path in filesystem.glob(f"{root}/*/{MANIFEST}"))
    except FileNotFoundError:
        return []


def _cached(address: str, cache: Path) -> list[Path] | None:
    """Copies of the last time, if all are there."""
    folder = cache / _key(address)
    try:
        names = (folder / "shards.txt").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    copies = [folder / name for name in names]
    return copies if all((copy / MANIFEST).is_file() for copy in copies) else None


def _copy(filesystem: Any, root: str, copy: Path) -> Path:
    """One shard, whole and verified, in ``copy``."""
    address = filesystem.unstrip_protocol(root)
    try:
        text = filesystem.cat_file(f"{root}/{MANIFEST}").decode("utf-8")
    except Exception as error:
        raise InputError(f"{address}/{MANIFEST} cannot be read ({_line(error)}); run it again, or check it") from None
    manifest = parse_manifest(text, address)
    try:
        with _lock(copy):
            if (copy / MANIFEST).is_file() and (copy / MANIFEST).read_text(encoding="utf-8") == text:
                return copy
            (copy / MANIFEST).unlink(missing_ok=True)  # of an older shard
            _need_space(filesystem, root, copy)
            for name in FILES:
                _fetch(filesystem, f"{root}/{name}", copy / name, manifest["sha256"][name])
            write_text(copy / MANIFEST, text)
            remember_verified(copy)
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise InputError(f"no space left in {copy.parent} for {address}; free some, or use another cache") from None
        raise InputError(f"{copy} cannot be written ({_line(error)}); choose another cache folder") from None
    return copy


def _need_space(filesystem: Any, root: str, copy: Path) -> None:
    """Refuse at once what cannot fit. Files whose size the protocol does not tell count as nothing."""
    address = filesystem.unstrip_protocol(root)
    try:
        needed = sum(filesystem.size(f"{root}/{name}") or 0 for name in FILES)
    except Exception as error:
        raise InputError(f"{address} is not complete ({_line(error)}); upload all three files of the shard") from None
    free = shutil.disk_usage(copy).free
    if needed > free:
        raise InputError(
            f"{address} has {needed:,} bytes and {copy.parent} room for {free:,}; free some, or use another cache"
        )


def _fetch(filesystem: Any, source: str, target: Path, digest: str) -> None:
    """Download one file under a temporary name, hashing it on the way; what breaks or differs is tried again."""
    address = filesystem.unstrip_protocol(source)
    problem = ""
    for _ in range(_TRIES):
        with suppress(_Broken), atomic_path(target) as temporary:
            try:
                found, size = _stream(filesystem, source, temporary)
            except Exception as error:
                if isinstance(error, OSError) and error.errno in _NO_SPACE:
                    raise
                problem = f"{address} broke off ({_line(error)}); run it again when the connection holds"
                raise _Broken from None
            if found != digest:
                problem = f"{address} does not match the SHA-256 in {MANIFEST} ({size:,} bytes came); upload it again"
                raise _Broken
            problem = ""
        if not problem:
            return
    raise InputError(f"{problem} (tried {_TRIES} times)")


class _Broken(Exception):
    """A download that is to be tried again."""


def _stream(filesystem: Any, source: str, target: Path) -> tuple[str, int]:
    """Copy a remote file; returns its SHA-256 and size."""
    found, size = hashlib.sha256(), 0
    with filesystem.open(source, "rb") as remote, open(target, "wb") as local:
        while piece := remote.read(_PIECE):
            found.update(piece)
            size += local.write(piece)
    return found.hexdigest(), size


@contextmanager
def _lock(copy: Path) -> Iterator[None]:
    """Let one process at a time fill a copy; the lock ends with the process."""
    copy.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(copy / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _key(address: str) -> str:
    return hashlib.sha256(address.rstrip("/").encode()).hexdigest()[:16]


def _line(error: BaseException) -> str:
    """An error of any library as one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
