"""The model inside a GGUF file: its configuration, and the Hugging Face name of each of its tensors.

Architectures qwen3, qwen3moe, qwen2 and llama, as llama.cpp defines them. A key that is missing is an error by name,
never llama.cpp's default; a feature that the model does not have is one too. Needs no gguf package, so that a file
can be described without it. Not here: weights, the tokenizer.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from twofold.base.gguf_file import GGUFFile, read_gguf
from twofold.base.records import InputError
from twofold.model import rope
from twofold.model.config import Context, ModelConfig
from twofold.text.gguf_tokenizer import gguf_template

ARCHITECTURES = {"qwen3": "qwen3", "qwen3_moe": "qwen3moe", "qwen2": "qwen2", "llama": "llama"}  # Hugging Face's: ours
TOP = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
HEAD = "output.weight"
LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_q.bias": "self_attn.q_proj.bias",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_k.bias": "self_attn.k_proj.bias",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_v.bias": "self_attn.v_proj.bias",
    "attn_output.weight": "self_attn.o_proj.weight",
    "attn_output.bias": "self_attn.o_proj.bias",
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
    "ffn_gate.bias": "mlp.gate_proj.bias",
    "ffn_up.bias": "mlp.up_proj.bias",
    "ffn_down.bias": "mlp.down_proj.bias",
    "ffn_gate_inp.weight": "mlp.gate.weight",
}
EXPERTS = {"ffn_gate_exps.weight": "gate_proj", "ffn_up_exps.weight": "up_proj", "ffn_down_exps.weight": "down_proj"}
ROPE_FACTORS = "rope_freqs.weight"  # Llama 3: what every frequency is divided by
STATIC = "twofold.context.static"
_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")
# Keys that change the model in ways it does not have, by the value that switches them off.
_OFF: dict[str, tuple[Any, ...]] = {
    "attention.sliding_window": (0,), "attention.causal": (True,), "attention.scale": (0.0,),
    "attention.clamp_kqv": (0.0,), "expert_shared_feed_forward_length": (0,), "expert_shared_count": (0,),
    "expert_weights_scale": (0.0, 1.0), "expert_weights_norm": (True,), "expert_gating_func": (1,),
    "logit_scale": (0.0, 1.0), "embedding_scale": (0.0, 1.0), "residual_scale": (0.0, 1.0),
    "use_parallel_residual": (False,),
}  # fmt: skip
# Llama 3.1 and later: what rope_freqs.weight was made with; the file does not say it.
_LLAMA3 = {"native": 8192, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
# Not in GGUF files and only read by init_weights; every released Qwen has this value.
_INITIALIZER_RANGE = 0.02


@dataclass(frozen=True, slots=True)
class GGUFDescription:
    """A GGUF file without its weights. tensors: (name, type, bytes) in file order."""

    architecture: str
    name: str
    config: ModelConfig
    tensors: list[tuple[str, str, int]]
    chat_template: str | None


def describe_gguf(path: Path) -> GGUFDescription:
    """What a file holds; reads the header only. Types that cannot be loaded are listed like any other.

    Raises:
        InputError: not a GGUF file, a damaged one, or an architecture or feature that the model does not have.
    """
    file = read_gguf(path)
    tensors = [(info.name, info.type, info.bytes) for info in file.tensors.values()]
    return GGUFDescription(
        architecture(file),
        str(file.metadata.get("general.name", path.stem)),
        config_from_gguf(file),
        tensors,
        gguf_template(file.metadata, str(path)),
    )


def architecture(file: GGUFFile) -> str:
    """The file's architecture; InputError unless it is one of ours."""
    found = file.metadata.get("general.architecture")
    if found not in ARCHITECTURES.values():
        known = ", ".join(ARCHITECTURES.values())
        raise InputError(f"{file.path}: architecture {found!r} is not supported; give a model of one of: {known}")
    return str(found)


def config_from_gguf(file: GGUFFile) -> ModelConfig:
    """The configuration that the metadata, the names of the tensors and the shape of the embedding describe.

    Raises:
        InputError: a missing key, an unknown architecture, or a feature that the model does not have.
    """
    arch = architecture(file)
    keys = _Keys(file, arch)
    for key, off in _OFF.items():
        if (given := keys.get(key)) is not None and given not in off:
            raise InputError(
                f"{file.path}: {arch}.{key} = {given!r} is not supported; this model knows {off[0]!r} only"
            )
    try:
        return ModelConfig.model_validate(_dense(keys) | _experts(keys))
    except ValidationError as error:
        raise InputError(f"{file.path}: {error.errors()[0]['msg']}; the file describes an impossible model") from None


def _dense(keys: _Keys) -> dict[str, Any]:
    """The fields that every family has."""
    tensors, head_dim = keys.file.tensors, _head_dim(keys)
    theta = keys.number("rope.freq_base")
    return {
        "vocab_size": _vocabulary(keys.file),
        "hidden_size": keys.count("embedding_length"),
        "intermediate_size": keys.count("feed_forward_length"),
        "num_hidden_layers": keys.count("block_count"),
        "num_attention_heads": keys.count("attention.head_count"),
        "num_key_value_heads": keys.count("attention.head_count_kv"),
        "head_dim": head_dim,
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": theta,
        "max_position_embeddings": keys.count("context_length"),
        "tie_word_embeddings": HEAD not in tensors,
        "initializer_range": _INITIALIZER_RANGE,
        "qk_norm": keys.arch.startswith("qwen3"),
        "qkv_bias": "blk.0.attn_q.bias" in tensors,
        "o_bias": "blk.0.attn_output.bias" in tensors,
        "mlp_bias": "blk.0.ffn_down.bias" in tensors,
        "context": _context(keys, theta, head_dim),
    }


def _head_dim(keys: _Keys) -> int:
    """Qwen2 and Llama define it as width / heads where the file does not say it."""
    width, heads = keys.count("embedding_length"), keys.count("attention.head_count")
    if keys.arch in ("qwen2", "llama") and keys.get("attention.key_length") is None and width % heads == 0:
        head_dim = width // heads
    else:
        head_dim = keys.count("attention.key_length")
    for key in ("attention.value_length", "rope.dimension_count"):
        if (given := keys.get(key)) not in (None, head_dim):
            raise InputError(
                f"{keys.file.path}: {keys.arch}.{key} = {given!r} is not supported; it must equal the head dimension "
                f"{head_dim}"
            )
    return head_dim


def _experts(keys: _Keys) -> dict[str, Any]:
    """The fields of a mixture of experts, none for a dense model."""
    if keys.arch != "qwen3moe":
        if keys.get("expert_count"):
            raise InputError(
                f"{keys.file.path}: experts of architecture {keys.arch!r} are not supported, only qwen3moe's"
            )
        return {}
    layers = range(keys.count("block_count"))
    return {
        "num_experts": keys.count("expert_count"),
        "num_experts_per_tok": keys.count("expert_used_count"),
        "moe_intermediate_size": keys.count("expert_feed_forward_length"),
        "mlp_only_layers": [i for i in layers if f"blk.{i}.ffn_gate_inp.weight" not in keys.file.tensors],
    }


class _Keys:
    """Values of one architecture's keys, checked."""

    def __init__(self, file: GGUFFile, arch: str) -> None:
        self.file, self.arch = file, arch

    def get(self, key: str) -> Any:
        return self.file.metadata.get(f"{self.arch}.{key}")

    def number(self, key: str) -> float:
        value = self.get(key)
        if value is None:
            raise InputError(
                f"{self.file.path}: {self.arch}.{key} is missing, and llama.cpp's default may not be the "
                "model's value; convert the model again with a recent llama.cpp"
            )
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            what = "differs between layers" if isinstance(value, list) else f"= {value!r} is no finite number"
            raise InputError(f"{self.file.path}: {self.arch}.{key} {what}, which is not supported")
        return value

    def optional(self, key: str) -> float | None:
        return None if self.get(key) is None else self.number(key)

    def count(self, key: str) -> int:
        value = self.number(key)
        if not isinstance(value, int) or value < 1:
            raise InputError(f"{self.file.path}: {self.arch}.{key} = {value!r} must be a whole number above 0")
        return value


def _vocabulary(file: GGUFFile) -> int:
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise InputError(f"{file.path}: tensor 'token_embd.weight' is missing; the file holds no whole model")
    return embedding.shape[0]


def _context(keys: _Keys, theta: float, head_dim: int) -> Context | None:
    """Long context: YaRN from the metadata, Llama 3's scaling from its tensor, None without either."""
    kind = keys.get("rope.scaling.type") or "none"
    if ROPE_FACTORS in keys.file.tensors:
        if kind != "none":
            raise InputError(f"{keys.file.path}: both {ROPE_FACTORS} and rope.scaling.type {kind!r}; not supported")
        return _llama3(keys.file, theta, head_dim)
    if kind == "none" or (kind == "linear" and keys.get("rope.scaling.factor") in (None, 0.0, 1.0)):
        return None
    if kind != "yarn":
        raise InputError(
            f"{keys.file.path}: rope.scaling.type {kind!r} is not supported; this model knows none and yarn"
        )
    native, factor = keys.count("rope.scaling.original_context_length"), keys.number("rope.scaling.factor")
    values: dict[str, Any] = {"native": native, "target": round(native * factor)}
    for field in ("beta_fast", "beta_slow"):
        if (given := keys.optional(f"rope.scaling.yarn_{field}")) is not None:
            values[field] = given
    values["static"] = bool(keys.file.metadata.get(STATIC, False))
    context = Context(**values)
    # llama.cpp multiplies YaRN's own attention factor by this one.
    own = keys.optional("rope.scaling.attn_factor") or keys.optional("rope.scaling.yarn_attn_factor") or 1.0
    return context if own == 1.0 else Context(**values, attention_factor=rope.attention_factor(context) * own)


def _llama3(file: GGUFFile, theta: float, head_dim: int) -> Context:
    """The scaling that gives the stored factors; refused when none with Llama 3.1's other constants does."""
    info, native = file.tensors[ROPE_FACTORS], int(_LLAMA3["native"])
    if (info.type, info.shape) == ("F32", (head_dim // 2,)):
        with open(info.path, "rb") as handle:
            handle.seek(info.offset)
            stored = torch.frombuffer(bytearray(handle.read(info.bytes)), dtype=torch.float32)
        factor = round(float(stored.max()), 3)
        if 1 <= factor < math.inf:
            context = Context(method="llama3", target=round(native * factor), **_LLAMA3)  # type: ignore[arg-type]
            if torch.allclose(rope_factors(theta, head_dim, context), stored, rtol=1e-4):
                return context
    raise InputError(
        f"{file.path}: {ROPE_FACTORS} is not Llama 3.1's scaling (native {native}, factors 1 and 4); "
        "load the model from its Hugging Face folder"
    )


def rope_factors(theta: float, head_dim: int, context: Context) -> torch.Tensor:
    """What llama.cpp divides each inverse frequency by, fp32 [H/2]."""
    native = rope.inverse_frequencies(theta, head_dim)
    return native / rope.llama3(native, context)


def hugging_face_name(file: GGUFFile, name: str) -> str:
    """Hugging Face's name of a tensor; of stacked experts one with ``{}`` for the expert's number.

    Raises:
        InputError: a tensor that no supported architecture has.
    """
    found = (TOP | {HEAD: "lm_head.weight"}).get(name)
    block = _BLOCK.fullmatch(name)
    if block and block[2] in LAYER:
        found = f"model.layers.{block[1]}.{LAYER[block[2]]}"
    elif block and block[2] in EXPERTS:
        found = f"model.layers.{block[1]}.mlp.experts.{{}}.{EXPERTS[block[2]]}.weight"
    if found is None:
        raise InputError(
            f"{file.path}: tensor {name!r} has no place in a {architecture(file)} model; "
            "the file holds a variant that is not supported, load it from its Hugging Face folder"
        )
    return found


def is_permuted(arch: str, name: str) -> bool:
    """True for query and key rows of Llama, which are stored for rotations of neighbouring pairs."""
    return arch == "llama" and bool(re.fullmatch(r"blk\.\d+\.attn_[qk]\.(weight|bias)", name))
