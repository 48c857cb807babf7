"""The released shapes of Qwen3, Qwen3-2507, Qwen3-Coder and Qwen2.5, as data.

Values are those of the released config.json files (technical report arXiv 2505.09388, tables 1 and 2; arXiv 2412.15115
for Qwen2.5); the tests compare parameter counts with the published ones. ``max_position_embeddings`` is 40,960 for
post-trained Qwen3, 262,144 for 2507 and Coder, and Qwen2.5's published context (32K up to 3B, 128K above). Nothing is
stretched; a longer context is the caller's choice (``Context``). Not here: weights.
"""

from __future__ import annotations

import difflib
from typing import Any

from twofold.base.records import InputError
from twofold.model.config import ModelConfig

Shape = tuple[int, int, int, int, int]  # layers, width, feed-forward width, query heads, key/value heads

_COMMON: dict[str, Any] = {"vocab_size": 151936, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "initializer_range": 0.02}


def _config(shape: Shape, tied: bool, **changes: Any) -> ModelConfig:
    layers, hidden, inner, heads, kv_heads = shape
    sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": inner}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "tie_word_embeddings": tied}
    return ModelConfig(**(_COMMON | sizes | changes))


def _qwen3(shape: Shape, tied: bool = False, **changes: Any) -> ModelConfig:
    """Qwen3: QK-norm, no biases, heads of 128 whatever the width."""
    return _config(shape, tied, **({"head_dim": 128, "max_position_embeddings": 40960} | changes))


def _qwen2(shape: Shape, tied: bool = False, **changes: Any) -> ModelConfig:
    """Qwen2.5: biases on q, k and v, no QK-norm, heads of width / heads."""
    return _config(shape, tied, head_dim=shape[1] // shape[3], qk_norm=False, qkv_bias=True, **changes)


def _moe(experts: int, inner: int) -> dict[str, Any]:
    return {"num_experts": experts, "num_experts_per_tok": 8, "moe_intermediate_size": inner}


def _long(theta: float) -> dict[str, Any]:
    return {"rope_theta": theta, "max_position_embeddings": 262144}


_SMALL: dict[str, Any] = {"max_position_embeddings": 32768}
_LARGE: dict[str, Any] = {"max_position_embeddings": 131072, "vocab_size": 152064}
_4B = (36, 2560, 9728, 32, 8)
_30B = (48, 2048, 6144, 32, 4)
_235B = (94, 4096, 12288, 64, 4)

PRESETS: dict[str, ModelConfig] = {
    "Qwen3-0.6B": _qwen3((28, 1024, 3072, 16, 8), tied=True),
    "Qwen3-1.7B": _qwen3((28, 2048, 6144, 16, 8), tied=True),
    "Qwen3-4B": _qwen3(_4B, tied=True),
    "Qwen3-8B": _qwen3((36, 4096, 12288, 32, 8)),
    "Qwen3-14B": _qwen3((40, 5120, 17408, 40, 8)),
    "Qwen3-32B": _qwen3((64, 5120, 25600, 64, 8)),
    "Qwen3-30B-A3B": _qwen3(_30B, **_moe(128, 768)),
    "Qwen3-235B-A22B": _qwen3(_235B, **_moe(128, 1536)),
    "Qwen3-4B-Instruct-2507": _qwen3(_4B, tied=True, **_long(5e6)),
    "Qwen3-4B-Thinking-2507": _qwen3(_4B, tied=True, **_long(5e6)),
    "Qwen3-30B-A3B-Instruct-2507": _qwen3(_30B, **_moe(128, 768), **_long(1e7)),
    "Qwen3-30B-A3B-Thinking-2507": _qwen3(_30B, **_moe(128, 768), **_long(1e7)),
    "Qwen3-235B-A22B-Instruct-2507": _qwen3(_235B, **_moe(128, 1536), **_long(5e6)),
    "Qwen3-235B-A22B-Thinking-2507": _qwen3(_235B, **_moe(128, 1536), **_long(5e6)),
    "Qwen3-Coder-30B-A3B": _qwen3((48, 2048, 5472, 32, 4), **_moe(128, 768), **_long(1e7)),
    "Qwen3-Coder-480B-A35B": _qwen3((62, 6144, 8192, 96, 8), **_moe(160, 2560), **_long(1e7)),
    "Qwen2.5-0.5B": _qwen2((24, 896, 4864, 14, 2), tied=True, **_SMALL),
    "Qwen2.5-1.5B": _qwen2((28, 1536, 8960, 12, 2), tied=True, **_SMALL),
    "Qwen2.5-3B": _qwen2((36, 2048, 11008, 16, 2), tied=True, **_SMALL),
    "Qwen2.5-7B": _qwen2((28, 3584, 18944, 28, 4), **_LARGE),
    "Qwen2.5-14B": _qwen2((48, 5120, 13824, 40, 8), **_LARGE, rms_norm_eps=1e-5),
    "Qwen2.5-32B": _qwen2((64, 5120, 27648, 40, 8), **_LARGE, rms_norm_eps=1e-5),
    "Qwen2.5-72B": _qwen2((80, 8192, 29568, 64, 8), **_LARGE, rms_norm_eps=1e-5),
}


def preset(name: str) -> ModelConfig:
    """The shape of a released model; upper and lower case, and an owner in front ("Qwen/"), make no difference.

    Raises:
        InputError: no such preset; the message names the nearest.
    """
    by_name = {known.lower(): known for known in PRESETS}
    wanted = name.lower().removeprefix("qwen/")
    if wanted in by_name:
        return PRESETS[by_name[wanted]]
    longer = [known for known in by_name if known.startswith(wanted)]
    near = longer or difflib.get_close_matches(wanted, by_name, n=1, cutoff=0.4)
    hint = f"did you mean {by_name[near[0]]}?" if near else f"known: {', '.join(PRESETS)}"
    raise InputError(f"no preset is called {name!r}; {hint}")
