"""How a mixture-of-experts model uses its experts: load, dead experts, and specialisation by kind of text.

Specialisation is the total-variation distance between the routing distributions of two kinds, averaged over pairs of
kinds and over layers: 0 when all kinds use experts alike, 1 when they share none. Plain text is far from every task, so
specialisation among the tasks alone is given too. Intervals come from resampling documents.
Shape legend: N documents, L MoE layers, E experts.
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
_TEXT = "text"  # the kind that is not a task


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
    """Load per layer and expert, dead experts, shares by kind, and specialisation with resamples; JSON-able.

    "family_tv" and "task_tv" are by layer, over all kinds and over all but "text"; their samples are means over layers,
    both from the same resamples. "pairs" has each two kinds' distance, mean over layers, under "a|b". Where fewer than
    two kinds are tasks, "task_tv" and its samples are empty.
    """
    counts = {kind: routing_counts(model, rows) for kind, rows in documents.items()}
    total_LE = torch.stack([c.sum(0) for c in counts.values()]).sum(0)
    generator = torch.Generator().manual_seed(seed)
    tasks = [kind for kind in counts if kind != _TEXT]
    family_samples, task_samples = [], []
    for _ in range(_RESAMPLES):
        drawn = {k: c[torch.randint(len(c), (len(c),), generator=generator)] for k, c in counts.items()}
        family_samples.append(float(specialisation(drawn).mean()))
        if len(tasks) > 1:
            task_samples.append(float(specialisation({kind: drawn[kind] for kind in tasks}).mean()))
    return {
        "load": _shares(total_LE).tolist(),
        "dead": int((total_LE == 0).sum()),
        "family_tv": specialisation(counts).tolist(),
        "family_tv_samples": family_samples,
        "task_tv": specialisation({kind: counts[kind] for kind in tasks}).tolist() if len(tasks) > 1 else [],
        "task_tv_samples": task_samples,
        "pairs": {f"{a}|{b}": float(distance_L.mean()) for (a, b), distance_L in distances(counts).items()},
        "by_family": {kind: _shares(c.sum(0)).tolist() for kind, c in counts.items()},
    }


def specialisation(counts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Mean total-variation distance between the kinds' routing, for each layer [L]."""
    return torch.stack(list(distances(counts).values())).mean(0)


def distances(counts: Mapping[str, torch.Tensor]) -> dict[tuple[str, str], torch.Tensor]:
    """Total-variation distance between the routing of each two kinds, for each layer [L]."""
    shares = {kind: _shares(c.sum(0)) for kind, c in counts.items()}
    return {(a, b): 0.5 * (shares[a] - shares[b]).abs().sum(-1) for a, b in itertools.combinations(shares, 2)}


def _shares(counts_LE: torch.Tensor) -> torch.Tensor:
    return counts_LE / counts_LE.sum(-1, keepdim=True)
