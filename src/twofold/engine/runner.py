"""Runner: the model and the KV cache; computes a batch and moves blocks around it. Knows nothing of queues or sampling.

Shape legend: T tokens, D width, R rows of logits, V vocabulary.
"""

from __future__ import annotations

from collections import defaultdict

import torch

from twofold.engine.inputs import StepInputs, step_inputs
from twofold.engine.memory import Shape
from twofold.engine.replay import Replay
from twofold.engine.scheduler import Batch
from twofold.model.attn_inputs import PagedKV
from twofold.model.qwen3 import Qwen3

_FIRST_BLOCKS = 64  # a CPU's cache begins so small and grows as it is used


class Runner:
    """Runs batches over one cache.

    Args:
        shape: of the cache; on CPUs it is only as large as has been needed so far. min_rows: fewest rows in a matrix
            product, idle ones included. replay: recordings of the model, if any.
    """

    def __init__(self, model: Qwen3, shape: Shape, min_rows: int, replay: Replay | None = None) -> None:
        self.model, self.shape, self.min_rows, self.replay = model, shape, min_rows, replay
        device = model.model.norm.weight.device
        first = shape.blocks if shape.whole or device.type != "cpu" else min(shape.blocks, _FIRST_BLOCKS)
        self.cache = PagedKV(model.config, first, shape.block_size, model.attention_dtype, device, whole=shape.whole)

    def fits(self, shape: Shape) -> bool:
        """Whether the cache serves for ``shape`` as well, as the model stands now."""
        same = self.cache.dtype == self.model.attention_dtype
        same &= self.cache.device == self.model.model.norm.weight.device and self.shape.whole == shape.whole
        if shape.whole:
            return same and self.shape.blocks >= shape.blocks and self.shape.block_size >= shape.block_size
        return same and self.shape.block_size == shape.block_size

    @torch.no_grad()
    def run(self, batch: Batch) -> tuple[torch.Tensor, StepInputs]:
        """Final hidden states [T, D] of a batch's tokens, and what was run."""
        self._grow(batch)
        if batch.moves:
            self.cache.copy(list(batch.moves), list(batch.moves.values()), batch.moved)
        inputs = step_inputs(batch, self.cache, self.min_rows)
        hidden_TD = None if self.replay is None else self.replay.run(inputs)
        if hidden_TD is None:
            hidden_TD = self.model(inputs.tokens_T, inputs.positions_T, inputs.attn)
        by_length: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for source, target, length in batch.copies:
            by_length[length].append((source, target))
        for length, pairs in by_length.items():
            sources, targets = zip(*pairs, strict=True)
            self.cache.copy(sources, targets, length)
        return hidden_TD, inputs

    @torch.no_grad()
    def logits(self, hidden_RD: torch.Tensor) -> torch.Tensor:
        """fp32 logits [R, V] of the given hidden states."""
        missing = max(0, self.min_rows - len(hidden_RD))
        padded = torch.nn.functional.pad(hidden_RD, (0, 0, 0, missing)) if missing else hidden_RD
        return self.model.logits(padded)[: len(hidden_RD)]

    def _grow(self, batch: Batch) -> None:
        """Have the blocks that the batch uses."""
        if self.cache.blocks == self.shape.blocks:
            return
        samples = [*batch.rows, *(chunk.sample for chunk in batch.chunks)]
        highest = max(max(sample.blocks) for sample in samples)
        highest = max(highest, max((target for _, target, _ in batch.copies), default=0))
        if highest >= self.cache.blocks:
            self.cache.grow(min(self.shape.blocks, max(2 * self.cache.blocks, highest + 1)))
