"""A whole scaling run in small: sweeps, laws, prediction, check, report; resuming; workers; errors."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from twofold import cli
from twofold.base.files import read_json, read_jsonl, write_json
from twofold.base.progress import SilentProgress
from twofold.data.shards import write_shard
from twofold.recipes import scaling, scaling_runs
from twofold.recipes.artefacts import read_manifest
from twofold.recipes.scaling import Runner, build
from twofold.recipes.scaling_fit import Grid, best_setting, losses_of
from twofold.recipes.scaling_report import batch_claim, rate_claim
from twofold.recipes.scaling_runs import ProxyConfig, Setting, train_all, train_proxy, worker_pool
from twofold.text.chat import CHAT_TEMPLATE
from twofold.text.tokenizer import Tokenizer

PROXY = ProxyConfig(layers=1, context=32, eval_windows=4)
SETTING = Setting(width=16, tokens=2048, rate=0.02, batch=128, seed=0)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    texts = [f"line {number} of some text that says line {number} again and again\n" * 8 for number in range(60)]
    tokenizer = Tokenizer.train(texts, 330)
    tokenizer.save(folder / "tokenizer", CHAT_TEMPLATE)
    for name, part in (("text", texts[:50]), ("held_out", texts[50:])):
        write_shard(folder / name, tokenizer.encode_batch(part), {}, vocab_size=tokenizer.vocab_size)
    return folder


def test_a_run_learns_and_is_kept(data: Path, tmp_path: Path) -> None:
    row = train_proxy(SETTING, PROXY, data, tmp_path)
    assert row["loss"] < train_proxy(SETTING._replace(rate=1e-9), PROXY, data, tmp_path)["loss"]
    assert row["steps"] == 16 and row["flops"] > 0 and row["parameters"] == 2744
    path = tmp_path / "rows" / f"{SETTING.name}.json"
    write_json(path, row | {"loss": 0.5})
    assert train_proxy(SETTING, PROXY, data, tmp_path)["loss"] == 0.5, "a finished run is not trained again"
    assert not (tmp_path / SETTING.name).exists(), "its states are gone"


def test_workers_change_no_number(data: Path, tmp_path: Path) -> None:
    settings = [SETTING._replace(rate=rate) for rate in (0.01, 0.02, 0.04)]
    threads, told = torch.get_num_threads(), []
    rows = []
    for workers in (1, 2):
        with worker_pool(workers) as pool:
            rows.append(train_all(settings, PROXY, data, tmp_path / str(workers), pool, told.append))
    assert rows[0] == rows[1] and [row["rate"] for row in rows[0]] == [0.01, 0.02, 0.04]
    assert len(told) == 6 and torch.get_num_threads() == threads


def test_an_interrupted_run_goes_on_bit_for_bit(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train_proxy(SETTING, PROXY, data, tmp_path / "a")
    source = scaling_runs.PackedSource
    drawn = []

    class Killed(source):  # type: ignore[misc, valid-type]
        def next_step(self) -> list[Any]:
            drawn.append(1)
            if len(drawn) == 9:
                raise KeyboardInterrupt
            return super().next_step()

    monkeypatch.setattr("twofold.train.loop.CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(scaling_runs, "PackedSource", Killed)
    with pytest.raises(KeyboardInterrupt):
        train_proxy(SETTING, PROXY, data, tmp_path / "b")
    assert train_proxy(SETTING, PROXY, data, tmp_path / "b") == whole
    assert len(drawn) == 9 + 16 - 8, "eight steps were done and the ninth broke; eight were left"


def test_a_run_that_breaks_is_a_row_without_a_loss(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: Any, seed: int) -> None:
        model.model.embed_tokens.weight.data.fill_(float("nan"))

    monkeypatch.setattr(scaling_runs.Qwen3, "init_weights", broken)
    with pytest.warns(RuntimeWarning, match="not finite"):
        row = train_proxy(SETTING, PROXY, data, tmp_path)
    assert row["loss"] is None and "not finite" in row["error"]
    assert losses_of([row]) == {(0.02, 128): float("inf")}


def runner(data: Path, tmp_path: Path, tokens: int = 2048) -> Runner:
    config = SimpleNamespace(proxy=PROXY, tolerance=1.0)
    context = SimpleNamespace(config=config, seed=0, inputs={"text": data}, work=tmp_path, progress=SilentProgress())
    return Runner(context, tokens, None)  # type: ignore[arg-type]


def test_text_is_never_seen_twice(data: Path, tmp_path: Path) -> None:
    with pytest.raises(scaling.InputError, match="lower tokens"):
        runner(data, tmp_path, tokens=10**7)


def test_a_sweep_trains_until_it_encloses(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = []

    def pretend(settings: Sequence[Setting], *_: Any) -> list[dict[str, Any]]:
        rounds.append(len(settings))
        bowl = [abs(s.rate - 0.16) * 5 + max(0, s.batch - 256) / 1000 + 2 for s in settings]
        return [{**s._asdict(), "loss": loss} for s, loss in zip(settings, bowl, strict=True)]

    monkeypatch.setattr(scaling, "train_all", pretend)
    found = runner(data, tmp_path)
    rates, batches = tuple(0.01 * 2**k for k in range(6)), (128, 256, 512, 1024)
    found.enclose(16, (1024, 2048), Grid(rates, batches, (0.02, 256)))
    for tokens in (1024, 2048):
        assert best_setting(found.cell(16, tokens), 0.01).inside
    assert len(rounds) > 1 and sum(rounds) == len(found.rows) < 2 * len(rates) * len(batches)


FIT: dict[str, Any] = {"noise": 0.001}
CHECK: dict[str, Any] = {
    "prediction": {"width": 16, "tokens": 9, "rate": 0.02, "batch": 512},
    "rate": {"value": 0.03, "edge": ""},
    "optimum": {"batch_edge": ""},
    "batch": {"value": 600.0, "low": 450.0, "high": 900.0},
    "settings": {"predicted": {"rate": 0.02, "batch": 512}, "best": {"rate": 0.04, "batch": 512}},
    "losses": {"predicted": [2.01, 2.01], "best": [2.0, 2.0]},
    "sweep": [{"rate": rate, "batch": 512, "loss": loss} for rate, loss in ((0.01, 2.1), (0.02, 2.01), (0.04, 2.0))],
}


def test_the_rate_is_judged_on_the_upper_end() -> None:
    claim = rate_claim(FIT, CHECK, 1.0)
    assert claim.judged and claim.holds and claim.value == pytest.approx(0.5)
    assert claim.high == pytest.approx(0.5 + 0.196) and claim.low == pytest.approx(0.5 - 0.196)
    assert "5.00" in claim.note and "at half" in claim.note  # what a wrong rate costs
    assert not rate_claim(FIT, CHECK, 0.6).holds
    assert not rate_claim({"noise": 0.01}, CHECK, 1.0).holds, "noise as large as the limit shows nothing"


def test_the_batch_is_judged_on_the_interval_s_ends() -> None:
    claim = batch_claim(CHECK, 1.0)
    assert claim.holds and claim.value == pytest.approx(600 / 512) and claim.low == 1.0
    assert claim.high == pytest.approx(900 / 512)
    assert not batch_claim(CHECK | {"batch": {"value": 600.0, "low": 200.0, "high": 900.0}}, 1.0).holds
    far = batch_claim(CHECK | {"batch": {"value": 2048.0, "low": 1536.0, "high": 2560.0}}, 1.0)
    assert not far.holds and far.low == pytest.approx(3.0)


def test_a_held_out_sweep_that_encloses_nothing_judges_nothing() -> None:
    open_ = rate_claim(FIT, CHECK | {"rate": {"value": 0.08, "edge": "high"}}, 1.0)
    assert not open_.judged and "does not enclose its best rate" in open_.note
    assert not rate_claim(FIT, CHECK | {"losses": {"predicted": [2.0, None], "best": [2.0, 2.0]}}, 1.0).judged
    assert not batch_claim(CHECK | {"optimum": {"batch_edge": "low"}}, 1.0).judged


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("widths=[48]", "widths needs 2 or more rising values"),
        ("widths=[48,44]", "widths needs 2 or more rising values"),
        ("widths=[44,48]", "a width must be a multiple of 8, got 44"),
        ("next_width=56", "predict a size that is not swept"),
        ("batches=[32,64,128]", "batches must be proxy.context=64 tokens or more"),
        ("tokens=[10000,20000]", "fewer than 8 steps"),
        ("tolerance=0", "tolerance is in percent"),
        ("noise_seeds=1", "noise_seeds must be 2 or more"),
        ("rate=3", "did you mean 'rates'"),
    ],
)
def test_wrong_settings_are_one_line(given: str, words: str) -> None:
    shown = CliRunner().invoke(cli.app, ["run", "scaling", "--dry-run", "--set", given])
    assert shown.exit_code == 2 and words in " ".join(shown.output.split())


def test_one_more_width_leaves_the_other_sweeps_alone() -> None:
    few, more = (build([f"widths={widths}", "workers=3"]).stages for widths in ("[16,24]", "[16,24,32]"))
    configs = [{stage.name: stage.config.digest() for stage in stages} for stages in (few, more)]
    assert configs[0]["sweep_16"] == configs[1]["sweep_16"] and "sweep_32" in configs[1]
    other = {stage.name: stage.config.digest() for stage in build(["widths=[16,24]", "workers=1"]).stages}
    assert all(other[name] == digest for name, digest in configs[0].items() if name != "report")


SMALL = {
    "widths": [16, 24], "tokens": [4096, 8192, 16384], "next_width": 32, "next_tokens": 24000,
    "batches": [32, 64, 128, 256, 512], "rates": [0.0025 * 2**k for k in range(9)],
    "noise_seeds": 2, "check_seeds": 2, "draws": 20, "workers": 1, "text.vocab_size": 300, "text.tokenizer_chars": 300,
    "proxy.layers": 1, "proxy.context": 32, "proxy.eval_windows": 4,
}  # fmt: skip


def lawful(settings: Sequence[Setting], *_: Any) -> list[dict[str, Any]]:
    """Rows as training would give them if laws held exactly, but for the seed: stands in for ``train_all``."""
    rows = []
    for setting in settings:
        parameters = scaling_runs.body_parameters(PROXY.model(setting.width, 300))
        rate = 0.02 * (parameters / 4000) ** -0.3 * (setting.tokens / 8192) ** -0.1 * (setting.batch / 128) ** 0.5
        excess = 0.02 * math.log(setting.rate / rate) ** 2 + 0.01 * (setting.batch / 128 / root(setting.tokens)) ** 1.5
        loss = (1.5 + 40 / parameters**0.5 + 90 / setting.tokens**0.5) * (1 + excess) * (1 + 0.1 * setting.seed)
        rows.append({**setting._asdict(), "parameters": parameters, "loss": loss, "steps": 1, "flops": 1.0})
    return rows


def root(tokens: int) -> float:
    return math.sqrt(tokens / 8192)


def run(folder: Path, *more: str) -> str:
    settings = [part for key, value in SMALL.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    shown = CliRunner().invoke(cli.app, ["run", "scaling", *settings, *more, "--out", str(folder)])
    assert shown.exit_code == 0, shown.output
    return " ".join(shown.output.split())


def test_a_whole_run_finds_the_laws_behind_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "train_all", lawful)
    few = scaling.corpus.python_stdlib_documents()[:60]
    monkeypatch.setattr(scaling.corpus, "python_stdlib_documents", lambda: few)
    shown = run(tmp_path)
    assert "6 of 6 stages ran" in shown and "2 of 2 claims hold" in shown and "Predicted batch" in shown
    fit, check, report = (
        read_json(tmp_path / name) for name in ("fit/result.json", "check/result.json", "report.json")
    )
    assert fit["laws"]["rate"]["exponents"]["parameters"]["value"] == pytest.approx(-0.3, abs=0.01)
    assert fit["laws"]["rate"]["exponents"]["batch"]["value"] == pytest.approx(0.5, abs=0.01)
    assert fit["laws"]["batch"]["exponents"]["tokens"]["value"] == pytest.approx(0.5, abs=0.15)
    told = fit["prediction"]
    for name in ("rate", "batch", "loss"):
        assert told[name]["low"] <= told[name]["value"] <= told[name]["high"]
    assert check["prediction"]["rate"] == told["rate"]["value"]
    assert check["rate"]["value"] == pytest.approx(told["rate"]["value"], rel=0.01)
    assert set(check["losses"]) == {"predicted", "best", "least", "carried"}
    assert len(read_jsonl(tmp_path / "check" / "runs.jsonl")) == check["runs"] >= 9
    titles = [plot["title"] for section in report["sections"] for plot in section["plots"]]
    assert "Loss against learning rate" in titles and "Best learning rate against parameters" in titles
    assert "**" not in report["intro"], "no best setting lies at an edge"
    assert "nothing to do" in run(tmp_path)


def test_optima_at_an_edge_are_said_loudly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "train_all", lawful)
    few = scaling.corpus.python_stdlib_documents()[:60]
    monkeypatch.setattr(scaling.corpus, "python_stdlib_documents", lambda: few)
    run(tmp_path, "--set", "batches=[32,64,128,256]", "--set", "tokens=[4096,8192,32768]", "--set", "next_tokens=9000")
    report = read_json(tmp_path / "report.json")
    assert "2 of 6 best settings lie at the edge" in report["intro"]
    table = next(t for section in report["sections"] for t in section["tables"] if t["title"] == "Best settings")
    assert sum(row[-1] == "batch at its high edge" for row in table["rows"]) == 2


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds child processes by /proc")
def test_a_killed_run_leaves_no_workers_and_loses_no_finished_run(tmp_path: Path) -> None:
    settings = SMALL | {"workers": 2, "tokens": [4096, 32768]}
    arguments = [part for key, value in settings.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    command = ["run", "scaling", *arguments, "--only", "sweep_24", "--out"]
    process = subprocess.Popen([sys.executable, "-m", "twofold.cli", *command, str(tmp_path / "a")])
    deadline = time.monotonic() + 240
    while len(list((tmp_path / "a" / ".work").glob("*/work/rows/*.json"))) < 3:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) >= 2
    process.kill()
    process.wait()
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline, "the workers outlive the run"
        time.sleep(0.05)
    for folder in ("a", "b"):
        shown = CliRunner().invoke(cli.app, [*command, str(tmp_path / folder)])
        assert shown.exit_code == 0, shown.output
    contents = [read_manifest(tmp_path / folder / "sweep_24") for folder in ("a", "b")]
    assert contents[0] and contents[1] and contents[0].content == contents[1].content
    assert contents[0].cost.attempts == 2
