"""Rendered conversations as a source."""

from __future__ import annotations

from collections import Counter

import pytest

from twofold.base.records import InputError
from twofold.post.sft import ChatSource
from twofold.text.chat import Rendered

EXAMPLES = [Rendered([i, i + 1, i + 2], [0.0, 0.0, 1.0]) for i in range(0, 50, 10)]


def firsts(source: ChatSource, steps: int) -> list[int]:
    out = []
    for _ in range(steps):
        (batch,) = source.next_step()
        out += batch.tokens_T[batch.cu_seqlens[:-1]].tolist()
    return out


def test_every_example_comes_once_an_epoch_in_a_new_order() -> None:
    taken = firsts(ChatSource(EXAMPLES, 2, seed=0), 10)
    epochs = [taken[i : i + 5] for i in range(0, 20, 5)]
    assert all(Counter(epoch) == Counter(range(0, 50, 10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_resuming_goes_on_exactly() -> None:
    whole = firsts(ChatSource(EXAMPLES, 3, seed=4), 9)
    first = ChatSource(EXAMPLES, 3, seed=4)
    head = firsts(first, 4)
    second = ChatSource(EXAMPLES, 3, seed=4)
    second.load_state_dict(first.state_dict())
    assert head + firsts(second, 5) == whole and second.can_checkpoint
    assert firsts(ChatSource(EXAMPLES, 3, seed=5), 9) != whole


def test_weights_are_shifted_with_the_targets() -> None:
    (batch,) = ChatSource(EXAMPLES[:1], 1, seed=0).next_step()
    assert batch.targets_T.tolist() == [1, 2] and batch.weights_T.tolist() == [0.0, 1.0]


def test_data_that_teaches_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="no training conversations"):
        ChatSource([], 1, 0)
    only_first = Rendered([1, 2], [1.0, 0.0])  # nothing predicts the first token
    with pytest.raises(InputError, match="conversation 1 has no token with a loss weight"):
        ChatSource([EXAMPLES[0], only_first], 1, 0)
