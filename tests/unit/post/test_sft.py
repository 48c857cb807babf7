"""Rendered conversations as a source."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from twofold.base.records import InputError
from twofold.post.sft import ChatSource, StoredExamples, write_examples
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


def test_micro_batches_hold_the_same_step_within_a_limit() -> None:
    (whole,) = ChatSource(EXAMPLES, 4, seed=1).next_step()
    parts = ChatSource(EXAMPLES, 4, seed=1, micro_tokens=7).next_step()
    assert [part.num_tokens for part in parts] == [4, 4]
    assert torch.equal(torch.cat([part.tokens_T for part in parts]), whole.tokens_T)
    assert torch.equal(torch.cat([part.weights_T for part in parts]), whole.weights_T)


def test_stored_examples_are_the_written_ones(tmp_path: Path) -> None:
    write_examples(tmp_path / "e.safetensors", EXAMPLES)
    stored = StoredExamples(tmp_path / "e.safetensors")
    assert [(e.token_ids, e.weights) for e in stored] == [(e.token_ids, e.weights) for e in EXAMPLES]
    assert stored[-2:][0].token_ids == EXAMPLES[3].token_ids
    assert firsts(ChatSource(stored, 2, seed=0), 3) == firsts(ChatSource(EXAMPLES, 2, seed=0), 3)
    write_examples(tmp_path / "none.safetensors", [])
    assert len(StoredExamples(tmp_path / "none.safetensors")) == 0
    (tmp_path / "bad.safetensors").write_bytes(b"x")
    with pytest.raises(InputError, match=r"bad\.safetensors cannot be read"):
        StoredExamples(tmp_path / "bad.safetensors")
