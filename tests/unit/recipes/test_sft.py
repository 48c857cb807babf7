"""Fine-tuning from the command line: full and adapter, masks, what is left out, resuming, errors."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from twofold import cli
from twofold.base.files import read_json, read_jsonl
from twofold.base.records import Message
from twofold.llm import LLM
from twofold.model.config import ModelConfig
from twofold.model.lora import activate
from twofold.model.peft_io import load_adapter
from twofold.model.qwen3 import Qwen3
from twofold.post.sft import StoredExamples
from twofold.recipes.pretrain import save_model
from twofold.recipes.sft import RowsConfig, prepare_rows
from twofold.text.chat import Renderer
from twofold.text.tokenizer import Tokenizer
from twofold.train.loop import FitConfig, Trainer

TEXTS = ["which letter comes after a b c d e f g h user assistant 0123456789"] * 4
LETTERS = "abcdefgh"


@pytest.fixture(scope="module")
def init(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = Tokenizer.train(TEXTS, 330)
    model = Qwen3(
        ModelConfig(
            vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, head_dim=16, rms_norm_eps=1e-6, rope_theta=1e4,
            max_position_embeddings=256, tie_word_embeddings=True, initializer_range=0.1,
        )
    )  # fmt: skip
    model.init_weights(2)
    folder = tmp_path_factory.mktemp("init") / "model"
    save_model(model, tokenizer, folder)
    return folder


def row(letter: int, number: int) -> dict[str, object]:
    after = LETTERS[(letter + 1) % len(LETTERS)]
    return {
        "messages": [
            {"role": "user", "content": f"which letter comes after {LETTERS[letter]} {number}"},
            {"role": "assistant", "content": after, "reasoning_content": f"a b c d {after}"},
        ]
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [row(letter, number) for letter in range(len(LETTERS)) for number in range(12)]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in [*rows, rows[0]]), encoding="utf-8")
    return path


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(cli.app, ["run", "sft", *(str(argument) for argument in arguments)])
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


def settings(init: Path, data: Path, **more: object) -> list[str]:
    values = {"init": init, "data": data, "rows.held_out": 0.2, "train.batch_size": 8, "train.sample_tokens": 8, **more}
    return [part for key, value in values.items() for part in ("--set", f"{key}={value}")]


def test_all_weights(init: Path, data: Path, tmp_path: Path) -> None:
    more = {"train.epochs": 6, "train.learning_rate": 0.01, "train.save_type": "f32"}
    shown = run(*settings(init, data, **more), "--out", tmp_path / "run")
    assert "3 of 3 stages ran" in shown and "Fine-tuning helps" in shown and "twofold chat" in shown
    sft = read_json(tmp_path / "run" / "sft" / "result.json")
    assert sft["after"]["loss"] < 0.5 * sft["before"]["loss"] and sft["after"]["accuracy"] > sft["before"]["accuracy"]
    claim = read_json(tmp_path / "run" / "report.json")["claims"][0]
    assert claim["holds"] and claim["low"] > 0
    assert "with thinking" in (tmp_path / "run" / "report.md").read_text()  # one mode only: said loudly
    assert "nothing to do" in run(*settings(init, data, **more), "--out", tmp_path / "run")
    # the folder is a whole model that can chat; masks and views are the renderer's
    assert LLM(tmp_path / "run" / "sft").chat([Message("user", "which letter comes after a 3")], max_tokens=4).token_ids
    stored = StoredExamples(tmp_path / "run" / "rows" / "train.safetensors")
    rendered = [
        view
        for line in data.read_text().splitlines()[:-1]
        for view in Renderer.from_pretrained(init).views(json.loads(line)["messages"])
    ]
    assert {(*e.token_ids, *e.weights) for e in stored} < {(*v.token_ids, *v.weights) for v in rendered}
    assert [r["reason"] for r in read_jsonl(tmp_path / "run" / "rows" / "dropped.jsonl")] == [
        "the same conversation came before"
    ]


def test_an_adapter_is_written_for_peft_and_merged(init: Path, data: Path, tmp_path: Path) -> None:
    more = {"train.method": "lora", "train.epochs": 3, "train.learning_rate": 0.02, "train.save_type": "f32"}
    run(*settings(init, data, **more), "--out", tmp_path)
    merged, based = LLM(tmp_path / "sft"), LLM(init)
    ids = torch.arange(20, 60).tolist()
    before = based.score([ids])[0]
    load_adapter(based.model, "a", tmp_path / "sft" / "adapter")
    torch.testing.assert_close(based.score([ids])[0], merged.score([ids])[0], atol=1e-4, rtol=1e-4)
    activate(based.model, None)
    torch.testing.assert_close(based.score([ids])[0], before)
    result = read_json(tmp_path / "sft" / "result.json")
    assert result["after"]["loss"] < result["before"]["loss"]
    assert result["trained_parameters"] < sum(p.numel() for p in merged.model.parameters())


def test_a_quantised_base_under_an_adapter(init: Path, data: Path, tmp_path: Path) -> None:
    more = {"train.method": "lora", "train.base_bits": 8, "train.epochs": 1, "train.learning_rate": 0.02}
    run(*settings(init, data, **more), "--out", tmp_path)
    result = read_json(tmp_path / "sft" / "result.json")
    assert result["after"]["loss"] < result["before"]["loss"]


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["full", "lora"])
def test_on_a_gpu_in_bf16(method: str, init: Path, data: Path, tmp_path: Path) -> None:
    more = {"train.device": "cuda", "train.precision": "bf16", "train.method": method, "train.epochs": 6}
    run(*settings(init, data, **more, **{"train.learning_rate": 0.01}), "--out", tmp_path)
    result = read_json(tmp_path / "sft" / "result.json")
    assert result["after"]["loss"] < 0.7 * result["before"]["loss"]


def test_precision_reaches_the_loop(init: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[FitConfig | None] = []
    fit = Trainer.fit

    def watched(trainer: Trainer, config: FitConfig | None = None, **more: object) -> None:
        seen.append(config)
        fit(trainer, config, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(Trainer, "fit", watched)
    more = {"train.precision": "bf16", "train.epochs": 2, "train.learning_rate": 0.01, "train.sample_tokens": 1}
    run(*settings(init, data, **more), "--out", tmp_path)
    assert seen == [FitConfig(precision="bf16")]
    result = read_json(tmp_path / "sft" / "result.json")
    assert result["after"]["loss"] < result["before"]["loss"]


def test_bad_rows_stop_the_run_or_are_counted(init: Path, data: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    long = row(0, 0) | {"messages": [{"role": "user", "content": "a b " * 60}, {"role": "assistant", "content": "b"}]}
    lines = data.read_text().splitlines()[:40]
    path.write_text("\n".join([*lines[:3], "{broken", *lines[3:], json.dumps(long), '{"messages": []}']))
    shown = run(*settings(init, path), "--out", tmp_path / "a", code=1)
    assert "bad.jsonl:4" in shown and "rows.broken=skip" in shown
    more = {"rows.broken": "skip", "rows.max_length": 100, "train.epochs": 0.5}
    run(*settings(init, path, **more), "--out", tmp_path / "a")
    dropped = read_jsonl(tmp_path / "a" / "rows" / "dropped.jsonl")
    assert [(d["place"], d["reason"]) for d in dropped] == [
        (":4", "cannot be read"),
        (":42", "longer than 100 tokens"),
        (":43", "cannot be read"),
    ]
    shown = run(*settings(init, path, **more, **{"rows.too_long": "error"}), "--out", tmp_path / "b", code=1)
    assert "bad.jsonl:42" in shown and "rows.too_long=skip" in shown


def test_columns_that_nothing_reads_stop_the_run_or_are_counted(init: Path, data: Path, tmp_path: Path) -> None:
    path = tmp_path / "columns.jsonl.gz"
    rows = [json.loads(line) | {"id": 7, "response": "z"} for line in data.read_text().splitlines()[:8]]
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    shown = run(*settings(init, path), "--out", tmp_path / "a", code=1)
    assert "columns.jsonl.gz:1" in shown and "'response'" in shown and "rows.ignore=" in shown
    config = RowsConfig(init=str(init), data=str(path), ignore=("response",))
    (tmp_path / "b").mkdir()
    prepare_rows(SimpleNamespace(config=config, inputs={}, out=tmp_path / "b"))  # type: ignore[arg-type]
    assert read_json(tmp_path / "b" / "result.json")["ignored_columns"] == {"id": 8}


CALL = {"type": "function", "function": {"name": "calculator", "arguments": '{"expression": "2+2"}'}}
TOOLS = [{"type": "function", "function": {"name": "calculator", "parameters": {"type": "object", "properties": {}}}}]
KINDS: dict[str, dict[str, object]] = {
    "thinking": row(0, 0),
    "not thinking": {"messages": [{"role": "user", "content": "b"}, {"role": "assistant", "content": "c d"}]},
    "system": {"messages": [{"role": "system", "content": "a b"}, *row(1, 1)["messages"]]},  # type: ignore[misc]
    "several turns": {
        "messages": [
            *row(2, 2)["messages"],
            {"role": "user", "content": "which"},
            {"role": "assistant", "content": "e"},
        ]  # type: ignore[misc]
    },
    "tools": {
        "messages": [
            {"role": "user", "content": "2+2"},
            {"role": "assistant", "content": "a", "reasoning_content": "call it", "tool_calls": [CALL]},
            {"role": "tool", "content": "4"},
            {"role": "assistant", "content": "<|im_end|> 4"},
        ],
        "tools": TOOLS,
    },
}


@pytest.mark.parametrize("empty", [False, True])
def test_what_is_trained_is_what_the_renderer_says(empty: bool, init: Path, tmp_path: Path) -> None:
    path = tmp_path / "kinds.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in KINDS.values()))
    more = {"rows.held_out": 0.0, "rows.train_empty_think": empty}
    run(*settings(init, path, **more), "--only", "rows", "--out", tmp_path / "run")
    stored = list(StoredExamples(tmp_path / "run" / "rows" / "train.safetensors"))
    renderer = Renderer.from_pretrained(init)
    views = [
        view
        for entry in KINDS.values()
        for view in renderer.views(entry["messages"], entry.get("tools"), empty_think_trained=empty)  # type: ignore[arg-type]
    ]
    assert [(e.token_ids, e.weights) for e in stored] == [(v.token_ids, v.weights) for v in views] and len(views) == 7
    # said once more without the renderer's weights: the model's own words, its tags and one end of turn
    block = "<think>\n\n</think>\n\n" if empty else ""
    trained = [
        renderer.tokenizer.decode([token for token, weight in zip(*e, strict=True) if weight > 0]) for e in stored
    ]
    assert trained == [
        "<think>\na b c d b\n</think>\n\nb<|im_end|>",
        block + "c d<|im_end|>",
        "<think>\na b c d c\n</think>\n\nc<|im_end|>",
        "<think>\na b c d d\n</think>\n\nd<|im_end|>",
        block + "e<|im_end|>",
        '<think>\ncall it\n</think>\n\na\n<tool_call>\n{"name": "calculator", "arguments": {"expression": "2+2"}}\n'
        "</tool_call><|im_end|>",
        block + "<|im_end|> 4<|im_end|>",
    ]
    # what the spelling of a control token in content became is no control token
    assert [e.token_ids.count(renderer.tokenizer.im_end) for e in stored][-1] == 5


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "the checkpoint is missing; give a model folder"),
        ({"init": "nowhere"}, "nowhere is no checkpoint"),
        ({"init": "INIT"}, "the data file is missing"),
        ({"init": "INIT", "data": "none.jsonl"}, "none.jsonl is no file; give conversations"),
        ({"init": "INIT", "data": "DATA", "family": "klingon"}, "family 'klingon' is not known; there are hybrid"),
        ({"init": "INIT", "data": "INIT"}, "is a folder; give conversations"),
        ({"init": "INIT", "data": "DATA", "train.base_bits": 8}, "needs train.method=lora"),
        ({"init": "INIT", "data": "DATA", "train.epoch": 3}, "did you mean 'epochs'"),
        ({"init": "INIT", "data": "DATA", "train.batch_size": 0}, "train.batch_size: Input should be greater than or"),
        ({"init": "INIT", "data": "DATA", "train.epochs": 0}, "train.epochs: Input should be greater than 0"),
        ({"init": "INIT", "data": "DATA", "rows.held_out": 1}, "rows.held_out: Input should be less than 1"),
        (
            {"init": "INIT", "data": "DATA", "train.device": "gpu"},
            "train.device: device 'gpu' is not on this machine; torch finds cpu",
        ),
        ({"init": "INIT", "data": "DATA", "train.method": "rows"}, "name them: --set new_tokens="),
        ({"init": "INIT", "data": "DATA", "train.new_tokens": '["<a>"]'}, "follows from the top of the recipe"),
    ],
)
def test_wrong_settings_are_one_line(given: dict[str, object], words: str, init: Path, data: Path) -> None:
    places = {"INIT": init, "DATA": data}
    values = [part for key, v in given.items() for part in ("--set", f"{key}={places.get(str(v), v)}")]
    assert words in run(*values, "--dry-run", code=2)


def test_a_checkpoint_without_a_template_is_given_a_family(init: Path, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(init, folder)
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_policy.json").unlink()
    more = {"train.epochs": 0.2, "train.sample_tokens": 1, "train.save_type": "f32"}
    shown = run(*settings(folder, data, **more), "--out", tmp_path / "run", code=1)
    assert "has no chat template; choose a family: --family NAME, in Python" in shown
    run(*settings(folder, data, **more), "--family", "thinking", "--out", tmp_path / "run")
    ours = LLM(tmp_path / "run" / "sft")
    assert ours.renderer.policy.family == "thinking"
    stored = StoredExamples(tmp_path / "run" / "rows" / "train.safetensors")[0]
    first = next(place for place, weight in enumerate(stored.weights) if weight)
    assert ours.tokenizer.decode(stored.token_ids[:first]).endswith("<|im_start|>assistant\n<think>\n")


def test_a_tokenizer_of_another_model_is_refused(init: Path, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(init, folder)
    larger = Tokenizer.train([text + " the quick brown fox jumps over lazy dogs" for text in TEXTS], 400)
    larger.save(folder, (folder / "chat_template.jinja").read_text())
    shown = run(*settings(folder, data), "--out", tmp_path / "run", code=1)
    assert f"the tokenizer has {larger.vocab_size} tokens and the embedding 317 rows; they are not a pair" in shown


def test_a_changed_file_is_read_again(init: Path, data: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(data.read_text())
    more = {"train.epochs": 0.2, "train.sample_tokens": 1}
    run(*settings(init, path, **more), "--out", tmp_path / "run")
    path.write_text("\n".join(data.read_text().splitlines()[:50]))
    assert "3 of 3 stages ran" in run(*settings(init, path, **more), "--out", tmp_path / "run")
