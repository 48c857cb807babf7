"""Plain PyTorch of every operation: the specification that fast versions are tested against.

Written for reading, not for speed. No module state, no process groups, no in-place changes: everything here is
differentiable. Formulas follow the Qwen3 technical report and the published transformers implementation.

Shape legend: T tokens in a flat stream, S sequences, D model width, N query heads, K key/value heads,
H head dimension, L keys of one sequence, R rows, P blocks of a pool, B positions of a block, E experts, k experts per
token, I expert width, V vocabulary.
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


def paged_decode(
    q_RNH: torch.Tensor,
    k_KPBH: torch.Tensor,
    v_KPBH: torch.Tensor,
    tables: list[list[int]],
    places: list[int],
    window: int | None = None,
) -> torch.Tensor:
    """One query a row, at position ``places`` of a sequence whose position p is in place p % B of block p // B of its
    table, against that sequence's keys in the pools of blocks."""
    block_size = k_KPBH.shape[2]
    rows = []
    for row, (table, place) in enumerate(zip(tables, places, strict=True)):
        where = [(table[p // block_size], p % block_size) for p in range(place + 1)]
        k_LKH, v_LKH = (torch.stack([pool[:, block, at] for block, at in where]) for pool in (k_KPBH, v_KPBH))
        rows.append(attention_one(q_RNH[row : row + 1], k_LKH, v_LKH, window))
    return torch.cat(rows)


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


def filter_logits(
    logits_RV: torch.Tensor, top_k_R: torch.Tensor, top_p_R: torch.Tensor, min_p_R: torch.Tensor | None = None
) -> torch.Tensor:
    """-inf for logits below min-p (0 = off), then outside top-k (0 = off), then outside the top-p nucleus (1 = off).

    min-p is a share of the largest probability; a nucleus is one of what the filters before it leave.
    """
    rows = []
    shares = [0.0] * len(logits_RV) if min_p_R is None else min_p_R.tolist()
    for logits, k, p, share in zip(logits_RV, top_k_R.tolist(), top_p_R.tolist(), shares, strict=True):
        order = logits.argsort(descending=True, stable=True)
        if share > 0:
            order = order[logits[order] >= logits.max() + torch.tensor(share).log()]
        keep = order[: k or len(order)]
        probs = logits[keep].softmax(-1)
        if p < 1:
            keep = keep[(probs.cumsum(-1) - probs) < p]  # the first token is always kept
        out = torch.full_like(logits, -math.inf)
        out[keep] = logits[keep]
        rows.append(out)
    return torch.stack(rows)


def sample_filtered(
    logits_RV: torch.Tensor,
    temperature_R: torch.Tensor,
    top_k_R: torch.Tensor,
    top_p_R: torch.Tensor,
    min_p_R: torch.Tensor,
    uniform_R: torch.Tensor,
) -> torch.Tensor:
    """Of what the filters leave at each row's temperature, the first token whose cumulative probability exceeds u."""
    tokens = []
    for row, (temperature, u) in enumerate(zip(temperature_R.tolist(), uniform_R.tolist(), strict=True)):
        logits = logits_RV[row : row + 1]
        if temperature > 0:
            one = slice(row, row + 1)
            left = filter_logits(logits / temperature, top_k_R[one], top_p_R[one], min_p_R[one])
            above = (left[0].double().softmax(-1).cumsum(-1) > u).nonzero().flatten()
            tokens.append(int(above[0]) if len(above) else int(left[0].isfinite().nonzero()[-1]))
        else:
            tokens.append(int(logits.argmax()))
    return torch.tensor(tokens)


def penalise(
    logits_RV: torch.Tensor,
    made_RV: torch.Tensor,
    prompt_RV: torch.Tensor,
    presence_R: torch.Tensor,
    frequency_R: torch.Tensor,
    repetition_R: torch.Tensor,
) -> torch.Tensor:
    """Repetition divides or multiplies what was seen; frequency and presence are subtracted from what was generated."""
    out = logits_RV.clone()
    for row in range(len(out)):
        for token in range(out.shape[1]):
            count = int(made_RV[row, token])
            if count or bool(prompt_RV[row, token]):
                value, factor = out[row, token], repetition_R[row]
                out[row, token] = value / factor if value > 0 else value * factor
            if count:
                out[row, token] -= frequency_R[row] * count
                out[row, token] -= presence_R[row]
    return out


def allow(logits_RV: torch.Tensor, bits_RW: torch.Tensor) -> torch.Tensor:
    """Set logits to -inf where a token's bit is 0: bit t % 32 of word t // 32 (int32), or the word is missing."""
    out = logits_RV.clone()
    for row, words in enumerate(bits_RW.tolist()):
        for token in range(out.shape[1]):
            if token // 32 >= len(words) or not words[token // 32] >> token % 32 & 1:
                out[row, token] = -math.inf
    return out


def quant_linear(x: torch.Tensor, values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x times the transposed weight ``value * scale of its group``; two 4-bit values (stored + 8) in a uint8."""
    if values.dtype == torch.uint8:
        low, high = values.int() % 16 - 8, values.int() // 16 - 8
        values = torch.stack((low, high), -1).flatten(-2)
    scale = scale.float().repeat_interleave(values.shape[-1] // scale.shape[-1], -1)
    return F.linear(x, (values * scale).to(x.dtype))
