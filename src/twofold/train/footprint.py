"""Where the memory of a training step goes, by formula: the largest allocations of one step in bytes, named.

A formula explains, a run decides: ``twofold plan`` measures a few real steps and shows these beside them, and every
training stage keeps them with its timings. Not here: what the allocator adds, and other processes.

Shape legend: T tokens of a micro-batch, A of them with a loss weight, D width, V vocabulary, I feed-forward width.
"""

from __future__ import annotations

from collections.abc import Sequence

from twofold.base.batch import TokenBatch
from twofold.model.config import ModelConfig
from twofold.model.qwen3 import Qwen3
from twofold.model.recompute import Recompute
from twofold.train.checkpoint import Optimizers
from twofold.train.objectives import MOST_LOGITS

HELD = ("weights", "gradients", "optimizer", "activations", "logits")


def footprint(model: Qwen3, optimizers: Optimizers, batches: Sequence[TokenBatch]) -> dict[str, float]:
    """Bytes by name at the largest of a step's micro-batches, after the first step has made the moments.

    tokens, scored: of that micro-batch, and of these with a loss weight; the only two that are no bytes.
    weights, gradients, optimizer: of the parameters. activations: kept for the backward pass, and what recompute=full
    would keep instead. logits: of the head and its backward pass. A state is written from the tensors themselves, so
    saving takes nothing more.
    """
    largest = max(batches, key=lambda batch: batch.num_tokens)
    tokens, scored = largest.num_tokens, int((largest.weights_T != 0).sum())
    tensors = [*model.parameters(), *model.buffers()]
    trained = [p for p in model.parameters() if p.requires_grad]
    states = [optimizer.state for optimizer, _ in optimizers.values()]
    moments = sum(v.numel() * v.element_size() for state in states for kept in state.values() for v in kept.values())
    weights = float(sum(t.numel() * t.element_size() for t in tensors))
    size = model.dtype.itemsize
    return {
        "tokens": float(tokens),
        "scored": float(scored),
        "weights": weights,
        "gradients": float(sum(p.numel() * p.element_size() for p in trained)),
        "optimizer": float(moments),
        "activations": activation_bytes(model.config, tokens, size),
        "activations_recomputed": activation_bytes(model.config, tokens, size, "full"),
        "logits": logits_bytes(model.config, scored, tokens),
    }


def total(parts: dict[str, float]) -> float:
    """All that a step holds at its fullest."""
    return sum(parts[name] for name in HELD)


def activation_bytes(config: ModelConfig, tokens: float, itemsize: int = 4, recompute: Recompute = "none") -> float:
    """Bytes that the layers keep for the backward pass of ``tokens``, at ``itemsize`` bytes a number.

    A layer keeps the inputs of its products and of what is element-wise between them: 4 D around the norms, queries,
    keys and values before and after rotation and as attention groups them, its result, and 3 I of the feed-forward.
    With "full" it keeps its input, and one layer at a time is whole; "selective" keeps the results of products.
    """
    width, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    shared = config.num_key_value_heads * config.head_dim
    whole = kept = float(width)  # the input of the last norm
    largest = 0.0
    for layer in range(config.num_hidden_layers):
        sparse = config.is_moe_layer(layer)
        inner = config.num_experts_per_tok * config.moe_intermediate_size if sparse else config.intermediate_size
        gathered = 2 * config.num_experts_per_tok * width + config.num_experts if sparse else 0
        numbers = 4 * width + 6 * heads + 6 * shared + 3 * inner + gathered
        largest, whole = max(largest, numbers), whole + numbers
        kept += width if recompute == "full" else 2 * width + 2 * heads + 2 * shared + 2 * inner
    if recompute == "none":
        return tokens * itemsize * whole
    return tokens * itemsize * (kept + largest)


def logits_bytes(config: ModelConfig, scored: float, tokens: float) -> float:
    """Bytes of fp32 logits, their log-softmax and gradient; in chunks beyond MOST_LOGITS. Plus the hidden states."""
    rows = min(scored * config.vocab_size, MOST_LOGITS)
    return 4.0 * (3 * rows + 2 * tokens * config.hidden_size)
