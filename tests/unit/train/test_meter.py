"""Rates, operations and memory: counted by hand, and the ceiling by what it is used for."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from twofold.model.lora import LoraConfig, attach
from twofold.train import meter
from twofold.train.loop import OptimConfig, Trainer
from twofold.train.meter import ByteCounted, Meter, Work, bits_per_byte, ceiling, step_flops
from twofold.train.objectives import CrossEntropy

Make = Callable[..., Any]
CPU = torch.device("cpu")


def test_rates_are_those_of_recent_steps_without_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meter, "ceiling", lambda device, dtype: 1e9)
    speed = Meter(CPU, torch.float32, devices=2)
    speed.add(Work(10, 1e9, 100.0, 0.0))
    assert speed.reading()["tokens_per_second"] == pytest.approx(0.1)
    speed.add(Work(100, 4e9, 2.0, 0.0))
    speed.add(Work(300, 4e9, 6.0, 4.0))
    reading = speed.reading()
    assert reading["tokens_per_second"] == pytest.approx(400 / 8) and reading["waiting"] == pytest.approx(0.5)
    assert reading["tflops"] == pytest.approx(2e-3) and reading["mfu"] == pytest.approx(1.0) and reading["seconds"] == 6
    assert 2**20 < reading["memory_bytes"] <= reading["peak_memory_bytes"]
    for _ in range(meter.RECENT):
        speed.add(Work(1, 0.0, 1.0, 0.0))
    assert speed.reading()["tokens_per_second"] == pytest.approx(1.0)  # what lies further back is forgotten


def test_the_ceiling_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ceiling.cache_clear()
    found = ceiling(CPU, torch.float32)
    assert 1e8 < found < 1e15
    monkeypatch.setattr(torch, "mm", None)  # a second measurement would fail
    assert ceiling(CPU, torch.float32) == found


@pytest.mark.parametrize("moe", [False, True])
def test_operations_are_those_that_torch_counts(moe: bool, make_model: Make, make_batch: Make) -> None:
    """Against torch's counter of matrix products, but for attention, which it takes for whole squares."""
    model = make_model(moe, hidden_size=64, intermediate_size=128, head_dim=16)
    weights = [[1.0] * 24] * 3
    batch = make_batch([24, 24, 24], weights=weights)
    with FlopCounterMode(display=False) as counter:
        losses, _ = CrossEntropy()(model, batch)
        losses["loss"].backward()
    config = model.config
    keys = sum(n * (n + 1) / 2 for n in (23, 23, 23))
    attention = 12 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * keys
    counted = step_flops(model, [batch]) - attention
    by_torch = sum(
        number for operation, number in counter.get_flop_counts()["Global"].items() if "attention" not in str(operation)
    )
    # torch knows no grouped products, so experts are counted by hand: 2 of 4 see a token, 3 matrices each
    experts = 6 * batch.num_tokens * config.num_hidden_layers * 2 * 3 * 64 * 8 if moe else 0
    assert counted == pytest.approx(by_torch + experts, rel=0.05)
    assert step_flops(model, [batch]) == pytest.approx(
        batch.num_tokens * config.flops_per_token(context=12, backward=True), rel=1e-3
    )


def test_what_is_not_trained_or_scored_counts_less(make_model: Make, make_batch: Make) -> None:
    model = make_model(num_hidden_layers=2)
    plain, half = make_batch([9, 9]), make_batch([9, 9], weights=[[1.0] * 5 + [0.0] * 4, [1.0] * 5 + [0.0] * 4])
    head = model.config.vocab_size * model.config.hidden_size
    assert step_flops(model, [plain]) - step_flops(model, [half]) == pytest.approx(6 * head * 8)
    whole = step_flops(model, [plain])
    layers = sum(p.numel() for name, p in model.named_parameters() if ".layers." in name)
    attach(model, "a", LoraConfig(r=2), 0)
    adapters = sum(p.numel() for name, p in model.named_parameters() if ".adapters." in name)
    expected = whole - 2 * 16 * (layers + head) + 6 * 16 * adapters
    assert step_flops(model, [plain]) == pytest.approx(expected, rel=0.01)
    both = step_flops(model, [plain, plain])
    assert both == pytest.approx(2 * step_flops(model, [plain]))
    assert meter._visible(5, None) == 15 and meter._visible(5, 2) == 9 and meter._visible(2, 5) == 3


def test_the_loop_feeds_the_meter_and_metrics_stay_free_of_the_clock(
    tmp_path: Path, make_model: Make, make_source: Make
) -> None:
    trainer = Trainer(make_model(), make_source(2), CrossEntropy(), OptimConfig(), 3, tmp_path)
    trainer.fit()
    assert [work.tokens for work in trainer.meter.recent] == [26, 26] and trainer.meter.devices == 1
    assert all(0 <= work.waiting < work.seconds and work.flops > 1e5 for work in trainer.meter.recent)
    clock = {"seconds", "tokens_per_second", "tflops", "mfu", "waiting", "memory_bytes", "peak_memory_bytes"}
    assert not clock & trainer.metrics.rows()[0].keys() and trainer.meter.reading().keys() == clock


def test_bits_per_byte_of_a_step(tmp_path: Path, make_model: Make, make_source: Make) -> None:
    bytes_V = torch.arange(32)
    source = make_source(2)
    wanted = [sum(int(b.targets_T.sum()) for b in source.next_step()) / 26 for _ in range(2)]
    trainer = Trainer(make_model(), ByteCounted(make_source(2), bytes_V), CrossEntropy(), OptimConfig(), 2, tmp_path)
    trainer.fit()
    rows = trainer.metrics.rows()
    assert [row["bytes_per_token"] for row in rows] == pytest.approx(wanted)
    assert bits_per_byte(rows[0]) == pytest.approx(rows[0]["loss"] / math.log(2) / wanted[0])
    assert bits_per_byte({"loss": 1.0}) is None and bits_per_byte({"reward": 1.0, "bytes_per_token": 2.0}) is None
    again = ByteCounted(make_source(2), bytes_V)
    again.load_state_dict(trainer.source.state_dict())
    assert again.source.taken == 2 and again.can_checkpoint
