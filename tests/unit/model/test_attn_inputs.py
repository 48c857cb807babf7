"""Attention facts of a step: capacity, prefix copies and compaction of the row cache."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from twofold.model.attn_inputs import AttnInputs, KVCache
from twofold.model.config import ModelConfig


def test_what_does_not_fit_is_refused(make_config: Callable[..., ModelConfig]) -> None:
    cache = KVCache(make_config(), rows=2, capacity=8)
    AttnInputs.prefill([0, 8], cache, torch.tensor([0]))
    with pytest.raises(ValueError, match="9 tokens do not fit a cache of 8"):
        AttnInputs.prefill([0, 9], cache, torch.tensor([0]))
    with pytest.raises(ValueError, match="9 tokens do not fit"):
        AttnInputs.prefill([0, 2, 7], cache, torch.tensor([0, 1]), [0, 4])
    with pytest.raises(ValueError, match="9 tokens do not fit"):
        AttnInputs.decode(cache, torch.tensor([3, 8]))


def test_places_of_a_chunk_follow_what_is_cached(make_config: Callable[..., ModelConfig]) -> None:
    cache = KVCache(make_config(), rows=3, capacity=16)
    attn = AttnInputs.prefill([0, 2, 5], cache, torch.tensor([2, 0]), [4, 0])
    assert attn.slot_row_T is not None and attn.slot_place_T is not None
    assert attn.slot_row_T.tolist() == [2, 2, 0, 0, 0] and attn.slot_place_T.tolist() == [4, 5, 0, 1, 2]
    assert attn.plan is None


def test_a_decode_mask_shows_each_row_its_own_past(make_config: Callable[..., ModelConfig]) -> None:
    attn = AttnInputs.decode(KVCache(make_config(), rows=2, capacity=8), torch.tensor([0, 3]))
    assert attn.mask_RL is not None
    assert (attn.mask_RL == 0).tolist() == [[True, False, False, False], [True] * 4]


def test_copy_prefix_and_compact_move_whole_rows(make_config: Callable[..., ModelConfig]) -> None:
    cache = KVCache(make_config(), rows=4, capacity=6)
    for k, v in cache.layers:
        k.copy_(torch.arange(4.0).view(4, 1, 1, 1).expand_as(k))
        v.copy_(k + 10)
    cache.copy_prefix(1, torch.tensor([0, 3]), 4)
    for k, v in cache.layers:
        assert k[:, 0, 0, 0].tolist() == [1, 1, 2, 1] and k[:, 0, 5, 0].tolist() == [0, 1, 2, 3]
        assert v[3, 0, 3, 0] == 11
    cache.compact(torch.tensor([2, 3]), 6)
    for k, _ in cache.layers:
        assert k[:2, 0, 0, 0].tolist() == [2, 1] and k[:2, 0, 5, 0].tolist() == [2, 3]
