"""Token shards: round trip, streaming, refusal of anything incomplete or changed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twofold.base.records import InputError
from twofold.data import shards
from twofold.data.shards import Shard, write_shard

DOCUMENTS = [[1, 2, 3], [4], [5, 6]]


@settings(deadline=None, max_examples=25)
@given(st.lists(st.lists(st.integers(0, 99_999), min_size=1, max_size=20), min_size=1, max_size=20))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]]) -> None:
    folder = tmp_path_factory.mktemp("shard")
    write_shard(folder, iter(documents), {"bytes": 7, "name": "x"}, vocab_size=100_000)
    shard = Shard.open(folder)
    assert [shard.document(i).tolist() for i in range(len(shard))] == documents
    assert shard.num_tokens == sum(map(len, documents))
    assert shard.meta == {"bytes": 7, "name": "x"} and shard.text_bytes == 7 and shard.vocab_size == 100_000
    assert shard.tokens.dtype == np.uint32


def test_small_vocabularies_take_two_bytes_and_flushing_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shard(tmp_path / "a", DOCUMENTS, {}, vocab_size=512, text_bytes=11)
    monkeypatch.setattr(shards, "_FLUSH_TOKENS", 2)
    write_shard(tmp_path / "b", DOCUMENTS, {}, vocab_size=512, text_bytes=11)
    a, b = Shard.open(tmp_path / "a"), Shard.open(tmp_path / "b")
    assert a.tokens.dtype == np.uint16 and a.sha256 == b.sha256 and a.text_bytes == 11
    assert (tmp_path / "a" / "tokens.bin").stat().st_size == 12


def test_tokens_are_read_only(tmp_path: Path) -> None:
    write_shard(tmp_path, DOCUMENTS, {})
    with pytest.raises(ValueError, match="read-only"):
        Shard.open(tmp_path).tokens[0] = 3


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([], "at least one document"),
        ([[1], []], "document 1 has no tokens"),
        ([[512]], "vocab_size"),
        ([[-1]], "vocab"),
    ],
)
def test_bad_documents(tmp_path: Path, documents: list[list[int]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        write_shard(tmp_path, documents, {}, vocab_size=512)
    assert not list(tmp_path.glob("*"))  # nothing half-written is left


def test_a_failed_rewrite_leaves_no_valid_shard(tmp_path: Path) -> None:
    write_shard(tmp_path, DOCUMENTS, {})
    with pytest.raises(InputError):
        write_shard(tmp_path, [[1], []], {})
    with pytest.raises(InputError, match=r"shard.json is missing.*write it again"):
        Shard.open(tmp_path)


@pytest.mark.parametrize("name", ["shard.json", "tokens.bin", "offsets.npy"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "changed"])
def test_corruption_is_named_with_its_fix(tmp_path: Path, name: str, damage: str) -> None:
    write_shard(tmp_path, DOCUMENTS, {})
    path = tmp_path / name
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(data[:-2])
    else:
        path.write_bytes(data[:-4] + bytes(255 - byte for byte in data[-4:]))
    with pytest.raises(InputError, match=r"rebuild it|write it again"):
        Shard.open(tmp_path)


def test_offsets_must_fit_even_without_hashing(tmp_path: Path) -> None:
    write_shard(tmp_path, DOCUMENTS, {})
    np.save(tmp_path / "offsets.npy", np.array([0, 3, 3, 6]))
    with pytest.raises(InputError, match="does not fit"):
        Shard.open(tmp_path, verify="quick")
    (tmp_path / "offsets.npy").write_bytes(b"nonsense")
    with pytest.raises(InputError, match="cannot be read"):
        Shard.open(tmp_path, verify="quick")


def test_other_formats_are_refused(tmp_path: Path) -> None:
    write_shard(tmp_path, DOCUMENTS, {})
    manifest = json.loads((tmp_path / "shard.json").read_text())
    (tmp_path / "shard.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(InputError, match="format 1"):
        Shard.open(tmp_path)


def damage(path: Path) -> None:
    """Change one byte and nothing that a listing shows."""
    facts = path.stat()
    data = path.read_bytes()
    with open(path, "r+b") as handle:
        handle.write(bytes([data[0] ^ 1]))
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


def test_once_hashes_a_file_until_it_was_found_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shard(tmp_path, DOCUMENTS, {})
    hashed: list[str] = []
    real = shards.sha256_file
    monkeypatch.setattr(shards, "sha256_file", lambda path: hashed.append(path.name) or real(path))
    Shard.open(tmp_path, verify="quick")
    assert hashed == [] and not (tmp_path / shards.VERIFIED).exists()
    Shard.open(tmp_path, verify="once")
    Shard.open(tmp_path, verify="once")
    assert hashed == ["tokens.bin", "offsets.npy"]
    (tmp_path / "offsets.npy").touch()  # another time of change: looked at again
    Shard.open(tmp_path, verify="once")
    assert len(hashed) == 4
    (tmp_path / shards.VERIFIED).write_text("half a re")
    Shard.open(tmp_path, verify="once")
    Shard.open(tmp_path)
    assert len(hashed) == 8
    damage(tmp_path / "tokens.bin")  # what no listing shows is found by hashing alone
    assert Shard.open(tmp_path, verify="once").tokens[0] == DOCUMENTS[0][0] ^ 1
    with pytest.raises(InputError, match=r"does not match its SHA-256.*rebuild it"):
        Shard.open(tmp_path, verify="full")


def test_a_rewritten_shard_is_verified_again(tmp_path: Path) -> None:
    write_shard(tmp_path, DOCUMENTS, {})
    Shard.open(tmp_path, verify="once")
    write_shard(tmp_path, [[9, 9, 9], [9], [9, 9]], {})
    manifest = json.loads((tmp_path / "shard.json").read_text())
    manifest["sha256"]["tokens.bin"] = "0" * 64
    (tmp_path / "shard.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="does not match its SHA-256"):
        Shard.open(tmp_path, verify="once")


def test_a_folder_that_cannot_be_written_is_used_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shard(tmp_path, DOCUMENTS, {})

    def refuse(path: Path, value: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(shards, "write_json", refuse)
    with pytest.warns(RuntimeWarning, match=r"hashed whenever it is opened.*quick"):
        shard = Shard.open(tmp_path, verify="once")
    assert len(shard) == 3


def test_documents_by_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shard(tmp_path, [[1] * length for length in (3, 1, 5, 2, 4)], {})
    shard = Shard.open(tmp_path)
    for size in (1, 2, 3, 100):  # looked at in blocks of any size
        monkeypatch.setattr(shards, "_CHECKED_AT_ONCE", size)
        assert shard.of_lengths(1, None) is None and shard.of_lengths(1, 5) is None
        for low, high, wanted in ((2, None, [0, 2, 3, 4]), (3, 4, [0, 4]), (6, None, [])):
            found = shard.of_lengths(low, high)
            assert found is not None and found.tolist() == wanted
        with pytest.raises(InputError, match="does not fit"):
            (tmp_path / "copy").mkdir(exist_ok=True)
            for name in ("shard.json", "tokens.bin"):
                (tmp_path / "copy" / name).write_bytes((tmp_path / name).read_bytes())
            np.save(tmp_path / "copy" / "offsets.npy", np.array([0, 3, 4, 9, 9, 15]))
            Shard.open(tmp_path / "copy", verify="quick")
