"""What is stored where, and what is refused; that several processes agree is in tests/equivalence/test_parallel.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from twofold.base.batch import pack
from twofold.base.dist import Ranks
from twofold.base.records import InputError
from twofold.model import parallel
from twofold.model.config import ModelConfig
from twofold.model.lora import LoraConfig, attach
from twofold.model.parallel import Parallel, ParallelConfig, collect, parallelise, stored_order
from twofold.model.qwen3 import Qwen3


def make_model(**changes: Any) -> Qwen3:
    shape: dict[str, Any] = dict(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-6, rope_theta=1e4, max_position_embeddings=64,
        tie_word_embeddings=True, initializer_range=0.1,
    )  # fmt: skip
    model = Qwen3(ModelConfig(**(shape | changes)))
    model.init_weights(0)
    return model


MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 8}


def test_every_tensor_rank_has_its_part_of_each_piece() -> None:
    """q of 4, k of 2, v of 2 rows on two ranks."""
    assert stored_order([4, 2, 2], 2).tolist() == [0, 1, 4, 6, 2, 3, 5, 7]
    assert stored_order([4, 2, 2], 1).tolist() == list(range(8))
    order = stored_order([12, 6, 6], 3)
    assert sorted(order.tolist()) == list(range(24)) and order[:8].tolist() == [0, 1, 2, 3, 12, 13, 18, 19]


def test_rows_change_order_and_back() -> None:
    model, name = make_model(), "model.layers.0.self_attn.qkv_proj.weight"
    weight = model.get_parameter(name)
    before = weight.detach().clone()
    moment = {"muon." + name + ".momentum": before.clone(), "adamw.step": torch.tensor(1.0)}
    parallel.reorder(model, {name: weight, **moment}, 1, 2)
    assert torch.equal(weight, before[stored_order([32, 16, 16], 2)])
    assert torch.equal(moment["muon." + name + ".momentum"], weight)
    parallel.reorder(model, {name: weight}, 2, 1)
    assert torch.equal(weight, before)
    parallel.reorder(model, {name: weight}, 2, 2)
    assert torch.equal(weight, before)


def test_one_process_is_left_alone() -> None:
    model = make_model()
    spread = parallelise(model, ParallelConfig())
    assert spread == Parallel() and collect(model, spread) is model
    batch = pack([[1, 2, 3, 4]])
    assert spread.mine(batch) is batch
    for changed in ({"tensor": 2}, {"context": 2}, {"replicate": 2}):
        with pytest.raises(InputError, match="need several processes; start with torchrun"):
            parallelise(model, ParallelConfig(**changed))


@pytest.mark.parametrize(
    ("shape", "config", "size", "words"),
    [
        ({}, {"tensor": 3}, 4, "replicate x context x tensor = 1 x 1 x 3 does not divide the 4 processes"),
        ({}, {"replicate": 0}, 4, "0 x 1 x 1 does not divide"),
        ({}, {"tensor": 4}, 4, "tensor=4 does not divide num_key_value_heads=2"),
        ({"num_key_value_heads": 4, "intermediate_size": 22}, {"tensor": 4}, 4, "divide intermediate_size=22"),
        ({"mlp_bias": True}, {"tensor": 2}, 2, "no place for biases of o_proj and down_proj; use tensor=1"),
        (MOE | {"num_key_value_heads": 4}, {"tensor": 4}, 4, "tensor=4 does not divide num_experts=6"),
        ({}, {"experts": True}, 2, "experts=true needs a mixture of experts and tensor=1"),
        (MOE, {"experts": True, "tensor": 2}, 2, "needs a mixture of experts and tensor=1"),
        (MOE, {"experts": True}, 4, "4 ranks cannot share 6 experts evenly"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_before_anything_is_sent(
    shape: dict[str, Any], config: dict[str, Any], size: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel.dist, "world", lambda: Ranks(0, size))
    with pytest.raises(InputError, match=words):
        parallelise(make_model(**shape), ParallelConfig(**config))


def test_adapters_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel.dist, "world", lambda: Ranks(0, 2))
    model = make_model()
    attach(model, "new", LoraConfig(r=2))
    with pytest.raises(InputError, match="adapters are trained on one process"):
        parallelise(model, ParallelConfig())


def test_context_ranks_weigh_each_token_once() -> None:
    batch = pack([list(range(12)), list(range(9))])
    weights = [Parallel(context=Ranks(rank, 3)).mine(batch).weights_T for rank in range(3)]
    assert torch.equal(torch.stack(weights).sum(0), batch.weights_T)
    assert [int(w.sum()) for w in weights] == [7, 6, 6] and not batch.weights_T.eq(0).any()
