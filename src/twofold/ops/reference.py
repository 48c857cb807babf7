"""Plain PyTorch of every operation: the specification that fast versions are tested against.

Written for reading, not for speed. No module state, no process groups, no in-place changes: everything here is
differentiable. Formulas follow the Qwen3 technical report and the published transformers implementation.

Shape legend: T tokens in a flat stream, S sequences, D model width, N query heads, K key/value heads,
H head dimension, L keys of one sequence, E experts, k experts per token, I expert width, V vocabulary.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm over the last axis: statistics in fp32, multiplication by ``weight`` after the cast back."""
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def rope(x_TNH: torch.Tensor, cos_TH: torch.Tensor, sin_TH: torch.Tensor) -> torch.Tensor:
    """Rotate half-split (NeoX) pairs; ``cos_TH`` and ``sin_TH`` hold each angle twice (concatenated halves)."""
    first, second = x_TNH.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return x_TNH * cos_TH[:, None] + rotated * sin_TH[:, None]


def rope_at(x_TNH: torch.Tensor, positions_T: torch.Tensor, inv_freq: torch.Tensor) -> torch.Tensor:
    """``rope`` at the given positions; ``inv_freq``: fp32 [H/2]. Rotations add up: at 3, then at 4, is at 7."""
    angle = positions_T.float()[:, None] * inv_freq
    angle = torch.cat((angle, angle), dim=-1)
    return rope(x_TNH, angle.cos().to(x_TNH.dtype), angle.sin().to(x_TNH.dtype))


def qk_norm_rope(
    qk_TMH: torch.Tensor, weight_MH: torch.Tensor, cos_TH: torch.Tensor, sin_TH: torch.Tensor, eps: float
) -> torch.Tensor:
    """Per-head RMSNorm, then RoPE, of M = N + K query and key heads at once. ``weight_MH``: one row a head."""
    return rope(rms_norm(qk_TMH, weight_MH, eps), cos_TH, sin_TH)


def attention_one(
    q_QNH: torch.Tensor, k_LKH: torch.Tensor, v_LKH: torch.Tensor, window: int | None = None
) -> torch.Tensor:
    """Causal attention of one sequence whose Q queries are the last of its L positions. Softmax in fp32.

    With a ``window``, key j is visible to query i where i - j < window as well.
    """
    queries, keys = q_QNH.shape[0], k_LKH.shape[0]
    group = q_QNH.shape[1] // k_LKH.shape[1]
    k_LNH, v_LNH = (t.repeat_interleave(group, dim=1) for t in (k_LKH, v_LKH))
    scores = torch.einsum("qnh,lnh->nql", q_QNH, k_LNH) / math.sqrt(q_QNH.shape[-1])
    q_pos = torch.arange(keys - queries, keys, device=q_QNH.device)
    distance = q_pos[:, None] - torch.arange(keys, device=q_QNH.device)[None]
    hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
    probs = scores.float().masked_fill(hidden, -math.inf).softmax(-1).to(q_QNH.dtype)
    return torch.einsum("nql,lnh->qnh", probs, v_LNH)


def packed_attention(
    q_TNH: torch.Tensor,
    k_TKH: torch.Tensor,
    v_TKH: torch.Tensor,
    cu_seqlens: list[int],
    window: int | None = None,
) -> torch.Tensor:
    """Causal attention inside each of the S sequences of a flat stream; nothing crosses a boundary."""
    spans = zip(cu_seqlens, cu_seqlens[1:], strict=False)
    return torch.cat([attention_one(q_TNH[a:b], k_TKH[a:b], v_TKH[a:b], window) for a, b in spans])


def dual_chunk_attention(
    q_QNH: torch.Tensor,
    k_LKH: torch.Tensor,
    v_LKH: torch.Tensor,
    inv_freq: torch.Tensor,
    chunk_len: int,
    chunk_size: int,
) -> torch.Tensor:
    """Dual Chunk Attention (arXiv 2402.17463) of one sequence whose Q queries are the last of its L positions.

    Queries and keys are not rotated yet. Position p lies in chunk p // chunk_len, and every key is rotated at
    p mod chunk_len. A query sees keys of its own chunk from p mod chunk_len (intra), of the chunk before from that
    plus chunk_len, at most chunk_size (successive), of all earlier chunks from min(2 chunk_len - 1, chunk_size)
    (inter). One causal softmax in fp32 over the three groups of scores.
    """
    queries, keys = q_QNH.shape[0], k_LKH.shape[0]
    group = q_QNH.shape[1] // k_LKH.shape[1]
    k_pos = torch.arange(keys, device=q_QNH.device)
    q_pos = k_pos[keys - queries :]
    within = q_pos % chunk_len
    seen_from = (
        within,
        (within + chunk_len).clamp(max=chunk_size),
        torch.full_like(within, min(2 * chunk_len - 1, chunk_size)),
    )
    k_LNH = rope_at(k_LKH, k_pos % chunk_len, inv_freq).repeat_interleave(group, dim=1)
    intra, successive, inter = (
        torch.einsum("qnh,lnh->nql", rope_at(q_QNH, positions, inv_freq), k_LNH) / math.sqrt(q_QNH.shape[-1])
        for positions in seen_from
    )
    chunks_back = (q_pos // chunk_len)[:, None] - (k_pos // chunk_len)[None]
    scores = torch.where(chunks_back == 0, intra, torch.where(chunks_back == 1, successive, inter))
    probs = scores.float().masked_fill(k_pos[None] > q_pos[:, None], -math.inf).softmax(-1).to(q_QNH.dtype)
    return torch.einsum("nql,lnh->qnh", probs, v_LKH.repeat_interleave(group, dim=1))


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, for a projection whose first half is the gate."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def route(router_logits_TE: torch.Tensor, k: int, renormalise: bool) -> tuple[torch.Tensor, ...]:
    """Softmax over all experts in fp32, top-k, optional renormalisation.

    Returns:
        (probs_TE fp32, weights_Tk in the dtype of the logits, ids_Tk int64).
    """
    probs_TE = router_logits_TE.float().softmax(-1)
    weights_Tk, ids_Tk = probs_TE.topk(k, dim=-1)
    if renormalise:
        weights_Tk = weights_Tk / weights_Tk.sum(-1, keepdim=True)
    return probs_TE, weights_Tk.to(router_logits_TE.dtype), ids_Tk


def moe(
    x_TD: torch.Tensor,
    weights_Tk: torch.Tensor,
    ids_Tk: torch.Tensor,
    gate_up_EJD: torch.Tensor,
    down_EDI: torch.Tensor,
) -> torch.Tensor:
    """Sum of the chosen experts' SwiGLU outputs, one expert at a time (J = 2I). No capacity limit, no drops."""
    out_TD = torch.zeros_like(x_TD)
    for expert in range(gate_up_EJD.shape[0]):
        token, slot = (ids_Tk == expert).nonzero(as_tuple=True)
        if len(token):
            y = F.linear(swiglu(F.linear(x_TD[token], gate_up_EJD[expert])), down_EDI[expert])
            out_TD = out_TD.index_add(0, token, y * weights_Tk[token, slot, None])
    return out_TD


def load_balancing_loss(fraction_E: torch.Tensor, mean_prob_E: torch.Tensor) -> torch.Tensor:
    """E * sum(f * P) of one layer with f = assignments / (tokens * k): 1 at perfect balance (arXiv 2501.11873).

    Hugging Face's f is k times this one (assignments / tokens), so that balance gives k there: a coefficient of theirs
    is k of ours. Both f and P are over the whole batch that is to be balanced; f carries no gradient.
    """
    return fraction_E.shape[0] * (fraction_E * mean_prob_E).sum()


def token_logprobs(logits_TV: torch.Tensor, targets_T: torch.Tensor) -> torch.Tensor:
    """Natural-log probability of each target, fp32 [T]."""
    return logits_TV.float().log_softmax(-1).gather(-1, targets_T[:, None]).squeeze(-1)


def entropy(logits_TV: torch.Tensor) -> torch.Tensor:
    """Entropy of each row's distribution in nats, fp32 [T]."""
    logp = logits_TV.float().log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


def kl_divergence(logits_p_TV: torch.Tensor, logits_q_TV: torch.Tensor) -> torch.Tensor:
    """KL(p || q) of each row in nats over the full vocabulary, fp32 [T]."""
    logp, logq = (t.float().log_softmax(-1) for t in (logits_p_TV, logits_q_TV))
    return (logp.exp() * (logp - logq)).sum(-1)


def filter_logits(logits_RV: torch.Tensor, top_k_R: torch.Tensor, top_p_R: torch.Tensor) -> torch.Tensor:
    """Set logits outside top-k (0 = off), then outside the top-p nucleus of what is left (1 = off), to -inf."""
    rows = []
    for logits, k, p in zip(logits_RV, top_k_R.tolist(), top_p_R.tolist(), strict=True):
        order = logits.argsort(descending=True, stable=True)
        keep = order[: k or len(order)]
        probs = logits[keep].softmax(-1)
        if p < 1:
            keep = keep[(probs.cumsum(-1) - probs) < p]  # the first token is always kept
        out = torch.full_like(logits, -math.inf)
        out[keep] = logits[keep]
        rows.append(out)
    return torch.stack(rows)


def quant_linear(x: torch.Tensor, values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x times the transposed weight ``value * scale of its group``; two 4-bit values (stored + 8) in a uint8."""
    if values.dtype == torch.uint8:
        low, high = values.int() % 16 - 8, values.int() // 16 - 8
        values = torch.stack((low, high), -1).flatten(-2)
    scale = scale.float().repeat_interleave(values.shape[-1] // scale.shape[-1], -1)
    return F.linear(x, (values * scale).to(x.dtype))
