"""Micro-batches cut at sequence boundaries: into finer ones when memory is short, and into shares of several ranks.

Cutting changes no number beyond the order of sums: the loop divides by the counts of the whole step. A sequence is
never cut. Not here: which sequences a step has (sources) and the division of one sequence (context parallelism).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from twofold.base.batch import TokenBatch
from twofold.base.records import InputError


def part(batch: TokenBatch, first: int, last: int) -> TokenBatch:
    """Sequences ``first`` to ``last`` (exclusive) of a micro-batch; tensors are views."""
    start, end = batch.cu_seqlens[first], batch.cu_seqlens[last]
    return TokenBatch(
        tokens_T=batch.tokens_T[start:end],
        positions_T=batch.positions_T[start:end],
        cu_seqlens=[edge - start for edge in batch.cu_seqlens[first : last + 1]],
        targets_T=batch.targets_T[start:end],
        weights_T=batch.weights_T[start:end],
        extras={name: values[start:end] for name, values in batch.extras.items()},
        source_S=batch.source_S[first:last],
    )


def split(batch: TokenBatch, parts: int) -> list[TokenBatch]:
    """At most ``parts`` micro-batches of about equal tokens, in order; one sequence at least in each."""
    sequences = len(batch.cu_seqlens) - 1
    parts = min(parts, sequences)
    if parts == 1:
        return [batch]
    cuts = [0]
    for number in range(1, parts):
        wanted = batch.num_tokens * number / parts
        last = sequences - (parts - number)  # leaves a sequence for each part to come
        cut = cuts[-1] + 1
        while cut < last and abs(batch.cu_seqlens[cut + 1] - wanted) <= abs(batch.cu_seqlens[cut] - wanted):
            cut += 1
        cuts.append(cut)
    return [part(batch, first, last) for first, last in zip(cuts, [*cuts[1:], sequences], strict=True)]


def finer(batches: Sequence[TokenBatch], parts: int) -> list[TokenBatch]:
    """Every micro-batch cut into at most ``parts``."""
    return [piece for batch in batches for piece in split(batch, parts)]


def share(batches: Sequence[TokenBatch], rank: int, ranks: int) -> list[TokenBatch]:
    """This rank's micro-batches of a step, as many as any other rank has, so that ranks meet at each.

    Whole micro-batches are dealt out when their number allows it; otherwise all sequences are cut anew.

    Raises:
        InputError: fewer sequences than ranks.
    """
    if ranks == 1:
        return list(batches)
    if len(batches) % ranks:
        sequences = sum(len(batch.cu_seqlens) - 1 for batch in batches)
        if sequences < ranks:
            raise InputError(
                f"a step of {sequences} sequences cannot be shared among {ranks} processes; "
                "give a step more tokens or start fewer processes"
            )
        rounds = min(-(-len(batches) // ranks), sequences // ranks)
        batches = split(_joined(batches), rounds * ranks)
    return list(batches[rank::ranks])


def to_device(batch: TokenBatch, device: torch.device) -> TokenBatch:
    """The micro-batch with its tensors on ``device``; itself where it is there already."""
    if batch.tokens_T.device == device:
        return batch
    return replace(
        batch,
        tokens_T=batch.tokens_T.to(device),
        positions_T=batch.positions_T.to(device),
        targets_T=batch.targets_T.to(device),
        weights_T=batch.weights_T.to(device),
        extras={name: values.to(device) for name, values in batch.extras.items()},
    )


def _joined(batches: Sequence[TokenBatch]) -> TokenBatch:
    edges = [0]
    for batch in batches:
        edges += [edges[-1] + edge for edge in batch.cu_seqlens[1:]]
    return TokenBatch(
        tokens_T=torch.cat([batch.tokens_T for batch in batches]),
        positions_T=torch.cat([batch.positions_T for batch in batches]),
        cu_seqlens=edges,
        targets_T=torch.cat([batch.targets_T for batch in batches]),
        weights_T=torch.cat([batch.weights_T for batch in batches]),
        extras={name: torch.cat([batch.extras[name] for batch in batches]) for name in batches[0].extras},
        source_S=[source for batch in batches for source in batch.source_S],
    )


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or in the allocator of a CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("DefaultCPUAllocator" in text or "not enough memory" in text)
