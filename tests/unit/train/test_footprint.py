"""Formulas of memory against what torch really keeps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from twofold.model.attn_inputs import AttnInputs
from twofold.model.recompute import Recompute, recompute
from twofold.train.footprint import activation_bytes, footprint, logits_bytes, total
from twofold.train.loop import OptimConfig, Trainer
from twofold.train.objectives import CrossEntropy

Make = Callable[..., Any]
WIDE = {"hidden_size": 96, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24}


@pytest.mark.parametrize(("moe", "kind"), [(False, "none"), (True, "none"), (False, "full")])
@pytest.mark.parametrize("lengths", [[65] * 4, [20, 40, 90, 110]])
def test_activations_are_what_is_kept_for_the_backward_pass(
    moe: bool, kind: Recompute, lengths: list[int], make_model: Make, make_batch: Make
) -> None:
    model, batch = make_model(moe, num_hidden_layers=4, moe_intermediate_size=96, **WIDE), make_batch(lengths)
    recompute(model, kind)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(batch.tokens_T, batch.positions_T, AttnInputs.packed(batch.cu_seqlens, batch.tokens_T.device))
    seen = sum(storage.nbytes() for storage in kept.values())
    formula = activation_bytes(model.config, batch.num_tokens, recompute=kind)
    if kind == "full":  # one layer is whole only in the backward pass
        formula -= (activation_bytes(model.config, batch.num_tokens) - 4 * batch.num_tokens * 96) / 4
        assert seen < 0.25 * activation_bytes(model.config, batch.num_tokens)
    assert formula == pytest.approx(seen, rel=0.15)


def test_recomputing_keeps_less(make_model: Make) -> None:
    config = make_model(num_hidden_layers=8, **WIDE).config
    none, selective, full = (activation_bytes(config, 100, recompute=kind) for kind in ("none", "selective", "full"))
    assert full < selective < none and activation_bytes(config, 200) == 2 * none


def test_of_a_step(tmp_path: Path, make_model: Make, make_source: Make) -> None:
    model = make_model()
    trainer = Trainer(model, make_source(2), CrossEntropy(), OptimConfig(muon_lr=0.0), 1, tmp_path)
    trainer.fit()
    parts = footprint(model, trainer.optimizers, trainer.batches)
    size = 4 * sum(p.numel() for p in model.parameters())
    assert parts["weights"] == parts["gradients"] == size and parts["tokens"] == parts["scored"] == 13
    assert parts["optimizer"] == pytest.approx(2 * size, rel=0.01)
    with_muon = Trainer(make_model(), make_source(2), CrossEntropy(), OptimConfig(), 1, tmp_path / "muon")
    with_muon.fit()
    assert footprint(with_muon.model, with_muon.optimizers, trainer.batches)["optimizer"] < 1.8 * size
    named = ("weights", "gradients", "optimizer", "activations", "logits")
    assert total(parts) == sum(parts[name] for name in named)
    assert logits_bytes(model.config, 10**9, 10) < 4 * (3 * 2**26 + 10**4)  # never more than a chunk
