"""Shard sets: many shards read as one, folders and lists, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twofold.base.records import InputError
from twofold.data.shard_set import ShardSet, open_shards, write_shards
from twofold.data.shards import Shard, write_shard


@settings(max_examples=25)
@given(
    st.lists(st.lists(st.integers(0, 500), min_size=1, max_size=9), min_size=1, max_size=25),
    st.integers(1, 40),
)
def test_many_shards_are_one(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], tokens_per_shard: int
) -> None:
    folder = tmp_path_factory.mktemp("set") / "corpus"
    parts = write_shards(folder, iter(documents), {"name": "x"}, tokens_per_shard=tokens_per_shard, vocab_size=501)
    found = open_shards(folder)
    assert [found.read(*found.span(i)).tolist() for i in range(len(found))] == documents
    assert found.num_tokens == sum(map(len, documents)) and found.vocab_size == 501
    assert found.span(len(found) - 1)[1] == found.num_tokens
    for low, high in ((2, None), (3, 5)):
        kept = found.of_lengths(low, high)
        wanted = [i for i, doc in enumerate(documents) if low <= len(doc) <= (high or 99)]
        assert (list(range(len(documents))) if kept is None else kept.tolist()) == wanted
    if len(parts) > 1:
        assert isinstance(found, ShardSet)
        assert all(shard.num_tokens >= tokens_per_shard for shard in found.shards[:-1])
        assert found.document(len(found) - 1).tolist() == documents[-1]
        with pytest.raises(IndexError):
            found.span(len(found))
    else:
        assert isinstance(found, Shard)


def test_folders_lists_and_text(tmp_path: Path) -> None:
    for name, token in (("b", 2), ("a", 1), ("c", 3)):
        write_shard(tmp_path / "all" / name, [[token, token]], {}, text_bytes=5)
    firsts = [int(Shard.open(tmp_path / "all" / name).tokens[0]) for name in "abc"]
    found = open_shards(str(tmp_path / "all"))
    assert isinstance(found, ShardSet) and found.text_bytes == 15
    assert [int(found.document(i)[0]) for i in range(3)] == firsts == [1, 2, 3]
    chosen = open_shards([tmp_path / "all" / "c", tmp_path / "all" / "a"])
    assert [int(chosen.read(*chosen.span(i))[0]) for i in range(2)] == [3, 1]
    assert chosen.sha256 != open_shards([tmp_path / "all" / "a", tmp_path / "all" / "c"]).sha256


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"not there; check the path"):
        open_shards(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"holds no shards; write some"):
        open_shards(tmp_path / "empty")
    with pytest.raises(InputError, match="at least one shard"):
        open_shards([])
    write_shard(tmp_path / "set" / "a", [[1, 2]], {}, vocab_size=10)
    write_shard(tmp_path / "set" / "b", [[1, 2]], {}, vocab_size=20)
    with pytest.raises(InputError, match=r"made for 20 token ids.*one tokenizer"):
        open_shards(tmp_path / "set")
    (tmp_path / "set" / "b" / "shard.json").unlink()
    with pytest.raises(InputError, match=r"b is not a complete shard \(shard.json is missing\)"):
        open_shards(tmp_path / "set")
    with pytest.raises(InputError, match=r"not empty; choose a new folder"):
        write_shards(tmp_path / "set", [[1]], {}, tokens_per_shard=5)
    with pytest.raises(InputError, match="tokens_per_shard must be >= 1"):
        write_shards(tmp_path / "new", [[1]], {}, tokens_per_shard=0)
    with pytest.raises(InputError, match="at least one document"):
        write_shards(tmp_path / "new", [], {}, tokens_per_shard=5)


def test_a_shard_that_ends_the_stream_is_the_last(tmp_path: Path) -> None:
    """The stream ends exactly where a shard is full: no empty shard follows."""
    assert len(write_shards(tmp_path / "a", [[1, 2], [3, 4]], {}, tokens_per_shard=2)) == 2
    assert open_shards(tmp_path / "a").num_tokens == 4
