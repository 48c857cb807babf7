"""Attention facts of a step: the paged cache, and cached = uncached for every window and position code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from twofold.base.batch import boundaries, positions
from twofold.model.attn_inputs import AttnInputs, PagedKV, Rows, Span
from twofold.model.config import Context, ModelConfig
from twofold.model.qwen3 import Qwen3

NO_ROWS = Rows([], [], [])


def test_what_does_not_fit_is_refused(make_config: Callable[..., ModelConfig]) -> None:
    cache = PagedKV(make_config(), blocks=4, block_size=4)
    AttnInputs.paged(NO_ROWS, [Span([0, 3], 0, 8, False)], cache)
    with pytest.raises(ValueError, match="does not fit its blocks of 4"):
        AttnInputs.paged(NO_ROWS, [Span([0, 3], 0, 9, False)], cache)
    with pytest.raises(ValueError, match="does not fit its blocks"):
        AttnInputs.paged(NO_ROWS, [Span([1], 0, 2, False), Span([0, 3], 4, 9, False)], cache)
    with pytest.raises(ValueError, match="does not fit its blocks"):
        AttnInputs.paged(Rows([[0], [3]], [3, 4], [False, False]), [], cache)
    with pytest.raises(ValueError, match="sequences that begin come before"):
        AttnInputs.paged(NO_ROWS, [Span([0, 3], 4, 6, False), Span([1], 0, 2, False)], cache)


def test_places_of_a_mixed_step(make_config: Callable[..., ModelConfig]) -> None:
    cache = PagedKV(make_config(), blocks=9, block_size=4)
    spans = [Span([8], 0, 3, False), Span([7, 2], 3, 6, True)]
    attn = AttnInputs.paged(Rows([[5, 1], [0]], [4, 2], [False, True]), spans, cache, idle=3)
    assert attn.block_T is not None and attn.place_T is not None
    assert attn.block_T.tolist() == [1, 0, 8, 8, 8, 7, 2, 2] and attn.place_T.tolist() == [0, 2, 0, 1, 2, 3, 0, 1]
    assert attn.cu_seqlens == [0, 1, 2, 5, 8] and attn.longest == 6
    assert (
        attn.extended_T is not None
        and attn.extended_T.tolist() == [False, True] + [False] * 3 + [True] * 3 + [False] * 3
    )
    assert attn.plan is not None and attn.plan.buckets[0].contiguous == (0, 3), "only what begins is packed"


def test_a_decode_mask_shows_each_row_its_own_past(make_config: Callable[..., ModelConfig]) -> None:
    cache = PagedKV(make_config(), blocks=2, block_size=8, whole=True)
    (group,) = AttnInputs.paged(Rows([[0], [1]], [0, 3], [False, False]), [], cache).groups
    assert (group.mask_RL == 0).tolist() == [[True, False, False, False], [True] * 4]


@pytest.mark.parametrize("whole", [False, True])
def test_blocks_are_copied_up_to_a_length_and_survive_growth(
    whole: bool, make_config: Callable[..., ModelConfig]
) -> None:
    cache = PagedKV(make_config(), blocks=4, block_size=6, whole=whole)
    for k, v in cache.layers:
        k.copy_(torch.arange(4.0).view(1, 4, 1, 1).expand_as(k))
        v.copy_(k + 10)
    cache.copy([1, 2], [0, 3], 4)
    cache.grow(9)
    cache.grow(5)  # nothing to do
    assert cache.blocks == 9 and cache.bytes == 2 * 2 * 9 * 6 * 2 * 6 * 4
    for k, v in cache.layers:
        assert k.shape[1] == 9 and k[0, :4, 0, 0].tolist() == [1, 1, 2, 2] and k[0, :4, 5, 0].tolist() == [0, 1, 2, 3]
        assert v[0, 3, 3, 0] == 12 and not v[:, 4:].any()


def test_growth_that_broke_off_goes_on(
    make_config: Callable[..., ModelConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = PagedKV(make_config(), blocks=2, block_size=4)
    for k, v in cache.layers:
        k.fill_(1.0)
        v.fill_(2.0)
    room, pool = iter([True] * 3 + [False]), cache._pool

    def short(blocks: int) -> torch.Tensor:
        if not next(room, True):
            raise MemoryError
        return pool(blocks)

    monkeypatch.setattr(cache, "_pool", short)
    with pytest.raises(MemoryError):
        cache.grow(5)
    cache.grow(5)
    assert cache.blocks == 5
    for k, v in cache.layers:
        assert k.shape[1] == v.shape[1] == 5 and (k[:, :2] == 1).all() and (v[:, :2] == 2).all()


def test_one_sequence_is_read_in_its_order(make_config: Callable[..., ModelConfig]) -> None:
    cache = PagedKV(make_config(), blocks=5, block_size=2)
    for k, v in cache.layers:
        k.copy_(torch.arange(10.0).view(1, 5, 2, 1).expand_as(k))
        v.copy_(k + 10)
    for blocks, expected in (([1, 2, 3], [2, 3, 4, 5, 6]), ([4, 0, 1], [8, 9, 0, 1, 2])):
        k, v = cache.read(1, blocks, 5)
        assert k.shape == (2, 5, 6) and k[0, :, 0].tolist() == expected
        assert v[1, :, 3].tolist() == [x + 10 for x in expected]


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

    # Blocks of 4, scattered. One step after another: beginnings, chunks beside decoding, decoding alone.
    cache, order = PagedKV(model.config, blocks=32, block_size=4), torch.randperm(32, generator=generator).tolist()
    tables = [[order.pop() for _ in range(-(-n // 4))] for n in lengths]
    done = [0] * 4
    for upto in ([4, 20, 3, 0], [5, 39, 12, 12], [7, 40, 13, 28], [8, 41, 14, 29], [9, 41, 14, 30]):
        now = [s for s in range(4) if upto[s] > done[s]]
        rows = [s for s in now if done[s] and upto[s] == done[s] + 1]
        others = sorted((s for s in now if s not in rows), key=lambda s: done[s] > 0)
        spans = [Span(tables[s], done[s], upto[s], extended[s]) for s in others]
        columns = Rows([tables[s] for s in rows], [done[s] for s in rows], [extended[s] for s in rows])
        attn = AttnInputs.paged(columns, spans, cache, idle=2)
        tokens = torch.cat(
            [*(parts[s][done[s] : upto[s]] for s in (*rows, *others)), torch.zeros(2, dtype=torch.int64)]
        )
        places = torch.cat([*(torch.arange(done[s], upto[s]) for s in (*rows, *others)), torch.zeros(2)]).long()
        expected = torch.cat([whole[s][done[s] : upto[s]] for s in (*rows, *others)])
        torch.testing.assert_close(model(tokens, places, attn)[:-2], expected, atol=1e-5, rtol=1e-5)
        done = upto


def test_whole_sequences_decide_by_their_length(make_model: Callable[..., Qwen3]) -> None:
    model = make_model(context=Context(native=16, target=64))
    tokens = torch.randint(0, 40, (16 + 17,), generator=torch.Generator().manual_seed(0))
    where = positions([16, 17])
    decided, stated = (model(tokens, where, AttnInputs.packed([0, 16, 33], extended_S=e)) for e in (None, [0, 1]))
    assert torch.equal(decided, stated)
    assert not torch.allclose(decided, model(tokens, where, AttnInputs.packed([0, 16, 33], extended_S=[0, 0])))


@pytest.mark.parametrize("name", ["window", "yarn", "yarn, window"])
def test_everything_stands_on_the_device_it_is_given(name: str, make_model: Callable[..., Qwen3]) -> None:
    """Seen without a GPU: the meta device has shapes only, and refuses to meet tensors of the CPU."""
    meta = torch.device("meta")
    model = make_model(**CODINGS[name]).requires_grad_(False).to(meta)
    tokens, flags = torch.zeros(31, dtype=torch.int64, device=meta), [True, False]
    spans = [Span([1, 5, 7], 0, 22, True), Span([2, 0], 0, 9, False)]
    later = [Span([1, 5, 7], 22, 24, True), Span([2, 0], 9, 12, False)]
    rows, alone = Rows([[1, 5, 7], [2, 0]], [23, 9], flags), Rows([[1], [2]], [3, 4], flags)
    steps = []
    for whole in (False, True):
        cache = PagedKV(model.config, blocks=8, block_size=8, device=meta, whole=whole)
        steps += [
            (AttnInputs.packed([0, 22, 31], meta), 31),
            (AttnInputs.paged(NO_ROWS, spans, cache), 31),
            (AttnInputs.paged(rows, later, cache, 3), 10),
            (AttnInputs.paged(alone, [], cache), 2),
        ]
    for attn, count in steps:
        assert model(tokens[:count], tokens[:count], attn).shape == (count, 16)
