"""The Qwen3 decoder, dense and mixture-of-experts, on a flat [T] stream: one definition for training and inference.

``model(tokens_T, positions_T, attn)`` returns final hidden states; ``model.logits`` turns the rows you need into
logits. There is no batch axis, no cache inside the model and no global state. q, k, v and gate, up are one matrix each
(``weights.py`` has the table to Hugging Face's names); everything else is named as in Hugging Face's checkpoints.
Parallelism, quantisation and adapters are applied from outside.

Shape legend: T tokens, D width, N query heads, K key/value heads, M = N + K, H head dimension, E experts,
I expert width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from twofold.model import rope
from twofold.model.attn_inputs import AttnInputs
from twofold.model.config import ModelConfig
from twofold.ops import moe as moe_ops
from twofold.ops import norm_rope
from twofold.ops.loss import head_logits
from twofold.ops.reference import route, swiglu


@dataclass
class Routing:
    """Collects what the routers did in one forward pass, MoE layers in order.

    probs: softmax over all experts, fp32 [T, E], with gradient. ids: chosen experts [T, k].
    """

    probs: list[torch.Tensor] = field(default_factory=list)
    ids: list[torch.Tensor] = field(default_factory=list)


class RMSNorm(nn.Module):
    """RMSNorm with a learned scale [D]."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return norm_rope.rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention with RoPE, per-head QK-norm before it or biases as the family has them."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.eps, self.window = layer, config.rms_norm_eps, config.layer_window(layer)
        self.inner_dtype: torch.dtype | None = None
        self.n, self.k, self.h = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.qkv_proj = nn.Linear(config.hidden_size, (self.n + 2 * self.k) * self.h, bias=config.qkv_bias)
        self.o_proj = nn.Linear(self.n * self.h, config.hidden_size, bias=config.o_bias)
        self.q_norm = RMSNorm(self.h, self.eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.h, self.eps) if config.qk_norm else None

    def forward(self, x_TD: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor], attn: AttnInputs) -> torch.Tensor:
        heads = self.qkv_proj(x_TD).view(-1, self.n + 2 * self.k, self.h)
        qk_TMH, v_TKH = heads.split([self.n + self.k, self.k], dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            scale_MH = torch.cat((self.q_norm.weight.expand(self.n, -1), self.k_norm.weight.expand(self.k, -1)))
            rotated = norm_rope.qk_norm_rope(qk_TMH, scale_MH, *angles, self.eps)
        else:
            rotated = norm_rope.rope(qk_TMH, *angles)
        q_TNH, k_TKH = rotated.split([self.n, self.k], dim=1)
        inner = self.inner_dtype or x_TD.dtype
        out_TNH = attn.attend(self.layer, q_TNH.to(inner), k_TKH.to(inner), v_TKH.to(inner), self.window)
        return self.o_proj(out_TNH.to(x_TD.dtype).flatten(1))


class DenseMLP(nn.Module):
    """SwiGLU feed-forward; the first half of ``gate_up_proj`` is the gate."""

    def __init__(self, width: int, inner: int, bias: bool = False) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(width, 2 * inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)

    def forward(self, x_TD: torch.Tensor, routing: Routing | None) -> torch.Tensor:
        return self.down_proj(swiglu(self.gate_up_proj(x_TD)))


class Experts(nn.Module):
    """Weights of all experts: gate_up_proj [E, 2I, D] and down_proj [E, D, I]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        e, i, d = config.num_experts, config.moe_intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(e, 2 * i, d))
        self.down_proj = nn.Parameter(torch.empty(e, d, i))

    def forward(self, x_TD: torch.Tensor, weights_Tk: torch.Tensor, ids_Tk: torch.Tensor) -> torch.Tensor:
        return moe_ops.moe(x_TD, weights_Tk, ids_Tk, self.gate_up_proj, self.down_proj)


class Router(nn.Linear):
    """A linear layer whose product is taken in fp32, whatever its weights are stored in."""

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        return F.linear(x_TD.float(), self.weight.float())


class SparseMLP(nn.Module):
    """Top-k of E experts: softmax over all experts in fp32, top-k, renormalise; no shared expert, no drops."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.k, self.renormalise = config.num_experts_per_tok, config.norm_topk_prob
        self.gate = Router(config.hidden_size, config.num_experts, bias=False)
        self.experts = Experts(config)

    def forward(self, x_TD: torch.Tensor, routing: Routing | None) -> torch.Tensor:
        probs_TE, weights_Tk, ids_Tk = route(self.gate(x_TD), self.k, self.renormalise)
        if routing is not None:
            routing.probs.append(probs_TE)
            routing.ids.append(ids_Tk)
        return self.experts(x_TD, weights_Tk.to(x_TD.dtype), ids_Tk)


class DecoderLayer(nn.Module):
    """Pre-norm block: attention, then a dense or sparse feed-forward, each added to the stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        dense = not config.is_moe_layer(layer)
        shape = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.mlp = DenseMLP(*shape) if dense else SparseMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x_TD: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor],
        attn: AttnInputs,
        routing: Routing | None,
    ) -> torch.Tensor:
        x_TD = x_TD + self.self_attn(self.input_layernorm(x_TD), angles, attn)
        return x_TD + self.mlp(self.post_attention_layernorm(x_TD), routing)


class Decoder(nn.Module):
    """Embedding, layers and final norm (Hugging Face's ``model.`` prefix)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


@dataclass(eq=False)
class TokenRows:
    """Rows of tokens ``ids`` in the table at ``path`` that an adapter brings.

    own: the rows [len(ids), D]. base: what they have replaced in the table; None while they are not in it.
    """

    path: str
    ids: list[int]
    own: torch.Tensor
    base: torch.Tensor | None = None


@dataclass(eq=False)
class Adapter:
    """An adapter on a model, from its installation to its end. rows: in the order in which they are put into tables."""

    name: str
    rows: list[TokenRows] = field(default_factory=list)


@dataclass(eq=False)
class Adapters:
    """The adapters on a model, and the one that takes part."""

    named: dict[str, Adapter] = field(default_factory=dict)
    active: Adapter | None = None


class Qwen3(nn.Module):
    """A causal language model. Weights are uninitialised until ``init_weights`` or a checkpoint fills them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.packed_head: nn.Module | None = None  # takes the head's place in a quantised model
        self.adapters = Adapters()

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fill weights as Hugging Face does: matrices N(0, initializer_range), norms 1, biases 0.

        They follow from ``seed`` alone and are the same on every device.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                drawn = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
                parameter.copy_(drawn.normal_(0.0, self.config.initializer_range, generator=generator))

    def set_attention_dtype(self, dtype: torch.dtype | None) -> None:
        """Compute softmax(q k) v in ``dtype`` (None: that of the activations), in training and decoding alike.

        Sampling and training reduce over keys in different orders; in fp64 both round to the same fp32 number, so
        rollout and trainer log-probabilities agree bit for bit on a CPU. Costs about a third of a step.
        """
        for attention in self._attentions():
            attention.inner_dtype = dtype

    @property
    def attention_dtype(self) -> torch.dtype:
        """What attention is computed and cached in."""
        return self._attentions()[0].inner_dtype or self.dtype

    @property
    def dtype(self) -> torch.dtype:
        """What activations are computed in. A quantised model stores its embedding in fewer bits."""
        return self.model.norm.weight.dtype

    def _attentions(self) -> list[Attention]:
        return [module for module in self.modules() if isinstance(module, Attention)]

    @property
    def head_weight(self) -> torch.Tensor:
        """The output matrix [V, D]: the embedding when tied."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def forward(
        self, tokens_T: torch.Tensor, positions_T: torch.Tensor, attn: AttnInputs, routing: Routing | None = None
    ) -> torch.Tensor:
        """Final hidden states [T, D] after the last norm.

        Args:
            tokens_T, positions_T: int64. attn: which tokens see which. routing: filled by MoE layers when given.
        """
        x_TD = self.model.embed_tokens(tokens_T).to(self.dtype)
        angles, attn = self._angles(positions_T, attn, x_TD.dtype)
        for layer in self.model.layers:
            x_TD = layer(x_TD, angles, attn, routing)
        return self.model.norm(x_TD)

    def _angles(
        self, positions_T: torch.Tensor, attn: AttnInputs, dtype: torch.dtype
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], AttnInputs]:
        """cos and sin of each token, as its sequence is coded, and the attention facts with that coding filled in."""
        config, context = self.config, self.config.context
        coding = rope.frequencies(config.rope_theta, config.head_dim, context, positions_T.device)
        if context is None:
            return rope.angles(positions_T, coding.native, dtype), attn
        attn = attn.coded(context, coding.native)
        extended_T = attn.extended_T
        if extended_T is None:
            return rope.angles(positions_T, coding.native, dtype), attn
        if attn.chunks is not None:
            positions_T = torch.where(extended_T, positions_T % attn.chunks.length, positions_T)
        return rope.mixed_angles(positions_T, coding, extended_T, dtype), attn

    def logits(self, hidden_TD: torch.Tensor, ids: list[int] | None = None) -> torch.Tensor:
        """fp32 logits [T, V] of the given hidden states, or [T, len(ids)] of these tokens alone."""
        if self.packed_head is not None:
            logits_TV: torch.Tensor = self.packed_head(hidden_TD).float()
            return logits_TV if ids is None else logits_TV[:, ids]
        return head_logits(hidden_TD, self.head_weight if ids is None else self.head_weight[ids])
