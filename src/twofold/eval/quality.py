"""What packing a model's weights costs: its next-token distributions against the same weights in fp32.

Teacher-forced on plain text, all windows of one length. Not here: tasks, which need samples (``eval/scores.py``).

Shape legend: T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from twofold.base.batch import pack
from twofold.base.records import InputError
from twofold.eval.language import hidden_states
from twofold.eval.stats import Interval, mean_interval
from twofold.model.qwen3 import Qwen3
from twofold.ops import loss as ops

_ROWS = 128  # of logits that exist at once


@dataclass(frozen=True)
class Quality:
    """How near one model's distributions are to a reference's; intervals are over windows.

    kl: mean KL(reference || other) in nats a token. kl_median, kl_p99, kl_max: over tokens. top1: share of tokens where
    both find the same token likeliest. nats, reference_nats: mean loss of each on the text; loss: their difference.
    """

    tokens: int
    windows: int
    kl: Interval
    kl_median: float
    kl_p99: float
    kl_max: float
    top1: Interval
    nats: float
    reference_nats: float
    loss: Interval


def windows_of(tokens: Sequence[int], length: int, count: int) -> list[list[int]]:
    """``count`` windows of ``length`` + 1 tokens, evenly spread over a text and never overlapping.

    Raises:
        InputError: the text is too short for two.
    """
    fitting = min(count, len(tokens) // (length + 1))
    if fitting < 2:
        raise InputError(f"the text has {len(tokens)} tokens, two windows of {length} need more; give a longer text")
    stride = len(tokens) / fitting
    return [list(tokens[int(i * stride) : int(i * stride) + length + 1]) for i in range(fitting)]


@torch.no_grad()
def compare(
    reference: Qwen3, other: Qwen3, windows: Sequence[Sequence[int]], on_window: Callable[[int], None] = lambda _: None
) -> Quality:
    """Compare two models with one vocabulary on windows of tokens.

    Args:
        on_window: called with the number of windows done, for progress.
    """
    kls: list[torch.Tensor] = []
    same: list[torch.Tensor] = []
    nats: list[torch.Tensor] = []
    reference_nats: list[torch.Tensor] = []
    for done, window in enumerate(windows, 1):
        batch = pack([window])
        hidden_p, hidden_q = hidden_states(reference, batch), hidden_states(other, batch)
        for rows in torch.arange(batch.num_tokens).split(_ROWS):
            p_TV, q_TV = reference.logits(hidden_p[rows]), other.logits(hidden_q[rows])
            kls.append(ops.kl_divergence(p_TV, q_TV))
            same.append((p_TV.argmax(-1) == q_TV.argmax(-1)).float())
            reference_nats.append(-ops.token_logprobs(p_TV, batch.targets_T[rows]))
            nats.append(-ops.token_logprobs(q_TV, batch.targets_T[rows]))
        on_window(done)
    by_token = torch.cat(kls).clamp(min=0.0)
    one, two = torch.cat(nats), torch.cat(reference_nats)
    return Quality(
        tokens=len(by_token),
        windows=len(windows),
        kl=_over_windows(by_token, len(windows)),
        kl_median=float(by_token.median()),
        kl_p99=float(by_token.quantile(0.99)),
        kl_max=float(by_token.max()),
        top1=_over_windows(torch.cat(same), len(windows)),
        nats=float(one.mean()),
        reference_nats=float(two.mean()),
        loss=_over_windows(one - two, len(windows)),
    )


def _over_windows(values_T: torch.Tensor, windows: int) -> Interval:
    return mean_interval(values_T.double().unflatten(0, (windows, -1)).mean(1).tolist())
