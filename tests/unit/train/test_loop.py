"""The loop: what it refuses, what it logs, which optimiser owns what."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from twofold.base.batch import TokenBatch
from twofold.base.config import ConfigError
from twofold.base.files import read_json, read_jsonl
from twofold.base.records import InputError
from twofold.model.qwen3 import Qwen3
from twofold.optim.groups import GROUPS
from twofold.optim.schedule import lr_scale
from twofold.train.checkpoint import load_state
from twofold.train.loop import FitConfig, Hook, OptimConfig, Trainer, TrainError, build_optimizers
from twofold.train.objectives import CrossEntropy, Sums

Make = Callable[..., Any]


class Spoiled(CrossEntropy):
    """Cross entropy whose loss is multiplied by ``factor`` from its ``start``-th call on."""

    def __init__(self, factor: float, start: int) -> None:
        super().__init__()
        self.factor, self.left = factor, start

    def __call__(self, model: Qwen3, batch: TokenBatch) -> tuple[Sums, Sums]:
        losses, stats = super().__call__(model, batch)
        self.left -= 1
        return {"loss": losses["loss"] * (self.factor if self.left < 0 else 1.0)}, stats


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_losses_that_are_not_finite_stop_the_run_by_name(
    factor: float, tmp_path: Path, make_model: Make, make_source: Make
) -> None:
    model = make_model()
    trainer = Trainer(model, make_source(1), Spoiled(factor, 2), OptimConfig(warmup=1), 5, tmp_path)
    words = r"step 2: loss or gradient is not finite \(\{'loss': (nan|inf).*\), 3 times in a row; .* Lower the learning"
    with pytest.warns(RuntimeWarning, match="left out") as seen, pytest.raises(TrainError, match=words):
        trainer.fit()
    assert len(seen) == 2 and trainer.skipped == 3
    assert all(torch.isfinite(p).all() for p in model.parameters())  # the bad update was not applied
    assert [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [0, 1]
    flight = read_json(tmp_path / "flight.json")
    assert flight["error"].startswith("TrainError: step 2:") and "in _train_step" in "".join(flight["traceback"])
    assert flight["metrics"][-1]["step"] == 1 and flight["settings"]["optim"]["adam_lr"] == 3e-3
    assert flight["batches"] == [{"tokens": 13, "sequences": 2, "weight": 13.0, "sources": [0]}]
    assert flight["memory"]["peak_resident"] > 10**7 and flight["source"] == {"taken": 5}


class SpoiledOnce(CrossEntropy):
    """Cross entropy that is not finite in the given calls."""

    def __init__(self, *calls: int) -> None:
        super().__init__()
        self.calls, self.called = calls, 0

    def __call__(self, model: Qwen3, batch: TokenBatch) -> tuple[Sums, Sums]:
        losses, stats = super().__call__(model, batch)
        self.called += 1
        return {"loss": losses["loss"] * (float("nan") if self.called in self.calls else 1.0)}, stats


def test_a_skipped_step_leaves_weights_moments_and_schedule_alone(
    tmp_path: Path, make_model: Make, make_source: Make
) -> None:
    """As if its batch had never been drawn: calls 3 and 4 are the third step's micro-batches."""
    skipping = Trainer(make_model(), make_source(2), SpoiledOnce(3, 8), OptimConfig(warmup=2), 4, tmp_path / "a")
    with pytest.warns(RuntimeWarning, match=r"step [12]: loss or gradient is not finite"):
        skipping.fit()
    source = make_source(2)
    steps = iter([1, 3, 5, 6])  # batches 2 and 4 are the bad ones

    def next_step() -> list[TokenBatch]:
        number = next(steps)
        return [source.make([9, 6], seed=100 * number + part) for part in range(2)]

    source.next_step = next_step
    plain = Trainer(make_model(), source, CrossEntropy(), OptimConfig(warmup=2), 4, tmp_path / "b")
    plain.fit()
    for (name, a), b in zip(skipping.model.named_parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    rows, expected = skipping.metrics.rows(), plain.metrics.rows()
    assert [row.pop("skipped_steps", 0) for row in rows] == [0, 1, 2, 2] and rows == expected
    saved = load_state(skipping.state_path)[1]
    assert saved["skipped"] == 2 and saved["tokens"] == plain.tokens


def test_how_many_in_a_row_is_a_setting(tmp_path: Path, make_model: Make, make_source: Make) -> None:
    with pytest.raises(TrainError, match=r"step 1: .* 1 times in a row"):
        Trainer(make_model(), make_source(1), SpoiledOnce(2), OptimConfig(), 5, tmp_path / "a").fit(
            FitConfig(max_skipped=1)
        )
    trainer = Trainer(make_model(), make_source(1), SpoiledOnce(2, 3, 5, 6), OptimConfig(), 4, tmp_path / "b")
    with pytest.warns(RuntimeWarning):
        trainer.fit()  # never three in a row
    assert trainer.step == 4 and trainer.skipped == 4


class Small(CrossEntropy):
    """Runs out of memory above ``room`` tokens, after part of the work is done."""

    def __init__(self, room: int, balance: float = 0.0) -> None:
        super().__init__(balance)
        self.room, self.sizes = room, list[int]()

    def __call__(self, model: Qwen3, batch: TokenBatch) -> tuple[Sums, Sums]:
        losses, stats = super().__call__(model, batch)
        self.sizes.append(batch.num_tokens)
        if batch.num_tokens > self.room:
            losses["loss"].backward()
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore lines")
        return losses, stats


@pytest.mark.parametrize("moe", [False, True])
def test_what_does_not_fit_is_cut_and_the_numbers_stay(
    moe: bool, tmp_path: Path, make_model: Make, make_source: Make
) -> None:
    optim, balance = OptimConfig(muon_lr=0.0, warmup=1), 0.1 if moe else 0.0

    def source() -> Any:
        out = make_source(2)
        inner = out.make
        out.make = lambda lengths, seed: inner([9, 3, 6, 4, 8], seed=seed)
        return out

    plain = Trainer(make_model(moe), source(), CrossEntropy(balance), optim, 3, tmp_path / "plain")
    plain.fit()
    objective = Small(15, balance)
    cut = Trainer(make_model(moe), source(), objective, optim, 3, tmp_path / "cut")
    with pytest.warns(RuntimeWarning, match="a micro-batch of 25 tokens did not fit in memory; .* in 2 parts") as seen:
        cut.fit()
    assert len(seen) == 1 and objective.sizes[0] == 25
    assert max(objective.sizes[1:]) <= 15 and len(objective.sizes) == 1 + 3 * 2 * 2
    for a, b in zip(plain.metrics.rows(), cut.metrics.rows(), strict=True):
        assert b.pop("micro_batch_split") == 2
        assert b == pytest.approx(a, rel=1e-4, abs=1e-6)
    again = Trainer(make_model(moe), source(), Small(15, balance), optim, 3, tmp_path / "cut")
    again.fit()
    assert again.split == 2  # remembered, so nothing fails a second time
    given = Trainer(make_model(moe), source(), Small(15, balance), optim, 3, tmp_path / "given")
    given.fit(FitConfig(split=2))
    assert given.metrics.rows()[0]["micro_batch_split"] == 2


def test_a_sequence_that_does_not_fit_alone_names_the_fix(tmp_path: Path, make_model: Make, make_source: Make) -> None:
    model = make_model()
    before = [p.clone() for p in model.parameters()]
    trainer = Trainer(model, make_source(2), Small(5), OptimConfig(), 3, tmp_path)
    words = r"step 0: a sequence of 8 tokens does not fit in memory even alone \(CUDA out of memory. Tried to allocate "
    with pytest.warns(RuntimeWarning), pytest.raises(TrainError, match=words + "2.00 GiB.; use recompute=full"):
        trainer.fit()
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, model.parameters(), strict=True))


def test_other_errors_of_a_pass_are_not_taken_for_memory(tmp_path: Path, make_model: Make, make_source: Make) -> None:
    class Broken(CrossEntropy):
        def __call__(self, model: Qwen3, batch: TokenBatch) -> tuple[Sums, Sums]:
            raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ") as caught:
        Trainer(make_model(), make_source(), Broken(), OptimConfig(), 3, tmp_path).fit()
    assert caught.value.__notes__ == [f"what is known about it: {tmp_path / 'flight.json'}"]


def test_hooks_measure_before_a_step_is_logged(tmp_path: Path, make_model: Make, make_source: Make) -> None:
    asked: list[tuple[str, int]] = []

    def measure(step: int) -> dict[str, float]:
        asked.append(("eval", step))
        return {"eval_loss": 10.0 - step}

    hooks = [Hook(2, measure), Hook(3, lambda step: asked.append(("sample", step)))]
    rows: list[dict[str, float]] = []
    optim = OptimConfig(decay="constant")
    trainer = Trainer(
        make_model(), make_source(1), CrossEntropy(), optim, 5, tmp_path, on_step=lambda _, row: rows.append(row)
    )
    trainer.fit(hooks=hooks)
    assert asked == [("eval", 2), ("sample", 3), ("eval", 4), ("eval", 5), ("sample", 5)]
    assert [row.get("eval_loss") for row in trainer.metrics.rows()] == [None, 8.0, None, 6.0, 5.0]
    assert rows == trainer.metrics.rows()


def test_the_best_weights_and_the_last_states_are_kept(tmp_path: Path, make_model: Make, make_source: Make) -> None:
    values = {1: 3.0, 2: 1.0, 3: 2.0, 4: 1.0, 5: 5.0}
    at: dict[int, list[torch.Tensor]] = {}
    model = make_model()

    def measure(step: int) -> dict[str, float]:
        at[step] = [p.detach().clone() for p in model.parameters()]
        return {"eval_loss": values[step]}

    config = FitConfig(keep_best="eval_loss", keep_every=1, keep_last=2)
    trainer = Trainer(model, make_source(1), CrossEntropy(), OptimConfig(), 5, tmp_path)
    with pytest.raises(InputError, match="fit with keep_best"):
        trainer.load_best()
    trainer.fit(config, [Hook(1, measure)])
    kept = sorted(path.name for path in tmp_path.glob("state-*"))
    assert kept == ["state-00000004.safetensors", "state-00000005.safetensors"]
    assert [load_state(tmp_path / name)[1]["step"] for name in kept] == [4, 5]
    assert trainer.load_best() == 2
    assert all(torch.equal(a, b) for a, b in zip(at[2], model.parameters(), strict=True))


STOPPED = """
import os, signal, sys, time
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[2])
from conftest import CountingSource, VOCABULARY
from twofold.base.batch import pack
from twofold.model.config import ModelConfig
from twofold.model.qwen3 import Qwen3
from twofold.train.loop import OptimConfig, Trainer
from twofold.train.objectives import CrossEntropy

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell would have it ignored
model = Qwen3(ModelConfig(
    vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, head_dim=8, rms_norm_eps=1e-6, rope_theta=1e4, max_position_embeddings=64,
    tie_word_embeddings=True, initializer_range=0.2))
model.init_weights(0)
class Stopping(CrossEntropy):
    def __call__(self, model, batch):
        if self.stop:
            os.kill(os.getpid(), signal.SIGINT)
        return super().__call__(model, batch)
def make(lengths, seed):
    g = torch.Generator().manual_seed(seed)
    return pack([torch.randint(0, VOCABULARY, (n,), generator=g).tolist() for n in lengths])
objective = Stopping()
objective.stop = sys.argv[3] != "0"
trainer = Trainer(model, CountingSource(make, int(sys.argv[3]) or 1), objective, OptimConfig(), 3, Path(sys.argv[1]))
try:
    trainer.fit()
except KeyboardInterrupt as error:
    print("stopped:", error)
print("steps", trainer.step, signal.getsignal(signal.SIGINT) is signal.default_int_handler)
"""


def test_control_c_ends_the_step_and_saves_and_a_second_one_stops_at_once(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}

    def run(folder: str, signals: int) -> tuple[str, str]:
        command = [sys.executable, "-c", STOPPED, str(tmp_path / folder), str(Path(__file__).parent), str(signals)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
        return done.stdout, done.stderr

    out, told = run("once", 1)
    assert out.startswith(f"stopped: stopped after step 1, saved in {tmp_path / 'once' / 'state.safetensors'}; run the")
    assert out.endswith("steps 1 True\n") and told.count("Ctrl-C again stops at once") == 1
    assert load_state(tmp_path / "once" / "state.safetensors")[1]["step"] == 1
    out, _ = run("twice", 2)  # one in each micro-batch of the first step
    assert out == "stopped: \nsteps 0 True\n" and not (tmp_path / "twice" / "state.safetensors").exists()


def test_a_step_without_any_loss_weight_is_refused(
    tmp_path: Path, make_model: Make, make_source: Make, make_batch: Make
) -> None:
    source = make_source()
    source.make = lambda lengths, seed: make_batch(lengths, seed, [[0.0] * n for n in lengths])
    with pytest.raises(TrainError, match="step 0: no token of the batch carries a loss weight"):
        Trainer(make_model(), source, CrossEntropy(), OptimConfig(), 1, tmp_path).fit()


def test_metrics_say_what_was_done(tmp_path: Path, make_model: Make, make_source: Make) -> None:
    seen: list[tuple[int, float]] = []
    optim = OptimConfig(warmup=2, decay="linear", end=0.0, grad_clip=1e-3)
    trainer = Trainer(
        make_model(),
        make_source(),
        CrossEntropy(),
        optim,
        4,
        tmp_path,
        on_step=lambda s, row: seen.append((s, row["loss"])),
    )
    trainer.fit()
    rows = trainer.metrics.rows()
    assert [row["step"] for row in rows] == [0, 1, 2, 3] and seen == [(row["step"] + 1, row["loss"]) for row in rows]
    assert [row["num_tokens"] for row in rows] == [26, 52, 78, 104] and trainer.tokens == 104
    assert [row["lr_scale"] for row in rows] == [lr_scale(s, 4, 2, "linear", 1.0, 0.0) for s in range(4)]
    assert all(row["grad_norm"] > 0.01 for row in rows)  # as measured, before clipping
    assert 2 < rows[0]["loss"] < 6 and 0 <= rows[0]["mean_token_accuracy"] <= 1


def test_statistics_that_are_maxima_keep_the_largest(tmp_path: Path, make_model: Make, make_source: Make) -> None:
    class Peaks(CrossEntropy):
        values = iter([3.0, 8.0, 2.0, 5.0, 1.0, 4.0])

        def __call__(self, model: Qwen3, batch: TokenBatch) -> tuple[Sums, Sums]:
            losses, stats = super().__call__(model, batch)
            return losses, stats | {"gap/max": torch.tensor(next(self.values))}

    trainer = Trainer(make_model(), make_source(3), Peaks(), OptimConfig(), 2, tmp_path)
    trainer.fit()
    assert [row["gap/max"] for row in trainer.metrics.rows()] == [8.0, 5.0]


def test_nothing_is_saved_while_the_source_cannot_describe_itself(
    tmp_path: Path, make_model: Make, make_source: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("twofold.train.loop.CHECKPOINT_SECONDS", 0.0)
    source = make_source()
    source.can_checkpoint = False
    trainer = Trainer(make_model(), source, CrossEntropy(), OptimConfig(), 3, tmp_path)
    trainer.fit()
    assert not trainer.state_path.exists() and len(trainer.metrics.rows()) == 3


def test_training_learns(tmp_path: Path, make_model: Make, make_source: Make, make_batch: Make) -> None:
    source = make_source(1)
    source.make = lambda lengths, seed: make_batch(lengths, 7)
    trainer = Trainer(make_model(), source, CrossEntropy(), OptimConfig(warmup=1), 25, tmp_path)
    trainer.fit()
    rows = trainer.metrics.rows()
    assert rows[-1]["loss"] < 0.3 * rows[0]["loss"]


def test_muon_owns_the_matrices_inside_layers_and_adamw_the_rest(make_model: Make) -> None:
    model = make_model(True)
    names = {id(p): name for name, p in model.named_parameters()}
    owned = {
        kind: {names[id(p)] for group in optimizer.param_groups for p in group["params"]}
        for kind, (optimizer, _) in build_optimizers(model, OptimConfig()).items()
    }
    assert owned["muon"] | owned["adamw"] == set(names.values()) and not owned["muon"] & owned["adamw"]
    assert {"model.embed_tokens.weight", "model.norm.weight", "model.layers.0.mlp.gate.weight"} <= owned["adamw"]
    assert "model.layers.1.mlp.experts.down_proj" in owned["muon"]
    only = build_optimizers(model, OptimConfig(muon_lr=0.0))
    assert list(only) == ["adamw"]
    assert sum(len(group["params"]) for group in only["adamw"][0].param_groups) == len(names)


def test_a_run_that_has_learnt_enough_ends_early_and_stays_ended(
    tmp_path: Path, make_model: Make, make_source: Make
) -> None:
    def train(enough: Callable[[int], bool]) -> Trainer:
        trainer = Trainer(make_model(), make_source(1), CrossEntropy(), OptimConfig(), 6, tmp_path, enough=enough)
        trainer.fit()
        return trainer

    asked: list[int] = []
    assert train(lambda step: asked.append(step) or step == 3).step == 3  # type: ignore[func-returns-value]
    assert asked == [0, 1, 2, 3]
    resumed = train(lambda step: step >= 3)
    assert resumed.step == 3
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 3


def test_the_schedule_may_follow_tokens(tmp_path: Path, make_model: Make, make_source: Make) -> None:
    optim = OptimConfig(decay=((0, 0.5), (52, 1.0), (104, 0.0)))
    trainer = Trainer(make_model(), make_source(), CrossEntropy(), optim, 5, tmp_path)  # 26 tokens a step
    trainer.fit()
    assert [row["lr_scale"] for row in trainer.metrics.rows()] == [0.5, 0.75, 1.0, 0.5, 0.0]
    longer = Trainer(make_model(), make_source(), CrossEntropy(), optim, 6, tmp_path)
    longer.fit()  # the number of steps is not part of such a schedule
    assert longer.step == 6
    assert OptimConfig().override(["decay=[[0,1],[2e6,0.1]]"]).decay == ((0, 1), (2e6, 0.1))
    for points in ([], [[5, 1.0], [5, 0.5]], [[9, 1.0], [2, 0.5]]):
        with pytest.raises(ValueError, match="points whose tokens rise"):
            OptimConfig(decay=points)


def shrunk(model: Qwen3, optim: OptimConfig) -> set[str]:
    """The parameters that one step without gradients moves: weight decay alone."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
            parameter.grad = torch.zeros_like(parameter)
    for optimizer, _ in build_optimizers(model, optim).values():
        optimizer.step()
    return {name for name, parameter in model.named_parameters() if not torch.all(parameter == 1)}


@pytest.mark.parametrize("muon", [0.0, 0.02])
@pytest.mark.parametrize("shape", [{}, {"qk_norm": False, "qkv_bias": True}, {"tie_word_embeddings": False}])
def test_weight_decay_shrinks_matrices_and_others_only_where_asked(
    make_model: Make, shape: dict[str, Any], muon: float
) -> None:
    model = make_model(moe=True, **shape)
    matrices = {name for name, p in model.named_parameters() if p.dim() > 1 and "embed_tokens" not in name}
    vectors = {name for name, p in model.named_parameters() if p.dim() == 1}
    assert {name.rpartition(".")[2] for name in vectors} == ({"weight", "bias"} if "qkv_bias" in shape else {"weight"})
    optim = OptimConfig(muon_lr=muon, adam_lr=0.1, weight_decay=0.5)
    assert shrunk(model, optim) == matrices
    tables = {"model.embed_tokens.weight"}
    for wanted, names in (({"embeddings": 0.5}, tables), ({"vectors": 0.5}, vectors), ({"matrices": 0.5}, matrices)):
        named = OptimConfig.model_validate({"muon_lr": muon, "adam_lr": 0.1, "weight_decay": wanted})
        assert shrunk(model, named) == names
    assert shrunk(model, OptimConfig(muon_lr=muon)) == set()


def test_groups_of_weight_decay_are_set_by_name() -> None:
    optim = OptimConfig().override(['weight_decay={"matrices": 0.1, "embeddings": 0.01}'])
    assert [optim.shrinks(group) for group in GROUPS] == [0.1, 0.01, 0.0]
    assert OptimConfig().model_dump(mode="json")["weight_decay"] == 0.0  # states and keys of older runs stay good
    for wrong in ('{"norms": 0.1}', "-1", "NaN"):
        with pytest.raises(ConfigError, match="weight_decay"):
            OptimConfig().override([f"weight_decay={wrong}"])


def test_a_warm_up_as_long_as_the_run_is_said_before_it(tmp_path: Path, make_model: Make, make_source: Make) -> None:
    def trainer(optim: OptimConfig, steps: int, name: str) -> Trainer:
        return Trainer(make_model(), make_source(1), CrossEntropy(), optim, steps, tmp_path / name)

    said = "the warm-up of 10 steps takes the whole run of 4: the rate ends at 40% of what was asked for"
    first = trainer(OptimConfig(), 4, "long")
    with pytest.warns(RuntimeWarning, match=said):
        first.fit()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer(OptimConfig(), 4, "long").fit()  # nothing is left to be done
        trainer(OptimConfig(warmup=1), 3, "short").fit()
        trainer(OptimConfig(warmup=0, decay="constant"), 2, "constant").fit()
        trainer(OptimConfig(warmup=9, decay=((0, 1.0), (50, 0.0))), 2, "points").fit()
