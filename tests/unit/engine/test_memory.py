"""The cache's size and shape."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from twofold.base.records import Request, SamplingParams
from twofold.engine import memory
from twofold.engine.memory import Shape, paged_shape, whole_shape
from twofold.model.config import ModelConfig

CPU = torch.device("cpu")


def batch(count: int, prompt: int = 30, max_tokens: int = 90, n: int = 1, common: int = 0) -> list[Request]:
    params = SamplingParams(max_tokens=max_tokens, n=n)
    return [Request((*range(common), *range(i, i + prompt - common)), params) for i in range(count)]


def test_free_memory_is_positive_and_below_a_petabyte() -> None:
    assert 1 << 20 < memory.free_bytes(CPU) < 1 << 50


def test_a_control_group_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = memory.free_bytes(CPU)
    (tmp_path / "limit").write_text("3000000")
    (tmp_path / "used").write_text("1000000")
    monkeypatch.setattr(memory, "_CGROUP", ((str(tmp_path / "limit"), str(tmp_path / "used")), ("absent", "absent")))
    assert memory.free_bytes(CPU) == 2000000
    (tmp_path / "limit").write_text("max")
    assert abs(memory.free_bytes(CPU) / before - 1) < 0.5
    monkeypatch.setattr(memory, "_meminfo", lambda: None)  # not Linux
    assert memory.free_bytes(CPU) > 1 << 20


def test_a_small_model_takes_no_more_than_it_can_use(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=6, rms_norm_eps=1e-6, rope_theta=1e4, max_position_embeddings=100,
        tie_word_embeddings=True, initializer_range=0.2,
    )  # fmt: skip
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10**9)
    assert memory.cache_bytes(config, 4, 8, CPU) == 8 * 100 * 2 * 2 * 2 * 6 * 4
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
    assert memory.cache_bytes(config, 4, 8, CPU) == 500
    assert memory.cache_bytes(config, 4, 8, CPU, held=600) == 800, "what a new cache replaces is as good as free"
    assert memory.cache_bytes(config, 4, 8, torch.device("cuda")) == 800
    assert paged_shape(1000, 10, 32) == Shape(3, 32, whole=False)


@pytest.mark.parametrize(
    ("requests", "expected"),
    [
        (batch(16, n=16), Shape(64, 128, whole=True)),
        (batch(16), Shape(16, 128, whole=True)),
        (batch(7), None),  # too few samples to matter
        (batch(16, max_tokens=2100), None),  # too long
        (batch(16, prompt=400, max_tokens=50), Shape(16, 512, whole=True)),
        (batch(16, prompt=400, max_tokens=50, common=300), None),  # worth a prefix cache
        (batch(16, prompt=100, common=90), Shape(16, 192, whole=True)),
        ([], None),
    ],
)
def test_which_calls_get_one_block_a_sequence(requests: list[Request], expected: Shape | None) -> None:
    assert whole_shape(requests, 64, 10**6, 100) == expected
    if expected is not None:
        assert whole_shape(requests, 64, expected.blocks * expected.block_size * 100 - 1, 100) is None
