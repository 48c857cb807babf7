"""Remote shards: copies that are whole and verified, used again, and one-line refusals of everything else."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from twofold.base.records import InputError
from twofold.data import remote, shards
from twofold.data.remote import is_address, local_copies
from twofold.data.shard_set import ShardSet, open_shards
from twofold.data.shards import Shard, write_shard

fsspec = pytest.importorskip("fsspec")

ADDRESS = "memory://corpus"


@pytest.fixture
def memory() -> Iterator[Any]:
    """An empty memory file system, as remote as a test can be."""
    filesystem = fsspec.filesystem("memory")
    filesystem.store.clear()
    filesystem.pseudo_dirs[:] = [""]
    yield filesystem
    filesystem.store.clear()


def upload(filesystem: Any, root: str, documents: list[list[int]], folder: Path) -> None:
    write_shard(folder, documents, {})
    for name in (*shards.FILES, shards.MANIFEST):
        filesystem.pipe_file(f"{root}/{name}", (folder / name).read_bytes())


def two(memory: Any, tmp_path: Path) -> Path:
    """Two shards at ADDRESS; returns the cache folder to use."""
    upload(memory, "/corpus/00000", [[1, 2, 3], [4, 5]], tmp_path / "made" / "0")
    upload(memory, "/corpus/00001", [[6, 7]], tmp_path / "made" / "1")
    return tmp_path / "cache"


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of files as they are downloaded."""
    names: list[str] = []
    real = remote._stream

    def stream(filesystem: Any, source: str, target: Path) -> tuple[str, int]:
        names.append(source.rsplit("/", 1)[-1])
        return real(filesystem, source, target)

    monkeypatch.setattr(remote, "_stream", stream)
    return names


def test_a_folder_of_shards_is_fetched_once(memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, fetched = two(memory, tmp_path), counted(monkeypatch)
    found = open_shards(ADDRESS, cache=cache)
    assert isinstance(found, ShardSet)
    assert [found.document(i).tolist() for i in range(3)] == [[1, 2, 3], [4, 5], [6, 7]]
    assert sorted(fetched) == sorted(shards.FILES * 2)
    monkeypatch.setattr(shards, "sha256_file", lambda path: pytest.fail("hashed again though it was just downloaded"))
    again = open_shards(ADDRESS + "/", cache=cache)
    assert len(fetched) == 4 and again.sha256 == found.sha256
    one = open_shards(f"{ADDRESS}/00001", cache=cache)
    assert isinstance(one, Shard) and one.document(0).tolist() == [6, 7]
    assert not list(cache.rglob("*.tmp"))


def test_local_files_by_address(tmp_path: Path) -> None:
    write_shard(tmp_path / "made" / "a", [[1, 2]], {})
    (copy,) = local_copies(f"file://{tmp_path}/made", tmp_path / "cache")
    assert Shard.open(copy).document(0).tolist() == [1, 2]


def test_a_changed_remote_shard_is_fetched_again(memory: Any, tmp_path: Path) -> None:
    cache = two(memory, tmp_path)
    before = open_shards(ADDRESS, cache=cache)
    upload(memory, "/corpus/00001", [[8, 8, 8]], tmp_path / "made" / "1")
    after = open_shards(ADDRESS, cache=cache)
    assert after.sha256 != before.sha256 and after.read(*after.span(2)).tolist() == [8, 8, 8]
    assert before.read(*before.span(2)).tolist() == [6, 7], "a run that has the old copy mapped is not disturbed"


def test_a_copy_cut_short_is_fetched_again(memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = two(memory, tmp_path)

    def killed(path: Path, text: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(remote, "write_text", killed)
        with pytest.raises(KeyboardInterrupt):
            local_copies(ADDRESS, cache)
    assert not list(cache.rglob("shard.json")), "nothing counts before all of it is there"
    assert len(local_copies(ADDRESS, cache)) == 2


def broken(times: int, real: Callable[..., Any]) -> Callable[..., Any]:
    """Downloads that break off in the middle of the first ``times`` files."""
    left = [times]

    def stream(filesystem: Any, source: str, target: Path) -> Any:
        if left[0]:
            left[0] -= 1
            target.write_bytes(b"ha")
            raise ConnectionResetError("connection reset by peer\nand more")
        return real(filesystem, source, target)

    return stream


def test_a_broken_download_is_tried_again_and_then_named(
    memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, real = two(memory, tmp_path), remote._stream
    monkeypatch.setattr(remote, "_stream", broken(3, real))
    with pytest.raises(InputError, match=r"tokens.bin broke off \(connection reset by peer\); run it again") as failure:
        local_copies(ADDRESS, cache)
    assert "\n" not in str(failure.value)
    assert not list(cache.rglob("tokens.bin")) and not list(cache.rglob("*.tmp"))
    monkeypatch.setattr(remote, "_stream", broken(2, real))
    assert len(local_copies(ADDRESS, cache)) == 2


@pytest.mark.parametrize("name", shards.FILES)
def test_a_wrong_checksum_is_named(memory: Any, tmp_path: Path, name: str) -> None:
    cache = two(memory, tmp_path)
    data = memory.cat_file(f"/corpus/00000/{name}")
    memory.pipe_file(f"/corpus/00000/{name}", data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(InputError, match=rf"{name} does not match the SHA-256 in shard.json.*upload it again"):
        local_copies(ADDRESS, cache)
    assert not list(cache.rglob(name)), "what differs is not kept"


def test_missing_things(memory: Any, tmp_path: Path) -> None:
    cache = two(memory, tmp_path)
    with pytest.raises(InputError, match=r"holds no shard \(shard.json is missing\); check the address"):
        local_copies("memory://elsewhere", cache)
    with pytest.raises(InputError, match="name a cache folder"):
        open_shards(ADDRESS)
    with pytest.raises(InputError, match=r"cannot be opened.*mend the address"):
        local_copies("nonsense://corpus", cache)
    memory.rm_file("/corpus/00001/offsets.npy")
    with pytest.raises(InputError, match=r"00001 is not complete.*upload all three files"):
        local_copies(ADDRESS, cache)
    memory.pipe_file("/corpus/00001/shard.json", b"{}")
    with pytest.raises(InputError, match=r"memory://.*00001/shard.json is not of shard format 1"):
        local_copies(ADDRESS, cache)


def test_no_space(memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = two(memory, tmp_path)
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(remote.shutil, "disk_usage", lambda path: usage(100, 91, 9))
        with pytest.raises(InputError, match=r"room for 9; free some, or use another cache"):
            local_copies(ADDRESS, cache)

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(remote, "_stream", full)
    with pytest.raises(InputError, match=r"no space left in .*; free some"):
        local_copies(ADDRESS, cache)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="choose another cache folder"):
        local_copies(ADDRESS, tmp_path / "file")


def test_an_unreachable_address_leaves_the_copies_with_a_warning(
    memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = two(memory, tmp_path)
    copies = local_copies(ADDRESS, cache)

    def unreachable(self: Any, path: str, **_: Any) -> None:
        raise TimeoutError("timed out")

    monkeypatch.setattr(type(memory), "info", unreachable)
    with pytest.warns(UserWarning, match=r"cannot be reached \(timed out\); using the copies"):
        assert local_copies(ADDRESS, cache) == copies
    with pytest.raises(InputError, match=r"cannot be read \(timed out\); check the address"):
        local_copies("memory://other", cache)
    (copies[0] / "shard.json").unlink()
    with pytest.raises(InputError, match="cannot be read"):
        local_copies(ADDRESS, cache)


def test_paths_are_no_addresses_and_never_load_fsspec(tmp_path: Path) -> None:
    assert is_address("s3://bucket/x") and not is_address("a/b") and not is_address(tmp_path)
    write_shard(tmp_path / "a", [[1, 2]], {})
    code = (
        "import sys; from twofold.data.shard_set import open_shards\n"
        f"open_shards({str(tmp_path)!r}); print('fsspec' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(remote.__file__).parents[2])}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def test_without_fsspec_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(InputError, match=r"pip install 'twofold\[remote\]'"):
        local_copies(ADDRESS, tmp_path)


def test_the_manifest_of_a_copy_is_the_remote_one(memory: Any, tmp_path: Path) -> None:
    cache = two(memory, tmp_path)
    (first, _) = local_copies(ADDRESS, cache)
    assert (first / "shard.json").read_bytes() == memory.cat_file("/corpus/00000/shard.json")
    assert json.loads((first / shards.VERIFIED).read_text())["tokens.bin"]["size"] == 10
