"""Training an adapter with the ordinary loop: the base stays, and a resumed run ends bit for bit the same (T18)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from twofold.model.lora import LoraConfig, activate, attach
from twofold.model.qwen3 import Qwen3
from twofold.train import loop
from twofold.train.loop import OptimConfig, Trainer, build_optimizers
from twofold.train.objectives import CrossEntropy

Make = Callable[..., Any]


def adapted(make_model: Make, moe: bool) -> Qwen3:
    model = make_model(moe=moe)
    attach(model, "new", LoraConfig(r=2, alpha=4, targets=("q_proj", "v_proj", "gate_proj", "down_proj")))
    activate(model, "new", train=True)
    return model


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_only_the_adapter_moves_and_a_resumed_run_ends_the_same(
    moe: bool, tmp_path: Path, make_model: Make, make_source: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    before = {name: value.clone() for name, value in adapted(make_model, moe).state_dict().items()}

    def train(steps: int, folder: str) -> Qwen3:
        model = adapted(make_model, moe)
        Trainer(model, make_source(), CrossEntropy(), OptimConfig(decay="constant"), steps, tmp_path / folder).fit()
        return model

    whole = train(6, "whole").state_dict()
    train(3, "parts")
    parts = train(6, "parts").state_dict()
    for name, value in whole.items():
        assert torch.equal(value, parts[name]), name
        if ".adapters." not in name:
            assert torch.equal(value, before[name]), name
    assert any(not torch.equal(value, before[name]) for name, value in whole.items() if ".adapters." in name)


def test_muon_keeps_away_from_factors(make_model: Make) -> None:
    optimizers = build_optimizers(adapted(make_model, False), OptimConfig())
    assert list(optimizers) == ["adamw"]
