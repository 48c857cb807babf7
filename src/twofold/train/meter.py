"""How fast a run is: tokens, operations and seconds of recent steps as rates, against what the device can do.

The ceiling is not a number from a data sheet: it is the best rate of a matrix product of the type that computes, taken
once a process. Operations are those that the model needs (arXiv 2001.08361): what is done twice, to save memory or to
balance experts, does not count. Readings differ from run to run, so they have a file of their own, apart from metrics.

Shape legend: T tokens of a micro-batch, D width.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch

from twofold.base import log
from twofold.base.batch import BatchSource, TokenBatch
from twofold.model.qwen3 import Qwen3

RECENT = 16  # steps that a reading looks back on
_PRODUCT = {"cpu": 1024, "cuda": 4096}  # rows and columns of the product that measures the ceiling
_CEILING_SECONDS = 0.2


class Work(NamedTuple):
    """One step: tokens of all ranks, operations of all ranks, seconds it took, and of these in the source."""

    tokens: int
    flops: float
    seconds: float
    waiting: float


class Meter:
    """Rates over the last steps. The first step of a process, which warms up, counts only until there is another.

    Args:
        devices: how many work together.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, devices: int = 1) -> None:
        self.device, self.dtype, self.devices = device, dtype, devices
        self.recent: deque[Work] = deque(maxlen=RECENT)
        self._warm = False

    def add(self, work: Work) -> None:
        """Take in a step."""
        if len(self.recent) == 1 and not self._warm:
            self.recent.clear()
            self._warm = True
        self.recent.append(work)

    def reading(self) -> dict[str, float]:
        """What recent steps come to, and the memory of this process's device.

        tokens_per_second: of the whole step. tflops (10^12 a second) and mfu (share of the ceiling of all devices): of
        the time outside the source, which may have sampled. waiting: share of the time in the source. memory_bytes and
        peak_memory_bytes: resident set on a CPU, allocated tensors on a GPU.
        """
        tokens, flops, seconds, waiting = (sum(column) for column in zip(*self.recent, strict=True))
        rate = flops / max(seconds - waiting, 1e-9)
        now, peak = memory(self.device)
        return {
            "seconds": self.recent[-1].seconds,
            "tokens_per_second": tokens / max(seconds, 1e-9),
            "tflops": rate / 1e12,
            "mfu": rate / (ceiling(self.device, self.dtype) * self.devices),
            "waiting": waiting / max(seconds, 1e-9),
            "memory_bytes": now,
            "peak_memory_bytes": peak,
        }


@cache
def ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of the fastest of many square matrix products in ``dtype``; takes 0.2 s, once a process."""
    size = _PRODUCT.get(device.type, 1024)
    a_DD, b_DD = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    out_DD, best, begun = torch.empty_like(a_DD), math.inf, time.perf_counter()
    repeats = 1 if device.type == "cpu" else 16  # a launch on a GPU costs as much as a small product
    while time.perf_counter() - begun < _CEILING_SECONDS or best == math.inf:
        _synchronise(device)
        start = time.perf_counter()
        for _ in range(repeats):
            torch.mm(a_DD, b_DD, out=out_DD)
        _synchronise(device)
        best = min(best, (time.perf_counter() - start) / repeats)
    return 2 * size**3 / best


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory(device: torch.device) -> tuple[int, int]:
    """Bytes in use now and at most so far."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    return log.memory_bytes(), log.peak_memory_bytes()


def step_flops(model: Qwen3, batches: Iterable[TokenBatch]) -> float:
    """Operations of one step's forward and backward passes.

    Two a multiply-add: once forward, once for gradients of inputs, and once more for weights that are trained. The head
    counts where a token carries a loss weight, attention where a query sees a key, experts where a token visits them.
    """
    tokens = scored = 0
    visible: dict[int | None, float] = dict.fromkeys(_windows(model), 0.0)
    for batch in batches:
        tokens += batch.num_tokens
        scored += int((batch.weights_T != 0).sum())
        for begin, end in zip(batch.cu_seqlens, batch.cu_seqlens[1:], strict=False):
            for window in visible:
                visible[window] += _visible(end - begin, window)
    config = model.config
    frozen, trained = _matrices(model)
    head = config.vocab_size * config.hidden_size
    head_trained = model.packed_head is None and model.head_weight.requires_grad
    products = tokens * (4 * frozen + 6 * trained) + scored * head * (6 if head_trained else 4)
    keys = sum(visible[config.layer_window(layer)] for layer in range(config.num_hidden_layers))
    return products + 3 * 4 * config.num_attention_heads * config.head_dim * keys


def _windows(model: Qwen3) -> set[int | None]:
    return {model.config.layer_window(layer) for layer in range(model.config.num_hidden_layers)}


def _visible(length: int, window: int | None) -> float:
    """Pairs of query and key of one sequence."""
    seen = length * (length + 1) / 2
    beyond = max(0, length - window) if window is not None else 0
    return seen - beyond * (beyond + 1) / 2


def _matrices(model: Qwen3) -> tuple[float, float]:
    """Elements of layers that one token is multiplied with: frozen (packed ones too), and trained."""
    config = model.config
    active = config.num_experts_per_tok / config.num_experts if config.num_experts else 1.0
    own = adapters = 0.0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ".layers." in name:
            size = parameter.numel() * (active if ".experts." in name else 1.0)
            adapters += size if ".adapters." in name else 0.0
            own += 0.0 if ".adapters." in name else size
    heads = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    return max(0.0, config.num_parameters(active=True) - heads - own), own + adapters


class ByteCounted:
    """A source that also tells how many bytes a predicted token stands for, so that loss can be read in bits per byte.

    Args:
        bytes_V: UTF-8 bytes of every token id.
    """

    def __init__(self, source: BatchSource, bytes_V: torch.Tensor) -> None:
        self.source, self.bytes_V = source, bytes_V.double()
        self.metrics: dict[str, float] = {}

    @property
    def can_checkpoint(self) -> bool:
        return self.source.can_checkpoint

    def next_step(self) -> list[TokenBatch]:
        """The source's next step; ``metrics`` then has its ``bytes_per_token``."""
        batches = self.source.next_step()
        size = sum(float(self.bytes_V[batch.targets_T] @ batch.weights_T.double()) for batch in batches)
        weight = sum(float(batch.weights_T.sum()) for batch in batches)
        self.metrics = getattr(self.source, "metrics", {}) | {"bytes_per_token": size / max(weight, 1e-9)}
        return batches

    def state_dict(self) -> dict[str, Any]:
        return self.source.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.source.load_state_dict(state)


def bits_per_byte(row: Mapping[str, Any]) -> float | None:
    """Loss of a row of metrics in bits per byte of text, None where it does not say how many bytes a token has."""
    if "loss" not in row or not row.get("bytes_per_token"):
        return None
    return float(row["loss"]) / math.log(2) / float(row["bytes_per_token"])
