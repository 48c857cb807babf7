"""Attention facts of a step: the row cache, and cached = uncached for every window and position code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from twofold.base.batch import boundaries, positions
from twofold.model.attn_inputs import AttnInputs, KVCache
from twofold.model.config import Context, ModelConfig
from twofold.model.qwen3 import Qwen3


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


# What a query sees and how it is coded, on every path. Native length 16, so Dual Chunk Attention has chunks of 11.
CODINGS: dict[str, dict[str, Any]] = {
    "window": {"sliding_window": 5, "max_window_layers": 1},
    "yarn": {"context": Context(native=16, target=64)},
    "yarn, window": {"context": Context(native=16, target=64), "sliding_window": 7},
    "yarn, static": {"context": Context(native=16, target=64, static=True)},
    "llama3": {"context": Context(native=16, target=64, method="llama3")},
    "dca": {"context": Context(native=16, target=64, method="dca")},
    "dca, static": {"context": Context(native=16, target=64, method="dca", static=True)},
}


@pytest.mark.parametrize("name", CODINGS)
def test_cached_equals_uncached(name: str, make_model: Callable[..., Qwen3]) -> None:
    """Whole prefill, chunked prefill and decoding, sequences of either coding side by side."""
    model = make_model(num_hidden_layers=3, **CODINGS[name]).requires_grad_(False)
    lengths, extended = [9, 41, 14, 30], [False, True, True, True]  # the third is short now and will be long
    generator = torch.Generator().manual_seed(1)
    parts = [torch.randint(0, 40, (n,), generator=generator) for n in lengths]
    whole = [
        model(part, torch.arange(len(part)), AttnInputs.packed([0, len(part)], extended_S=[flag]))
        for part, flag in zip(parts, extended, strict=True)
    ]
    packed = model(torch.cat(parts), positions(lengths), AttnInputs.packed(boundaries(lengths), extended_S=extended))
    torch.testing.assert_close(packed, torch.cat(whole), atol=1e-5, rtol=1e-5)

    cache, rows = KVCache(model.config, rows=5, capacity=48), torch.tensor([3, 0, 1, 2])
    done = [0] * 4
    for upto in ([4, 20, 3, 12], [5, 39, 12, 13], [7, 40, 13, 28]):
        steps = [b - a for a, b in zip(done, upto, strict=True)]
        tokens = torch.cat([part[a:b] for part, a, b in zip(parts, done, upto, strict=True)])
        places = torch.cat([torch.arange(a, b) for a, b in zip(done, upto, strict=True)])
        attn = AttnInputs.prefill(boundaries(steps), cache, rows, done if any(done) else None, extended)
        expected = torch.cat([w[a:b] for w, a, b in zip(whole, done, upto, strict=True)])
        torch.testing.assert_close(model(tokens, places, attn), expected, atol=1e-5, rtol=1e-5)
        done = upto
    order = rows.argsort()
    for step in (0, 1):  # by rows 0 .. 3; the fourth row is sequence 0
        now = [min(done[s] + step, lengths[s] - 1) for s in order.tolist()]
        tokens = torch.stack([parts[s][place] for s, place in zip(order.tolist(), now, strict=True)])
        attn = AttnInputs.decode(cache, torch.tensor(now), torch.tensor(extended)[order])
        expected = torch.stack([whole[s][place] for s, place in zip(order.tolist(), now, strict=True)])
        torch.testing.assert_close(model(tokens, torch.tensor(now), attn), expected, atol=1e-5, rtol=1e-5)


def test_whole_sequences_decide_by_their_length(make_model: Callable[..., Qwen3]) -> None:
    model = make_model(context=Context(native=16, target=64))
    tokens = torch.randint(0, 40, (16 + 17,), generator=torch.Generator().manual_seed(0))
    where = positions([16, 17])
    decided, stated = (model(tokens, where, AttnInputs.packed([0, 16, 33], extended_S=e)) for e in (None, [0, 1]))
    assert torch.equal(decided, stated)
    assert not torch.allclose(decided, model(tokens, where, AttnInputs.packed([0, 16, 33], extended_S=[0, 0])))


def test_a_cached_step_must_say_how_its_sequences_began(make_model: Callable[..., Qwen3]) -> None:
    model = make_model(context=Context(native=16, target=64))
    cache = KVCache(model.config, rows=1, capacity=8)
    with pytest.raises(ValueError, match="extended_S"):
        model(torch.tensor([1]), torch.tensor([0]), AttnInputs.prefill([0, 1], cache, torch.tensor([0])))
    with pytest.raises(ValueError, match="extended_S"):
        model(torch.tensor([1]), torch.tensor([0]), AttnInputs.decode(cache, torch.tensor([0])))


@pytest.mark.parametrize("name", ["window", "yarn", "yarn, window"])
def test_everything_stands_on_the_device_it_is_given(name: str, make_model: Callable[..., Qwen3]) -> None:
    """Seen without a GPU: the meta device has shapes only, and refuses to meet tensors of the CPU."""
    meta = torch.device("meta")
    model = make_model(**CODINGS[name]).requires_grad_(False).to(meta)
    cache = KVCache(model.config, rows=2, capacity=32, device=meta)
    rows, places = torch.tensor([1, 0]), torch.tensor([23, 9])
    tokens, flags = torch.zeros(31, dtype=torch.int64, device=meta), [True, False]
    steps = [
        (AttnInputs.packed([0, 22, 31], meta), positions([22, 9])),
        (AttnInputs.prefill([0, 22, 31], cache, rows, extended_S=flags), positions([22, 9])),
        (AttnInputs.decode(cache, places, torch.tensor(flags)), places),
    ]
    for attn, where in steps:
        assert model(tokens[: len(where)], where.to(meta), attn).shape == (len(where), 16)
