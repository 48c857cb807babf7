"""Language-model measures: bits per byte, overall and by position, and the long-range retrieval probe.

Teacher-forced: nothing is sampled here. Bits per byte do not depend on the vocabulary, so different tokenizers compare.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from twofold.base.batch import TokenBatch
from twofold.eval.stats import Interval, mean_interval, wilson
from twofold.model.attn_inputs import AttnInputs
from twofold.model.qwen3 import Qwen3
from twofold.ops import loss as ops


@torch.no_grad()
def token_nats(model: Qwen3, batch: TokenBatch) -> torch.Tensor:
    """Negative log-likelihood in nats of each target of the batch, fp32 [T]."""
    return -ops.token_logprobs(model.logits(hidden_states(model, batch)), batch.targets_T)


def hidden_states(model: Qwen3, batch: TokenBatch) -> torch.Tensor:
    """Hidden states [T, D] of a batch of whole sequences."""
    attn = AttnInputs.packed(batch.cu_seqlens, batch.tokens_T.device)
    hidden: torch.Tensor = model(batch.tokens_T, batch.positions_T, attn)
    return hidden


def bits_per_byte(
    model: Qwen3, windows: Sequence[TokenBatch], token_bytes: torch.Tensor, spans: Sequence[tuple[int, int]]
) -> list[tuple[Interval, list[float]]]:
    """Bits per byte over equal windows, for each span [from, to) of positions.

    Returns:
        For each span an interval over windows (clustered by window) and the per-window values, for paired tests.
    """
    per_span: list[list[float]] = [[] for _ in spans]
    for window in windows:
        nats = token_nats(model, window)
        sizes = token_bytes[window.targets_T].float()
        for values, (start, end) in zip(per_span, spans, strict=True):
            values.append(float(nats[start:end].sum() / math.log(2) / sizes[start:end].sum()))
    return [(mean_interval(values), values) for values in per_span]


@dataclass(frozen=True)
class ProbeDocument:
    """A tokenised retrieval document: at ``answer_places`` stand tokens that only the far past determines.

    ``distances`` counts tokens back to the place where each was stated before.
    """

    token_ids: list[int]
    answer_places: list[int]
    distances: list[int]


@torch.no_grad()
def retrieval_accuracy(model: Qwen3, documents: Sequence[ProbeDocument], min_distance: int) -> Interval:
    """Share of answers at least ``min_distance`` tokens away that the model gives (greedy)."""
    right = asked = 0
    for document in documents:
        ids = torch.tensor(document.token_ids)
        hidden = model(ids[:-1], torch.arange(len(ids) - 1), AttnInputs.packed([0, len(ids) - 1], ids.device))
        far = [p for p, d in zip(document.answer_places, document.distances, strict=True) if d >= min_distance]
        if far:
            places = torch.tensor(far)
            guesses = model.logits(hidden[places - 1]).argmax(-1)
            right += int((guesses == ids[places]).sum())
            asked += len(far)
    return wilson(right, asked)
