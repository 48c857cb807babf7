"""Models in few bits: weights of linear layers and experts swapped in place, for adapters to stand on or to run fast.

``quantise_base`` stores weights in 8 or 4 bits, dequantised for the moment of use: memory while training adapters.
``quantise_model`` packs them for the processor's kernels: speed while generating, no gradient. Both swap attention, MLP
and expert matrices; routers, norms and biases stay as they are. Packing takes the output head too and keeps the
embedding in 16 bits. ``load_quantised`` packs while it reads, so that no whole model in full precision ever exists.
Not here: calibration, files of quantised weights.

Shape legend: O outputs, I inputs, E experts, P stored bytes along the inputs, G scales a row.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from twofold.base.records import InputError
from twofold.model import weights
from twofold.model.config import ModelConfig
from twofold.model.qwen3 import DenseMLP, Experts, Qwen3
from twofold.model.sources import TensorSource
from twofold.ops import quant
from twofold.ops.dispatch import by_expert
from twofold.ops.reference import swiglu

logger = logging.getLogger("twofold")

_LINEAR = {"self_attn": ("qkv_proj", "o_proj"), "mlp": ("gate_up_proj", "down_proj")}
_OUTLIERS = ("qkv_proj", "down_proj")  # a few large inputs would take the steps of all others, so in groups
_GROUP = 2560
KINDS: tuple[quant.Kind, ...] = ("int8", "float16", "float32")


class QuantWeight(nn.Module):
    """One weight [O, I] or a stack of them [E, O, I] in few bits. ``model.to(dtype)`` leaves its scales fp16."""

    values: torch.Tensor
    scale: torch.Tensor

    def __init__(self, weight: torch.Tensor, bits: int, group: int | None) -> None:
        super().__init__()
        matrices = weight.detach().flatten(0, -3) if weight.dim() > 2 else weight.detach()[None]
        pairs = [quant.quantise(w_OI, bits, group or w_OI.shape[-1]) for w_OI in matrices]
        for name, parts in zip(("values", "scale"), zip(*pairs, strict=True), strict=True):
            self.register_buffer(name, torch.stack(parts) if weight.dim() > 2 else parts[0])

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        exact = self.scale
        super()._apply(fn, recurse)
        self.scale = exact.to(self.scale.device)
        return self

    def __len__(self) -> int:
        return len(self.values)

    def linear(self, x: torch.Tensor, expert: int | None = None) -> torch.Tensor:
        """x times the transposed weight, or that of one expert; the gradient flows to x."""
        at = slice(None) if expert is None else expert
        return quant.quant_linear(x, self.values[at], self.scale[at])

    def dequantised(self, dtype: torch.dtype) -> nn.Parameter:
        """The weight in ``dtype``, as a parameter."""
        return nn.Parameter(quant.dequantise(self.values, self.scale, dtype))


class PackedWeight(nn.Module):
    """One weight [O, I] or a stack of them [E, O, I], packed for the processor; no gradient."""

    def __init__(self, weight: torch.Tensor, kind: quant.Kind, groups: int = 1) -> None:
        super().__init__()
        self.stacked = weight.dim() > 2
        self.packed = [quant.pack(w_OI, kind, groups) for w_OI in (weight if self.stacked else [weight])]
        for index, part in enumerate(part for packed in self.packed for part in packed.parts):
            if isinstance(part, torch.ScriptObject):
                setattr(self, f"part{index}", part)  # where a recording of the model finds it

    def __len__(self) -> int:
        return len(self.packed)

    @property
    def recordable(self) -> bool:
        """Whether ``torch.jit.trace`` can write its product down; not for oneDNN's (an argument of a type it lacks)."""
        return all(packed.kind != "float32" for packed in self.packed)

    def linear(self, x: torch.Tensor, expert: int | None = None) -> torch.Tensor:
        """x times the transposed weight, or that of one expert.

        Raises:
            InputError: x needs a gradient, which packed weights do not give.
        """
        if x.requires_grad:
            raise InputError("weights packed for inference give no gradient; train adapters on quantise_base instead")
        return quant.packed_linear(x, self.packed[expert or 0])

    def dequantised(self, dtype: torch.dtype) -> nn.Parameter:
        """The weight in ``dtype``, as a parameter."""
        matrices = [quant.unpack(packed).to(dtype) for packed in self.packed]
        return nn.Parameter(torch.stack(matrices) if self.stacked else matrices[0])


Shrink = Callable[[torch.Tensor, bool], QuantWeight | PackedWeight]  # the flag: inputs that have outliers


class QuantLinear(nn.Module):
    """``nn.Linear`` with its weight in few bits; the bias, if any, stays as it is."""

    def __init__(self, linear: nn.Linear, shrink: Shrink, outliers: bool = False) -> None:
        super().__init__()
        self.weight = shrink(linear.weight.detach(), outliers)
        self.bias = linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.weight.linear(x)
        return y if self.bias is None else y + self.bias


class QuantExperts(nn.Module):
    """``Experts`` in few bits, multiplied one expert at a time."""

    def __init__(self, experts: Experts, shrink: Shrink) -> None:
        super().__init__()
        self.gate_up_proj = shrink(experts.gate_up_proj.detach(), False)
        self.down_proj = shrink(experts.down_proj.detach(), True)

    def forward(self, x_TD: torch.Tensor, weights_Tk: torch.Tensor, ids_Tk: torch.Tensor) -> torch.Tensor:
        def run(expert: int, x: torch.Tensor) -> torch.Tensor:
            return self.down_proj.linear(swiglu(self.gate_up_proj.linear(x, expert)), expert)

        return by_expert(x_TD, weights_Tk, ids_Tk, len(self.down_proj), run)


def project(experts: Experts | QuantExperts, name: str, expert: int, x: torch.Tensor) -> torch.Tensor:
    """x times one expert's ``gate_up_proj`` or ``down_proj``."""
    weight = getattr(experts, name)
    if isinstance(weight, QuantWeight | PackedWeight):
        return weight.linear(x, expert)
    return F.linear(x, weight[expert])


def plain(module: nn.Module, config: ModelConfig, dtype: torch.dtype) -> nn.Linear | Experts:
    """An ordinary module with the dequantised weights in ``dtype``; one that is not quantised is returned as it is."""
    if isinstance(module, QuantLinear):
        linear = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
        linear.weight, linear.bias = module.weight.dequantised(dtype), module.bias
        return linear
    if isinstance(module, QuantExperts):
        with torch.device("meta"):
            experts = Experts(config)
        experts.gate_up_proj = module.gate_up_proj.dequantised(dtype)
        experts.down_proj = module.down_proj.dequantised(dtype)
        return experts
    assert isinstance(module, nn.Linear | Experts)
    return module


def sites(model: Qwen3) -> Iterator[tuple[str, nn.Module, str]]:
    """(path, parent, attribute) of every linear layer and stack of experts inside layers, routers excepted."""
    for index, layer in enumerate(model.model.layers):
        for part, attributes in _LINEAR.items():
            parent = getattr(layer, part)
            sparse = part == "mlp" and not isinstance(parent, DenseMLP)
            for attribute in ("experts",) if sparse else attributes:
                yield f"model.layers.{index}.{part}.{attribute}", parent, attribute


def quantise_base(model: Qwen3, bits: int, group: int = 64) -> list[str]:
    """Swap the weights of attention, MLP and experts for ``bits``-bit ones, in place, one module after the other.

    Args:
        bits: 8 (one scale an output channel) or 4. group: inputs that share a scale in 4 bits: 32, 64 or 128.

    Returns:
        Names of the modules swapped; their weights can no longer be trained, so attach an adapter.

    Raises:
        InputError: other bits or group, a width that groups do not divide, or a model already quantised or adapted.
    """
    if bits not in (4, 8) or (bits == 4 and group not in (32, 64, 128)):
        raise InputError(f"cannot quantise to {bits} bits in groups of {group}; use 8, or 4 with 32, 64 or 128")
    swapped = _plain_sites(model)
    for name, parent, attribute in swapped:
        matrices = [weight for weight in getattr(parent, attribute).parameters() if weight.dim() > 1]
        odd = [weight.shape[-1] for weight in matrices if weight.shape[-1] % group]
        if bits == 4 and odd:
            raise InputError(f"{name} has {odd[0]} inputs, which groups of {group} do not divide; use 8 bits")
    per_row = None if bits == 8 else group
    for _, parent, attribute in swapped:
        _swap(parent, attribute, lambda weight, _: QuantWeight(weight, bits, per_row))
    return [name for name, _, _ in swapped]


def _plain_sites(model: Qwen3) -> list[tuple[str, nn.Module, str]]:
    found = list(sites(model))
    for name, parent, attribute in found:
        if not isinstance(getattr(parent, attribute), nn.Linear | Experts):
            raise InputError(f"{name} is quantised already or carries adapters; quantise a plain model, then attach")
    return found


def _swap(parent: nn.Module, attribute: str, shrink: Shrink) -> None:
    module = getattr(parent, attribute)
    if isinstance(module, Experts):
        setattr(parent, attribute, QuantExperts(module, shrink))
    else:
        setattr(parent, attribute, QuantLinear(module, shrink, attribute in _OUTLIERS))


def _shrink(kind: str, device: torch.device | str) -> Shrink:
    """How weights of ``kind`` are held on ``device``.

    Raises:
        InputError: an unknown kind, or one that needs another processor.
    """
    if kind not in KINDS:
        raise InputError(f"cannot quantise to {kind!r}; use one of {', '.join(KINDS)}")
    if quant.can_pack(device):
        return lambda weight, outliers: PackedWeight(weight, kind, _groups(weight.shape[-1]) if outliers else 1)
    if kind != "int8":
        raise InputError(f'{kind} weights are for x86 processors; load with dtype="{kind}" on {device}, or int8')
    logger.info("int8: weights are dequantised for each product; fast int8 products need an x86 processor")
    return lambda weight, _: QuantWeight(weight, 8, None)


def _groups(inputs: int) -> int:
    """Into how many groups a weight's inputs are split: at least two, each of at most ``_GROUP`` inputs."""
    return next(count for count in range(2, inputs + 1) if inputs % count == 0 and inputs // count <= _GROUP)


@torch.no_grad()
def quantise_model(model: Qwen3, kind: str = "int8", head: bool = True) -> None:
    """Pack a model for inference, in place, one module after the other. It can no longer be trained or saved.

    Args:
        kind: "int8", activations in 8 bits as well; "float16", products in fp32; or "float32", which loses nothing.
            head: pack the output head too; without it a tied head keeps the embedding in full precision.

    Raises:
        InputError: an unknown kind, one that needs another processor, or a model already quantised or adapted.
    """
    shrink = _shrink(kind, model.model.embed_tokens.weight.device)
    swapped = _plain_sites(model)
    if head:
        _pack_head(model, shrink, exact=kind == "float32")
    for _, parent, attribute in swapped:
        _swap(parent, attribute, shrink)
    model.requires_grad_(False)


def _pack_head(model: Qwen3, shrink: Shrink, exact: bool) -> None:
    """The head packed on its own, the embedding in 16 bits if that changes nothing or may; a tied table becomes two."""
    table = model.model.embed_tokens
    if model.config.tie_word_embeddings:
        matrix = nn.Linear(table.embedding_dim, table.num_embeddings, bias=False, device="meta")
        matrix.weight = table.weight
    else:
        matrix = model.lm_head
        del model.lm_head
    model.packed_head = QuantLinear(matrix, shrink)
    table.weight = nn.Parameter(_in_16_bits(table.weight, exact), requires_grad=False)


def _in_16_bits(weight: torch.Tensor, exact: bool) -> torch.Tensor:
    """bf16 where that changes nothing (as for released checkpoints), else fp16 where it may and fits, else as it is."""
    if torch.equal(weight.bfloat16().to(weight.dtype), weight):
        return weight.bfloat16()
    if exact:
        return weight
    return weight.half() if float(weight.abs().max()) <= torch.finfo(torch.float16).max else weight


@torch.no_grad()
def load_quantised(
    config: ModelConfig,
    source: TensorSource,
    kind: str = "int8",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    head: bool = True,
) -> Qwen3:
    """The model of a configuration, packed while it is read: memory peaks at the packed size and one fused weight.

    Args:
        kind, head: as for ``quantise_model``. dtype: of what is not packed, and of activations.

    Raises:
        InputError: as ``quantise_model``, or tensors that do not fit the configuration.
    """
    shrink = _shrink(kind, device)
    model = weights.empty_model(config, device="meta")
    weights.match(model, source)

    def read(module: nn.Module, prefix: str) -> None:
        for name, parameter in list(module.named_parameters()):
            owner = module.get_submodule(name.rpartition(".")[0])
            if parameter.is_meta:
                filled = nn.Parameter(torch.empty(parameter.shape, dtype=dtype, device=device), requires_grad=False)
                setattr(owner, name.rpartition(".")[2], filled)
                weights.read_parameter(config, source, f"{prefix}{name}", filled)

    read(model.model.embed_tokens, "model.embed_tokens.")
    weights.check_tied(model, source)
    if not config.tie_word_embeddings:
        read(model.lm_head, "lm_head.")
    if head:
        _pack_head(model, shrink, exact=kind == "float32")
    for path, parent, attribute in sites(model):
        read(getattr(parent, attribute), f"{path}.")
        _swap(parent, attribute, shrink)
    read(model, "")
    return model
