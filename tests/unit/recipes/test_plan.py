"""Estimates against what was run: a rehearsal in a real process, how it is scaled, what is said when it fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from twofold import cli, plan_cli
from twofold.base.config import ConfigError
from twofold.base.files import read_jsonl
from twofold.base.records import InputError
from twofold.model.qwen3 import Qwen3
from twofold.recipes import plan as planning
from twofold.recipes import rehearse, sft, tiny
from twofold.recipes.plan import Estimate, plan, sample_rows, scaled
from twofold.recipes.pretrain import ModelShape, save_model
from twofold.text.tokenizer import Tokenizer
from twofold.train.footprint import activation_bytes, logits_bytes

SMALL = ModelShape(hidden_size=32, intermediate_size=64, layers=2, heads=2, kv_heads=1, head_dim=16)


@pytest.fixture(scope="module")
def init(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("init") / "model"
    tokenizer = Tokenizer.train(["which letter comes after a b c d e f g h user assistant 0123456789"] * 4, 330)
    model = Qwen3(SMALL.build(tokenizer.vocab_size, 1e4, 256))
    model.init_weights(0)
    save_model(model, tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [
        [{"role": "user", "content": f"after {n}"}, {"role": "assistant", "content": "a b c " * (1 + n % 7)}]
        for n in range(600)
    ]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows), encoding="utf-8")
    return path


def test_fine_tuning_is_rehearsed_and_scaled(init: Path, data: Path, tmp_path: Path) -> None:
    """The run it speaks of is made here too; memory agrees, and time within what a busy machine does to it."""
    overrides = [f"init={init}", f"data={data}", "train.batch_size=8", "train.sample_tokens=8", "train.epochs=1"]
    chain = sft.build(overrides, 0)
    rows, tuned, report = plan("sft", chain, overrides, tmp_path, lambda line: None)
    assert rows.seconds and report.note == "not estimated" and report.seconds is None
    assert tuned.seconds and 0 < tuned.efficiency < 2 and tuned.note == ""
    shown = CliRunner().invoke(cli.app, ["run", "sft", *_settings(overrides), "--out", str(tmp_path / "real")])
    assert shown.exit_code == 0, shown.output
    manifest = json.loads((tmp_path / "real" / "sft" / "manifest.json").read_text())
    tokens = json.loads((tmp_path / "real" / "sft" / "result.json").read_text())["tokens"]
    assert tuned.tokens == pytest.approx(tokens, rel=0.05)
    flops = sum(row["flops"] for row in read_jsonl(tmp_path / "real" / "sft" / "volatile" / "speed.jsonl"))
    assert tuned.flops == pytest.approx(flops, rel=0.05)
    assert 0.1 < tuned.seconds / manifest["cost"]["seconds"] < 10
    assert tuned.process < tuned.peak_bytes and tuned.parts["weights"] == 4 * _parameters(init)


def _settings(overrides: list[str]) -> list[str]:
    return [part for override in overrides for part in ("--set", override)]


def _parameters(init: Path) -> int:
    return planning.checkpoint_config(init).num_parameters()


def found(**changes: Any) -> dict[str, Any]:
    step = {"tokens": 100, "flops": 2e9, "seconds": 2.0, "elapsed": 2.5, "tflops": 1e-3, "mfu": 0.25}
    parts = {"tokens": 100.0, "scored": 50.0, "gradients": 1e6, "activations": 0.0, "logits": 0.0}
    config = SMALL.build(330, 1e4, 256)
    parts |= {"activations": activation_bytes(config, 100), "logits": logits_bytes(config, 50, 100)}
    first = step | {"seconds": 9.0, "elapsed": 9.0}
    return {
        "seconds": 24.0, "steps": [first, step, step], "parts": parts, "process": 3e8, "peak": 5e8, **changes
    }  # fmt: skip


def test_time_is_what_steps_took_and_what_a_stage_does_besides() -> None:
    stage, config = tiny.build().stages[1], SMALL.build(330, 1e4, 256)
    e = scaled(stage, found(), 1000, config, longest=100)
    assert e.seconds == pytest.approx(24 - 9 - 5 + 10 * 2.5)  # the step that warms up counts once, not ten times
    assert e.flops == pytest.approx(10 * 2e9) and e.efficiency == pytest.approx(1e9 / 4e9) and e.peak_bytes == 5e8


def test_larger_micro_batches_to_come_take_more_memory() -> None:
    stage, config = tiny.build().stages[1], SMALL.build(330, 1e4, 256)
    more = activation_bytes(config, 150) - activation_bytes(config, 100)
    more += logits_bytes(config, 75, 150) - logits_bytes(config, 50, 100)
    assert scaled(stage, found(), 1000, config, longest=150).peak_bytes == pytest.approx(5e8 + more)
    assert scaled(stage, found(), 1000, config, longest=50).peak_bytes == 5e8


def test_rows_are_taken_from_all_over_the_file(tmp_path: Path) -> None:
    path, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    path.write_text("".join(f'{{"n": {n}}}\n' for n in range(1000)), encoding="utf-8")
    assert sample_rows(path, out, 10, "error") == (1000, 10)
    assert [row["n"] for row in read_jsonl(out)] == list(range(0, 1000, 100))
    assert sample_rows(path, out, 5000, "error") == (1000, 1000)
    path.write_text('{"n": 1}\n{"n": \n{"n": 3}\n', encoding="utf-8")
    with pytest.raises(InputError, match=r"rows.jsonl:2: not JSON .*rows.broken=skip"):
        sample_rows(path, out, 10, "error")
    assert sample_rows(path, out, 10, "skip") == (2, 2)
    path.write_text("", encoding="utf-8")
    with pytest.raises(InputError, match="has no rows"):
        sample_rows(path, out, 10, "skip")


def test_a_stage_that_would_fail_is_named(init: Path, tmp_path: Path) -> None:
    job = {"recipe": "tiny", "overrides": ["s1.optim.muon_lr=x"], "seed": 0, "steps": 3, "stage": "s1"}
    with pytest.raises(InputError, match=r"^stage s1 fails when it is rehearsed: .*s1\.optim\.muon_lr"):
        planning.rehearse(job | {"folder": str(tmp_path)})
    with pytest.raises(ConfigError, match="did you mean 'tiny'"):
        cli.build_chain("tinny", [], 0)


def test_pretraining_is_cut_and_stands_on_stand_in_data(tmp_path: Path) -> None:
    small = [f"{name}.shape.{key}={value}" for name in ("s1", "s2") for key, value in SMALL.model_dump().items()]
    overrides = [*small, "data.vocab_size=400", "data.probe_documents=2", "s2.eval_windows=2", "s2.tokens_per_step=600"]
    chain = rehearse.rehearsal("tiny", overrides, 0, steps=3)
    assert [s.name for s in chain.stages] == [s.name for s in tiny.build().stages]
    chain.run(tmp_path, only="s2")
    stage = next(stage for stage in chain.stages if stage.name == "s2")
    seen = rehearse.measured(tmp_path, stage)
    assert len(seen["steps"]) == 3 and seen["seconds"] > sum(row["seconds"] for row in seen["steps"]) > 0
    assert 500 <= seen["parts"]["tokens"] <= 900


def test_what_is_shown() -> None:
    parts = {name: 1e8 for name in ("weights", "gradients", "optimizer", "activations", "logits")}
    parts |= {"activations_recomputed": 2e7}
    known = Estimate("s1", "One", 1.5e6, 2e15, 7200.0, 6e8, 0.41, 3e8, parts)
    console = Console(width=140, record=True)
    console.print(plan_cli.table([known, Estimate("rl", "RL", note="samples at most 5 tokens"), known], price=3.0))
    text = console.export_text()
    assert "1,500,000" in text and "41%" in text and "0.60 GB" in text and "2h00m" in text and "6.00" in text
    assert "12.00" in text and "without 1 that are not estimated" in text and "samples at most 5 tokens" in text
    lines = plan_cli.explanations([known, Estimate("rl", "RL")])
    assert len(lines) == 1 and "= 0.80 GB by formula; activations would be 20.00 MB with recompute=full" in lines[0]
    assert len(plan_cli.table([known], None).columns) == len(plan_cli.table([known], 0.0).columns) - 1
