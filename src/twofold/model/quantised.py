"""A base model in 8 or 4 bits, for adapters to stand on: weights of linear layers and experts are swapped in place.

Quantised: attention, MLP and expert matrices. Kept as they are: routers, norms, biases, embedding and head. The point
is memory while training adapters; products run in the dtype of the activations on weights dequantised for the moment.
Not here: calibration, fast low-precision products, files of quantised weights.

Shape legend: O outputs, I inputs, E experts, P stored bytes along the inputs, G scales a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from twofold.base.records import InputError
from twofold.model.config import ModelConfig
from twofold.model.qwen3 import DenseMLP, Experts, Qwen3
from twofold.ops import quant
from twofold.ops.dispatch import by_expert
from twofold.ops.reference import swiglu

_LINEAR = {"self_attn": ("qkv_proj", "o_proj"), "mlp": ("gate_up_proj", "down_proj")}


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

    def dequantised(self, dtype: torch.dtype) -> nn.Parameter:
        """The weight in ``dtype``, as a parameter."""
        return nn.Parameter(quant.dequantise(self.values, self.scale, dtype))


class QuantLinear(nn.Module):
    """``nn.Linear`` with its weight in few bits; the bias, if any, stays as it is."""

    def __init__(self, linear: nn.Linear, bits: int, group: int | None) -> None:
        super().__init__()
        self.weight = QuantWeight(linear.weight, bits, group)
        self.bias = linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = quant.quant_linear(x, self.weight.values, self.weight.scale)
        return y if self.bias is None else y + self.bias


class QuantExperts(nn.Module):
    """``Experts`` in few bits; one expert at a time is dequantised."""

    def __init__(self, experts: Experts, bits: int, group: int | None) -> None:
        super().__init__()
        self.gate_up_proj = QuantWeight(experts.gate_up_proj, bits, group)
        self.down_proj = QuantWeight(experts.down_proj, bits, group)

    def forward(self, x_TD: torch.Tensor, weights_Tk: torch.Tensor, ids_Tk: torch.Tensor) -> torch.Tensor:
        def run(expert: int, x: torch.Tensor) -> torch.Tensor:
            return project(self, "down_proj", expert, swiglu(project(self, "gate_up_proj", expert, x)))

        return by_expert(x_TD, weights_Tk, ids_Tk, len(self.down_proj.values), run)


def project(experts: Experts | QuantExperts, name: str, expert: int, x: torch.Tensor) -> torch.Tensor:
    """x times one expert's ``gate_up_proj`` or ``down_proj``."""
    weight = getattr(experts, name)
    if isinstance(weight, QuantWeight):
        return quant.quant_linear(x, weight.values[expert], weight.scale[expert])
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
    swapped = list(sites(model))
    for name, parent, attribute in swapped:
        module = getattr(parent, attribute)
        if not isinstance(module, nn.Linear | Experts):
            raise InputError(f"{name} is quantised already or carries adapters; quantise a plain model, then attach")
        widths = [weight.shape[-1] for weight in module.parameters() if weight.dim() > 1]
        odd = [width for width in widths if width % group]
        if bits == 4 and odd:
            raise InputError(f"{name} has {odd[0]} inputs, which groups of {group} do not divide; use 8 bits")
    per_row = None if bits == 8 else group
    for _, parent, attribute in swapped:
        module = getattr(parent, attribute)
        small = QuantExperts if isinstance(module, Experts) else QuantLinear
        setattr(parent, attribute, small(module, bits, per_row))
    return [name for name, _, _ in swapped]
