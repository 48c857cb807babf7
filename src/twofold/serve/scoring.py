"""Log-probabilities of a prompt's own tokens, with the likeliest alternatives, for completions that echo it.

One forward pass, without the cache; logits are made a stretch at a time, because a vocabulary is wide. Not here:
sampling, and sequences of many requests (``Engine.score``).

Shape legend: T tokens, V vocabulary, K alternatives.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from twofold.base.batch import boundaries, positions
from twofold.model.attn_inputs import AttnInputs
from twofold.model.qwen3 import Qwen3
from twofold.serve.replies import Score

_STRETCH = 256  # positions whose logits are held at once


@torch.no_grad()
def score_prompt(model: Qwen3, ids: Sequence[int], top: int) -> list[Score]:
    """One ``Score`` a token; the first has no log-probability.

    Args:
        model: the model. ids: the prompt, at least one token. top: alternatives at each place, likeliest first.
    """
    device = model.model.embed_tokens.weight.device
    scores = [Score(ids[0], None)]
    if len(ids) == 1:
        return scores
    lengths = [len(ids) - 1]
    tokens_T = torch.tensor(ids, device=device)
    hidden_TD = model(tokens_T[:-1], positions(lengths).to(device), AttnInputs.packed(boundaries(lengths), device))
    for begin in range(0, lengths[0], _STRETCH):
        logprobs_TV = model.logits(hidden_TD[begin : begin + _STRETCH]).float().log_softmax(-1)
        targets_T = tokens_T[1 + begin : 1 + begin + len(logprobs_TV)]
        own_T = logprobs_TV.gather(-1, targets_T[:, None]).squeeze(-1).tolist()
        best_TK, which_TK = (found.tolist() for found in logprobs_TV.topk(min(top, logprobs_TV.shape[-1]), dim=-1))
        for token, own, which, best in zip(targets_T.tolist(), own_T, which_TK, best_TK, strict=True):
            scores.append(Score(token, own, tuple(zip(which, best, strict=True))))
    return scores
