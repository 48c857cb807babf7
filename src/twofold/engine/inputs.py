"""From a batch to the tensors of one forward pass.

Shape legend: T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from twofold.engine.request import Sample
from twofold.engine.scheduler import Batch, Chunk
from twofold.model.attn_inputs import AttnInputs, PagedKV, Rows, Span, integers


@dataclass(frozen=True, slots=True)
class StepInputs:
    """What the model is called with, and what its tokens are: one of each row, those of the chunks, idle ones."""

    tokens_T: torch.Tensor
    positions_T: torch.Tensor
    attn: AttnInputs
    rows: list[Sample]
    chunks: list[Chunk]


def step_inputs(batch: Batch, cache: PagedKV, min_tokens: int) -> StepInputs:
    """Order a batch as ``AttnInputs.paged`` wants it and write out its tokens, with idle ones up to ``min_tokens``.

    Rows stand in the order of their blocks where each has one, else by length, longest first: then they can be read
    together.
    """
    rows = sorted(batch.rows, key=_first_block if cache.whole else _fewest_left)
    chunks = sorted(batch.chunks, key=lambda chunk: chunk.begin > 0)
    places = [sample.computed for sample in rows]
    tokens, positions = [sample.tokens[-1] for sample in rows], list(places)
    for chunk in chunks:
        known = chunk.sample.tokens[chunk.begin : chunk.end]
        tokens += known + chunk.sample.draft[: chunk.end - chunk.begin - len(known)]
        positions += range(chunk.begin, chunk.end)
    idle = max(0, min_tokens - len(tokens))
    tokens_T, positions_T = (integers(values + [0] * idle, cache.device) for values in (tokens, positions))
    spans = [Span(c.sample.blocks, c.begin, c.end, c.sample.extended) for c in chunks]
    columns = Rows([sample.blocks for sample in rows], places, [sample.extended for sample in rows])
    return StepInputs(tokens_T, positions_T, AttnInputs.paged(columns, spans, cache, idle), rows, chunks)


def _first_block(sample: Sample) -> int:
    return sample.blocks[0]


def _fewest_left(sample: Sample) -> int:
    return -sample.computed
