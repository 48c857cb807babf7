"""bf16 products over fp32 weights: what is rounded and what is not; compiled modules: same numbers, and gone after."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from twofold.base.batch import TokenBatch
from twofold.base.dist import Ranks
from twofold.base.records import InputError
from twofold.model.lora import LoraConfig, attach
from twofold.model.parallel import Parallel
from twofold.model.qwen3 import Qwen3
from twofold.model.recompute import recompute
from twofold.train import loop
from twofold.train.compute import compiled, in_precision
from twofold.train.loop import FitConfig, OptimConfig, Trainer
from twofold.train.objectives import CrossEntropy, Sums

Make = Callable[..., Any]
PLAIN = OptimConfig(decay="constant", muon_lr=0.01, adam_lr=0.003)


def fit(model: Qwen3, source: Any, folder: Path, steps: int = 4, **settings: Any) -> Trainer:
    moe = bool(model.config.num_experts)
    trainer = Trainer(model, source, CrossEntropy(0.01 if moe else 0.0), PLAIN, steps, folder)
    trainer.fit(FitConfig(**settings))
    return trainer


def losses(trainer: Trainer) -> torch.Tensor:
    return torch.tensor([row["loss"] for row in trainer.metrics.rows()])


@pytest.mark.parametrize("kind", ["dense", "moe", "adapter"])
def test_the_loss_is_near_and_what_is_kept_is_fp32(
    kind: str, tmp_path: Path, make_model: Make, make_source: Make
) -> None:
    runs = []
    for precision in ("fp32", "bf16"):
        model = make_model(moe=kind == "moe")
        if kind == "adapter":
            attach(model, "a", LoraConfig(r=2))
        runs.append(fit(model, make_source(), tmp_path / precision, precision=precision))
        for optimizer, _ in runs[-1].optimizers.values():
            moments = [value for state in optimizer.state.values() for value in state.values()]
            assert moments and {moment.dtype for moment in moments if torch.is_tensor(moment)} == {torch.float32}
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    plain, lowered = (losses(run) for run in runs)
    assert not torch.equal(plain, lowered)
    torch.testing.assert_close(lowered, plain, atol=0.03, rtol=0.01)


def test_a_step_computes_what_a_bf16_model_does(make_model: Make, make_batch: Make) -> None:
    """Statistics in fp32 included: the same functions run; gradients arrive unrounded sums of its micro-batches'."""
    model, low = make_model(), make_model().to(torch.bfloat16)
    objective, batches = CrossEntropy(), [make_batch([9, 6], seed=s) for s in (1, 2)]
    seen: list[Any] = []

    def run(trained: Qwen3) -> list[float]:
        out = []
        for batch in batches:
            loss = objective(trained, batch)[0]["loss"]
            loss.backward()
            out.append(float(loss.detach()))
            seen.append((trained.dtype, trained.head_weight.dtype))
        return out

    mine = in_precision(model, "bf16", lambda: run(model))
    assert seen == [(torch.bfloat16, torch.bfloat16)] * 2 and model.dtype == torch.float32
    wanted: dict[str, torch.Tensor] = {}
    for batch, value in zip(batches, mine, strict=True):
        low.zero_grad()
        loss = objective(low, batch)[0]["loss"]
        loss.backward()
        assert float(loss.detach()) == value
        for name, parameter in low.named_parameters():
            wanted[name] = wanted.get(name, 0.0) + parameter.grad.float()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32
        assert torch.equal(parameter.grad, wanted[name]), name


@pytest.mark.parametrize("kind", ["selective", "full"])
def test_layers_computed_again_find_the_same_weights(
    kind: Any, tmp_path: Path, make_model: Make, make_source: Make
) -> None:
    plain = fit(make_model(), make_source(), tmp_path / "plain", precision="bf16")
    again = make_model()
    recompute(again, kind)
    trainer = fit(again, make_source(), tmp_path / "again", precision="bf16")
    assert torch.equal(losses(plain), losses(trainer))
    assert all(torch.equal(a, b) for a, b in zip(plain.model.parameters(), again.parameters(), strict=True))


def test_weights_are_back_after_an_error(make_model: Make) -> None:
    model = make_model()
    before = dict(model.named_parameters())

    def fail() -> None:
        assert model.dtype == torch.bfloat16
        raise MemoryError("not enough memory")

    with pytest.raises(MemoryError):
        in_precision(model, "bf16", fail)
    assert all(parameter is before[name] for name, parameter in model.named_parameters())


def test_out_of_memory_in_bf16_is_cut_finer(tmp_path: Path, make_model: Make, make_source: Make) -> None:
    class Short(CrossEntropy):
        def __call__(self, model: Qwen3, batch: TokenBatch) -> tuple[Sums, Sums]:
            if len(batch.cu_seqlens) > 2:
                raise MemoryError("not enough memory")
            return super().__call__(model, batch)

    trainer = Trainer(make_model(), make_source(), Short(), PLAIN, 2, tmp_path)
    with pytest.warns(RuntimeWarning, match="did not fit in memory"):
        trainer.fit(FitConfig(precision="bf16"))
    assert trainer.split == 2 and trainer.step == 2


def test_a_resumed_run_goes_on_and_another_precision_is_refused(
    tmp_path: Path, make_model: Make, make_source: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    whole = fit(make_model(), make_source(), tmp_path / "whole", steps=4, precision="bf16")
    fit(make_model(), make_source(), tmp_path / "parts", steps=2, precision="bf16")
    with pytest.raises(InputError, match="precision was 'bf16' and is 'not set' now; put them back"):
        fit(make_model(), make_source(), tmp_path / "parts", steps=4)
    parts = fit(make_model(), make_source(), tmp_path / "parts", steps=4, precision="bf16")
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True))


def test_compiling_needs_one_process(tmp_path: Path, make_model: Make, make_source: Make) -> None:
    trainer = Trainer(make_model(), make_source(), CrossEntropy(), PLAIN, 1, tmp_path)
    with pytest.raises(InputError, match="compile=true need"):
        trainer.fit(FitConfig(compile=True), parallel=Parallel(world=Ranks(0, 2)))


def test_a_machine_that_cannot_compile_is_told_how(make_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(function: Any, **options: Any) -> Any:
        raise RuntimeError("\nInvalidCxxCompiler: No working C++ compiler found\nmore")

    monkeypatch.setattr(torch, "compile", broken)
    words = r"compile=true: torch cannot compile here \(InvalidCxx.*\); .*leave it out"
    with pytest.raises(InputError, match=words), compiled(make_model(), True):
        pass


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["dense", "moe", "adapter", "full", "bf16"])
def test_compiled_runs_learn_the_same_and_resume_to_the_bit(
    kind: str, tmp_path: Path, make_model: Make, make_source: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    more = {"precision": "bf16"} if kind == "bf16" else {}

    def train(folder: str, steps: int, compile: bool = True) -> Trainer:
        torch.compiler.reset()  # as a new process begins
        model = make_model(moe=kind == "moe")
        if kind == "full":
            recompute(model, "full")
        if kind == "adapter":
            attach(model, "a", LoraConfig(r=2))
        return fit(model, make_source(), tmp_path / folder, steps, compile=compile, **more)

    plain, whole = train("plain", 4, compile=False), train("whole", 4)
    torch.testing.assert_close(losses(whole), losses(plain), atol=0.02 if more else 1e-5, rtol=0.0)
    assert kind == "full" or not any("forward" in module.__dict__ for module in whole.model.modules())
    train("parts", 2)
    parts = train("parts", 4)
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True))
