"""What a stage shows and keeps: rows of speed apart from metrics, the line, trackers without a new key."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from twofold.base.batch import TokenBatch, pack
from twofold.base.config import Config, ConfigError
from twofold.base.files import read_json, read_jsonl
from twofold.base.progress import metrics_text
from twofold.model.config import ModelConfig
from twofold.model.qwen3 import Qwen3
from twofold.recipes import tiny
from twofold.recipes.chain import Chain, Stage, StageContext
from twofold.recipes.pretrain import run_training
from twofold.recipes.watch import shown
from twofold.train import trackers
from twofold.train.loop import OptimConfig
from twofold.train.meter import ByteCounted
from twofold.train.objectives import CrossEntropy

READING = {"tokens_per_second": 12345.6, "mfu": 0.414, "memory_bytes": 9.1e8}


class Source:
    """Batch i depends on i alone."""

    can_checkpoint = True

    def __init__(self) -> None:
        self.taken = 0

    def next_step(self) -> list[TokenBatch]:
        self.taken += 1
        generator = torch.Generator().manual_seed(self.taken)
        return [pack([torch.randint(0, 32, (9,), generator=generator).tolist() for _ in range(3)])]

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.taken = state["taken"]


def model() -> Qwen3:
    made = Qwen3(
        ModelConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, rms_norm_eps=1e-6, rope_theta=1e4, max_position_embeddings=64,
            tie_word_embeddings=True, initializer_range=0.2,
        )
    )  # fmt: skip
    made.init_weights(0)
    return made


class Settings(Config):
    steps: int = 4


class Stop(Exception):
    pass


@pytest.fixture
def context(tmp_path: Path) -> Callable[..., StageContext]:
    """(stop at step or None, trackers) -> the same stage's context."""

    def make(stop: int | None = None, track: tuple[str, ...] = ()) -> StageContext:
        lines: list[dict[str, Any]] = []

        def update(done: float, **metrics: Any) -> None:
            lines.append(metrics)
            if done == stop:
                raise Stop

        progress = SimpleNamespace(start=lambda *_: None, update=update, finish=lambda: None, lines=lines)
        for name in ("out", "work"):
            (tmp_path / name).mkdir(exist_ok=True)
        made = StageContext("s1", Settings(), 0, {}, tmp_path / "out", tmp_path / "work", progress, track)
        return made

    return make


def train(context: StageContext) -> None:
    source = ByteCounted(Source(), torch.full((32,), 2.0))
    run_training(context, model(), source, CrossEntropy(), OptimConfig(), context.config.steps)


def test_an_interrupted_stage_has_one_row_of_speed_a_step(
    context: Callable[..., StageContext], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("twofold.train.loop.CHECKPOINT_SECONDS", 0.0)
    with pytest.raises(Stop):
        train(context(stop=3))
    finished = context()
    train(finished)
    rows = read_jsonl(tmp_path / "out" / "volatile" / "speed.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3] and all(row["tokens"] == 24 for row in rows)
    assert all(row["elapsed"] >= row["seconds"] > 0 and row["mfu"] > 0 and row["flops"] > 1e5 for row in rows)
    metrics = read_jsonl(tmp_path / "out" / "metrics.jsonl")
    assert not {"seconds", "mfu", "elapsed"} & metrics[0].keys() and metrics[0]["bytes_per_token"] == 2.0
    memory = read_json(tmp_path / "out" / "volatile" / "memory.json")
    parameters = sum(p.numel() for p in model().parameters())
    assert memory["weights"] == memory["gradients"] == 4 * parameters and memory["tokens"] == 24
    line = finished.progress.lines[-1]
    assert list(line) == ["loss", "tok/s", "MFU", "norm", "lr", "GB", "bpb"]
    assert float(line["bpb"]) == pytest.approx(metrics[3]["loss"] / 0.693147 / 2, rel=1e-2)


def test_tensorboard_files_end_up_in_the_artefact(context: Callable[..., StageContext], tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(context(track=("tensorboard",)))
    events = accumulator.EventAccumulator(str(tmp_path / "out" / "volatile" / "tensorboard"))
    events.Reload()
    losses = [row["loss"] for row in read_jsonl(tmp_path / "out" / "metrics.jsonl")]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(losses)
    assert {"grad_norm", "bits_per_byte", "speed/mfu", "lr/adamw", "lr/muon"} <= set(events.Tags()["scalars"])


def test_trackers_make_nothing_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plain, followed = tiny.build(), tiny.build(["track=tensorboard"])
    for a, b in zip(plain.stages[:-1], followed.stages[:-1], strict=True):  # the report names the command
        assert plain.key(a, tmp_path) == followed.key(b, tmp_path) and a.config.digest() == b.config.digest()
    seen: list[tuple[str, ...]] = []
    monkeypatch.setattr("twofold.recipes.tiny.main_stages", lambda config: [])
    monkeypatch.setattr("twofold.recipes.tiny.write_stage_report", lambda context: seen.append(context.track))
    stage = tiny.build(["track=tensorboard"]).stages[0]
    stage.run(StageContext("s", Settings(), 0, {}, tmp_path, tmp_path, SimpleNamespace()))  # type: ignore[arg-type]
    assert seen == [("tensorboard",)]
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="track=wandb needs a package"):
        tiny.build(["track=wandb"])


def test_the_line_says_the_most_important_first() -> None:
    row = {"loss": 2.3456, "grad_norm": 0.8312, "bytes_per_token": 2.5, "max_expert_load": 1.9, "dead_experts": 0.0}
    layers = {f"max_expert_load/layer_{layer}": 1.0 + layer / 10 for layer in range(4)}
    text = metrics_text(shown(row | layers, READING, 0.00123))
    assert text == "loss 2.346  tok/s 12,346  MFU 41%  norm 0.83  lr 0.0012  GB 0.91  bpb 1.35  load 1.0/1.1/1.2/1.3"
    many = {f"max_expert_load/layer_{layer}": 1.0 + layer / 10 for layer in range(9)}
    assert metrics_text(shown(row | many | {"dead_experts": 2.0}, READING, 1.0)).endswith("load 1.8 in layer 8  dead 2")
    rl = shown({"reward": 0.5, "kl": 0.1, "entropy": 0.2, "policy": 0.0, "grad_norm": 1.0}, READING, 1.0)
    assert list(rl)[:3] == ["reward", "kl", "entropy"] and "bpb" not in rl


def test_a_chain_keeps_what_depends_on_the_clock_apart(tmp_path: Path) -> None:
    """Two runs differ in volatile files alone, so the artefacts count as the same."""
    contents = []
    for name in ("a", "b"):
        chain = Chain("fake", [Stage("s1", "One", Settings(), (), train)], 0)
        chain.run(tmp_path / name)
        manifest = read_json(tmp_path / name / "s1" / "manifest.json")
        contents.append({f: e["sha256"] for f, e in manifest["files"].items()})
    differ = {name for name in contents[0] if contents[0][name] != contents[1][name]}
    assert differ == {"volatile/speed.jsonl"} and "volatile/memory.json" in contents[0]
