"""Log-probabilities, entropy and KL from hidden states, without keeping more [T, V] tensors than needed.

Same results as ``ops.reference`` on ``hidden @ head.T``; everything after the matrix product is fp32.

Shape legend: T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

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


def linear_logprobs(
    hidden_TD: torch.Tensor, head_VD: torch.Tensor, targets_T: torch.Tensor, chunk: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """``token_logprobs`` of ``head_logits`` and whether each target is the likeliest token, ``chunk`` rows at a time.

    No more than [chunk, V] logits exist at any moment, forward or backward; the backward pass makes them once more.

    Returns:
        Log-probabilities, fp32 [T], and hits, bool [T] (without gradient).
    """
    logp_T, hits_T = _LinearLogprobs.apply(hidden_TD, head_VD, targets_T, chunk)
    return logp_T, hits_T


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TD: torch.Tensor, head_VD: torch.Tensor, targets_T: torch.Tensor, chunk: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = len(hidden_TD)
        logp_T = torch.empty(rows, dtype=torch.float32, device=hidden_TD.device)
        norm_T = torch.empty_like(logp_T)
        hits_T = torch.empty(rows, dtype=torch.bool, device=hidden_TD.device)
        for begin in range(0, rows, chunk):
            part = slice(begin, begin + chunk)
            logits = head_logits(hidden_TD[part], head_VD)
            targets = targets_T[part]
            norm_T[part] = logits.logsumexp(-1)
            logp_T[part] = logits.gather(-1, targets[:, None]).squeeze(-1) - norm_T[part]
            hits_T[part] = logits.argmax(-1) == targets
        ctx.save_for_backward(hidden_TD, head_VD, targets_T, norm_T)
        ctx.chunk = chunk
        ctx.mark_non_differentiable(hits_T)
        return logp_T, hits_T

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None, None]:
        hidden_TD, head_VD, targets_T, norm_T = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden_TD)
        grad_head = torch.zeros_like(head_VD, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for begin in range(0, len(hidden_TD), ctx.chunk):
            part = slice(begin, begin + ctx.chunk)
            hidden, upstream = hidden_TD[part], grads[0][part, None]
            grad_logits = (head_logits(hidden, head_VD) - norm_T[part, None]).exp_().mul_(-upstream)
            grad_logits.scatter_add_(-1, targets_T[part, None], upstream)
            typed = grad_logits.to(head_VD.dtype)
            grad_hidden[part] = typed @ head_VD
            if grad_head is not None:
                grad_head += typed.T @ hidden
        return grad_hidden, None if grad_head is None else grad_head.to(head_VD.dtype), None, None
