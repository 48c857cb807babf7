"""What ``twofold inspect``, ``twofold export`` and ``twofold data view`` do once the command line has been read.

MODEL is a Hugging Face folder, a .gguf file, or a run folder whose last model is meant. Not here: options and exit
codes (``cli.py``), the formats themselves.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape

from twofold.base.files import write_text
from twofold.base.records import InputError
from twofold.llm import LLM
from twofold.model.gguf_config import describe_gguf
from twofold.model.gguf_file import read_metadata
from twofold.model.gguf_write import save_gguf
from twofold.model.hf_config import read_generation_config, write_generation_config
from twofold.model.inspect import Checkpoint, describe, read_folder, show
from twofold.model.lora import merge
from twofold.model.peft_io import load_adapter
from twofold.model.weights import save_weights
from twofold.recipes.post import find_model
from twofold.text.chat import Renderer
from twofold.text.gguf_tokenizer import tokenizer_from_gguf
from twofold.text.view import html_view, terminal_view, view_file

GGUF_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0")
HF_TYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


def inspect(model: Path, context: int | None, batch: int, dtype: str, console: Console) -> None:
    """Say what a checkpoint is, what memory it needs and where it would run, without loading its weights."""
    path = find_model(model)
    checkpoint = _read_gguf(path) if path.suffix == ".gguf" else read_folder(path)
    show(describe(checkpoint, context, batch, dtype), console)


def _read_gguf(path: Path) -> Checkpoint:
    found = describe_gguf(path)
    stored: dict[str, tuple[int, int]] = {}
    for _, kind, size in found.tensors:
        count, total = stored.get(kind, (0, 0))
        stored[kind] = count + 1, total + size
    return Checkpoint(str(path), "GGUF file", found.config, stored, found.chat_template)


def export(model: Path, out: Path, kind: str, adapter: Path | None, console: Console) -> None:
    """Write a model as a Hugging Face folder, or as one GGUF file where ``out`` ends in .gguf.

    Args:
        kind: type of the weights: f32, f16, bf16, and for GGUF q8_0 and q4_0. adapter: a PEFT folder to merge first.

    Raises:
        InputError: an unknown type, or an ``out`` that exists already.
    """
    as_gguf = out.suffix == ".gguf"
    known = GGUF_TYPES if as_gguf else tuple(HF_TYPES)
    if kind not in known:
        hint = "; q8_0 and q4_0 need an OUT that ends in .gguf" if kind in GGUF_TYPES else ""
        raise InputError(f"unknown type {kind!r}; use one of {', '.join(known)}{hint}")
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise InputError(f"{out} exists already; choose another name or remove it")
    path = find_model(model)
    llm = LLM(path, dtype="float32" if as_gguf else HF_TYPES[kind])
    if adapter is not None:
        load_adapter(llm.model, "adapter", adapter)
        merge(llm.model, "adapter")
    if as_gguf:
        notes = save_gguf(llm.model, llm.tokenizer, out, kind, llm.renderer.chat_template, path.stem)
    else:
        notes = []
        save_weights(llm.model, out)
        llm.renderer.save(out)
        if path.is_dir() and (generation := read_generation_config(path)):
            write_generation_config(out, generation)
    for note in notes:
        console.print(escape(note), style="yellow", highlight=False, soft_wrap=True)
    size = sum(f.stat().st_size for f in ([out] if as_gguf else out.iterdir()))
    console.print(escape(f"{out}: {size / 1e6:,.1f} MB"), style="bold", highlight=False, soft_wrap=True)


def view(file: Path, model: Path, html: Path | None, limit: int, console: Console) -> None:
    """Show conversations token by token as they will be trained, on the terminal or as an HTML page."""
    renderer = _renderer(model)
    samples = view_file(file, renderer, limit)
    if html is None:
        console.print(terminal_view(samples, renderer.tokenizer))
        return
    write_text(html, html_view(samples, renderer.tokenizer, file.name))
    console.print(escape(f"{html}: {len(samples)} conversations"), style="bold", highlight=False, soft_wrap=True)


def _renderer(model: Path) -> Renderer:
    """The renderer of a model, without its weights; a folder of a tokenizer and a chat template is enough."""
    path = model if (model / "tokenizer.json").is_file() else find_model(model)
    if path.suffix != ".gguf":
        return Renderer.from_pretrained(path)
    metadata = read_metadata(path)
    template = metadata.get("tokenizer.chat_template")
    if template is None:
        raise InputError(f"{path} has no chat template, so nothing says how its chats are written; give another model")
    return Renderer.from_parts(tokenizer_from_gguf(metadata, str(path)), template)
