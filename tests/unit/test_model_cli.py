"""twofold inspect, export and data view, from the command line to the files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from twofold import cli
from twofold.base.records import InputError
from twofold.llm import LLM
from twofold.model.gguf_config import describe_gguf
from twofold.model.lora import LoraConfig, attach
from twofold.model.peft_io import save_adapter
from twofold.model.qwen3 import Qwen3
from twofold.model.vocab import add_tokens, train_new_rows
from twofold.model.weights import save_weights, to_hf
from twofold.recipes.models import find_model
from twofold.text.chat import Renderer
from twofold.text.policy import ChatPolicy

TEXTS = ["sum mod 10: E1 B5 user assistant 0123456789 /think /no_think"] * 4


@pytest.fixture(scope="module")
def folder(save_tiny_model: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("runs") / "fusion")


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.output


def copied(folder: Path, to: Path, *without: str) -> Path:
    shutil.copytree(folder, to)
    for name in without:
        (to / name).unlink()
    return to


def test_inspect_says_what_a_checkpoint_is(folder: Path) -> None:
    for place in (folder, folder.parent):  # a run folder stands for its last model
        shown = run("inspect", place, "--context", 100, "--batch", 2)
        assert "qwen3, dense" in shown and "F32" in shown and "2 x 100 tokens" in shown
        assert "thinking on and off" in shown


def test_inspect_reads_headers_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twofold.model.sources.FolderSource.read_into", lambda *_: 1 / 0)
    assert "qwen3" in run("inspect", folder)


@pytest.mark.parametrize(("name", "kind"), [("hf", "f32"), ("hf16", "bf16"), ("small.gguf", "f16")])
def test_export_writes_a_model_that_loads(folder: Path, tmp_path: Path, name: str, kind: str) -> None:
    if name.endswith(".gguf"):
        pytest.importorskip("gguf")
    out = tmp_path / name
    assert "MB" in run("export", folder, out, "--type", kind)
    ours, theirs = LLM(folder), LLM(out)
    weight = ours.model.model.layers[0].self_attn.qkv_proj.weight
    rounded = weight.to({"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}[kind]).float()
    assert torch.equal(theirs.model.model.layers[0].self_attn.qkv_proj.weight, rounded)
    ask = [{"role": "user", "content": "sum mod 10: E1"}]
    assert theirs.renderer.prompt_ids(ask) == ours.renderer.prompt_ids(ask)


def test_export_says_what_the_model_can_do_unless_it_changes(folder: Path, tmp_path: Path) -> None:
    told = copied(folder, tmp_path / "told")
    (told / "about.json").write_text('{"can": ["sums"], "cannot": "talk"}')
    run("export", told, tmp_path / "same", "--type", "f32")
    assert (tmp_path / "same" / "about.json").read_text() == (told / "about.json").read_text()


def test_export_merges_an_adapter(folder: Path, tmp_path: Path) -> None:
    (folder / "about.json").write_text('{"can": ["sums"], "cannot": "talk"}')
    llm = LLM(folder)
    attach(llm.model, "new", LoraConfig(r=2, alpha=4, targets=("q_proj", "down_proj")))
    with torch.no_grad():
        for name, parameter in llm.model.named_parameters():
            if ".adapters." in name:
                parameter.normal_(0, 0.1)
    save_adapter(llm.model, "new", tmp_path / "adapter")
    want = llm.score([[5, 6, 7, 8]])[0]
    run("export", folder, tmp_path / "merged", "--type", "f32", "--adapter", tmp_path / "adapter")
    assert not (tmp_path / "merged" / "about.json").exists()  # it is about the model without the adapter
    (folder / "about.json").unlink()
    torch.testing.assert_close(LLM(tmp_path / "merged").score([[5, 6, 7, 8]])[0], want, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def words(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with rows for two new tokens, its tokenizer beside it, and the base with room for them."""
    base = copied(folder, tmp_path_factory.mktemp("words") / "base")
    llm = LLM(base)
    size = llm.tokenizer.vocab_size
    add_tokens(llm.model, size, 2)
    save_weights(llm.model, base)
    train_new_rows(llm.model, size, 2)
    attach(llm.model, "new", LoraConfig(r=2, targets=("q_proj",)))
    save_adapter(llm.model, "new", base.parent / "adapter")
    Renderer(llm.tokenizer.add_words(["<ask>", "<say>"]), ChatPolicy(family="thinking")).save(base.parent / "adapter")
    return base.parent


@pytest.mark.parametrize("name", ["out", "out.gguf"])
def test_an_adapter_brings_its_tokens_and_template(words: Path, tmp_path: Path, name: str) -> None:
    if name.endswith(".gguf"):
        pytest.importorskip("gguf")
    run("export", words / "base", tmp_path / name, "--type", "f32", "--adapter", words / "adapter")
    llm = LLM(tmp_path / name)
    assert llm.tokenizer.vocab_size == LLM(words / "base").tokenizer.vocab_size + 2
    assert len(llm.tokenizer.encode_with_special("<ask>")) == 1 and llm.renderer.policy.family == "thinking"


def test_an_adapter_brings_a_template_of_no_family(words: Path, tmp_path: Path) -> None:
    adapter = copied(words / "adapter", tmp_path / "adapter", "chat_policy.json")
    (adapter / "chat_template.jinja").write_text("{{ messages[0].content }}")
    run("export", words / "base", tmp_path / "out", "--type", "f32", "--adapter", adapter)
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages[0].content }}"
    assert not LLM(tmp_path / "out").has_renderer


NEARLY = ChatPolicy().template.replace("# Tools", "# Instruments")


def test_export_keeps_a_template_that_is_nearly_a_family(folder: Path, tmp_path: Path) -> None:
    """Ours would render it otherwise, and what else reads the folder follows the file."""
    near = copied(folder, tmp_path / "near", "chat_policy.json")
    (near / "chat_template.jinja").write_text(NEARLY, encoding="utf-8")
    with pytest.warns(UserWarning, match="renders otherwise: a tool"):
        run("export", near, tmp_path / "out", "--type", "f32")
    assert (tmp_path / "out" / "chat_template.jinja").read_text(encoding="utf-8") == NEARLY
    assert not (tmp_path / "out" / "chat_policy.json").exists()
    run("export", near, tmp_path / "chosen", "--type", "f32", "--family", "coder")
    assert LLM(tmp_path / "chosen").renderer.policy == ChatPolicy(family="coder")


def test_data_view_takes_a_family_by_hand(folder: Path, tmp_path: Path) -> None:
    strange = copied(folder, tmp_path / "strange", "chat_policy.json")
    (strange / "chat_template.jinja").write_text("{{ messages[0].content }}")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}')
    assert "--family NAME" in run("data", "view", rows, "--model", strange, code=1)
    assert "whose turn" in run("data", "view", rows, "--model", strange, "--family", "chatml")


def test_rows_of_tokens_that_no_tokenizer_knows_are_refused(words: Path, tmp_path: Path) -> None:
    bare = copied(words / "adapter", tmp_path / "bare", "tokenizer.json")
    shown = run("export", words / "base", tmp_path / "out", "--type", "f32", "--adapter", bare, code=1)
    assert "has a row for token" in shown and "put the tokenizer" in shown


def test_an_adapter_of_another_base_needs_a_flag(folder: Path, tmp_path: Path) -> None:
    llm = LLM(folder)
    attach(llm.model, "new", LoraConfig(r=2, targets=("q_proj",)))
    save_adapter(llm.model, "new", tmp_path / "adapter")
    sibling, other = copied(folder, tmp_path / "sibling"), LLM(folder)
    with torch.no_grad():
        other.model.model.layers[0].self_attn.qkv_proj.weight.add_(1)
    save_weights(other.model, sibling)
    options = ("--type", "f32", "--adapter", tmp_path / "adapter")
    assert "add --any-base" in run("export", sibling, tmp_path / "out", *options, code=1)
    run("export", sibling, tmp_path / "out", *options, "--any-base")


def test_export_refuses(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("mine")
    assert "exists already" in run("export", folder, tmp_path / "there", code=1)
    assert "use one of f32, f16, bf16; q8_0 and q4_0 need" in run(
        "export", folder, tmp_path / "x", "--type", "q8_0", code=1
    )
    assert "does not exist" in run("export", tmp_path / "nowhere", tmp_path / "x", code=1)


def test_data_view_reads_no_weights(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    file, bare, gguf = tmp_path / "texts.jsonl", tmp_path / "bare", tmp_path / "small.gguf"
    file.write_text('{"text": "sum B5"}\n')
    run("export", folder, gguf, "--type", "f16")
    llm = LLM(folder)
    bare.mkdir()
    llm.renderer.save(bare)
    two_files = copied(bare, tmp_path / "two_files", "tokenizer.json")
    monkeypatch.setattr("twofold.model_cli.LLM", lambda *_: 1 / 0)
    for model in (folder, folder.parent, bare, two_files, gguf):
        assert "sum" in run("data", "view", file, "--model", model)


def test_data_view_on_the_terminal_and_as_a_page(folder: Path, tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "sum"}, {"role": "assistant", "content": "B5"}]}]
    file, page = tmp_path / "chats.jsonl", tmp_path / "chats.html"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "B·5" in run("data", "view", file, "--model", folder)
    run("data", "view", file, "--model", folder, "--html", page)
    assert "<html" in page.read_text() and "assistant" in page.read_text()
    file.write_text("{broken\n")
    assert "error:" in run("data", "view", file, "--model", folder, code=1)


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("template", [None, "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"])
def test_export_keeps_a_template_of_no_family_and_needs_none(
    folder: Path, tmp_path: Path, template: str | None
) -> None:
    pytest.importorskip("gguf")
    bare = copied(folder, tmp_path / "bare-0.6B", "chat_policy.json", "chat_template.jinja")
    if template is not None:
        (bare / "chat_template.jinja").write_text(template)
    run("export", bare, tmp_path / "out", "--type", "f32")
    run("export", bare, tmp_path / "out.gguf", "--type", "f32")
    found = describe_gguf(tmp_path / "out.gguf")
    written = tmp_path / "out" / "chat_template.jinja"
    assert found.chat_template == template == (written.read_text() if written.exists() else None)
    assert found.name == "bare-0.6B"  # not "bare-0"


def test_export_is_whole_or_absent(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise InputError("no")

    monkeypatch.setattr("twofold.recipes.folder.write_generation_config", refuse)
    run("export", folder, tmp_path / "out", code=1)
    assert left(tmp_path) == []


def test_export_to_a_place_that_cannot_be_written(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "taken.gguf").mkdir()
    assert "cannot be written" in run("export", folder, tmp_path / "file" / "x", code=1)
    assert "exists already" in run("export", folder, tmp_path / "taken.gguf", "--type", "f32", code=1)
    assert left(tmp_path) == ["file", "taken.gguf"]


@pytest.mark.parametrize("name", ["x", "x.gguf"])
def test_a_place_that_cannot_be_written_is_found_before_loading(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr("twofold.model_cli.LLM", lambda *_, **__: 1 / 0)
    monkeypatch.setattr("twofold.model_cli.require_package", lambda _: None)
    shown = run("export", folder, tmp_path / "file" / name, "--type", "f32", code=1)
    assert f"{tmp_path}/file is no folder" in shown
    assert "File name too long" in run("export", folder, tmp_path / ("x" * 300 + name), "--type", "f32", code=1)
    monkeypatch.setattr("os.access", lambda _, mode: not mode & os.W_OK)
    assert "may not be written to" in run("export", folder, tmp_path / "sub" / name, "--type", "f32", code=1)


def test_a_full_disk_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")

    def full(*_: object) -> None:  # as numpy says it: without a number
        raise OSError("512 requested and 0 written")

    monkeypatch.setattr("twofold.model_cli.save_gguf", full)
    shown = run("export", folder, tmp_path / "a.gguf", "--type", "f32", code=1)
    assert "cannot be written: 512 requested and 0 written; choose" in shown


def test_export_into_an_empty_folder_that_is_there(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder stays the same one: a shell may stand in it."""
    here, other = tmp_path / "here", tmp_path / "other"
    here.mkdir()
    other.mkdir()
    (tmp_path / "link").symlink_to(other)
    monkeypatch.chdir(here)
    inode = here.stat().st_ino
    run("export", folder, ".", "--type", "f32")
    run("export", folder, tmp_path / "link", "--type", "f32")
    assert here.stat().st_ino == inode and left(here) == left(other) and (tmp_path / "link").is_symlink()
    assert LLM(Path("."))


@pytest.mark.parametrize("kind", ["f32", "bf16", "q8_0"])
def test_a_gguf_file_is_the_same_from_half_the_memory(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A model in bf16 stays so in memory."""
    pytest.importorskip("gguf")
    (tmp_path / "a").mkdir()
    half = copied(folder, tmp_path / "a" / "half")
    save_weights(LLM(folder, dtype="bfloat16").model, half)
    held = []

    def load(path: Path, dtype: torch.dtype, **more: object) -> LLM:
        held.append(dtype)
        return LLM(path, dtype=dtype)

    monkeypatch.setattr("twofold.model_cli.LLM", load)
    run("export", half, tmp_path / "half.gguf", "--type", kind)
    monkeypatch.setattr("twofold.model_cli.LLM", lambda path, **_: LLM(path, dtype="float32"))
    run("export", half, tmp_path / "whole.gguf", "--type", kind)
    assert held == [torch.bfloat16]
    assert (tmp_path / "half.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_without_a_head_is_said_to_have_none(folder: Path, tmp_path: Path, tied: bool) -> None:
    bare = copied(folder, tmp_path / "bare", "model.safetensors")
    tensors = {name.removeprefix("model."): t.contiguous() for name, t in to_hf(LLM(folder).model).items()}
    save_file(tensors, bare / "model.safetensors")
    config = json.loads((bare / "config.json").read_text())
    (bare / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": tied}))
    shown = run("export", bare, tmp_path / "out", "--type", "f32")
    assert "has no lm_head; it gives embeddings, but no text to rely on; in" in " ".join(shown.split())
    assert "no lm_head" not in run("export", folder, tmp_path / "whole", "--type", "f32")


def test_export_says_where_replies_end(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    run("export", folder, tmp_path / "a.gguf", "--type", "f32")
    run("export", tmp_path / "a.gguf", tmp_path / "back", "--type", "f32")
    eos = json.loads((tmp_path / "back" / "generation_config.json").read_text())["eos_token_id"]
    assert LLM(tmp_path / "a.gguf").tokenizer.im_end in eos
    config = json.loads((tmp_path / "back" / "tokenizer_config.json").read_text())
    assert (config["eos_token"], config["bos_token"], config["model_max_length"]) == ("<|im_end|>", None, 160)


def test_export_keeps_end_tokens_that_are_not_the_tokenizer_s(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    odd = copied(folder, tmp_path / "odd")
    (odd / "generation_config.json").write_text('{"eos_token_id": [70, 71]}')
    run("export", odd, tmp_path / "a.gguf", "--type", "f32")
    assert LLM(tmp_path / "a.gguf").engine.eos_ids == (70, 71)


def test_export_refuses_values_beyond_f16(folder: Path, tmp_path: Path) -> None:
    big = copied(folder, tmp_path / "big")
    llm = LLM(big)
    with torch.no_grad():
        llm.model.model.norm.weight.fill_(1e6)
    save_weights(llm.model, big)
    assert "f16 cannot hold" in run("export", big, tmp_path / "out", "--type", "f16", code=1)
    assert left(tmp_path) == ["big"]


def test_an_adapter_merges_into_any_type(folder: Path, tmp_path: Path) -> None:
    """The base is compared as it was trained, before it is rounded to the type."""
    llm = LLM(folder)
    attach(llm.model, "new", LoraConfig(r=2, targets=("q_proj",)))
    save_adapter(llm.model, "new", tmp_path / "adapter")
    for kind in ("f16", "bf16"):
        run("export", folder, tmp_path / kind, "--type", kind, "--adapter", tmp_path / "adapter")


def test_inspect_fails_where_weights_cannot_be_loaded(folder: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    damaged = copied(folder, tmp_path / "damaged")
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert "10 bytes are missing" in run("inspect", damaged, code=1)
    run("export", folder, tmp_path / "a.gguf", "--type", "f32")
    data = (tmp_path / "a.gguf").read_bytes()
    assert gguf and b"blk.0.attn_q.weight" in data
    (tmp_path / "b.gguf").write_bytes(data.replace(b"blk.0.attn_q.weight", b"blk.0.attn_x.weight"))
    assert "blk.0.attn_x.weight" in run("inspect", tmp_path / "b.gguf", code=1)
    (tmp_path / "c.gguf").write_bytes(data.replace(b"\x05\0\0\0\0\0\0\0qwen2", b"\x05\0\0\0\0\0\0\0qwen9"))
    assert "tokenizer.ggml.pre 'qwen9' is not supported" in run("inspect", tmp_path / "c.gguf", code=1)


def test_a_place_that_may_not_be_looked_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "is_file", refuse)
    with pytest.raises(InputError, match=rf"^{tmp_path}/x cannot be read: Permission denied$"):
        find_model(tmp_path / "x")


def test_names_of_files_are_taken_as_they_are(folder: Path, tmp_path: Path) -> None:
    weights = folder / "model.safetensors"
    assert "is neither a model folder nor a .gguf file" in run("inspect", weights, code=1)
    pytest.importorskip("gguf")
    run("export", folder, tmp_path / "B.GGUF", "--type", "f32")
    assert "(GGUF file)" in run("inspect", tmp_path / "B.GGUF")


def test_tensors_kept_as_f16_are_counted(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    odd, llm = copied(folder, tmp_path / "odd"), LLM(folder)
    model = Qwen3(llm.model.config.model_copy(update={"intermediate_size": 40}))
    model.init_weights(1)
    save_weights(model, odd)
    shown = run("export", odd, tmp_path / "odd.gguf", "--type", "q8_0")
    assert "1 tensors are F16: their rows are no multiple of 32, which q8_0 needs" in shown and "blk" not in shown


def test_quality_compares_packed_weights_with_fp32(folder: Path, tmp_path: Path) -> None:
    shown = run("quality", folder, "--length", 40, "--windows", 3)
    assert "int8 against fp32, 120 tokens in 3 windows" in shown and "same likeliest token" in shown
    text = tmp_path / "text.txt"
    text.write_text("sum mod 10: E1 B5 " * 40)
    assert "float16 against fp32" in run("quality", folder, "--quantize", "float16", "--text", text, "--length", 30)
    text.write_text("sum")
    assert "give a longer text" in run("quality", folder, "--text", text, code=1)
    assert "UTF-8" in run("quality", folder, "--text", tmp_path / "none", code=1)
    assert "cannot quantise to 'int3'" in run("quality", folder, "--quantize", "int3", code=1)
