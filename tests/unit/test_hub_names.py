"""Every place that opens a model takes a name of the hub; the download itself is in unit/base/test_hub.py."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from twofold import cli
from twofold.base import hub
from twofold.base.records import InputError
from twofold.llm import LLM
from twofold.model.inspect import describe, read_folder
from twofold.recipes import sft
from twofold.recipes.models import find_model
from twofold.serve.config import ServeConfig
from twofold.serve.service import Service
from twofold.serve_cli import serve

TEXTS = ["sum mod 10: E1 B5 user assistant 0123456789 /think /no_think"] * 4
ROW = '{"messages": [{"role": "user", "content": "sum E1"}, {"role": "assistant", "content": "5"}]}\n'


@pytest.fixture(scope="module")
def folder(save_tiny_model: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model where the hub's cache keeps it."""
    return save_tiny_model(tmp_path_factory.mktemp("hub") / "models--Qwen--Tiny-0.1B" / "snapshots" / ("a" * 40))


@pytest.fixture
def asked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """What was asked of the hub, as (name, whether with weights); it has one model."""
    names: list[tuple[str, bool]] = []

    def fetch(name: hub._Name, weights: bool) -> Path:
        names.append((name.given, weights))
        return folder

    monkeypatch.setattr(hub, "_from_hugging_face", fetch)
    return names


def run(*arguments: object) -> str:
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_every_door_takes_a_name(folder: Path, asked: list[tuple[str, bool]], tmp_path: Path) -> None:
    llm = LLM("Qwen/Tiny-0.1B@v1")
    assert llm.path == folder and asked == [("Qwen/Tiny-0.1B@v1", True)]
    assert Service(llm, ServeConfig()).name == "Qwen/Tiny-0.1B", "not the name of the cache's folder"
    assert find_model(Path("Qwen/Tiny-0.1B")) == folder, "chat, serve, inspect, export, quality"
    assert str(folder) in run("inspect", "Qwen/Tiny-0.1B")
    run("export", "Qwen/Tiny-0.1B", tmp_path / "out")
    (tmp_path / "rows.jsonl").write_text(ROW)
    asked.clear()
    assert "sum" in run("data", "view", tmp_path / "rows.jsonl", "--model", "Qwen/Tiny-0.1B")
    assert asked == [("Qwen/Tiny-0.1B", False)], "no weights to look at data"
    chain = sft.build(["init=Qwen/Tiny-0.1B@v1", f"data={tmp_path / 'rows.jsonl'}"])
    assert {stage.config.init for stage in chain.stages if isinstance(stage.config, sft.Origin)} == {str(folder)}
    assert asked[-1] == ("Qwen/Tiny-0.1B@v1", True)


@pytest.fixture
def bare(folder: Path, tmp_path: Path) -> Path:
    """The model without its tokenizer."""
    shutil.copytree(folder, tmp_path / "bare")
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (tmp_path / "bare" / name).unlink()
    return tmp_path / "bare"


def test_a_folder_without_a_tokenizer_scores_and_generates_from_tokens(
    folder: Path, bare: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole, llm = LLM(folder), LLM(bare)
    assert "no tokenizer files" in caplog.text and not llm.has_tokenizer and whole.has_tokenizer
    assert llm.engine.eos_ids == whole.engine.eos_ids, "generation_config.json names them"
    assert llm.score([[5, 6, 7]])[0].equal(whole.score([[5, 6, 7]])[0])
    made = [one.generate([[5, 6, 7]], one.params({"max_tokens": 8, "temperature": 0.0})) for one in (llm, whole)]
    assert made[0][0].token_ids == made[1][0].token_ids
    for use in (
        lambda: llm.generate(["sum"]),
        lambda: llm.chat([{"role": "user", "content": "sum"}]),
        lambda: llm.text(made[0][0]),
        lambda: llm.embed(["sum"]),
        lambda: llm.generate([[5]], llm.params({"stop": ("x",)})),
    ):
        with pytest.raises(InputError, match="copy the tokenizer files of this model into the folder"):
            use()
    rows = dict(describe(read_folder(bare)))
    assert rows["loads"] == "yes" and "takes and gives token ids alone" in rows["warning"]
    with pytest.raises(InputError, match="no tokenizer files, and a server speaks text"):
        serve(bare)
    failed = CliRunner().invoke(cli.app, ["export", str(bare), str(tmp_path / "out")])
    assert failed.exit_code == 1 and "no tokenizer files" in failed.output and not (tmp_path / "out").exists()
    (bare / "generation_config.json").unlink()
    assert LLM(bare).generate([[5]], llm.params({"max_tokens": 2}))[0].finish_reason in ("length", "stop")


def test_a_damaged_tokenizer_is_no_missing_one(bare: Path) -> None:
    (bare / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match=r"not a readable tokenizer\.json"):
        LLM(bare)
