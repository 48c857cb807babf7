"""LoRA: low-rank adapters on attention, MLP and expert weights, several by name on one base, applied from outside.

``attach`` wraps linear layers and experts of a model in place (the base may be quantised), ``activate`` chooses the one
adapter that takes part, or none, ``merge`` adds an adapter to the weights and leaves a plain model, ``detach`` takes it
away. The base is frozen while any adapter is attached. A fused projection has separate factors for each of its Hugging
Face parts. Routers are adapted only when asked. Not here: files (``peft_io.py``), dropout, DoRA, new vocabulary rows.

Shape legend: r rank, I inputs, O outputs, E experts, T tokens, D width, k experts per token.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import nn

from twofold.base.config import Config
from twofold.base.records import InputError
from twofold.model.config import ModelConfig
from twofold.model.quantised import QuantExperts, plain, project, sites
from twofold.model.qwen3 import Adapter, Adapters, Experts, Qwen3, SparseMLP, TokenRows
from twofold.model.vocab import freeze_base, put_rows, take_rows, thaw
from twofold.model.weights import FUSED, split_sizes
from twofold.ops.dispatch import by_expert
from twofold.ops.reference import swiglu

DEFAULT_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TARGETS = (*DEFAULT_TARGETS, "gate_up_proj", "gate")


class LoraConfig(Config):
    """Sizes of an adapter.

    r: rank. alpha: the update counts alpha / r, with ``rslora`` alpha / sqrt(r) (arXiv 2312.03732).
    targets: Hugging Face's names of parts. In experts every expert gets its own factors. "gate_up_proj": experts only,
        one input factor for gate and up together, as PEFT has it for stacked experts. "gate": the router.
    """

    r: int = 16
    alpha: float = Field(default=32.0, allow_inf_nan=False)
    rslora: bool = False
    targets: tuple[str, ...] = DEFAULT_TARGETS

    @model_validator(mode="after")
    def _check(self) -> LoraConfig:
        unknown = [name for name in self.targets if name not in TARGETS]
        if self.r < 1 or not self.targets or unknown:
            raise ValueError(f"an adapter needs r >= 1 and targets among {', '.join(TARGETS)}; got {self}")
        if "gate_up_proj" in self.targets and {"gate_proj", "up_proj"} & set(self.targets):
            raise ValueError("targets: gate_up_proj stands for gate_proj and up_proj of experts; give one or the other")
        return self


class LowRank(nn.Module):
    """Factors of one part: lora_A [r, I] and lora_B [O, r], with a leading E for experts; fp32. B begins at 0."""

    def __init__(self, lora_A: torch.Tensor, lora_B: torch.Tensor, alpha: float, rslora: bool) -> None:
        super().__init__()
        self.lora_A, self.lora_B = nn.Parameter(lora_A), nn.Parameter(lora_B)
        self.alpha, self.rslora = alpha, rslora

    @property
    def r(self) -> int:
        return self.lora_A.shape[-2]

    @property
    def scale(self) -> float:
        """What the update is multiplied by."""
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return low_rank(x, self.lora_A, self.lora_B, self.scale)


def low_rank(x: torch.Tensor, A_rI: torch.Tensor, B_Or: torch.Tensor, scale: float) -> torch.Tensor:
    """x A^T B^T scale in the dtype of the factors, then cast to that of x."""
    return (F.linear(F.linear(x.to(A_rI.dtype), A_rI), B_Or) * scale).to(x.dtype)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a Hugging Face part lies: rows from ``start`` of the module's parameter ``weight``."""

    part: str
    weight: str
    start: int
    outputs: int
    inputs: int


class _Adapted(nn.Module):
    """A module and its adapters: ``adapters[name][part]`` is a LowRank. ``carried`` says which one takes part."""

    def __init__(self, base: nn.Module, places: Iterable[Place], carried: Adapters) -> None:
        super().__init__()
        self.base, self.carried = base, carried
        self.outputs = {place.part: place.outputs for place in places}
        self.adapters = nn.ModuleDict()

    def active(self) -> dict[str, LowRank]:
        """Factors of the adapter that takes part."""
        return {} if self.carried.active is None else self.factors(self.carried.active.name)

    def factors(self, name: str) -> dict[str, LowRank]:
        """Factors of adapter ``name`` by part; empty when it has none here."""
        if name not in self.adapters:
            return {}
        return {part: cast(LowRank, module) for part, module in cast(nn.ModuleDict, self.adapters[name]).items()}


class LoraLinear(_Adapted):
    """A linear layer, fused or not, whose parts may carry low-rank updates."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)
        factors = self.active()
        if not factors:
            return y
        pieces = [factors[p](x) if p in factors else x.new_zeros(*x.shape[:-1], n) for p, n in self.outputs.items()]
        return y + torch.cat(pieces, -1)


class LoraExperts(_Adapted):
    """Experts, plain or quantised, with low-rank updates of each expert's own."""

    base: Experts | QuantExperts

    def forward(self, x_TD: torch.Tensor, weights_Tk: torch.Tensor, ids_Tk: torch.Tensor) -> torch.Tensor:
        factors = self.active()
        if not factors:
            return self.base(x_TD, weights_Tk, ids_Tk)
        split = {part: (f.lora_A.unbind(0), f.lora_B.unbind(0), f.scale) for part, f in factors.items()}

        def update(part: str, expert: int, x: torch.Tensor) -> torch.Tensor:
            if part not in split:
                return x.new_zeros(len(x), self.outputs[part])
            A, B, scale = split[part]
            return low_rank(x, A[expert], B[expert], scale)

        def run(expert: int, x: torch.Tensor) -> torch.Tensor:
            apart = torch.cat((update("gate_proj", expert, x), update("up_proj", expert, x)), -1)
            gate_up = project(self.base, "gate_up_proj", expert, x) + apart + update("gate_up_proj", expert, x)
            inner = swiglu(gate_up)
            return project(self.base, "down_proj", expert, inner) + update("down_proj", expert, inner)

        experts = len(next(iter(split.values()))[0])
        return by_expert(x_TD, weights_Tk, ids_Tk, experts, run)


@dataclass(frozen=True, slots=True)
class Site:
    """A module that can be adapted, where it hangs, and the places of its parts by path."""

    parent: nn.Module
    attribute: str
    places: dict[str, Place]

    @property
    def module(self) -> nn.Module:
        return cast(nn.Module, getattr(self.parent, self.attribute))

    @property
    def base(self) -> nn.Module:
        """The module without adapters."""
        return self.module.base if isinstance(self.module, _Adapted) else self.module

    def replace(self, module: nn.Module) -> None:
        setattr(self.parent, self.attribute, module)


def adaptable(model: Qwen3) -> list[Site]:
    """Every module that can be adapted. Paths are Hugging Face's, ``model.layers.0.self_attn.q_proj``; those of all
    experts of a layer together are ``model.layers.0.mlp.experts.gate_proj``."""
    found = list(sites(model))
    for index, layer in enumerate(model.model.layers):
        if isinstance(layer.mlp, SparseMLP):
            found.append((f"model.layers.{index}.mlp.gate", layer.mlp, "gate"))
    out = []
    for path, parent, attribute in found:
        site = Site(parent, attribute, {})
        prefix = path if attribute == "experts" else path.rpartition(".")[0]
        site.places.update({f"{prefix}.{place.part}": place for place in _places(model.config, path, site.base)})
        out.append(site)
    return out


def all_places(model: Qwen3) -> dict[str, Place]:
    """Every part that can be adapted, by path."""
    return {path: place for site in adaptable(model) for path, place in site.places.items()}


def _places(config: ModelConfig, path: str, module: nn.Module) -> list[Place]:
    name = path.rpartition(".")[2]
    if name == "experts":
        d, i = config.hidden_size, config.moe_intermediate_size
        return [
            Place("gate_proj", "gate_up_proj", 0, i, d),
            Place("up_proj", "gate_up_proj", i, i, d),
            Place("gate_up_proj", "gate_up_proj", 0, 2 * i, d),
            Place("down_proj", "down_proj", 0, d, i),
        ]
    inputs, outputs = cast(int, module.in_features), cast(int, module.out_features)
    sizes = split_sizes(config, path) or [outputs]
    starts = itertools.accumulate(sizes[:-1], initial=0)
    names = FUSED.get(name, (name,))
    return [Place(*values, inputs) for values in zip(names, ["weight"] * len(names), starts, sizes, strict=True)]


def attach(model: Qwen3, name: str, config: LoraConfig, seed: int = 0) -> None:
    """Add a new adapter, activate it, and let its factors alone be trained; at first it changes nothing.

    Factors A are uniform in +-1/sqrt(I), as PEFT starts them, from ``seed`` alone; factors B are 0.

    Raises:
        InputError: the name is taken or unusable, or no module of the model has any of the targets.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen: dict[str, LowRank] = {}
    for path, place in all_places(model).items():
        if place.part in config.targets:
            stack = (model.config.num_experts,) if ".experts." in path else ()
            bound = 1 / math.sqrt(place.inputs)
            A = torch.empty(*stack, config.r, place.inputs).uniform_(-bound, bound, generator=generator)
            B = torch.zeros(*stack, place.outputs, config.r)
            chosen[path] = LowRank(A, B, config.alpha, config.rslora)
    if not chosen:
        raise InputError(f"adapter {name!r}: the model has none of the targets {', '.join(config.targets)}")
    install(model, name, chosen)
    activate(model, name, train=True)


def install(model: Qwen3, name: str, chosen: dict[str, LowRank], rows: Sequence[TokenRows] = ()) -> None:
    """Put factors, given by path, on the model without activating them, and freeze the base.

    Args:
        rows: of tokens, which ``check_rows`` has passed; they are in the tables while the adapter takes part.

    Raises:
        InputError: the name is taken or unusable.
    """
    if not name or "." in name:
        raise InputError(f"{name!r} cannot name an adapter; use letters, digits, - and _")
    if name in adapters(model):
        raise InputError(f"the model carries an adapter {name!r} already; detach it first or choose another name")
    for site in adaptable(model):
        here = {place.part: chosen[path] for path, place in site.places.items() if path in chosen}
        if not here:
            continue
        module = site.module
        if not isinstance(module, _Adapted):
            module = (LoraExperts if site.attribute == "experts" else LoraLinear)(
                module, site.places.values(), model.adapters
            )
            site.replace(module)
        module.adapters[name] = nn.ModuleDict(here).to(model.model.norm.weight.device)
    model.adapters.named[name] = Adapter(name, list(rows))
    freeze_base(model)


def activate(model: Qwen3, name: str | None, train: bool = False) -> None:
    """Let one adapter take part, with the rows of tokens that it brings, or none.

    Args:
        train: its factors, and no other adapter's, take gradients.

    Raises:
        InputError: no such adapter, or training none.
    """
    if name is not None:
        _require(model, name)
    if train and name is None:
        raise InputError("train=True needs the name of an adapter")
    _switch(model, None if name is None else model.adapters.named[name])
    for site in adaptable(model):
        if isinstance(site.module, _Adapted):
            for other in site.module.adapters:
                site.module.adapters[other].requires_grad_(train and other == name)


def _switch(model: Qwen3, adapter: Adapter | None) -> None:
    carried = model.adapters
    if adapter is not carried.active:
        if carried.active is not None:
            take_rows(model, carried.active)
        carried.active = adapter
        if adapter is not None:
            put_rows(model, adapter)


def adapters(model: Qwen3) -> list[str]:
    """Names of the attached adapters."""
    return list(model.adapters.named)


def adapter_factors(model: Qwen3, name: str) -> dict[str, LowRank]:
    """Factors of an adapter by path.

    Raises:
        InputError: no such adapter.
    """
    _require(model, name)
    found: dict[str, LowRank] = {}
    for site in adaptable(model):
        here = site.module.factors(name) if isinstance(site.module, _Adapted) else {}
        found |= {path: here[place.part] for path, place in site.places.items() if place.part in here}
    return found


def detach(model: Qwen3, name: str) -> None:
    """Take an adapter away, and the rows it brings. With the last one the base is back as it was and can be trained.

    Raises:
        InputError: no such adapter.
    """
    _require(model, name)
    if model.adapters.active is model.adapters.named[name]:
        _switch(model, None)
    del model.adapters.named[name]
    for site in adaptable(model):
        module = site.module
        if isinstance(module, _Adapted) and name in module.adapters:
            del module.adapters[name]
            if not module.adapters:
                site.replace(module.base)
    if not adapters(model):
        thaw(model)


@torch.no_grad()
def merge(model: Qwen3, name: str) -> None:
    """Add the adapter to the weights and remove it: a plain model with the same logits, its rows of tokens kept.

    Sums are fp32. A quantised base becomes a plain one, in the dtype of the embedding.

    Raises:
        InputError: no such adapter, others are attached (they fit the base as it was), or a model packed for inference.
    """
    others = [other for other in adapters(model) if other != name]
    if others:
        raise InputError(f"detach {', '.join(others)} before merging {name!r}: they fit the base as it is now")
    if model.packed_head is not None:
        raise InputError(f"{name!r} cannot be merged into a model packed for inference; load it without quantize")
    updates = adapter_factors(model, name)
    _switch(model, model.adapters.named[name])
    dtype = model.model.embed_tokens.weight.dtype
    for site in adaptable(model):
        base = plain(site.base, model.config, dtype)
        for path, place in site.places.items():
            if path in updates:
                _add(getattr(base, place.weight).narrow(-2, place.start, place.outputs), updates[path])
        site.replace(base)
    model.adapters.named.clear()
    model.adapters.active = None
    thaw(model)


def _add(rows: torch.Tensor, factor: LowRank) -> None:
    stacks = [tensor if tensor.dim() > 2 else tensor[None] for tensor in (rows, factor.lora_A, factor.lora_B)]
    for weight_OI, A_rI, B_Or in zip(*stacks, strict=True):
        weight_OI.copy_(weight_OI.float() + B_Or @ A_rI * factor.scale)


def _require(model: Qwen3, name: str) -> None:
    if name not in adapters(model):
        raise InputError(f"no adapter {name!r} is attached; attached are: {', '.join(adapters(model)) or 'none'}")
