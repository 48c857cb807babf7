"""What ``twofold inspect``, ``export``, ``quality`` and ``data view`` do once the command line has been read.

MODEL is a Hugging Face folder, a .gguf file, a run folder whose last model is meant, or a name of the hub. Not here:
options and exit codes (``cli.py``), the formats themselves.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from twofold.base.files import write_text
from twofold.base.gguf_file import is_gguf
from twofold.base.hub import checkpoint_name, local
from twofold.base.records import InputError
from twofold.data.corpus import pydoc_topic_documents, python_stdlib_documents
from twofold.eval.quality import Quality, compare, windows_of
from twofold.eval.stats import Interval
from twofold.llm import LLM
from twofold.model.companions import has_vocabulary
from twofold.model.gguf_config import describe_gguf
from twofold.model.gguf_read import open_gguf, require_package
from twofold.model.gguf_write import KINDS, save_gguf
from twofold.model.inspect import Checkpoint, describe, read_folder, show, tokenizer_warnings
from twofold.model.lora import merge
from twofold.model.peft_io import OTHER_BASE, load_adapter
from twofold.model.safetensors_io import DTYPES
from twofold.model.sources import CONFIG
from twofold.model.weights import NO_HEAD, empty_model, match
from twofold.recipes.folder import TYPES, save_folder
from twofold.recipes.models import find_model
from twofold.text.chat import Renderer, folder_template
from twofold.text.gguf_tokenizer import gguf_ends, tokenizer_from_gguf
from twofold.text.policy import POLICY_FILE, ChatPolicy, by_name
from twofold.text.tokenizer import Tokenizer
from twofold.text.view import html_view, terminal_view, view_file


def inspect(model: Path, context: int | None, batch: int, dtype: str, console: Console) -> None:
    """Say what a checkpoint is, what memory it needs and where it would run, without loading its weights.

    Raises:
        InputError: no checkpoint, or (after the description) one whose weights cannot be loaded.
    """
    checkpoint = _read(find_model(model))
    show(describe(checkpoint, context, batch, dtype), console)
    if checkpoint.problem is not None:
        raise InputError(checkpoint.problem)


def _read(path: Path) -> Checkpoint:
    return _read_gguf(path) if is_gguf(path) else read_folder(path)


def _read_gguf(path: Path) -> Checkpoint:
    found = describe_gguf(path)
    stored: dict[str, tuple[int, int]] = {}
    for _, kind, size in found.tensors:
        count, total = stored.get(kind, (0, 0))
        stored[kind] = count + 1, total + size
    problem = None
    warnings: list[str] = []
    try:
        config, source = open_gguf(path)
        match(empty_model(config, device="meta"), source)
        tokenizer = tokenizer_from_gguf(source.file.metadata, str(path))
        warnings = tokenizer_warnings(tokenizer, config)
        tokenizer.ends([(str(path), list(gguf_ends(source.file.metadata, tokenizer, str(path))))], config.vocab_size)
    except InputError as error:
        problem = str(error)
    return Checkpoint(str(path), "GGUF file", found.config, stored, found.chat_template, problem, tuple(warnings))


def export(
    model: Path,
    out: Path,
    kind: str,
    adapter: Path | None,
    any_base: bool,
    console: Console,
    family: str | None = None,
) -> None:
    """Write a model as a Hugging Face folder, or as one GGUF file where ``out`` ends in .gguf; whole or not at all.

    A chat template that is not exactly one of our families is written as it is; a model without one stays without.

    Args:
        kind: type of the weights: f32, f16, bf16, and for GGUF q8_0 and q4_0. adapter: a PEFT folder to merge first;
            a tokenizer in it, and the chat template beside that, take the place of the model's. any_base: merge it also
            where it was trained on other weights. family: the chat format to write, whatever the template is.

    Raises:
        InputError: an unknown type, an ``out`` that exists already or cannot be written, weights that do not fit the
            type, or an adapter that does not fit the model or has tokens that no tokenizer knows.
    """
    as_gguf = is_gguf(out)
    known = KINDS if as_gguf else tuple(TYPES)
    if kind not in known:
        hint = "; q8_0 and q4_0 need an OUT that ends in .gguf" if kind in KINDS else ""
        raise InputError(f"unknown type {kind!r}; use one of {', '.join(known)}{hint}")
    _check_place(out, as_gguf)
    path, adapter = find_model(model), adapter and local(adapter)
    checkpoint = _read(path)
    if checkpoint.problem is not None:
        raise InputError(checkpoint.problem)
    own = _Text() if adapter is None else _text_of(adapter)
    policy = by_name(family) or own.policy
    llm = LLM(path, dtype=_memory_type(checkpoint, as_gguf, kind, adapter), policy=policy)
    tokenizer = own.tokenizer or llm.tokenizer
    if adapter is not None:
        _merge(llm, adapter, tokenizer, any_base)
    foreign = own.template if policy is None else None  # of no family, whatever the model's is
    if foreign is None and llm.has_renderer and llm.renderer.differs:
        foreign = checkpoint.chat_template
    said = llm.renderer.chat_template if llm.has_renderer else own.template or checkpoint.chat_template
    template = said if foreign is None else foreign
    notes = [f"{path} has {NO_HEAD}; in {out} the embedding is the head"] if checkpoint.headless else []
    try:
        if as_gguf:
            kept = save_gguf(llm.model, tokenizer, out, kind, template, checkpoint_name(path), llm.engine.eos_ids)
            if kept:
                notes.append(f"{len(kept)} tensors are F16: their rows are no multiple of 32, which {kind} needs")
        else:
            with _whole_folder(out) as folder:
                save_folder(llm, path, template, folder, kind, tokenizer)
                if foreign is not None:
                    write_text(folder / "chat_template.jinja", foreign)
                    (folder / POLICY_FILE).unlink(missing_ok=True)
                if adapter is None and (path / "about.json").is_file():  # what the model can do, as chat and serve say
                    shutil.copyfile(path / "about.json", folder / "about.json")
    except OSError as error:
        raise _unwritable(out, error) from None
    for note in notes:
        console.print(escape(note), style="yellow", highlight=False, soft_wrap=True)
    size = sum(f.stat().st_size for f in ([out] if as_gguf else out.iterdir()))
    console.print(escape(f"{out}: {size / 1e6:,.1f} MB"), style="bold", highlight=False, soft_wrap=True)


def _memory_type(checkpoint: Checkpoint, as_gguf: bool, kind: str, adapter: Path | None) -> torch.dtype:
    """What to hold the weights in: where all are stored in one type, a GGUF file is the same made from that or fp32."""
    if adapter is not None:
        return torch.float32
    if not as_gguf:
        return TYPES[kind]
    stored = [DTYPES.get(name, torch.float32) for name in checkpoint.stored]
    return stored[0] if len(stored) == 1 else torch.float32


def quality(model: Path, quantize: str, text: Path | None, length: int, windows: int, console: Console) -> None:
    """Say how far a packed model's next-token distributions are from its own in fp32, on ``text`` or Python's own.

    Args:
        length: tokens of a window; shorter where the model's context is. windows: most of them.

    Raises:
        InputError: no checkpoint, an unknown kind, or a text that cannot be read or is too short.
    """
    path = find_model(model)
    packed = LLM(path, dtype="float32", quantize=quantize)  # first, so that an unknown kind is refused at once
    llm = LLM(path, dtype="float32")
    length = min(length, llm.model.config.longest - 1)
    chosen = windows_of(llm.tokenizer.encode(_text(text)), length, windows)
    with console.status("") as status:
        found = compare(llm.model, packed.model, chosen, lambda done: status.update(f"window {done} of {len(chosen)}"))
    console.print(_quality_table(found, path, quantize))


def _text(path: Path | None) -> str:
    if path is None:  # half prose, half code, on every machine
        topics = [document.text for document in pydoc_topic_documents()]
        prose = "\n".join(topics)
        return prose + "\n".join(document.text for document in python_stdlib_documents()[::20])[: len(prose)]
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as text ({error}); give a UTF-8 file") from None


def _quality_table(found: Quality, path: Path, kind: str) -> Table:
    title = f"{checkpoint_name(path)}: {kind} against fp32, {found.tokens:,} tokens in {found.windows} windows"
    table = Table(title=escape(title), title_justify="left", show_header=False)

    def add(name: str, interval: Interval, digits: int, unit: str = "", scale: float = 1.0) -> None:
        value, low, high = (f"{scale * part:.{digits}f}" for part in (interval.value, interval.low, interval.high))
        table.add_row(name, f"{value}{unit}  [{low}, {high}]")

    add("KL(fp32, packed), nats a token", found.kl, 5)
    table.add_row(
        "its median, 99th percentile, maximum", f"{found.kl_median:.5f}, {found.kl_p99:.4f}, {found.kl_max:.3f}"
    )
    add("same likeliest token", found.top1, 2, " %", 100)
    add("loss added, nats a token", found.loss, 5)
    table.add_row("loss in fp32, packed", f"{found.reference_nats:.4f}, {found.nats:.4f}")
    return table


@dataclass(frozen=True, slots=True)
class _Text:
    """Tokenizer and chat template in an adapter's folder. policy: the template's, None where it is no family's."""

    tokenizer: Tokenizer | None = None
    template: str | None = None
    policy: ChatPolicy | None = None


def _text_of(adapter: Path) -> _Text:
    if not (adapter / "tokenizer.json").is_file():
        return _Text()
    tokenizer, template = Tokenizer.from_folder(adapter), folder_template(adapter)
    try:
        renderer = Renderer.from_pretrained(adapter)
        return _Text(tokenizer, template, None if renderer.differs else renderer.policy)
    except InputError:
        return _Text(tokenizer, template)


def _merge(llm: LLM, adapter: Path, tokenizer: Tokenizer, any_base: bool) -> None:
    """Merge an adapter into the model, which is in fp32: it is checked against, and fits, the base as it was trained.

    Raises:
        InputError: it does not fit the model, or has rows of tokens that ``tokenizer`` lacks.
    """
    try:
        load_adapter(llm.model, "adapter", adapter, same_base=not any_base)
    except InputError as error:
        raise (error.with_hint("or add --any-base") if error.code == OTHER_BASE else error) from None
    last = max((i for rows in llm.model.adapters.named["adapter"].rows for i in rows.ids), default=-1)
    if last >= tokenizer.vocab_size:
        raise InputError(
            f"{adapter} has a row for token {last}, the tokenizer only {tokenizer.vocab_size} tokens; put the "
            "tokenizer that the adapter was trained with into its folder"
        )
    merge(llm.model, "adapter")


def _check_place(out: Path, as_gguf: bool) -> None:
    """Raise InputError where ``out`` is taken or cannot be written, as far as that shows before anything is loaded."""
    if as_gguf:
        require_package(out)
    try:
        if out.exists() and (as_gguf or not out.is_dir() or any(out.iterdir())):
            raise InputError(f"{out} exists already; choose another name or remove it")
        place = next(path for path in (out.resolve(), *out.resolve().parents) if path.exists())
    except OSError as error:
        raise _unwritable(out, error) from None
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        why = "may not be written to" if place.is_dir() else "is no folder"
        raise InputError(f"{out} cannot be written: {place} {why}; choose another place")


def _unwritable(out: Path, error: OSError) -> InputError:
    return InputError(f"{out} cannot be written: {error.strerror or error}; choose another place")


@contextmanager
def _whole_folder(out: Path) -> Iterator[Path]:
    """A folder that becomes ``out`` when all is written; on an error nothing stays.

    An empty ``out`` keeps its place, since it may be a mount or the folder a shell stands in; config.json arrives last.
    """
    target = out.resolve()
    temporary = (target if target.is_dir() else target.parent) / f".{target.name}.{os.getpid()}.tmp"
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if target.is_dir():
            for path in sorted(temporary.iterdir(), key=lambda path: path.name == CONFIG):
                path.replace(target / path.name)
        else:
            temporary.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def view(file: Path, model: Path, html: Path | None, limit: int, console: Console, family: str | None = None) -> None:
    """Show conversations token by token as they will be trained, on the terminal or as an HTML page."""
    renderer = _renderer(model, by_name(family))
    samples = view_file(file, renderer, limit)
    if html is None:
        console.print(terminal_view(samples, renderer.tokenizer))
        return
    write_text(html, html_view(samples, renderer.tokenizer, file.name))
    console.print(escape(f"{html}: {len(samples)} conversations"), style="bold", highlight=False, soft_wrap=True)


def _renderer(model: Path, policy: ChatPolicy | None) -> Renderer:
    """The renderer of a model, without its weights; a folder of a tokenizer and a chat template is enough."""
    found = local(model, weights=False)
    path = found if has_vocabulary(found) else find_model(found)
    return Renderer.from_pretrained(path, policy)
