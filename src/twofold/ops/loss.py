"""Log-probabilities, entropy and KL from hidden states, without keeping more [T, V] tensors than needed.

Same results as ``ops.reference`` on ``hidden @ head.T``; everything after the matrix product is fp32.

Shape legend: T tokens, D width, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def head_logits(hidden_TD: torch.Tensor, head_VD: torch.Tensor) -> torch.Tensor:
    """Logits in fp32, [T, V]."""
    return F.linear(hidden_TD, head_VD).float()


def token_logprobs(logits_TV: torch.Tensor, targets_T: torch.Tensor) -> torch.Tensor:
    """Natural-log probability of each target, fp32 [T]; one fused forward and backward."""
    return -F.cross_entropy(logits_TV, targets_T, reduction="none")


@torch.no_grad()
def entropy(logits_TV: torch.Tensor) -> torch.Tensor:
    """Entropy of each row in nats, fp32 [T]; for reporting, carries no gradient."""
    logp = logits_TV.log_softmax(-1)
    return -torch.linalg.vecdot(logp.exp(), logp)


def entropy_with_grad(logits_TV: torch.Tensor) -> torch.Tensor:
    """Entropy of each row in nats, differentiable (for an entropy bonus)."""
    logp = logits_TV.log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


def kl_divergence(logits_p_TV: torch.Tensor, logits_q_TV: torch.Tensor) -> torch.Tensor:
    """KL(p || q) of each row in nats over the full vocabulary, fp32 [T]."""
    logp, logq = logits_p_TV.log_softmax(-1), logits_q_TV.log_softmax(-1)
    return (logp.exp() * (logp - logq)).sum(-1)
