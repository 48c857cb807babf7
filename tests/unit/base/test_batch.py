"""Packing: targets, weights and extras are shifted together; nothing is padded."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twofold.base.batch import boundaries, pack, positions


def test_pack_shifts_targets_weights_and_extras_alike() -> None:
    batch = pack(
        [[1, 2, 3], [4, 5]],
        [[9.0, 0.0, 1.0], [9.0, 0.5]],
        {"advantages": [[7.0, 0.1, 0.2], [7.0, 0.3]]},
        sources=[3, 1],
    )
    assert batch.tokens_T.tolist() == [1, 2, 4] and batch.targets_T.tolist() == [2, 3, 5]
    assert batch.weights_T.tolist() == [0.0, 1.0, 0.5]
    assert batch.extras["advantages"].tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert batch.positions_T.tolist() == [0, 1, 0] and batch.cu_seqlens == [0, 2, 3] and batch.num_tokens == 3
    assert batch.source_S == [3, 1] and pack([[1, 2]]).weights_T.tolist() == [1.0]


@given(st.lists(st.lists(st.integers(0, 99), min_size=2, max_size=9), min_size=1, max_size=6))
def test_every_transition_is_there_once(sequences: list[list[int]]) -> None:
    batch = pack(sequences)
    pairs = [(a, b) for row in sequences for a, b in zip(row, row[1:], strict=False)]
    assert list(zip(batch.tokens_T.tolist(), batch.targets_T.tolist(), strict=True)) == pairs
    lengths = [len(row) - 1 for row in sequences]
    assert batch.cu_seqlens == boundaries(lengths) and batch.positions_T.tolist() == positions(lengths).tolist()


def test_bad_sequences_are_refused_by_index() -> None:
    with pytest.raises(ValueError, match="sequence 1 has 1 tokens"):
        pack([[1, 2], [3]])
    with pytest.raises(ValueError, match="sequence 0: 3 tokens but 2 weights"):
        pack([[1, 2, 3]], [[1.0, 1.0]])
