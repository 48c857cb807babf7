"""Packing: nothing lost, exact shares, documents apart, exact resume, evaluation windows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twofold.base.batch import BatchSource, TokenBatch, pack
from twofold.base.records import InputError
from twofold.data.packing import MixtureEntry, PackedSource, eval_windows
from twofold.data.shard_set import ShardSet
from twofold.data.shards import Shard, write_shard


def make_shard(folder: Path, lengths: list[int], start: int = 0) -> Shard:
    """Documents whose tokens are all different, so that every prediction can be traced."""
    documents, token = [], start
    for length in lengths:
        documents.append(list(range(token, token + length)))
        token += length
    write_shard(folder, documents, {}, vocab_size=1 << 20)
    return Shard.open(folder)


def pieces(batch: TokenBatch) -> list[tuple[list[int], list[int], int]]:
    """(inputs, targets, source) of each sequence."""
    edges = zip(batch.cu_seqlens, batch.cu_seqlens[1:], batch.source_S, strict=False)
    return [(batch.tokens_T[a:b].tolist(), batch.targets_T[a:b].tolist(), source) for a, b, source in edges]


def same(left: list[TokenBatch], right: list[TokenBatch]) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a.tokens_T, b.tokens_T)
        and torch.equal(a.targets_T, b.targets_T)
        and torch.equal(a.positions_T, b.positions_T)
        and a.cu_seqlens == b.cu_seqlens
        and a.source_S == b.source_S
        for a, b in zip(left, right, strict=True)
    )


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=15),
    step=st.integers(1, 60),
    low=st.integers(1, 12),
    spread=st.integers(0, 10),
    seed=st.integers(0, 1000),
    micro=st.integers(1, 4),
    shuffle=st.booleans(),
)
def test_an_epoch_holds_every_prediction_exactly_once(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    step: int,
    low: int,
    spread: int,
    seed: int,
    micro: int,
    shuffle: bool,
) -> None:
    lengths = [*lengths, 2]
    shard = make_shard(tmp_path_factory.mktemp("shard"), lengths)
    source = PackedSource([MixtureEntry("a", shard, 1.0, shuffle)], step, ((1.0, low, low + spread),), seed, micro)
    expected = {(t, t + 1) for i in range(len(shard)) for t in shard.document(i).tolist()[:-1]}
    stream: list[tuple[int, int]] = []
    steps = 0
    while len(stream) < 2 * len(expected):
        batches = source.next_step()
        steps += 1
        assert 1 <= len(batches) <= micro
        drawn = [piece for batch in batches for piece in pieces(batch)]
        longest = max(len(inputs) for inputs, _, _ in drawn)
        assert longest <= low + spread
        assert sum(len(inputs) for inputs, _, _ in drawn) <= step + longest
        for inputs, targets, _ in drawn:
            assert targets == [token + 1 for token in inputs]  # one document, consecutive tokens
            stream.extend(zip(inputs, targets, strict=True))
    for epoch in range(2):
        part = stream[epoch * len(expected) : (epoch + 1) * len(expected)]
        assert set(part) == expected
    if step >= low + spread:
        assert abs(len(stream) - steps * step) <= low + spread  # overshoot does not add up
    if not shuffle:
        assert stream[: len(expected)] == sorted(expected)


def test_batches_are_well_formed_and_equal_to_pack(tmp_path: Path) -> None:
    shard = make_shard(tmp_path, [5, 9, 3, 30])
    source: BatchSource = PackedSource([MixtureEntry("a", shard, 1.0, shuffle=False)], 44, ((1.0, 10, 10),), 0)
    (batch,) = source.next_step()
    pairs = [(inputs, targets) for inputs, targets, _ in pieces(batch)]
    reference = pack([inputs + targets[-1:] for inputs, targets in pairs])
    assert same([batch], [reference])
    assert [len(inputs) for inputs, _ in pairs] == [4, 8, 2, 10, 10, 9, 4]
    assert batch.tokens_T.dtype == batch.targets_T.dtype == batch.positions_T.dtype == torch.int64
    assert batch.weights_T.dtype == torch.float32 and batch.weights_T.eq(1).all()
    assert source.can_checkpoint


def test_a_head_start_comes_first_and_on_top_of_the_shares(tmp_path: Path) -> None:
    shards = {name: make_shard(tmp_path / name, [8] * 40, start=1000 * i) for i, name in enumerate("abc")}
    entries = [
        MixtureEntry("a", shards["a"], 3.0),
        MixtureEntry("b", shards["b"], 1.0, shuffle=False, head_start=70),
        MixtureEntry("c", shards["c"], 0.0, head_start=21),
    ]
    source = PackedSource(entries, 7, ((1.0, 8, 8),), 0)
    firsts = [source.next_step()[0].source_S for _ in range(13)]
    assert firsts == [[1]] * 10 + [[2]] * 3
    half = source.state_dict()
    drawn = [batch.source_S for _ in range(40) for batch in source.next_step()]
    counts = [sum(part.count(i) for part in drawn) for i in range(3)]
    assert counts == [30, 10, 0]
    again = PackedSource(entries, 7, ((1.0, 8, 8),), 0)
    again.load_state_dict(json.loads(json.dumps(half)))
    assert [batch.source_S for _ in range(40) for batch in again.next_step()] == drawn
    with pytest.raises(InputError, match="sources"):
        PackedSource([entries[0], entries[1]], 7, ((1.0, 8, 8),), 0).load_state_dict(half)


@settings(deadline=None, max_examples=15)
@given(st.lists(st.floats(0.05, 1.0), min_size=2, max_size=4), st.integers(0, 100))
def test_weights_are_shares_of_tokens(
    tmp_path_factory: pytest.TempPathFactory, weights: list[float], seed: int
) -> None:
    folder = tmp_path_factory.mktemp("mix")
    entries = [
        MixtureEntry(str(i), make_shard(folder / str(i), [3 + 17 * i] * 8, start=10_000 * i), weight)
        for i, weight in enumerate(weights)
    ]
    source = PackedSource(entries, 200, ((1.0, 4, 32),), seed)
    counts = [0] * len(entries)
    for _ in range(15):
        for batch in source.next_step():
            for inputs, _, index in pieces(batch):
                assert all(token // 10_000 == index for token in inputs)
                counts[index] += len(inputs)
        for count, weight in zip(counts, weights, strict=True):
            assert abs(count - sum(counts) * weight / sum(weights)) <= 32 * len(weights)
    assert list(source.tokens_by_source.values()) == counts


def test_resume_is_exact(tmp_path: Path) -> None:
    entries = [
        MixtureEntry("short", make_shard(tmp_path / "a", [7] * 30), 0.7),
        MixtureEntry("long", make_shard(tmp_path / "b", [200, 90, 1, 150], start=1000), 0.3, shuffle=False),
    ]

    def fresh(seed: int = 3) -> PackedSource:
        return PackedSource(entries, 100, ((0.5, 5, 20), (0.5, 30, 60)), seed, micro_batches=2)

    straight = fresh()
    steps = [straight.next_step() for _ in range(20)]
    for stop in (0, 1, 7, 13):
        first = fresh()
        assert all(same(first.next_step(), steps[i]) for i in range(stop))
        state = json.loads(json.dumps(first.state_dict()))
        resumed = fresh()
        resumed.next_step()  # whatever it did before must not matter
        resumed.load_state_dict(state)
        assert all(same(resumed.next_step(), steps[i]) for i in range(stop, 20))
        assert resumed.state_dict() == straight.state_dict()
    assert not same(fresh(4).next_step(), steps[0])
    with pytest.raises(InputError, match="other seed"):
        fresh(4).load_state_dict(straight.state_dict())
    with pytest.raises(InputError, match="sources"):
        PackedSource(entries[:1], 100, ((0.5, 5, 20), (0.5, 30, 60)), 3, 2).load_state_dict(straight.state_dict())


def test_epochs_are_shuffled_differently(tmp_path: Path) -> None:
    shard = make_shard(tmp_path, [3] * 50)
    source = PackedSource([MixtureEntry("a", shard, 1.0)], 100, ((1.0, 8, 8),), 0)
    first, second = (source.next_step()[0].tokens_T.tolist() for _ in range(2))
    assert first != second and sorted(first) == sorted(second)
    assert source.epochs_by_source == {"a": 2.0}


def test_length_mix_shares_are_of_tokens(tmp_path: Path) -> None:
    shard = make_shard(tmp_path, [100_000])
    source = PackedSource([MixtureEntry("a", shard, 1.0)], 50_000, ((0.75, 100, 200), (0.25, 10, 20)), 0)
    lengths = [len(inputs) for inputs, _, _ in pieces(source.next_step()[0])]
    assert all(10 <= n <= 20 or 100 <= n <= 200 for n in lengths[:-1])
    share = sum(n for n in lengths if n >= 100) / sum(lengths)
    assert 0.7 < share < 0.8


def test_micro_batches_are_balanced(tmp_path: Path) -> None:
    shard = make_shard(tmp_path, [21] * 400)
    source = PackedSource([MixtureEntry("a", shard, 1.0)], 1000, ((1.0, 50, 50),), 0, micro_batches=4)
    assert [batch.num_tokens for batch in source.next_step()] == [260, 240, 260, 240]


def test_bad_settings(tmp_path: Path) -> None:
    shard, dots = make_shard(tmp_path / "a", [5, 6]), make_shard(tmp_path / "b", [1, 1])
    good = MixtureEntry("a", shard, 1.0)
    cases: list[tuple[list[MixtureEntry], int, tuple[tuple[float, int, int], ...], str]] = [
        ([], 10, ((1.0, 4, 4),), "at least one"),
        ([good, good], 10, ((1.0, 4, 4),), "distinct"),
        ([MixtureEntry("a", shard, 0.0)], 10, ((1.0, 4, 4),), "neither a weight nor a head start"),
        ([MixtureEntry("a", shard, 1.0, head_start=-1)], 10, ((1.0, 4, 4),), "0 or more"),
        ([MixtureEntry("a", shard, 0.0, head_start=9)], 10, ((1.0, 4, 4),), "a weight above 0"),
        ([good], 0, ((1.0, 4, 4),), ">= 1"),
        ([good], 10, (), "length_mix"),
        ([good], 10, ((1.0, 5, 4),), "low <= high"),
        ([MixtureEntry("a", dots, 1.0)], 10, ((1.0, 4, 4),), "at least 2 tokens"),
        ([MixtureEntry("a", shard, 1.0, lengths=(7, 9))], 10, ((1.0, 4, 4),), "no document of 7 to 9 tokens"),
        ([MixtureEntry("a", shard, 1.0, lengths=(7, 6))], 10, ((1.0, 4, 4),), "most >= 2"),
    ]
    for entries, step, mix, message in cases:
        with pytest.raises(InputError, match=message):
            PackedSource(entries, step, mix, 0)


def test_best_fit_fills_a_fixed_budget_without_cutting(tmp_path: Path) -> None:
    """Natural lengths: hardly a token of the budget is left, none too many, and no document under the cap is cut."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(4.5, 1.0, 3000).astype(int), 2, 1024).tolist()
    shard = make_shard(tmp_path, lengths)
    source = PackedSource([MixtureEntry("a", shard, 1.0)], 4096, ((1.0, 1024, 1024),), 0, 2, packing="best_fit")
    whole = {int(start): int(end) for start, end in zip(shard.offsets, shard.offsets[1:], strict=False)}
    filled = []
    for _ in range(40):
        batches = source.next_step()
        assert len(batches) == 2
        filled += [batch.num_tokens for batch in batches]
        for batch in batches:
            for inputs, targets, _ in pieces(batch):
                assert whole[inputs[0]] == targets[-1] + 1
    assert max(filled) <= 2048
    assert sum(filled) / (2048 * len(filled)) > 0.995
    assert source.tokens_by_source == {"a": sum(filled)}


def test_best_fit_keeps_the_shares_and_no_piece_waits_for_ever(tmp_path: Path) -> None:
    entries = [
        MixtureEntry("long", make_shard(tmp_path / "a", [40] * 20), 0.75),
        MixtureEntry("short", make_shard(tmp_path / "b", [3] * 50, start=1000), 0.25),
    ]
    source = PackedSource(entries, 47, ((1.0, 39, 39),), 0, packing="best_fit")
    counts = [0, 0]
    waiting: list[list[int]] = []
    for _ in range(400):
        (batch,) = source.next_step()
        for entry, start, _, _ in waiting[:1]:  # the oldest goes first
            assert pieces(batch)[0][0][0] == start + 1000 * entry
        waiting = source.state_dict()["pool"]
        assert len(waiting) <= 128
        for inputs, _, index in pieces(batch):
            counts[index] += len(inputs)
    assert abs(counts[0] - 0.75 * sum(counts)) < 128 * 39, "off by no more than what waits"
    assert list(source.tokens_by_source.values()) == counts


def test_best_fit_needs_room_for_the_longest_piece(tmp_path: Path) -> None:
    entries = [MixtureEntry("a", make_shard(tmp_path, [60] * 9), 1.0)]
    PackedSource(entries, 40, ((1.0, 5, 20),), 0, 2, "best_fit")
    for options in ({"micro_batches": 3}, {"micro_batches": 2, "mask_documents": False}):
        with pytest.raises(InputError, match=r"at least 2[01] tokens.*raise tokens_per_step"):
            PackedSource(entries, 40, ((1.0, 5, 20),), 0, packing="best_fit", **options)  # type: ignore[arg-type]


def test_documents_may_be_seen_across_their_boundaries(tmp_path: Path) -> None:
    """By explicit choice: joined up to the longest length, last tokens between, the predictions those of always."""
    shard = make_shard(tmp_path, [5, 9, 3, 30])
    entries = [MixtureEntry("a", shard, 1.0, shuffle=False)]
    (apart,) = PackedSource(entries, 44, ((1.0, 16, 16),), 0).next_step()
    (joined,) = PackedSource(entries, 44, ((1.0, 16, 16),), 0, mask_documents=False).next_step()
    assert apart.cu_seqlens == [0, 4, 12, 14, 30, 43, 47]
    assert joined.cu_seqlens == [0, 16, 32, 45, 49]
    assert joined.tokens_T.tolist() == [*range(16), *range(17, 33), *range(33, 46), 0, 1, 2, 3]
    assert joined.positions_T.tolist() == [*range(16), *range(16), *range(13), *range(4)]
    assert joined.weights_T.eq(0).nonzero().flatten().tolist() == [4, 13]  # last tokens 4 and 13, in the middle
    pairs = list(zip(joined.tokens_T.tolist(), joined.targets_T.tolist(), joined.weights_T.tolist(), strict=True))
    expected = list(zip(apart.tokens_T.tolist(), apart.targets_T.tolist(), strict=True))
    assert [(token, target) for token, target, weight in pairs if weight] == expected


def test_a_joined_sequence_is_of_the_source_with_most_of_it(tmp_path: Path) -> None:
    entries = [
        MixtureEntry("long", make_shard(tmp_path / "a", [20] * 9), 0.5),
        MixtureEntry("short", make_shard(tmp_path / "b", [4] * 9, start=1000), 0.5),
    ]
    (batch,) = PackedSource(entries, 80, ((1.0, 30, 30),), 0, mask_documents=False).next_step()
    edges = zip(batch.cu_seqlens, batch.cu_seqlens[1:], batch.source_S, strict=False)
    shares = [((batch.tokens_T[a:b] >= 1000).float().mean().item(), source) for a, b, source in edges]
    assert {source for _, source in shares} == {0, 1}
    assert all((share > 0.5) == (source == 1) for share, source in shares)


def test_documents_chosen_by_length(tmp_path: Path) -> None:
    """A long-context stage: one shard as two sources, three quarters from long documents."""
    shard = make_shard(tmp_path, [2, 60, 300, 70, 1, 500, 90] * 4)
    entries = [
        MixtureEntry("long", shard, 0.75, lengths=(256, None)),
        MixtureEntry("middle", shard, 0.25, lengths=(50, 255)),
    ]
    source = PackedSource(entries, 1000, ((1.0, 512, 512),), 0)
    for _ in range(30):
        for batch in source.next_step():
            for inputs, _, index in pieces(batch):
                assert (len(inputs) >= 255) == (index == 0) and len(inputs) >= 49
    tokens = source.tokens_by_source
    assert abs(tokens["long"] / sum(tokens.values()) - 0.75) < 0.02
    other = [entries[0], MixtureEntry("middle", shard, 0.25, lengths=(49, 255))]
    with pytest.raises(InputError, match="other lengths"):
        PackedSource(other, 1000, ((1.0, 512, 512),), 0).load_state_dict(source.state_dict())


def test_how_it_is_packed_is_part_of_the_state(tmp_path: Path) -> None:
    entries = [MixtureEntry("a", make_shard(tmp_path, [60] * 9), 1.0)]

    def made(packing: str = "stream", mask_documents: bool = True) -> PackedSource:
        return PackedSource(entries, 40, ((1.0, 5, 20),), 0, 1, packing, mask_documents)  # type: ignore[arg-type]

    plain = made()
    plain.next_step()
    for other, name in ((made("best_fit"), "packing"), (made(mask_documents=False), "mask_documents")):
        other.next_step()
        with pytest.raises(InputError, match=f"other {name}"):
            other.load_state_dict(plain.state_dict())
        with pytest.raises(InputError, match=f"other {name}"):
            plain.load_state_dict(other.state_dict())


def test_a_shard_set_is_read_like_one_shard(tmp_path: Path) -> None:
    lengths = [30, 2, 1, 17, 60, 5, 9, 44, 1, 8]
    whole = make_shard(tmp_path / "whole", lengths)
    parts, token = [], 0
    for place, cut in enumerate((lengths[:3], lengths[3:4], lengths[4:])):
        parts.append(make_shard(tmp_path / str(place), cut, start=token))
        token += sum(cut)
    one = PackedSource([MixtureEntry("a", whole, 1.0)], 50, ((1.0, 4, 20),), 3)
    many = PackedSource([MixtureEntry("a", ShardSet(parts), 1.0)], 50, ((1.0, 4, 20),), 3)
    assert all(same(one.next_step(), many.next_step()) for _ in range(20))
    with pytest.raises(InputError, match="other sources"):
        many.load_state_dict(one.state_dict())


def test_eval_windows(tmp_path: Path) -> None:
    shard = make_shard(tmp_path, [10, 3, 25])
    table = np.ones(38, dtype=np.int64)
    table[37] = 5
    batches, sizes = eval_windows(shard, window=8, count=10, token_bytes=table)
    assert [batch.tokens_T[0].item() for batch in batches] == [0, 13, 21, 29]
    assert all(batch.cu_seqlens == [0, 8] and batch.positions_T.tolist() == list(range(8)) for batch in batches)
    assert all(batch.targets_T.tolist() == [t + 1 for t in batch.tokens_T.tolist()] for batch in batches)
    assert sizes == [8, 8, 8, 12]
    few, _ = eval_windows(shard, window=8, count=2, token_bytes=table)
    assert [batch.tokens_T[0].item() for batch in few] == [0, 29]
    with pytest.raises(InputError, match="smaller window"):
        eval_windows(shard, window=25, count=1, token_bytes=table)
    with pytest.raises(InputError, match="byte table"):
        eval_windows(shard, window=8, count=9, token_bytes=table[:20])
    with pytest.raises(InputError, match=">= 1"):
        eval_windows(shard, window=0, count=9, token_bytes=table)
