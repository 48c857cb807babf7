"""`twofold run sft`: supervised fine-tuning of any checkpoint on a file of conversations, all weights or an adapter.

Three stages: the file is rendered and split, the checkpoint is trained and measured on what was held out, and a report
is written. With new tokens a stage before them makes the checkpoint that has rows for them, and the others start there.
Masks are the renderer's; nothing else decides what is trained. Not here: the loop, the renderer, formats.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from twofold.base.batch import pack
from twofold.base.config import Config, ConfigError
from twofold.base.files import named_path, read_json, read_jsonl, sha256_file, write_json, write_jsonl
from twofold.base.hub import hub_name, local
from twofold.base.records import InputError, SamplingParams
from twofold.base.split import held_out
from twofold.llm import LLM
from twofold.model.lora import LoraConfig, attach, merge
from twofold.model.peft_io import save_adapter
from twofold.model.quantised import quantise_base
from twofold.model.vocab import add_tokens, keep_new_rows, train_new_rows
from twofold.model.weights import check_device
from twofold.post.sft import ChatSource, StoredExamples, write_examples
from twofold.recipes.chain import Chain, Stage, StageContext, command_line
from twofold.recipes.folder import save_folder
from twofold.recipes.models import is_checkpoint
from twofold.recipes.pretrain import run_training
from twofold.recipes.sft_report import SFTReportConfig, write_sft_report
from twofold.recipes.watch import tracked
from twofold.text.chat import FAMILIES, Rendered, Renderer
from twofold.text.columns import ColumnError
from twofold.text.policy import by_name
from twofold.text.rows import read_views
from twofold.train.compute import Precision
from twofold.train.loop import FitConfig, OptimConfig
from twofold.train.micro import to_device
from twofold.train.objectives import CrossEntropy
from twofold.train.trackers import Track

_LEARNING_RATE = {"full": 2e-5, "lora": 2e-4, "rows": 1e-3}
_SAMPLES = 4


class Origin(Config):
    """What is trained; set at the top of the recipe. fingerprint: of the files, so that changed ones are read again."""

    init: str = ""
    fingerprint: str = ""
    family: str = ""
    new_tokens: tuple[str, ...] = ()


class ExtendConfig(Origin):
    """noise: of the rows of new tokens around the mean, in standard deviations of the others."""

    noise: float = Field(default=0.1, ge=0)


class RowsConfig(Origin):
    """Which conversations are trained on; ``data`` is set at the top of the recipe.

    max_length: tokens of a view; ``too_long`` and ``broken`` say what happens to longer ones and to rows that cannot
    be read: "error" stops at the first, "skip" leaves them out, counts them and lists them in dropped.jsonl.
    ignore: columns that are left out of every row; one that seems to hold part of a conversation, and that the row's
    format does not read, stops the run otherwise. held_out: share of the rows kept for measuring, chosen by content.
    """

    data: str = ""
    max_length: int = Field(default=2048, ge=2)
    too_long: Literal["error", "skip"] = "skip"
    broken: Literal["error", "skip"] = "error"
    ignore: tuple[str, ...] = ()
    held_out: float = Field(default=0.05, ge=0, lt=1)
    train_empty_think: bool = False


class TrainConfig(Origin):
    """How the checkpoint is trained.

    method: "full" trains all weights, "lora" an adapter and the rows of new tokens, "rows" those rows alone.
    learning_rate: 0 takes 2e-5 for all weights, 2e-4 for an adapter, 1e-3 for rows. base_bits: 8 or 4 quantises the
    frozen base under an adapter, 0 leaves it. micro_tokens: most tokens in one forward pass. device: cpu, cuda, cuda:1.
    precision: of products in training; bf16 is for GPUs. compile: let torch compile. save_type: f32, f16 or bf16.
    sample_tokens: length of the replies in the report.
    """

    method: Literal["full", "lora", "rows"] = "full"
    epochs: float = Field(default=2.0, gt=0)
    batch_size: int = Field(default=16, ge=1)
    micro_tokens: int = Field(default=4096, ge=1)
    learning_rate: float = Field(default=0.0, ge=0)
    optim: OptimConfig = OptimConfig(muon_lr=0.0, adam_lr=0.0, betas=(0.9, 0.999), warmup=10, decay="cosine", end=0.1)
    lora: LoraConfig = LoraConfig()
    base_bits: Literal[0, 4, 8] = 0
    device: str = "cpu"
    precision: Precision = "fp32"
    compile: bool = False
    save_type: Literal["f32", "f16", "bf16"] = "bf16"
    sample_tokens: int = Field(default=128, ge=1)


class SFTRecipe(Config):
    """init: the checkpoint: a folder, .gguf file or hub name. data: conversations in any known format, as JSON Lines
    (also .gz), a JSON array, .csv or .parquet.

    family: the chat format of a checkpoint that has no template, or that is to learn another ("chatml", "hybrid", ...).
    new_tokens: words that are to be one token each, wherever they stand in the conversations. track: trackers that get
    the rows of training.
    """

    init: str = ""
    data: str = ""
    family: str = ""
    track: Track = ()
    new_tokens: tuple[str, ...] = ()
    extend: ExtendConfig = ExtendConfig()
    rows: RowsConfig = RowsConfig()
    train: TrainConfig = TrainConfig()


def build(overrides: Sequence[str] = (), seed: int = 0) -> Chain:
    """The recipe's chain with overrides applied.

    Raises:
        ConfigError: init or data is missing or does not exist; the message shows the command.
    """
    config = SFTRecipe().override(overrides)
    for group, part in (("extend", config.extend), ("rows", config.rows), ("train", config.train)):
        for name in ("data", *Origin.model_fields):
            if getattr(part, name, None):
                raise ConfigError(f"{group}.{name} follows from the top of the recipe; set it there: --set {name}=...")
    init, data = _checkpoint(config.init), _file(config.data)
    found = _fingerprint(init)
    if config.family and config.family not in FAMILIES:
        raise ConfigError(f"family {config.family!r} is not known; there are {', '.join(FAMILIES)}")
    origin = {"init": str(init), "fingerprint": found, "family": config.family, "new_tokens": config.new_tokens}
    train, extend = config.train.model_copy(update=origin), config.extend.model_copy(update=origin)
    rows = config.rows.model_copy(update=origin | {"data": str(data), "fingerprint": sha256_file(data)[:16] + found})
    _check_device(train.device)
    if train.base_bits and train.method != "lora":
        raise ConfigError("train.base_bits needs train.method=lora: quantised weights cannot be trained themselves")
    if train.method == "rows" and not config.new_tokens:
        raise ConfigError("train.method=rows trains the rows of new tokens; name them: --set new_tokens='[\"<tool>\"]'")
    command = command_line("sft", overrides, seed)
    start = ("extend",) if config.new_tokens else ()
    stages = [
        *([Stage("extend", "New tokens: rows in embedding and head", extend, (), extend_vocabulary)] if start else []),
        Stage("rows", "Conversations: read, render, split", rows, start, prepare_rows),
        Stage("sft", "Supervised fine-tuning", train, (*start, "rows"), fine_tune),
        Stage("report", "Report", SFTReportConfig(command=command), ("rows", "sft"), write_sft_report),
    ]
    return Chain("sft", tracked(stages, config.track), seed, config)


def _checkpoint(text: str) -> Path:
    path = named_path(str(local(Path(text))))
    if not text or not is_checkpoint(path):
        what = f"{text} is no checkpoint" if text else "the checkpoint is missing"
        raise ConfigError(f"{what}; give a model folder, .gguf file or name: --set init=PATH --set data=FILE.jsonl")
    return path


def _check_device(name: str) -> None:
    """Refuse a device that torch does not find here, before anything is read."""
    try:
        check_device(name)
    except InputError as error:
        raise ConfigError(f"train.device: {error}") from None


def _file(text: str) -> Path:
    path = named_path(text)
    if not text or not path.is_file():
        what = f"{text} is {'a folder' if path.is_dir() else 'no file'}" if text else "the data file is missing"
        raise ConfigError(f"{what}; give conversations as JSON Lines: --set data=FILE.jsonl")
    return path


def _fingerprint(init: Path) -> str:
    """Hash of names, sizes and times of a checkpoint's files: cheap for large ones, and a changed file changes it."""
    files = sorted(init.iterdir()) if init.is_dir() else [init]
    facts = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def extend_vocabulary(context: StageContext) -> None:
    """Write the checkpoint with its new tokens, exactly (fp32); the base that an adapter with such tokens stands on.

    Raises:
        InputError: a token that cannot be added.
    """
    config: ExtendConfig = context.config
    llm = LLM(Path(config.init), dtype="float32", policy=by_name(config.family))
    _check_pair(llm)
    first = llm.tokenizer.vocab_size
    tokenizer = llm.tokenizer.add_words(config.new_tokens)
    add_tokens(llm.model, first, len(config.new_tokens), config.noise, context.seed)
    save_folder(llm, Path(config.init), None, context.out, "f32", tokenizer)


def _start(context: StageContext) -> Path:
    """The checkpoint that is trained: the one given, or the one with new tokens."""
    return context.inputs.get("extend", Path(context.config.init)).absolute()


def _renderer(context: StageContext) -> Renderer:
    return Renderer.from_pretrained(_start(context), by_name(context.config.family))


def _check_pair(llm: LLM) -> None:
    tokens, rows = llm.tokenizer.vocab_size, llm.model.config.vocab_size
    if tokens > rows:
        raise InputError(
            f"{llm.path}: the tokenizer has {tokens} tokens and the embedding {rows} rows; they are not a pair, "
            "give the tokenizer of this model"
        )


def prepare_rows(context: StageContext) -> None:
    """Render every row as the views that are trained, drop what cannot be used, split by content, and store tokens."""
    config: RowsConfig = context.config
    renderer = _renderer(context)
    kept: dict[bool, list[Rendered]] = {False: [], True: []}
    dropped: list[dict[str, str]] = []
    seen: set[str] = set()
    counts: Counter[str] = Counter()
    ignored: Counter[str] = Counter()
    for place, views in _rows(config, renderer, dropped, ignored):
        key = hashlib.sha256("\n".join(view.text for view in views).encode()).hexdigest()
        if key in seen:
            dropped.append({"place": place, "reason": "the same conversation came before"})
            continue
        seen.add(key)
        kept[held_out(key, config.held_out)].extend(views)
        counts["rows"] += 1
        counts["thinking"] += any("reasoning" in view.parts for view in views)
    if not kept[False]:
        reasons = Counter(row["reason"] for row in dropped)
        found = ", ".join(f"{count} {reason}" for reason, count in reasons.items()) or f"{counts['rows']} rows in all"
        raise InputError(f"{config.data}: no conversation is left to train on ({found}); twofold data view shows rows")
    for name, examples in (("train", kept[False]), ("held_out", kept[True])):
        write_examples(context.out / f"{name}.safetensors", examples)
    write_jsonl(context.out / "dropped.jsonl", dropped)
    write_jsonl(context.out / "prompts.jsonl", [_prompt(view) for view in (kept[True] or kept[False])[:_SAMPLES]])
    write_json(context.out / "result.json", {
        "data": config.data, "rows": counts["rows"], "thinking_rows": counts["thinking"],
        "thinks": renderer.policy.spec.thinks, "dropped": dict(Counter(row["reason"] for row in dropped)),
        "views": {name: len(kept[held]) for name, held in (("train", False), ("held_out", True))},
        "tokens": sum(len(view.token_ids) for view in kept[False]),
        "trained_tokens": sum(weight > 0 for view in kept[False] for weight in view.weights),
        "parts": dict(_trained_parts(kept[False])), "ignored_columns": dict(ignored),
    })  # fmt: skip


def _rows(
    config: RowsConfig, renderer: Renderer, dropped: list[dict[str, str]], ignored: Counter[str]
) -> Iterator[tuple[str, tuple[Rendered, ...]]]:
    path = Path(config.data)
    read = read_views(
        path, renderer, empty_think_trained=config.train_empty_think, ignore=config.ignore, ignored=ignored
    )
    for place, views in read:
        if isinstance(views, InputError):
            if config.broken == "error":
                way = ", or the column: rows.ignore='[\"NAME\"]'" if isinstance(views, ColumnError) else ""
                raise InputError(
                    f"{path}{place}: {views}; mend the row, or leave such rows out: rows.broken=skip" + way
                )
            dropped.append({"place": place, "reason": "cannot be read", "error": str(views)})
            continue
        trained = tuple(view for view in views if any(view.weights[1:]))
        longest = max((len(view.token_ids) for view in trained), default=0)
        if longest > config.max_length and config.too_long == "error":
            raise InputError(
                f"{path}{place}: {longest} tokens, more than rows.max_length={config.max_length}; raise it, or leave "
                "such rows out: rows.too_long=skip"
            )
        fitting = tuple(view for view in trained if len(view.token_ids) <= config.max_length)
        if len(fitting) < len(trained):
            dropped.append({"place": place, "reason": f"longer than {config.max_length} tokens"})
        elif not trained:
            dropped.append({"place": place, "reason": "nothing to train"})
        if fitting:
            yield place, fitting


def _prompt(view: Rendered) -> dict[str, Any]:
    """The view up to its first trained token, and the text that follows it."""
    first = next(place for place, weight in enumerate(view.weights) if weight > 0)
    return {"prompt_ids": view.token_ids[:first], "reference_ids": view.token_ids[first:]}


def _trained_parts(views: Sequence[Rendered]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for view in views:
        counts.update(part for part, weight in zip(view.parts, view.weights, strict=True) if weight > 0)
    return counts


def fine_tune(context: StageContext) -> None:
    """Train, measure before and after, and write the model; with an adapter also the adapter, in PEFT's format."""
    config: TrainConfig = context.config
    start = _start(context)
    rows = context.inputs["rows"]
    train, held = StoredExamples(rows / "train.safetensors"), StoredExamples(rows / "held_out.safetensors")
    prompts = read_jsonl(rows / "prompts.jsonl")
    llm = LLM(start, dtype="float32", device=config.device, policy=by_name(config.family))
    _check_pair(llm)
    before = _measured_before(context, llm, held, prompts)
    _choose_weights(llm, config, context.seed)
    trained = sum(p.numel() for p in llm.model.parameters() if p.requires_grad)
    source = ChatSource(train, config.batch_size, context.seed, config.micro_tokens)
    steps = max(1, round(config.epochs * len(train) / config.batch_size))
    optim = config.optim
    if not optim.adam_lr:
        optim = optim.model_copy(update={"adam_lr": config.learning_rate or _LEARNING_RATE[config.method]})
    llm.model.train()
    fit = FitConfig(precision=config.precision, compile=config.compile)
    trainer = run_training(context, llm.model, source, CrossEntropy(), optim, steps, fit=fit)
    llm.model.eval()
    if config.method == "lora":
        save_adapter(llm.model, "adapter", context.out / "adapter", base=hub_name(start) or str(start))
        if config.new_tokens:
            llm.renderer.save(context.out / "adapter")
        merge(llm.model, "adapter")
    keep_new_rows(llm.model)
    save_folder(llm, start, None, context.out, config.save_type)
    tokens = trainer.tokens
    del llm, trainer
    after = measure(LLM(context.out, dtype="float32", device=config.device), held, prompts, config)
    write_json(context.out / "result.json", {
        "init": config.init, "method": config.method, "steps": steps, "tokens": tokens,
        "learning_rate": optim.adam_lr, "trained_parameters": trained, "before": before, "after": after,
    })  # fmt: skip


def _choose_weights(llm: LLM, config: TrainConfig, seed: int) -> None:
    """Let the method's weights be trained, and no others."""
    if config.method == "lora":
        if config.base_bits:
            quantise_base(llm.model, config.base_bits)
        attach(llm.model, "adapter", config.lora, seed)
    if config.new_tokens and config.method != "full":
        train_new_rows(llm.model, llm.tokenizer.token_id(config.new_tokens[0]), len(config.new_tokens))


def _measured_before(
    context: StageContext, llm: LLM, held: StoredExamples, prompts: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """The checkpoint as it came; kept with the stage's work, so that a resumed run does not measure it again."""
    path = context.work / "before.json"
    if not path.is_file():
        write_json(path, measure(llm, held, prompts, context.config))
    before: dict[str, Any] = read_json(path)
    return before


@torch.no_grad()
def measure(llm: LLM, held: StoredExamples, prompts: Sequence[dict[str, Any]], config: TrainConfig) -> dict[str, Any]:
    """Loss (nats a trained token) and token accuracy on what was held out, and greedy replies to a few prompts."""
    objective, losses = CrossEntropy(), []
    weight = hits = 0.0
    for example in held:
        batch = to_device(pack([example.token_ids], [example.weights]), torch.device(config.device))
        loss, stats = objective(llm.model, batch)
        count = objective.counts(batch)["loss"]
        losses.append((float(loss["loss"]), count))
        weight, hits = weight + count, hits + float(stats["mean_token_accuracy"])
    params = SamplingParams(temperature=0.0, max_tokens=config.sample_tokens)
    room = [row for row in prompts if len(row["prompt_ids"]) < llm.model.config.longest]
    replies = llm.generate([row["prompt_ids"] for row in room], params) if room else []
    samples = [
        {
            "prompt": llm.tokenizer.decode(row["prompt_ids"]),
            "reference": llm.tokenizer.decode(row["reference_ids"], skip_special_tokens=True),
            "reply": llm.tokenizer.decode(reply.token_ids, skip_special_tokens=True),
        }
        for row, reply in zip(room, replies, strict=True)
    ]
    return {
        "loss": sum(loss for loss, _ in losses) / weight if weight else None,
        "accuracy": hits / weight if weight else None,
        "losses": [loss / count for loss, count in losses],
        "samples": samples,
    }
