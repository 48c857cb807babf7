"""Training state: whole or refused, by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from twofold.base.records import InputError
from twofold.model.qwen3 import Qwen3
from twofold.train.checkpoint import load_state, save_state
from twofold.train.loop import OptimConfig, Trainer
from twofold.train.objectives import CrossEntropy


def test_tensors_and_facts_come_back(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6).view(2, 3).T, "b": torch.tensor(1.5)}
    facts = {"step": 3, "source": {"name": "ü", "cursor": [1, 2]}}
    save_state(tmp_path / "state", tensors, facts)
    loaded, loaded_facts = load_state(tmp_path / "state")
    assert loaded_facts == facts and loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_damaged_states_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "state"
    save_state(path, {"a": torch.zeros(100)}, {"step": 1})
    whole = path.read_bytes()
    for damaged in (b"", whole[:5], whole[:-1], b"\xff" * 64):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"is damaged .* delete it"):
            load_state(path)


@pytest.fixture
def trained(tmp_path: Path, make_model: Callable[..., Qwen3], make_source: Callable[..., Any]) -> Path:
    Trainer(make_model(), make_source(), CrossEntropy(), OptimConfig(), 2, tmp_path).fit()
    return tmp_path


@pytest.mark.parametrize(
    ("lost", "words"),
    [
        ("adamw.model.norm.weight.", "no adamw exp_avg that fits 'model.norm.weight'"),
        ("adamw.model.norm.weight.exp_avg_sq", "no adamw exp_avg_sq that fits 'model.norm.weight'"),
        ("muon.model.layers.1.self_attn.qkv_proj.weight.momentum", "no muon momentum that fits 'model.layers.1.self"),
        ("muon.", "no muon moments that fits 'model.layers.0.self_attn.qkv_proj.weight'"),
        ("model.model.norm.weight", "model.norm.weight"),
    ],
)
def test_a_state_that_lacks_something_is_refused_by_name(
    lost: str, words: str, trained: Path, make_model: Callable[..., Qwen3], make_source: Callable[..., Any]
) -> None:
    path = trained / "state.safetensors"
    tensors, facts = load_state(path)
    left = {name: tensor for name, tensor in tensors.items() if not name.startswith(lost)}
    assert len(left) < len(tensors)
    save_state(path, left, facts)
    with pytest.raises(InputError, match=words):
        Trainer(make_model(), make_source(), CrossEntropy(), OptimConfig(), 4, trained).fit()


def test_a_state_of_another_model_is_refused(
    trained: Path, make_model: Callable[..., Qwen3], make_source: Callable[..., Any]
) -> None:
    with pytest.raises(InputError, match="does not fit this model"):
        Trainer(make_model(hidden_size=20), make_source(), CrossEntropy(), OptimConfig(), 4, trained).fit()
