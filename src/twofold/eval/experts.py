"""How a mixture-of-experts model uses its experts: load, dead experts, and specialisation by kind of text.

Specialisation is the total-variation distance between the routing distributions of two kinds, averaged over pairs of
kinds and over layers: 0 when all kinds use experts alike, 1 when they share none. Intervals come from resampling
documents. Shape legend: N documents, L MoE layers, E experts.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from twofold.base.batch import boundaries, positions
from twofold.model.attn_inputs import AttnInputs
from twofold.model.qwen3 import Qwen3, Routing

_RESAMPLES = 200


@torch.no_grad()
def routing_counts(model: Qwen3, documents: Sequence[Sequence[int]]) -> torch.Tensor:
    """Assignments of each document's tokens to each expert, [N, L, E]."""
    lengths = [len(document) for document in documents]
    routing = Routing()
    tokens = torch.tensor([token for document in documents for token in document])
    model(tokens, positions(lengths), AttnInputs.packed(boundaries(lengths), tokens.device), routing)
    experts = model.config.num_experts
    layers = []
    for ids_Tk in routing.ids:
        one_hot = torch.nn.functional.one_hot(ids_Tk, experts).sum(1).float()
        layers.append(torch.stack([part.sum(0) for part in one_hot.split(lengths)]))
    return torch.stack(layers, dim=1)


def expert_report(model: Qwen3, documents: Mapping[str, Sequence[Sequence[int]]], seed: int = 0) -> dict[str, Any]:
    """Load per layer and expert, dead experts, shares by kind, and specialisation with resamples; JSON-able."""
    counts = {kind: routing_counts(model, rows) for kind, rows in documents.items()}
    total_LE = torch.stack([c.sum(0) for c in counts.values()]).sum(0)
    generator = torch.Generator().manual_seed(seed)
    resamples = []
    for _ in range(_RESAMPLES):
        drawn = {k: c[torch.randint(len(c), (len(c),), generator=generator)] for k, c in counts.items()}
        resamples.append(float(specialisation(drawn).mean()))
    return {
        "load": _shares(total_LE).tolist(),
        "dead": int((total_LE == 0).sum()),
        "family_tv": specialisation(counts).tolist(),
        "family_tv_samples": resamples,
        "by_family": {kind: _shares(c.sum(0)).tolist() for kind, c in counts.items()},
    }


def specialisation(counts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Mean total-variation distance between the kinds' routing, for each layer [L]."""
    shares = [_shares(c.sum(0)) for c in counts.values()]
    distances = [0.5 * (a - b).abs().sum(-1) for a, b in itertools.combinations(shares, 2)]
    return torch.stack(distances).mean(0)


def _shares(counts_LE: torch.Tensor) -> torch.Tensor:
    return counts_LE / counts_LE.sum(-1, keepdim=True)
