"""The shape of a model, in Hugging Face's key names. No class defaults for model values: a missing key is an error.

Not here: sizes of released checkpoints, or anything about training.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import model_validator

from twofold.base.config import Config

LARGEST = 2**31  # of any size; what is beyond it, or makes a model of more parameters than _MOST_PARAMETERS, is damage
_MOST_PARAMETERS = 10**15


class Context(Config):
    """How positions beyond the native length are coded. ``native`` and ``target`` are tokens, their ratio the factor.

    method: "yarn" (NTK by parts with attention factor, arXiv 2309.00071), "dca" (Dual Chunk Attention, training-free,
        arXiv 2402.17463) or "llama3" (Llama 3.1's frequency scaling, always on).
    static: code every sequence that way; otherwise a sequence that fits ``native`` keeps its plain RoPE, decided for
        each sequence when it begins, because cached keys are rotated.
    beta_fast, beta_slow, attention_factor (None: 0.1 ln(factor) + 1): YaRN's.
    low_freq_factor, high_freq_factor: llama3's.
    chunk_size, local_window: dca's, in tokens (None: 3/4 and 1/16 of ``native``).
    """

    native: int
    target: int
    method: Literal["yarn", "dca", "llama3"] = "yarn"
    static: bool = False
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    chunk_size: int | None = None
    local_window: int | None = None

    @model_validator(mode="after")
    def _check(self) -> Context:
        if not 0 < self.native <= self.target:
            raise ValueError(f"context needs 0 < native <= target, got {self.native} and {self.target}")
        if self.target > LARGEST:
            raise ValueError(f"context.target must be <= {LARGEST}, got {self.target}")
        if self.method == "dca" and not 0 < self.chunk_len <= self.dca_chunk_size <= self.native:
            raise ValueError(
                f"dca needs 0 <= local_window < chunk_size <= native, got {self.dca_chunk_size - self.chunk_len}, "
                f"{self.dca_chunk_size} and {self.native}"
            )
        if self.method == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(f"low_freq_factor must be below high_freq_factor, got {self.low_freq_factor}")
        if self.method == "yarn" and not 0 < self.beta_slow <= self.beta_fast < math.inf:
            raise ValueError(f"yarn needs 0 < beta_slow <= beta_fast, got {self.beta_slow} and {self.beta_fast}")
        if self.attention_factor is not None and not 0 < self.attention_factor <= LARGEST:
            raise ValueError(f"attention_factor must be a number above 0, got {self.attention_factor}")
        return self

    @property
    def factor(self) -> float:
        """target / native."""
        return self.target / self.native

    @property
    def dca_chunk_size(self) -> int:
        """Dual Chunk Attention: the furthest position a query takes."""
        return self.chunk_size if self.chunk_size is not None else self.native * 3 // 4

    @property
    def chunk_len(self) -> int:
        """Dual Chunk Attention: tokens in a chunk, ``dca_chunk_size`` less the local window."""
        return self.dca_chunk_size - (self.local_window if self.local_window is not None else self.native // 16)

    @property
    def always(self) -> bool:
        """True where every sequence is coded that way, however short."""
        return self.static or self.method == "llama3"

    def describe(self) -> str:
        """One line for logs: what happens beyond the native length, with the factor derived."""
        names = {"yarn": "YaRN", "dca": "Dual Chunk Attention", "llama3": "Llama 3 frequency scaling"}
        how = "for every sequence" if self.always else "for sequences beyond the native length"
        factor = "" if self.method == "dca" else f", factor {self.factor:g}"
        return f"{names[self.method]} from {self.native} to {self.target} tokens{factor}, {how}"

    def extends(self, tokens: int) -> bool:
        """True where a sequence that will occupy ``tokens`` positions is coded beyond the native length."""
        return self.always or tokens > self.native


_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings",
)  # fmt: skip
_MOST = 10_000


class ModelConfig(Config):
    """A decoder of the Qwen family; ``num_experts`` 0 means dense. Keys as in ``config.json`` where it has them.

    qk_norm and qkv_bias tell the families apart: Qwen3 (norm, no bias), Qwen2 and 2.5 (bias, no norm), Llama (neither).
    o_bias, mlp_bias: biases of the output projection and of the dense feed-forward, which some Llamas have.
    sliding_window: tokens a query of layers >= max_window_layers can see, itself included (None: all before it).
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    initializer_range: float
    qk_norm: bool = True
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    context: Context | None = None
    sliding_window: int | None = None
    max_window_layers: int = 0
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = True
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        small = [name for name in _SIZES if getattr(self, name) < 1]
        if small:
            raise ValueError(f"{small[0]} must be >= 1, got {getattr(self, small[0])}")
        if self.num_hidden_layers > _MOST or self.num_experts > _MOST:  # a damaged number: building would not end
            raise ValueError(f"num_hidden_layers and num_experts must be <= {_MOST}")
        large = [name for name in (*_SIZES, "moe_intermediate_size") if getattr(self, name) > LARGEST]
        if large:
            raise ValueError(f"{large[0]} must be <= {LARGEST}, got {getattr(self, large[0])}")
        if not (1 < self.rope_theta < math.inf and 0 <= self.rms_norm_eps < math.inf):
            raise ValueError(
                f"rope_theta must be above 1 and rms_norm_eps >= 0, got {self.rope_theta} and {self.rms_norm_eps}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for RoPE, got {self.head_dim}")
        if self.num_experts and not 0 < self.num_experts_per_tok <= self.num_experts:
            raise ValueError(f"num_experts_per_tok must be in 1..{self.num_experts}, got {self.num_experts_per_tok}")
        if self.num_experts and self.moe_intermediate_size < 1:
            raise ValueError("moe_intermediate_size must be given when num_experts > 0")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window must be >= 1 or null, got {self.sliding_window}")
        if self.sliding_window is not None and self.context is not None and self.context.method == "dca":
            raise ValueError("sliding_window and context.method 'dca' exclude each other: leave one of them out")
        if self.mlp_bias and self.num_experts:
            raise ValueError("mlp_bias is for dense models; experts have no biases")
        if self.decoder_sparse_step < 1:
            raise ValueError(f"decoder_sparse_step must be >= 1, got {self.decoder_sparse_step}")
        if self.num_parameters() > _MOST_PARAMETERS:
            raise ValueError(f"these sizes make {self.num_parameters():.1e} parameters; one of them is wrong")
        return self

    @property
    def longest(self) -> int:
        """Most positions a sequence may take. Llama 3's scaling does not say it: 3.1 is made for twice its target."""
        if self.context is None or self.context.method == "llama3":
            return self.max_position_embeddings
        return self.context.target

    def is_moe_layer(self, layer: int) -> bool:
        """True where layer ``layer`` has experts (HF rule: sparse step and mlp_only_layers)."""
        return (
            self.num_experts > 0 and layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0
        )

    def layer_window(self, layer: int) -> int | None:
        """Tokens that a query of this layer can see, None for all before it."""
        return self.sliding_window if layer >= self.max_window_layers else None

    def num_parameters(self, active: bool = False) -> int:
        """Unique parameters; ``active`` counts only the experts one token visits."""
        h, d = self.hidden_size, self.head_dim
        nq, nkv = self.num_attention_heads, self.num_key_value_heads
        attention = 2 * h * nq * d + 2 * h * nkv * d + 2 * h
        attention += (2 * d if self.qk_norm else 0) + ((nq + 2 * nkv) * d if self.qkv_bias else 0)
        attention += h if self.o_bias else 0
        dense = 3 * h * self.intermediate_size + (2 * self.intermediate_size + h if self.mlp_bias else 0)
        experts = self.num_experts_per_tok if active else self.num_experts
        total = h + self.vocab_size * h * (1 if self.tie_word_embeddings else 2)
        for layer in range(self.num_hidden_layers):
            sparse = h * self.num_experts + experts * 3 * h * self.moe_intermediate_size
            total += attention + (sparse if self.is_moe_layer(layer) else dense)
        return total

    def kv_bytes_per_token(self, itemsize: int = 2) -> int:
        """Bytes that keys and values of one token take in a cache, at ``itemsize`` bytes a number (2: bf16)."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim * itemsize

    def flops_per_token(self, context: float, backward: bool) -> float:
        """Floating-point operations for one token that attends to ``context`` keys on average.

        2 per multiply-add of every matrix (head included, embedding look-up not), 4 * N * H per visible key,
        and three times that with the backward pass (arXiv 2001.08361, appendix).
        """
        matrices = self.num_parameters(active=True)
        if not self.tie_word_embeddings:
            matrices -= self.vocab_size * self.hidden_size
        attention = 4 * self.num_hidden_layers * self.num_attention_heads * self.head_dim * context
        return (2 * matrices + attention) * (3 if backward else 1)
