"""Pre-training in three stages: general, reasoning, long context; each a setting of the one training loop.

Stage 3 changes the RoPE base and the sequence lengths (facts: 75 % of text in the upper half of the new length, 25 %
below). Not here: sizes, which are the recipe's, and post-training.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from twofold.base.config import Config
from twofold.base.files import read_jsonl, write_json
from twofold.base.records import Request, SamplingParams
from twofold.data.packing import MixtureEntry, PackedSource, Packing, eval_windows
from twofold.data.prefetch import prefetching
from twofold.data.shards import Shard
from twofold.data.tasktext import item_text
from twofold.engine.engine import Engine
from twofold.eval.experts import expert_report
from twofold.eval.language import ProbeDocument, bits_per_byte, retrieval_accuracy
from twofold.model.config import ModelConfig
from twofold.model.hf_config import write_generation_config
from twofold.model.qwen3 import Qwen3
from twofold.model.weights import load_weights, save_weights
from twofold.recipes.chain import StageContext
from twofold.recipes.watch import Watch
from twofold.tasks.base import sample_items
from twofold.tasks.families import default_families
from twofold.text.chat import Renderer
from twofold.text.tokenizer import Tokenizer
from twofold.train.loop import FitConfig, OptimConfig, Trainer
from twofold.train.meter import ByteCounted
from twofold.train.objectives import CrossEntropy

_DOCUMENT_TOKENS = 96  # of an answer in document format, steps included


class ModelShape(Config):
    """The sizes that differ between the recipe's models; the rest follows."""

    hidden_size: int
    intermediate_size: int
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int
    experts: int = 0
    experts_per_token: int = 0
    expert_size: int = 0

    def build(self, vocab_size: int, rope_theta: float, max_positions: int) -> ModelConfig:
        """The full model configuration (tied embeddings, vocabulary padded to a multiple of 64)."""
        return ModelConfig(
            vocab_size=-(-vocab_size // 64) * 64,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            rms_norm_eps=1e-6,
            rope_theta=rope_theta,
            max_position_embeddings=max_positions,
            tie_word_embeddings=True,
            initializer_range=0.02,
            num_experts=self.experts,
            num_experts_per_tok=self.experts_per_token,
            moe_intermediate_size=self.expert_size,
        )


class PretrainConfig(Config):
    """One pre-training stage. ``mixture`` maps shard names to shares of ``tokens``; lengths are in tokens.

    ``ordered`` names the shards that are read in their stored order, from easy to hard; the others are shuffled.
    ``head_start`` maps shards to tokens that are read before the mixture begins, on top of ``tokens``. ``packing`` and
    ``mask_documents`` are as for ``PackedSource``.
    """

    shape: ModelShape
    optim: OptimConfig
    tokens: int
    tokens_per_step: int
    mixture: dict[str, float]
    ordered: tuple[str, ...] = ()
    head_start: dict[str, int] = Field(default_factory=dict)
    length_mix: tuple[tuple[float, int, int], ...]
    rope_theta: float
    context: int
    balance: float = 0.0
    balance_scope: Literal["global", "micro"] = "global"
    micro_tokens: int = 256  # of one micro-batch, where the balance is taken over each
    task_items: int = 0  # held-out items of each family that the model is asked in document format
    packing: Packing = "stream"
    mask_documents: bool = True
    probe_distance: int = 0
    spans: tuple[tuple[int, int], ...] = ((0, 256),)
    eval_windows: int = 48


def pretrain(context: StageContext) -> None:
    """Train from scratch, or on from the stage named "start" in the inputs, and measure on held-out text."""
    config: PretrainConfig = context.config
    data = context.inputs["data"]
    tokenizer = Tokenizer.from_folder(data / "tokenizer")
    start = next((path for name, path in context.inputs.items() if name != "data"), None)
    model = start_model(config, tokenizer, start, context.seed)
    before = (
        measure(model, data, tokenizer, config, context.seed) if start is not None and config.probe_distance else None
    )
    source = PackedSource(
        [
            MixtureEntry(
                name,
                Shard.open(data / name),
                config.mixture.get(name, 0.0),
                shuffle=name not in config.ordered,
                head_start=config.head_start.get(name, 0),
            )
            for name in dict.fromkeys((*config.head_start, *config.mixture))
        ],
        config.tokens_per_step,
        config.length_mix,
        seed=context.seed,
        packing=config.packing,
        mask_documents=config.mask_documents,
    )
    steps = max(1, round((config.tokens + sum(config.head_start.values())) / config.tokens_per_step))
    objective = CrossEntropy(config.balance, config.balance_scope, config.micro_tokens)
    with prefetching(source, steps_ahead(model)) as batches:
        counted = ByteCounted(batches, token_byte_table(tokenizer))
        trainer = run_training(context, model, counted, objective, config.optim, steps)
    save_model(model, tokenizer, context.out)
    result = measure(model, data, tokenizer, config, context.seed)
    if model.config.num_experts:
        result["experts"] = expert_report(model, _documents_by_family(data, tokenizer, context.seed))
    flops = trainer.tokens * model.config.flops_per_token(context=config.context / 4, backward=True)
    result |= {"before": before, "tokens_by_source": source.tokens_by_source, "steps": steps}
    result |= {"tokens": trainer.tokens, "flops": flops}
    write_json(context.out / "result.json", result)


def start_model(config: PretrainConfig, tokenizer: Tokenizer, start: Path | None, seed: int) -> Qwen3:
    """A freshly initialised model, or the earlier stage's weights under this stage's RoPE base and context."""
    shape = config.shape.build(tokenizer.vocab_size, config.rope_theta, config.context)
    model = Qwen3(shape)
    if start is None:
        model.init_weights(seed)
    else:
        model.load_state_dict(load_weights(start).state_dict())
    return model


def steps_ahead(model: Qwen3) -> int:
    """Batches made beside the training step: on a CPU packing one takes half a millisecond of the step's own time."""
    return 0 if model.model.embed_tokens.weight.device.type == "cpu" else 2


def run_training(
    context: StageContext,
    model: Qwen3,
    source: Any,
    objective: Any,
    optim: OptimConfig,
    steps: int,
    enough: Callable[[int], bool] | None = None,
    fit: FitConfig | None = None,
) -> Trainer:
    """The one loop with this stage's progress display and trackers; leaves metrics.jsonl in the artefact."""
    context.progress.start(steps, "step")
    with Watch(context) as watch:
        trainer = Trainer(
            model, source, objective, optim, steps, context.work, lambda *step: watch.step(trainer, *step), enough
        )
        trainer.fit(fit)
    context.progress.finish()
    shutil.copyfile(trainer.metrics.path, context.out / "metrics.jsonl")
    watch.keep()
    return trainer


def save_model(model: Qwen3, tokenizer: Tokenizer, out: Path) -> None:
    """Write a complete Hugging Face folder: config, weights, tokenizer, chat format, generation defaults."""
    save_weights(model, out)
    Renderer(tokenizer).save(out)
    defaults = {
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.95,
        "top_k": 20,
        "eos_token_id": list(tokenizer.eos_ids),
        "pad_token_id": tokenizer.endoftext,
    }
    write_generation_config(out, defaults)


def token_byte_table(tokenizer: Tokenizer) -> torch.Tensor:
    """UTF-8 bytes of every token id; control tokens count 0."""
    added = {tokenizer.im_start, tokenizer.im_end, tokenizer.endoftext}
    return torch.tensor([0 if i in added else len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)])


def measure(model: Qwen3, data: Path, tokenizer: Tokenizer, config: PretrainConfig, seed: int) -> dict[str, Any]:
    """Held-out bits per byte by position span; the retrieval probe and answers to tasks where they are asked for."""
    table = token_byte_table(tokenizer)
    longest = max(end for _, end in config.spans)
    windows, _ = eval_windows(Shard.open(data / "held_out"), longest, config.eval_windows, table.numpy())
    measured = bits_per_byte(model, windows, table, config.spans)
    out: dict[str, Any] = {
        "bpb": [
            {"span": span, "interval": asdict(interval), "values": values}
            for span, (interval, values) in zip(config.spans, measured, strict=True)
        ]
    }
    if config.probe_distance:
        probes = [ProbeDocument(**row) for row in read_jsonl(data / "probes.jsonl")]
        out["probe"] = asdict(retrieval_accuracy(model, probes, config.probe_distance))
    if config.task_items:
        out["tasks"] = document_answers(model, tokenizer, config.task_items, seed)
    return out


def document_answers(model: Qwen3, tokenizer: Tokenizer, per_family: int, seed: int) -> dict[str, Any]:
    """Verdicts on held-out items posed as a document begins, greedy; what follows the last blank line is the answer."""
    tasks = {task.name: task for task in default_families()}
    items = sample_items(list(tasks.values()), per_family * len(tasks), items_seed(seed), "test")
    params = SamplingParams(temperature=0, max_tokens=_DOCUMENT_TOKENS)
    requests = [Request(tuple(tokenizer.encode(item.prompt + "\n")), params) for item in items]
    replies = Engine(model, tokenizer.eos_ids, vocab_limit=tokenizer.vocab_size).generate(requests)
    texts = [tokenizer.decode(reply.token_ids, skip_special_tokens=True) for reply in replies]
    verdicts = [
        [tasks[item.family].verify(item, text.split("\n\n")[-1])] for item, text in zip(items, texts, strict=True)
    ]
    return {"kinds": [item.family for item in items], "correct": verdicts}


def items_seed(seed: int) -> int:
    """The seed of a run's held-out items: every training seed has others, so none were used to choose settings."""
    return 20261130 + 1_000 * seed


def _documents_by_family(data: Path, tokenizer: Tokenizer, seed: int, count: int = 60) -> dict[str, list[list[int]]]:
    """Held-out documents of each task family, and of text, for looking at experts."""
    documents: dict[str, list[list[int]]] = {}
    for task in default_families():
        items = sample_items([task], count, items_seed(seed), "test")
        documents[task.name] = [tokenizer.encode(item_text(item, item.traces[0])) for item in items]
    held_out = Shard.open(data / "held_out")
    chosen = range(0, len(held_out), max(1, len(held_out) // count))
    documents["text"] = [held_out.document(index)[:128].tolist() for index in chosen]
    return documents
