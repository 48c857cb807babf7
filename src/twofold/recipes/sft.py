"""`twofold run sft`: supervised fine-tuning of any checkpoint on a file of conversations, all weights or an adapter.

Three stages: the file is rendered and split, the checkpoint is trained and measured on what was held out, and a report
is written. Masks are the renderer's; nothing else decides what is trained. Not here: the loop, the renderer, formats.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from twofold.base.batch import pack
from twofold.base.config import Config, ConfigError
from twofold.base.files import read_json, read_jsonl, sha256_file, write_json, write_jsonl
from twofold.base.records import InputError, SamplingParams
from twofold.base.split import held_out
from twofold.llm import LLM
from twofold.model.lora import LoraConfig, attach, merge
from twofold.model.peft_io import save_adapter
from twofold.model.quantised import quantise_base
from twofold.post.sft import ChatSource, StoredExamples, write_examples
from twofold.recipes.chain import Chain, Stage, StageContext, command_line
from twofold.recipes.folder import save_folder
from twofold.recipes.models import is_checkpoint
from twofold.recipes.pretrain import run_training
from twofold.recipes.sft_report import SFTReportConfig, write_sft_report
from twofold.text.chat import Rendered, Renderer
from twofold.text.rows import read_views
from twofold.train.loop import OptimConfig
from twofold.train.objectives import CrossEntropy

_LEARNING_RATE = {"full": 2e-5, "lora": 2e-4}
_SAMPLES = 4


class RowsConfig(Config):
    """Which conversations are trained on.

    init, data: set at the top of the recipe. fingerprint: of both files, so that a changed file is read again.
    max_length: tokens of a view; ``too_long`` and ``broken`` say what happens to longer ones and to rows that cannot
    be read: "error" stops at the first, "skip" leaves them out, counts them and lists them in dropped.jsonl.
    held_out: share of the rows kept for measuring, chosen by content.
    """

    init: str = ""
    data: str = ""
    fingerprint: str = ""
    max_length: int = 2048
    too_long: Literal["error", "skip"] = "skip"
    broken: Literal["error", "skip"] = "error"
    held_out: float = 0.05
    train_empty_think: bool = False


class TrainConfig(Config):
    """How the checkpoint is trained.

    method: "full" trains all weights, "lora" an adapter. learning_rate: 0 takes 2e-5 for all weights, 2e-4 for an
    adapter. base_bits: 8 or 4 quantises the frozen base under an adapter, 0 leaves it. micro_tokens: most tokens in one
    forward pass. save_type: f32, f16 or bf16. sample_tokens: length of the replies in the report.
    """

    init: str = ""
    fingerprint: str = ""
    method: Literal["full", "lora"] = "full"
    epochs: float = 2.0
    batch_size: int = 16
    micro_tokens: int = 4096
    learning_rate: float = 0.0
    optim: OptimConfig = OptimConfig(muon_lr=0.0, adam_lr=0.0, betas=(0.9, 0.999), warmup=10, decay="cosine", end=0.1)
    lora: LoraConfig = LoraConfig()
    base_bits: Literal[0, 4, 8] = 0
    save_type: Literal["f32", "f16", "bf16"] = "bf16"
    sample_tokens: int = 128


class SFTRecipe(Config):
    """init: the checkpoint, a folder or .gguf file. data: JSON Lines of conversations in any known format."""

    init: str = ""
    data: str = ""
    rows: RowsConfig = RowsConfig()
    train: TrainConfig = TrainConfig()


def build(overrides: Sequence[str] = (), seed: int = 0) -> Chain:
    """The recipe's chain with overrides applied.

    Raises:
        ConfigError: init or data is missing or does not exist; the message shows the command.
    """
    config = SFTRecipe().override(overrides)
    init, data = _checkpoint(config.init), _file(config.data)
    found = _fingerprint(init)
    rows = config.rows.model_copy(
        update={"init": str(init), "data": str(data), "fingerprint": sha256_file(data)[:16] + found}
    )
    train = config.train.model_copy(update={"init": str(init), "fingerprint": found})
    if train.base_bits and train.method != "lora":
        raise ConfigError("train.base_bits needs train.method=lora: quantised weights cannot be trained themselves")
    command = command_line("sft", overrides, seed)
    stages = [
        Stage("rows", "Conversations: read, render, split", rows, (), prepare_rows),
        Stage("sft", "Supervised fine-tuning", train, ("rows",), fine_tune),
        Stage("report", "Report", SFTReportConfig(command=command), ("rows", "sft"), write_sft_report),
    ]
    return Chain("sft", stages, seed, config)


def _checkpoint(text: str) -> Path:
    path = Path(text).expanduser().absolute()
    if not text or not is_checkpoint(path):
        what = f"{text} is no checkpoint" if text else "the checkpoint is missing"
        raise ConfigError(f"{what}; give a model folder or .gguf file: --set init=PATH --set data=FILE.jsonl")
    return path


def _file(text: str) -> Path:
    path = Path(text).expanduser().absolute()
    if not text or not path.is_file():
        what = f"{text} does not exist" if text else "the data file is missing"
        raise ConfigError(f"{what}; give conversations as JSON Lines: --set data=FILE.jsonl")
    return path


def _fingerprint(init: Path) -> str:
    """Hash of names, sizes and times of a checkpoint's files: cheap for large ones, and a changed file changes it."""
    files = sorted(init.iterdir()) if init.is_dir() else [init]
    facts = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def prepare_rows(context: StageContext) -> None:
    """Render every row as the views that are trained, drop what cannot be used, split by content, and store tokens."""
    config: RowsConfig = context.config
    renderer = Renderer.from_pretrained(Path(config.init))
    kept: dict[bool, list[Rendered]] = {False: [], True: []}
    dropped: list[dict[str, str]] = []
    seen: set[str] = set()
    counts: Counter[str] = Counter()
    for place, views in _rows(config, renderer, dropped):
        key = hashlib.sha256("\n".join(view.text for view in views).encode()).hexdigest()
        if key in seen:
            dropped.append({"place": place, "reason": "the same conversation came before"})
            continue
        seen.add(key)
        kept[held_out(key, config.held_out)].extend(views)
        counts["rows"] += 1
        counts["thinking"] += any("reasoning" in view.parts for view in views)
    if not kept[False]:
        raise InputError(f"{config.data}: no conversation is left to train on; see dropped rows with twofold data view")
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
        "parts": dict(_trained_parts(kept[False])),
    })  # fmt: skip


def _rows(
    config: RowsConfig, renderer: Renderer, dropped: list[dict[str, str]]
) -> Iterator[tuple[str, tuple[Rendered, ...]]]:
    path = Path(config.data)
    for place, views in read_views(path, renderer, empty_think_trained=config.train_empty_think):
        if isinstance(views, InputError):
            if config.broken == "error":
                raise InputError(f"{path}{place}: {views}; mend the row, or leave such rows out: rows.broken=skip")
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
    rows = context.inputs["rows"]
    train, held = StoredExamples(rows / "train.safetensors"), StoredExamples(rows / "held_out.safetensors")
    prompts = read_jsonl(rows / "prompts.jsonl")
    llm = LLM(Path(config.init), dtype="float32")
    before = _measured_before(context, llm, held, prompts)
    if config.method == "lora":
        if config.base_bits:
            quantise_base(llm.model, config.base_bits)
        attach(llm.model, "adapter", config.lora, context.seed)
    trained = sum(p.numel() for p in llm.model.parameters() if p.requires_grad)
    source = ChatSource(train, config.batch_size, context.seed, config.micro_tokens)
    steps = max(1, round(config.epochs * len(train) / config.batch_size))
    optim = config.optim
    if not optim.adam_lr:
        optim = optim.model_copy(update={"adam_lr": config.learning_rate or _LEARNING_RATE[config.method]})
    llm.model.train()
    trainer = run_training(context, llm.model, source, CrossEntropy(), optim, steps)
    llm.model.eval()
    if config.method == "lora":
        save_adapter(llm.model, "adapter", context.out / "adapter", base=config.init)
        merge(llm.model, "adapter")
    save_folder(llm, Path(config.init), None, context.out, config.save_type)
    tokens = trainer.tokens
    del llm, trainer
    after = measure(LLM(context.out, dtype="float32"), held, prompts, config)
    write_json(context.out / "result.json", {
        "init": config.init, "method": config.method, "steps": steps, "tokens": tokens,
        "learning_rate": optim.adam_lr, "trained_parameters": trained, "before": before, "after": after,
    })  # fmt: skip


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
        batch = pack([example.token_ids], [example.weights])
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
