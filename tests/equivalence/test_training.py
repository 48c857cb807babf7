"""Accumulation equals one batch, and an interrupted run equals one that was left alone, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from twofold.base.batch import TokenBatch, pack
from twofold.base.files import read_jsonl
from twofold.model.config import ModelConfig
from twofold.model.qwen3 import Qwen3
from twofold.train.loop import OptimConfig, Trainer
from twofold.train.objectives import CrossEntropy, Objective, PolicyGradient


def make_model(moe: bool = False) -> Qwen3:
    shape: dict[str, Any] = dict(
        vocab_size=48, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-6, rope_theta=1e4, max_position_embeddings=64,
        tie_word_embeddings=True, initializer_range=0.1,
    )  # fmt: skip
    if moe:
        shape |= dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12)
    model = Qwen3(ModelConfig(**shape))
    model.init_weights(0)
    return model


def rows(step: int, count: int = 8) -> list[tuple[list[int], list[float], list[float], list[float]]]:
    """Random sequences with weights, recorded log-probabilities and advantages."""
    generator = torch.Generator().manual_seed(step)
    out = []
    for number in range(count):
        length = 4 + 3 * number
        tokens = torch.randint(0, 48, (length,), generator=generator).tolist()
        weights = [float(w) for w in torch.rand(length, generator=generator) < 0.6]
        old = (-3 - torch.rand(length, generator=generator)).tolist()
        advantage = [float(torch.randn((), generator=generator))] * length
        out.append((tokens, weights, old, advantage))
    return out


class Source:
    """The same sequences a step, cut into ``parts`` micro-batches of unequal token counts."""

    can_checkpoint = True

    def __init__(self, parts: int) -> None:
        self.parts, self.taken = parts, 0

    def next_step(self) -> list[TokenBatch]:
        self.taken += 1
        all_rows = rows(self.taken)
        size = len(all_rows) // self.parts
        cuts = [all_rows[i : i + size] for i in range(0, len(all_rows), size)]
        return [
            pack([r[0] for r in cut], [r[1] for r in cut],
                 {"old_logprobs": [r[2] for r in cut], "advantages": [r[3] for r in cut]})
            for cut in cuts
        ]  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.taken = state["taken"]


OBJECTIVES: dict[str, Callable[[], Objective]] = {
    "cross entropy": CrossEntropy,
    "grpo": lambda: PolicyGradient(entropy_coef=0.01),
    "gspo": lambda: PolicyGradient("gspo"),
}


@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_eight_micro_batches_equal_one_batch(name: str, moe: bool, tmp_path: Path) -> None:
    models, logged = [], []
    for parts in (1, 8):
        model, work = make_model(moe), tmp_path / str(parts)
        optim = OptimConfig(muon_lr=0.0, adam_lr=1e-2, betas=(0.0, 0.0), warmup=0, decay="constant")
        trainer = Trainer(model, Source(parts), OBJECTIVES[name](), optim, 1, work)
        captured: dict[str, torch.Tensor] = {}
        for parameter_name, parameter in model.named_parameters():
            parameter.register_post_accumulate_grad_hook(
                lambda p, key=parameter_name, into=captured: into.__setitem__(key, p.grad.clone())
            )
        trainer.fit()
        models.append(captured)
        logged.append(read_jsonl(work / "metrics.jsonl")[0])
    for key in models[0]:
        torch.testing.assert_close(models[0][key], models[1][key], atol=1e-6, rtol=1e-4, msg=key)
    assert logged[0].keys() == logged[1].keys()
    for key, value in logged[0].items():
        assert logged[1][key] == pytest.approx(value, rel=1e-4, abs=1e-6), key


def test_updates_of_muon_and_adamw_agree_too(tmp_path: Path) -> None:
    models = []
    for parts in (1, 8):
        models.append(make_model())
        optim = OptimConfig(muon_lr=0.02, adam_lr=1e-3, warmup=0)
        Trainer(models[-1], Source(parts), CrossEntropy(), optim, 3, tmp_path / str(parts)).fit()
    start = make_model()
    for (name, a), b, before in zip(
        models[0].named_parameters(), models[1].parameters(), start.parameters(), strict=True
    ):
        assert float((a - before).detach().abs().max()) > 1e-3, name
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


class Stop(Exception):
    """What a kill is to the loop."""


@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("stop_at", [1, 4])
def test_an_interrupted_run_equals_one_left_alone_bit_for_bit(
    moe: bool, stop_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trainer(work: Path, on_step: Callable[[int, Any], None] | None = None) -> Trainer:
        objective = CrossEntropy(balance=0.02) if moe else CrossEntropy()
        optim = OptimConfig(warmup=2, decay="cosine", end=0.1, weight_decay=0.01)
        return Trainer(make_model(moe), Source(2), objective, optim, 6, work, on_step)

    whole = trainer(tmp_path / "whole")
    whole.fit()
    monkeypatch.setattr("twofold.train.loop.CHECKPOINT_SECONDS", 0.0)

    def stop(step: int, row: Any) -> None:
        if step == stop_at + 1:  # after the update and its metrics row, before its state is saved
            raise Stop

    with pytest.raises(Stop):
        trainer(tmp_path / "cut", stop).fit()
    assert len(read_jsonl(tmp_path / "cut" / "metrics.jsonl")) == stop_at + 1
    again = trainer(tmp_path / "cut")
    again.fit()
    assert again.step == 6 and again.tokens == whole.tokens
    for (name, a), b in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert whole.metrics.rows() == again.metrics.rows()
    finished = trainer(tmp_path / "cut")
    finished.fit()  # nothing is left to do
    assert torch.equal(finished.model.head_weight, whole.model.head_weight)
