"""The tensors of a step, and the cache that grows as it is used."""

from __future__ import annotations

import pytest
import torch

from twofold.base.records import Request
from twofold.engine.blocks import root_key
from twofold.engine.inputs import step_inputs
from twofold.engine.memory import Shape
from twofold.engine.request import Sample
from twofold.engine.runner import Runner
from twofold.engine.scheduler import Batch, Chunk
from twofold.model.attn_inputs import PagedKV
from twofold.model.config import ModelConfig
from twofold.model.qwen3 import Qwen3


@pytest.fixture(scope="module")
def model() -> Qwen3:
    built = Qwen3(
        ModelConfig(
            vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=6, rms_norm_eps=1e-6, rope_theta=1e4, max_position_embeddings=100,
            tie_word_embeddings=True, initializer_range=0.2,
        )
    )  # fmt: skip
    built.init_weights(seed=0)
    return built.requires_grad_(False)


def sample(tokens: list[int], computed: int, blocks: list[int], draft: tuple[int, ...] = ()) -> Sample:
    made = Sample(0, 0, 0, Request(tuple(tokens)), root_key(0), False, tokens, 99, computed=computed, blocks=blocks)
    made.draft = list(draft)
    return made


def test_a_batch_is_written_out_in_the_order_that_attention_wants(model: Qwen3) -> None:
    cache = PagedKV(model.config, blocks=12, block_size=4)
    short, long = sample([1, 2, 3], 2, [0]), sample([*range(10, 20)], 9, [5, 3, 4])
    later, guessed = sample([*range(20, 29)], 4, [1, 2, 6]), sample([*range(30, 33)], 2, [7, 8], draft=(8, 9))
    begun = sample([5, 6], 0, [9])
    chunks = [Chunk(later, 4, 7), Chunk(guessed, 2, 5), Chunk(begun, 0, 2)]
    inputs = step_inputs(Batch([short, long], chunks), cache, min_tokens=14)
    assert inputs.rows == [long, short] and inputs.chunks == [chunks[2], chunks[0], chunks[1]]
    assert inputs.tokens_T.tolist() == [19, 3, 5, 6, 24, 25, 26, 32, 8, 9, 0, 0, 0, 0]
    assert inputs.positions_T.tolist() == [9, 2, 0, 1, 4, 5, 6, 2, 3, 4, 0, 0, 0, 0]
    assert inputs.attn.idle == 4 and inputs.attn.cu_seqlens == [0, 1, 2, 4, 7, 10]
    assert step_inputs(Batch([short], []), cache, min_tokens=1).attn.idle == 0


def test_whole_sequences_are_read_in_the_order_of_their_blocks(model: Qwen3) -> None:
    cache = PagedKV(model.config, blocks=4, block_size=16, whole=True)
    rows = [sample([1] * (place + 3), place + 2, [block]) for place, block in enumerate((2, 0, 1))]
    inputs = step_inputs(Batch(list(rows)), cache, min_tokens=1)
    assert [row.blocks[0] for row in inputs.rows] == [0, 1, 2]
    (group,) = inputs.attn.groups
    assert group.table is None and group.first == 0


def test_the_cache_grows_as_it_is_used_and_keeps_what_it_holds(model: Qwen3) -> None:
    runner = Runner(model, Shape(1000, 4, whole=False), min_rows=1)
    assert runner.cache.blocks == 64
    tokens = [*range(1, 11)]
    whole, _ = runner.run(Batch(chunks=[Chunk(sample(tokens, 0, [5, 6, 7]), 0, 10)]))
    runner.run(Batch(chunks=[Chunk(sample(tokens, 0, [5, 6, 7]), 0, 6)]))
    far = sample([3, 4], 0, [70])
    runner.run(Batch(chunks=[Chunk(far, 0, 2)], copies=[(70, 150, 2)]))
    assert runner.cache.blocks == 151
    rest, _ = runner.run(Batch(chunks=[Chunk(sample(tokens, 6, [5, 6, 7]), 6, 10)]))
    torch.testing.assert_close(rest, whole[6:], atol=1e-5, rtol=1e-5)
    for k, v in runner.cache.layers:
        assert (
            torch.equal(k[:, 70, :2], k[:, 150, :2]) and torch.equal(v[:, 70, :2], v[:, 150, :2]) and k[0, 70, 0].any()
        )
    runner.run(Batch(chunks=[Chunk(sample([3], 0, [999]), 0, 1)]))
    assert runner.cache.blocks == 1000


def test_moves_come_before_the_forward_pass(model: Qwen3) -> None:
    runner = Runner(model, Shape(3, 16, whole=True), min_rows=4)
    tokens = [*range(1, 8)]
    whole, _ = runner.run(Batch(chunks=[Chunk(sample(tokens, 0, [2]), 0, 7)]))
    runner.run(Batch(chunks=[Chunk(sample(tokens, 0, [2]), 0, 6)]))
    hidden, _ = runner.run(Batch(rows=[sample(tokens, 6, [0])], moves={2: 0}, moved=6))
    assert hidden.shape == (4, 16), "idle rows fill up a small product"
    torch.testing.assert_close(hidden[0], whole[6], atol=1e-5, rtol=1e-5)
    assert runner.logits(hidden[:1]).shape == (1, 40)


def test_which_caches_serve_for_which_shapes(model: Qwen3) -> None:
    paged, whole = Shape(40, 32, whole=False), Shape(8, 128, whole=True)
    assert Runner(model, paged, 1).fits(Shape(0, 32, whole=False))
    assert not Runner(model, paged, 1).fits(Shape(0, 16, whole=False)) and not Runner(model, paged, 1).fits(whole)
    runner = Runner(model, whole, 1)
    assert runner.fits(Shape(6, 64, whole=True)) and not runner.fits(Shape(9, 64, whole=True))
    assert not runner.fits(Shape(6, 192, whole=True)) and not runner.fits(paged)
    model.set_attention_dtype(torch.float64)
    assert not runner.fits(whole)
    model.set_attention_dtype(None)
