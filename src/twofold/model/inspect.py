"""What a checkpoint is, what it needs and where it would run, from its headers alone: no weight is read.

``read_folder`` looks at a Hugging Face folder; any other format fills a ``Checkpoint`` itself. ``describe`` turns one
into labelled lines, ``show`` prints them. Not here: the command line, loading.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape

from twofold.base.records import InputError
from twofold.model.companions import NO_TOKENIZER, ends_of, tokenizer_of
from twofold.model.config import ModelConfig
from twofold.model.hf_config import model_type, read_config, said_ends
from twofold.model.presets import PRESETS
from twofold.model.rope import attention_factor
from twofold.model.sources import FolderSource
from twofold.model.weights import NO_HEAD, empty_model, fitted, match, resolve_dtype
from twofold.text.chat import folder_template
from twofold.text.tokenizer import Tokenizer

Row = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint of any format before its weights are read.

    kind: the format in words. stored: type on disk -> (tensors, bytes). chat_template: its text, None without one.
    problem: why the checkpoint cannot be loaded, None if it can. warnings: what it cannot do although it loads.
    headless: it has no head, nor a prefix before its names, as embedding models are kept.
    """

    origin: str
    kind: str
    config: ModelConfig
    stored: Mapping[str, tuple[int, int]]
    chat_template: str | None = None
    problem: str | None = None
    warnings: tuple[str, ...] = ()
    headless: bool = False


def read_folder(folder: Path) -> Checkpoint:
    """Look at a Hugging Face folder; whatever keeps it from being loaded becomes ``problem``.

    Raises:
        InputError: no readable config.json.
    """
    config = read_config(folder)
    stored: dict[str, tuple[int, int]] = {}
    template = problem = None
    headless, warnings = False, []
    try:
        source = FolderSource(folder)
        for _, entry in source.entries.values():
            count, size = stored.get(entry.dtype, (0, 0))
            stored[entry.dtype] = count + 1, size + entry.end - entry.begin
        headless, config = source.headless, fitted(config, source)
        match(empty_model(config, device="meta"), source)
        tokenizer = tokenizer_of(folder)
        warnings = tokenizer_warnings(tokenizer, config)
        ends_of(tokenizer, said_ends(folder), config.vocab_size)
    except InputError as error:
        problem = str(error)
    try:
        template = folder_template(folder)
    except InputError as error:  # it loads all the same, and cannot chat
        warnings.append(str(error))
    return Checkpoint(str(folder), "Hugging Face folder", config, stored, template, problem, tuple(warnings), headless)


def tokenizer_warnings(tokenizer: Tokenizer | InputError, config: ModelConfig) -> list[str]:
    """A line where there is no tokenizer; otherwise one where it has tokens without a row in the embedding, and one
    where it has tokens that are not written in the byte alphabet."""
    if isinstance(tokenizer, InputError):
        return [NO_TOKENIZER]
    warnings = []
    if tokenizer.vocab_size > config.vocab_size:
        warnings.append(
            f"the tokenizer has {tokenizer.vocab_size:,} tokens and the embedding {config.vocab_size:,} rows; text "
            "with the tokens beyond them is refused"
        )
    if tokenizer.foreign:
        token, spelling = min(tokenizer.foreign.items())
        warnings.append(
            f"{len(tokenizer.foreign):,} tokens of the vocabulary, {spelling!r} (id {token}) the first, are not "
            "written in the byte alphabet; no text becomes one of them, and a sampled one is shown as it is spelled"
        )
    return warnings


def describe(checkpoint: Checkpoint, context: int | None = None, batch: int = 1, dtype: str = "auto") -> list[Row]:
    """Labelled lines about a checkpoint.

    Args:
        context, batch: tokens of a sequence (None: all the model is made for) and sequences kept in memory at once.
        dtype: what to compute in, as for ``resolve_dtype``.

    Raises:
        InputError: context or batch below 1, an unknown dtype.
    """
    config = checkpoint.config
    longest = config.longest
    tokens = longest if context is None else context
    if tokens < 1 or batch < 1:
        raise InputError(f"context and batch must be >= 1, got {tokens} and {batch}")
    rows = [("checkpoint", f"{checkpoint.origin} ({checkpoint.kind})"), ("family", _family(config))]
    rows.append(("parameters", _parameters(config)))
    for name, (count, size) in sorted(checkpoint.stored.items()):
        rows.append(("on disk", f"{name}: {count:,} tensors, {gigabytes(size)}"))
    rows += [("context", line) for line in _context(config)]
    rows.append(("chat template", _template(checkpoint.chat_template)))
    rows += [("warning", f"it has {NO_HEAD}")] if checkpoint.headless else []
    rows += [("warning", line) for line in checkpoint.warnings]
    if tokens > longest:
        rows.append(("warning", f"{tokens:,} tokens are more than the {longest:,} that the model is made for"))
    rows += [("runs on", line) for line in _devices(config, tokens, batch, dtype)]
    rows.append(("loads", "yes" if checkpoint.problem is None else f"no: {checkpoint.problem}"))
    return rows


def show(rows: list[Row], console: Console) -> None:
    """Print labelled lines, a label once for each group."""
    width = max(len(label) for label, _ in rows) + 2
    last = ""
    for label, text in rows:
        console.print(f"[bold]{(label if label != last else '').ljust(width)}[/]{escape(text)}", soft_wrap=True)
        last = label


def memory_bytes(config: ModelConfig, tokens: int, batch: int, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of the weights, and of keys and values of ``batch`` sequences of ``tokens``, all in ``dtype``."""
    cache = config.kv_bytes_per_token(dtype.itemsize) * tokens * batch
    return config.num_parameters() * dtype.itemsize, cache


def gigabytes(count: float) -> str:
    """Bytes in GB (10^9), MB below a tenth of one."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


def _family(config: ModelConfig) -> str:
    try:
        family = model_type(config)
    except InputError:
        family = "of its own"
    same = [name for name, known in PRESETS.items() if _shape(known) == _shape(config)]
    if not config.num_experts:
        text = f"{family}, dense"
    else:
        layers = sum(map(config.is_moe_layer, range(config.num_hidden_layers)))
        text = f"{family}, {config.num_experts} experts of which {config.num_experts_per_tok} see a token, "
        text += f"in {layers} of {config.num_hidden_layers} layers"
    return text + (f" (the shape of {' and '.join(same)})" if same else "")


def _shape(config: ModelConfig) -> ModelConfig:
    """What does not change when a model is made for another context."""
    return config.model_copy(update={"context": None, "max_position_embeddings": 1})


def _parameters(config: ModelConfig) -> str:
    total, active = config.num_parameters(), config.num_parameters(active=True)
    tied = "embedding and head tied" if config.tie_word_embeddings else "embedding and head separate"
    return f"{total:,}{f' ({active:,} active)' if active != total else ''}; {tied}"


def _context(config: ModelConfig) -> list[str]:
    context = config.context
    lines = [f"{config.max_position_embeddings:,} positions in config, RoPE base {config.rope_theta:,.0f}"]
    if context is not None:
        text = f"native {context.native:,}, target {context.target:,} by {context.method}, factor {context.factor:g}"
        if context.method == "yarn":
            text += f" (attention factor {attention_factor(context):.4f})"
        lines.append(text + (", always" if context.always else ", for sequences beyond the native length"))
    if config.sliding_window is not None:
        windows = sum(config.layer_window(i) is not None for i in range(config.num_hidden_layers))
        lines.append(f"sliding window of {config.sliding_window:,} tokens in {windows} layers")
    return lines


def _template(template: str | None) -> str:
    if template is None:
        return "none"
    first = next((line.strip() for line in template.splitlines() if line.strip()), "")
    modes = "thinking on and off" if "enable_thinking" in template else "mentions <think>"
    if "<think>" not in template:
        modes = "no thinking"
    return f"{modes}; sha256 {hashlib.sha256(template.encode()).hexdigest()[:16]}; begins {first[:60]!r}"


def _devices(config: ModelConfig, tokens: int, batch: int, dtype: str) -> list[str]:
    """A line for this CPU, and one for every GPU, or for GPUs in general where there is none."""
    lines = [_device(config, tokens, batch, ("CPU", *resolve_dtype(dtype, "cpu")), ram_bytes())]
    for index in range(torch.cuda.device_count()):
        _, total = torch.cuda.mem_get_info(index)
        label = f"GPU {index} ({torch.cuda.get_device_name(index)})"
        lines.append(_device(config, tokens, batch, (label, *resolve_dtype(dtype, f"cuda:{index}")), total))
    if not torch.cuda.is_available():
        chosen = (torch.bfloat16, "if it multiplies that natively") if dtype == "auto" else resolve_dtype(dtype, "cuda")
        lines.append(_device(config, tokens, batch, ("a GPU (none here)", *chosen), None))
    return lines


def _device(config: ModelConfig, tokens: int, batch: int, chosen: tuple[str, torch.dtype, str], has: int | None) -> str:
    label, dtype, reason = chosen
    weights, cache = memory_bytes(config, tokens, batch, dtype)
    name = str(dtype).removeprefix("torch.")
    text = f"{label}: {name} ({reason}); weights {gigabytes(weights)} + keys and values {gigabytes(cache)} "
    text += f"for {batch:,} x {tokens:,} tokens = {gigabytes(weights + cache)}"
    if has is None:
        return text
    return f"{text} of {gigabytes(has)}: {'fits' if weights + cache < has else 'does not fit'}"


def ram_bytes() -> int:
    """Main memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
