"""Random mixtures of random shards, however packed: resumed runs are the same, no prediction is lost or doubled.

Every token of every document is different, so that each prediction can be followed. Documents are many enough in some
mixtures for the order that is a function (its limit is lowered here).
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twofold.base.batch import TokenBatch
from twofold.data import order
from twofold.data.packing import MixtureEntry, PackedSource
from twofold.data.prefetch import prefetching
from twofold.data.shard_set import ShardSet
from twofold.data.shards import Shard, write_shard

SPACE = 10_000  # token ids of one source


@st.composite
def mixtures(draw: st.DrawFn) -> dict[str, Any]:
    """Documents' lengths by source and shard, and how they are mixed and packed."""
    shards = st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=6), min_size=1, max_size=3)
    sources = draw(st.lists(shards, min_size=1, max_size=3))
    longest = draw(st.integers(1, 12))
    micro = draw(st.integers(1, 3))
    return {
        "sources": [[[*part, 2] for part in source] for source in sources],
        "weights": draw(st.lists(st.floats(0.1, 1.0), min_size=len(sources), max_size=len(sources))),
        "shuffle": draw(st.lists(st.booleans(), min_size=len(sources), max_size=len(sources))),
        "head_start": draw(st.sampled_from([0, 0, 25])),
        "low": draw(st.integers(1, longest)),
        "longest": longest,
        "micro": micro,
        "step": micro * (longest + 1) + draw(st.integers(0, 40)),
        "packing": draw(st.sampled_from(["stream", "best_fit"])),
        "masked": draw(st.booleans()),
        "seed": draw(st.integers(0, 99)),
        "listed": draw(st.sampled_from([0, 1000])),
        "stop": draw(st.integers(0, 11)),
        "ahead": draw(st.integers(0, 2)),
    }


def write(folder: Path, sources: list[list[list[int]]]) -> list[ShardSet]:
    sets = []
    for number, parts in enumerate(sources):
        token = itertools.count(number * SPACE)
        for place, lengths in enumerate(parts):
            documents = [list(itertools.islice(token, length)) for length in lengths]
            write_shard(folder / f"{number}-{place}", documents, {}, vocab_size=1 << 17)
        sets.append(ShardSet([Shard.open(folder / f"{number}-{place}") for place in range(len(parts))]))
    return sets


def make(case: dict[str, Any], sets: list[ShardSet]) -> PackedSource:
    entries = [
        MixtureEntry(str(i), found, case["weights"][i], case["shuffle"][i], case["head_start"] if i == 0 else 0)
        for i, found in enumerate(sets)
    ]
    mix = ((1.0, case["low"], case["longest"]),)
    return PackedSource(
        entries, case["step"], mix, case["seed"], case["micro"], packing=case["packing"], mask_documents=case["masked"]
    )


def key(batches: list[TokenBatch]) -> list[Any]:
    return [
        (b.tokens_T.tolist(), b.targets_T.tolist(), b.weights_T.tolist(), b.cu_seqlens, b.source_S) for b in batches
    ]


def check_form(batch: TokenBatch, case: dict[str, Any]) -> None:
    lengths = [end - start for start, end in zip(batch.cu_seqlens, batch.cu_seqlens[1:], strict=False)]
    assert min(lengths) >= 1 and max(lengths) <= case["longest"]
    assert len(lengths) == len(batch.source_S)
    assert torch.equal(batch.positions_T, torch.cat([torch.arange(length) for length in lengths]))
    predicted = batch.weights_T > 0
    assert torch.equal(batch.targets_T[predicted], batch.tokens_T[predicted] + 1), "a prediction crosses documents"
    assert not case["masked"] or bool(predicted.all())
    if case["packing"] == "best_fit":
        assert batch.num_tokens <= case["step"] // case["micro"]


def check_counts(drawn: Counter[int], state: dict[str, Any], sets: list[ShardSet]) -> None:
    """Drawn so far, with what waits in the pool: every prediction of a source once an epoch."""
    total = drawn.copy()
    for entry, start, end, _ in state.get("pool", []):
        total.update(sets[entry].read(start, end).tolist())
    for number, (cursor, found) in enumerate(zip(state["cursors"], sets, strict=True)):
        every = {token for i in range(len(found)) for token in found.document(i).tolist()[:-1]}
        counts = {token: total[token] for token in every}
        assert set(counts.values()) <= {cursor["epoch"], cursor["epoch"] + 1}
        assert sum(counts.values()) == cursor["tokens"]
        assert all(token in every for token in total if token // SPACE == number)


@settings(max_examples=40)
@given(mixtures())
def test_resumed_runs_are_the_same_and_nothing_is_lost(
    tmp_path_factory: pytest.TempPathFactory, case: dict[str, Any]
) -> None:
    with mock.patch.object(order, "LISTED", case["listed"]):
        sets = write(tmp_path_factory.mktemp("mixture"), case["sources"])
        straight = make(case, sets)
        drawn: Counter[int] = Counter()
        steps, saved = [], {}
        for place in range(12):
            if place == case["stop"]:
                saved = json.loads(json.dumps(straight.state_dict()))
            steps.append(key(batches := straight.next_step()))
            for batch in batches:
                check_form(batch, case)
                drawn.update(batch.tokens_T[batch.weights_T > 0].tolist())
            check_counts(drawn, straight.state_dict(), sets)
            assert sum(straight.tokens_by_source.values()) == sum(drawn.values())
        with prefetching(make(case, sets), case["ahead"]) as resumed:
            resumed.load_state_dict(saved)
            for place in range(case["stop"], 12):
                assert key(resumed.next_step()) == steps[place]
            assert resumed.state_dict() == straight.state_dict()
