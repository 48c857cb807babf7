"""A model on several processes: what each holds and what they exchange, applied from outside in one written order.

Tensor parallel, expert parallel, context parallel, recomputation, then FSDP2: each step may rely on those before it.
Sums and counts are global, so losses and gradients are those of one process. Weights keep their names; those that are
sharded are DTensors. Not here: starting processes (``base/dist.py``), sharing out micro-batches and saving (``train``),
pipelines, vocabulary-parallel heads and sequence parallelism of norms.

Shape legend: T tokens of a micro-batch, U those of this rank, D width, N query heads, K key/value heads, H head
dimension, E experts, k experts per token, A chosen experts of this rank's tokens, B rows sent to this rank's experts.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import nn

from twofold.base import dist
from twofold.base.batch import TokenBatch
from twofold.base.config import Config
from twofold.base.dist import ALONE, Ranks, is_sharded, local, whole
from twofold.base.records import InputError
from twofold.model.context import ContextInputs, chunk_places
from twofold.model.exchange import all_to_all, copied, summed
from twofold.model.qwen3 import Attention, DenseMLP, Experts, Qwen3, Routing, SparseMLP
from twofold.model.recompute import Recompute, recompute
from twofold.model.weights import empty_model, split_sizes
from twofold.ops import moe as moe_ops

TENSOR = "tensor"  # mesh dimension whose ranks share a layer's heads, inner columns and experts


class ParallelConfig(Config):
    """How many processes share what. The world is replicate x shard x context x tensor; ``shard`` is what is left.

    replicate: copies of the sharded model (HSDP). context: ranks that share each micro-batch's tokens. tensor: ranks
    that share heads, inner columns and experts of each layer. experts: experts stay where they are, one share for each
    rank of shard x context, and tokens travel; without it they are gathered as all weights are. recompute: activations
    that are computed again in the backward pass. precision: "bf16" gathers weights in bf16 and computes with those;
    shards, gradients and their sums are fp32 (FSDP2's mixed precision).
    """

    replicate: int = 1
    context: int = 1
    tensor: int = 1
    experts: bool = False
    recompute: Recompute = "none"
    precision: Literal["fp32", "bf16"] = "fp32"


@dataclass
class Parallel:
    """Who does what, for the training loop; the default is one process that does everything.

    data: ranks that have different micro-batches. tokens: ranks that have different tokens. context: ranks that share
    a micro-batch. partial: parameters whose gradient is the sum over these ranks, still to be taken after a step.
    precision: in which gathered weights are computed with.
    """

    world: Ranks = ALONE
    data: Ranks = ALONE
    tokens: Ranks = ALONE
    context: Ranks = ALONE
    tensor: int = 1
    partial: dict[str, Ranks] = field(default_factory=dict)
    precision: str = "fp32"

    def mine(self, batch: TokenBatch) -> TokenBatch:
        """The micro-batch with loss weights on this rank's tokens only."""
        if self.context.size == 1:
            return batch
        kept_T = torch.zeros_like(batch.weights_T)
        kept_T[chunk_places(batch.num_tokens, self.context)] = 1.0
        return replace(batch, weights_T=batch.weights_T * kept_T)

    @torch.no_grad()
    def clip_gradients(self, model: nn.Module, largest: float) -> torch.Tensor:
        """Finish sums, scale gradients to a total norm of at most ``largest`` and return the norm before."""
        if self.world.size == 1:
            return torch.nn.utils.clip_grad_norm_(model.parameters(), largest)
        for name, ranks in self.partial.items():
            if (gradient := model.get_parameter(name).grad) is not None:
                local(gradient).copy_(ranks.sum(local(gradient)))
        pairs = [(p, local(p.grad)) for p in model.parameters() if p.grad is not None]
        squares = [gradient.float().square().sum() / dist.copies(p) for p, gradient in pairs]
        norm = self.world.sum(torch.stack(squares).sum()).sqrt()
        for _, gradient in pairs:
            gradient.mul_((largest / (norm + 1e-6)).clamp(max=1.0))
        return norm


def parallelise(model: Qwen3, config: ParallelConfig) -> Parallel:
    """Spread ``model`` over all processes, in place, before optimisers are made.

    Every rank must hold the same weights.

    Raises:
        InputError: sizes that do not divide the model or the number of processes.
    """
    world = dist.world()
    if world.size == 1:
        if (config.replicate, config.context, config.tensor) != (1, 1, 1):
            raise InputError("replicate, context and tensor above 1 need several processes; start with torchrun")
        recompute(model, config.recompute)
        return Parallel()
    shard = _checked(model, config, world.size)
    replicate, context, tensor = config.replicate, config.context, config.tensor
    mesh = dist.mesh((replicate, shard * context, tensor), ("replicate", "shard", TENSOR))
    parallel = Parallel(
        world,
        data=dist.ranks_of(dist.mesh((replicate * shard, context * tensor), ("data", "rest"))["data"]),
        tokens=dist.ranks_of(dist.mesh((replicate * shard * context, tensor), ("tokens", "rest"))["tokens"]),
        context=dist.ranks_of(dist.mesh((replicate * shard, context, tensor), ("data", "context", "rest"))["context"]),
        tensor=tensor,
    )
    if tensor > 1:
        _tensor_parallel(model, mesh[TENSOR], parallel)
    if config.experts:
        _expert_parallel(model, mesh["shard"], dist.ranks_of(mesh["replicate"]), parallel)
    if context > 1:
        _context_parallel(model, parallel.context)
    recompute(model, config.recompute)
    if parallel.tokens.size > 1:
        _shard(model, mesh["replicate", "shard"] if replicate > 1 else mesh["shard"], config.precision)
        parallel.precision = config.precision
    return parallel


def _checked(model: Qwen3, config: ParallelConfig, size: int) -> int:
    """Ranks left for ``shard``."""
    taken = config.replicate * config.context * config.tensor
    if min(config.replicate, config.context, config.tensor) < 1 or size % taken:
        raise InputError(
            f"replicate x context x tensor = {config.replicate} x {config.context} x {config.tensor} does not divide "
            f"the {size} processes; change one of them or torchrun's number"
        )
    if any(".adapters." in name for name, _ in model.named_parameters()):
        raise InputError("adapters are trained on one process; merge them or start without torchrun")
    shape = model.config
    if config.tensor > 1 and (shape.o_bias or shape.mlp_bias):
        raise InputError("tensor above 1 has no place for biases of o_proj and down_proj; use tensor=1 and shard more")
    moe = any(shape.is_moe_layer(layer) for layer in range(shape.num_hidden_layers))
    dense = any(not shape.is_moe_layer(layer) for layer in range(shape.num_hidden_layers))
    heads = {"num_attention_heads": shape.num_attention_heads, "num_key_value_heads": shape.num_key_value_heads}
    sizes = heads | ({"intermediate_size": shape.intermediate_size} if dense else {})
    sizes |= {"num_experts": shape.num_experts} if moe else {}
    for name, count in sizes.items():
        if count % config.tensor:
            raise InputError(f"tensor={config.tensor} does not divide {name}={count}; choose a divisor")
    if config.experts:
        share = size // config.replicate
        if not moe or config.tensor > 1:
            raise InputError("experts=true needs a mixture of experts and tensor=1, whose ranks share experts already")
        if shape.num_experts % share:
            raise InputError(f"{share} ranks cannot share {shape.num_experts} experts evenly; choose a divisor")
    return size // taken


# Tensor parallel


def stored_order(sizes: list[int], ranks: int) -> torch.Tensor:
    """Rows of a fused parameter in the order in which ``ranks`` tensor ranks store them, each its part of every piece.

    ``weight[stored_order(sizes, ranks)]`` cut into ``ranks`` equal blocks gives each rank whole heads of q, k and v (or
    columns of gate and up), stacked as the model expects.
    """
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    pieces = [
        torch.arange(start + rank * size // ranks, start + (rank + 1) * size // ranks)
        for rank in range(ranks)
        for start, size in zip(starts, sizes, strict=True)
    ]
    return torch.cat(pieces)


def row_order(model: Qwen3, name: str, ranks: int) -> torch.Tensor | None:
    """``stored_order`` of the parameter ``name`` (or of a moment of it); None where rows are in the model's order."""
    sizes = split_sizes(model.config, name)
    return stored_order(sizes, ranks) if ranks > 1 and sizes and ".experts." not in name else None


def tensor_ranks(model: Qwen3) -> int:
    """How many tensor ranks a model is spread over."""
    for parameter in model.parameters():
        if is_sharded(parameter):
            mesh = cast(Any, parameter).device_mesh
            if TENSOR in (mesh.mesh_dim_names or ()):
                return int(mesh.size(mesh.mesh_dim_names.index(TENSOR)))
    return 1


class _Column(nn.Module):
    """A linear layer that gives each tensor rank its rows of the result."""

    def __init__(self, linear: nn.Linear, mesh: Any, order: torch.Tensor) -> None:
        super().__init__()
        self.ranks = dist.ranks_of(mesh)
        self.weight = _placed(linear.weight.detach()[order], mesh, 0)
        self.bias = None if linear.bias is None else _placed(linear.bias.detach()[order], mesh, 0)

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else local(self.bias)
        return F.linear(copied(x_TD, self.ranks), local(self.weight), bias)


class _Row(nn.Module):
    """A linear layer whose inputs lie on several tensor ranks; the sum of their products is the result."""

    def __init__(self, linear: nn.Linear, mesh: Any) -> None:
        super().__init__()
        self.ranks = dist.ranks_of(mesh)
        self.weight = _placed(linear.weight.detach(), mesh, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return summed(F.linear(x, local(self.weight)), self.ranks)


class _PlacedExperts(nn.Module):
    """Experts of which each rank holds an equal share."""

    def __init__(self, experts: Experts, mesh: Any) -> None:
        super().__init__()
        self.ranks = dist.ranks_of(mesh)
        self.gate_up_proj = _placed(experts.gate_up_proj.detach(), mesh, 0)
        self.down_proj = _placed(experts.down_proj.detach(), mesh, 0)


class _OwnExperts(_PlacedExperts):
    """Experts of one tensor rank, applied to all tokens that chose them; the ranks' sum is the result."""

    def forward(self, x_TD: torch.Tensor, weights_Tk: torch.Tensor, ids_Tk: torch.Tensor) -> torch.Tensor:
        gate_up, down = local(self.gate_up_proj), local(self.down_proj)
        x_TD, weights_A = copied(x_TD, self.ranks), copied(weights_Tk, self.ranks).flatten()
        own_A = ids_Tk.flatten() - self.ranks.rank * len(down)
        chosen = ((own_A >= 0) & (own_A < len(down))).nonzero().flatten()
        rows = chosen.div(ids_Tk.shape[1], rounding_mode="floor")
        out = run_experts(x_TD.index_select(0, rows), weights_A[chosen], own_A[chosen], gate_up, down)
        return summed(torch.zeros_like(x_TD).index_add(0, rows, out), self.ranks)


def _tensor_parallel(model: Qwen3, mesh: Any, parallel: Parallel) -> None:
    """Heads, inner columns and experts go to the ranks; norms, router, embedding and head stay whole on each."""
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        assert isinstance(attention, Attention)
        order = stored_order(split_sizes(model.config, "qkv_proj"), mesh.size())
        attention.qkv_proj = _Column(attention.qkv_proj, mesh, order)  # type: ignore[assignment]
        attention.o_proj = _Row(attention.o_proj, mesh)  # type: ignore[assignment]
        attention.n, attention.k = attention.n // mesh.size(), attention.k // mesh.size()
        if attention.q_norm is not None:  # each rank sees its own heads only
            names = [f"model.layers.{attention.layer}.self_attn.{norm}.weight" for norm in ("q_norm", "k_norm")]
            parallel.partial |= dict.fromkeys(names, dist.ranks_of(mesh))
        if isinstance(mlp, DenseMLP):
            order = stored_order(split_sizes(model.config, "gate_up_proj"), mesh.size())
            mlp.gate_up_proj = _Column(mlp.gate_up_proj, mesh, order)  # type: ignore[assignment]
            mlp.down_proj = _Row(mlp.down_proj, mesh)  # type: ignore[assignment]
        elif isinstance(mlp, SparseMLP):
            mlp.experts = _OwnExperts(mlp.experts, mesh)  # type: ignore[assignment]


def _placed(full: torch.Tensor, mesh: Any, dim: int) -> nn.Parameter:
    """A parameter of which each rank of ``mesh`` keeps an equal part along ``dim``; nothing is sent."""
    from torch.distributed.tensor import Shard, distribute_tensor

    return nn.Parameter(distribute_tensor(full, mesh, [Shard(dim)], src_data_rank=None))


# Expert parallel


def run_experts(
    x_BD: torch.Tensor, weights_B: torch.Tensor, ids_B: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """One expert for each row, [B, D]. Without rows the experts get a gradient of zero all the same."""
    gate_up, down = gate_up.to(x_BD.dtype), down.to(x_BD.dtype)  # experts that stay in place keep their type
    if len(x_BD):
        return moe_ops.moe(x_BD, weights_B[:, None], ids_B[:, None], gate_up, down)
    return x_BD + 0.0 * (gate_up.sum() + down.sum() + weights_B.sum())


class _SentExperts(_PlacedExperts):
    """Experts that stay on their rank; rows travel to them and back by all-to-all, one row for each chosen expert."""

    def forward(self, x_TD: torch.Tensor, weights_Tk: torch.Tensor, ids_Tk: torch.Tensor) -> torch.Tensor:
        gate_up, down = local(self.gate_up_proj), local(self.down_proj)
        size, own = self.ranks.size, len(down)
        order_A = ids_Tk.flatten().argsort(stable=True)
        place_A = torch.empty_like(order_A)
        place_A[order_A] = torch.arange(len(order_A), device=order_A.device)
        sent_E = torch.bincount(ids_Tk.flatten(), minlength=size * own)
        received_E = all_to_all(sent_E, [own] * size, [own] * size, self.ranks)  # of every rank, for each own expert
        sent, received = (counts.view(size, own).sum(1).tolist() for counts in (sent_E, received_E))
        x_AD = x_TD.index_select(0, order_A.div(ids_Tk.shape[1], rounding_mode="floor"))
        x_BD = all_to_all(x_AD, sent, received, self.ranks)
        ids_B = torch.arange(own, device=ids_Tk.device).repeat(size).repeat_interleave(received_E)
        out_BD = run_experts(x_BD, torch.ones_like(x_BD[:, 0]), ids_B, gate_up, down)
        out_AD = all_to_all(out_BD, received, sent, self.ranks)
        return (out_AD.index_select(0, place_A).unflatten(0, ids_Tk.shape) * weights_Tk[..., None]).sum(1)


def _expert_parallel(model: Qwen3, mesh: Any, replicas: Ranks, parallel: Parallel) -> None:
    for index, layer in enumerate(model.model.layers):
        if isinstance(layer.mlp, SparseMLP):
            layer.mlp.experts = _SentExperts(layer.mlp.experts, mesh)  # type: ignore[assignment]
            if replicas.size > 1:
                names = [f"model.layers.{index}.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")]
                parallel.partial |= dict.fromkeys(names, replicas)


# Context parallel


def _context_parallel(model: Qwen3, ranks: Ranks) -> None:
    """The model runs on this rank's tokens; hidden states come back at the places of the whole stream, 0 elsewhere."""
    places: list[tuple[int, torch.Tensor]] = []  # of the passes that are under way

    def enter(module: nn.Module, args: Any, kwargs: Any) -> Any:
        tokens_T, positions_T, attn, *rest = args
        mine_U = chunk_places(len(tokens_T), ranks).to(tokens_T.device)
        places.append((len(tokens_T), mine_U))
        return (tokens_T[mine_U], positions_T[mine_U], ContextInputs.of(attn, mine_U, ranks), *rest), kwargs

    def leave(module: nn.Module, args: Any, hidden_UD: torch.Tensor) -> torch.Tensor:
        length, mine_U = places.pop()
        return hidden_UD.new_zeros(length, hidden_UD.shape[1]).index_copy(0, mine_U, hidden_UD)

    model.register_forward_pre_hook(enter, with_kwargs=True)
    model.register_forward_hook(leave)


# FSDP2


class _OpenRouting:
    """The lists of a Routing in a class that FSDP does not copy: it rebuilds data classes that hold tensors."""

    def __init__(self, routing: Routing) -> None:
        self.probs, self.ids = routing.probs, routing.ids


def _shard(model: Qwen3, mesh: Any, precision: str) -> None:
    """Every layer a unit, embedding and head with the model itself; gradients are summed, not averaged."""
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    def open_routing(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(_OpenRouting(arg) if isinstance(arg, Routing) else arg for arg in args)

    model.register_forward_pre_hook(open_routing)
    settled = {
        parameter for module in model.modules() if isinstance(module, _SentExperts) for parameter in module.parameters()
    }
    # Inputs of layers are in bf16 by themselves, and casting them would copy the routing that is filled inside.
    lowered = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    policy = lowered if precision == "bf16" else MixedPrecisionPolicy()
    for unit in [*model.model.layers, model]:
        fully_shard(unit, mesh=mesh, ignored_params=settled, mp_policy=policy)
    for unit in model.modules():
        if isinstance(unit, FSDPModule):
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)


# Back to one process


def kinds(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters that one fused optimiser call can take together: those that are sharded alike."""
    groups: dict[Any, list[nn.Parameter]] = {}
    for parameter in parameters:
        placed: Any = parameter
        key = (placed.device_mesh, placed.placements) if is_sharded(parameter) else None
        groups.setdefault(key, []).append(parameter)
    return list(groups.values())


@torch.no_grad()
def reorder(model: Qwen3, tensors: dict[str, torch.Tensor], before: int, now: int) -> None:
    """Rows of fused tensors stored by ``before`` tensor ranks, put into the order of ``now``, in place.

    Args:
        tensors: parameters or moments; names contain the parameter's.
    """
    for name, tensor in tensors.items():
        old, new = (row_order(model, name, ranks) for ranks in (before, now))
        if before != now and tensor.dim() and (old is not None or new is not None):
            rows = torch.arange(tensor.shape[0])
            back = rows if old is None else old.argsort()
            order = back if new is None else back[new]
            dist.fill(tensor, whole(tensor)[order])


@torch.no_grad()
def collect(model: Qwen3, parallel: Parallel) -> Qwen3:
    """A plain model with the weights of a spread one, on every rank; all ranks must ask. The model itself if alone."""
    if parallel.world.size == 1:
        return model
    plain = empty_model(model.config)
    own = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        full = whole(parameter)
        order = row_order(model, name, parallel.tensor)
        own[name].copy_(full if order is None else full[order.argsort()])
    return plain
