"""One MoE layer of Qwen3-30B-A3B's shape against a loop over experts, transformers' block and a dense layer, on a CPU.

    python -m benchmarks.moe_speed [--rounds 5] [--loop-rounds 3] [--experts 128] [--parts ...] [--out FILE]

Hidden size 2048, 128 experts of width 768, 8 a token; random fp32 weights (2.4 GB, and as much again for gradients),
so routing is nearly even. Each pair runs in turn, and the median of per-round ratios is what counts.

loop: ``reference.moe``, one expert after the other. For its backward pass experts are separate parameters, as a list
of modules would have them: cut out of one tensor, each would get a gradient as large as the whole tensor.
eager: transformers' own loop over experts (``experts_implementation="eager"``), which cuts each expert out of one
stacked parameter: its backward pass fills and adds a gradient of all experts once an expert.
decode: transformers' Qwen3MoeSparseMoeBlock with the experts implementation that its models choose by default, on the
same weights, without gradients.
floor: the least that the loop's 256 tokens can take in fp32 here, whoever multiplies: their operations at the measured
ceiling of a large square product, or every weight read from memory once (with the backward pass twice, and each
gradient written once), whichever takes longer; all at the best rates that the machine shows with nothing else to do.
torch: the same layer with torch's products in place of numpy's (``ops/blas.py``), which is why it has numpy's.
dense: forward and backward against a SwiGLU layer of width 6144, the same active parameters; routing is included.
Allocator settings are those the training command uses.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
import transformers

from twofold.base.files import write_json
from twofold.base.log import peak_memory_bytes
from twofold.base.malloc import ensure_malloc_settings
from twofold.model.presets import preset
from twofold.model.qwen3 import DenseMLP, SparseMLP
from twofold.ops import moe, reference
from twofold.ops.blas import torch_product
from twofold.train.meter import ceiling

RESULT = Path(__file__).parent / "results" / "moe-speed.json"
TRAIN_TOKENS = 2048
LARGE_TOKENS = 8192
PARTS = ("decode", "loop", "torch", "eager", "dense")
WARM = 4  # rounds that do not count: until then the heap still grows, and gigabytes of gradients pay page faults
Step = Callable[[], object]
Row = dict[str, Any]


def sparse_layer(experts: int) -> SparseMLP:
    """Our layer with random weights."""
    layer = SparseMLP(preset("Qwen3-30B-A3B").model_copy(update={"num_experts": experts}))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0.0, 0.02, generator=generator)
    return layer


def their_block(layer: SparseMLP, implementation: str | None = None) -> tuple[torch.nn.Module, str]:
    """transformers' block on the same tensors, and the name of the implementation it uses (default: its choice)."""
    experts, inner, width = layer.experts.down_proj.shape[0], *reversed(layer.experts.down_proj.shape[1:])
    config = transformers.Qwen3MoeConfig(
        hidden_size=width, num_hidden_layers=1, num_experts=experts, num_experts_per_tok=layer.k,
        moe_intermediate_size=inner, norm_topk_prob=True, vocab_size=8,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.Qwen3MoeForCausalLM(config)
    block = model.model.layers[0].mlp
    if implementation is not None:
        model.set_experts_implementation(implementation)
    block.gate.weight = layer.gate.weight
    block.experts.gate_up_proj, block.experts.down_proj = layer.experts.gate_up_proj, layer.experts.down_proj
    return block, str(model.config._experts_implementation)


def loop_step(layer: SparseMLP, x_TD: torch.Tensor, backward: bool) -> Step:
    """The layer as ``reference.moe``, or as its loop over separate parameters with a backward pass."""
    gate_up_EJD, down_EDI = layer.experts.gate_up_proj.detach(), layer.experts.down_proj.detach()
    if not backward:

        def forward() -> torch.Tensor:
            _, weights_Tk, ids_Tk = reference.route(layer.gate(x_TD), layer.k, layer.renormalise)
            return reference.moe(x_TD, weights_Tk, ids_Tk, gate_up_EJD, down_EDI)

        return torch.no_grad()(forward)
    pairs = [(a.requires_grad_(), b.requires_grad_()) for a, b in zip(gate_up_EJD, down_EDI, strict=True)]
    x_TD = x_TD.clone().requires_grad_()

    def step() -> None:
        _, weights_Tk, ids_Tk = reference.route(layer.gate(x_TD), layer.k, layer.renormalise)
        out_TD = torch.zeros_like(x_TD)
        for expert, (gate_up, down) in enumerate(pairs):
            token, slot = (ids_Tk == expert).nonzero(as_tuple=True)
            if len(token):
                y = F.linear(reference.swiglu(F.linear(x_TD[token], gate_up)), down)
                out_TD = out_TD.index_add(0, token, y * weights_Tk[token, slot, None])
        out_TD.sum().backward()
        layer.zero_grad()
        for pair in pairs:
            for weight in pair:
                weight.grad = None

    return step


def training_step(layer: torch.nn.Module, x: torch.Tensor) -> Step:
    """Forward and backward, gradients set to None after. Our layers are told that nobody records their routing."""
    x, routing = x.clone().requires_grad_(), () if x.dim() == 3 else (None,)

    def step() -> None:
        layer(x, *routing).sum().backward()
        layer.zero_grad()

    return step


def compare(name: str, ours: Step, theirs: Step, rounds: int, warm: int = WARM) -> Row:
    """Seconds of both in turn; ratio: theirs by ours, so above 1 where we are faster."""
    pairs = []
    for _ in range(warm + rounds):
        times = []
        for step in (ours, theirs):
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
        pairs.append(times)
    pairs = pairs[warm:]
    ratios = [theirs / ours for ours, theirs in pairs]
    row = {
        "ours_ms": round(1000 * statistics.median(ours for ours, _ in pairs), 1),
        "other_ms": round(1000 * statistics.median(theirs for _, theirs in pairs), 1),
        "ratio": round(statistics.median(ratios), 2),
        "ratio_range": [round(min(ratios), 2), round(max(ratios), 2)],
    }
    low, high = row["ratio_range"]
    print(f"{name:44} {row['ours_ms']:>10} ms {row['other_ms']:>10} ms   x{row['ratio']} ({low} to {high})", flush=True)
    return row


def shortest(steps: Sequence[Step]) -> float:
    """Milliseconds that the steps take one after the other, the best of five times."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        for step in steps:
            step()
        times.append(time.perf_counter() - start)
    return 1000 * min(times)


def floor(layer: SparseMLP, tokens: int) -> Row:
    """Milliseconds below which no fp32 layer gets on this machine, and what they are made of."""
    weights = [layer.experts.gate_up_proj.detach(), layer.experts.down_proj.detach()]
    gradients = [torch.zeros_like(weight) for weight in weights]
    flops = 2 * tokens * layer.k * sum(weight[0].numel() for weight in weights)
    highest = max(ceiling(weights[0].device, torch.float32) for _ in range(5))
    products, reading, writing = (
        1000 * flops / highest,
        shortest([weight.sum for weight in weights]),
        shortest([gradient.zero_ for gradient in gradients]),
    )
    row = {
        "ceiling_gflops": round(highest / 1e9, 1),
        "products_ms": round(products, 1),
        "reading_ms": round(reading, 1),
        "writing_ms": round(writing, 1),
        "forward_ms": round(max(products, reading), 1),
        "forward_and_backward_ms": round(max(3 * products, 2 * reading + writing), 1),
    }
    print(f"floor {tokens} tokens: {row}", flush=True)
    return row


def compare_eager(layer: SparseMLP, x_TD: torch.Tensor, rounds: int) -> dict[str, Row]:
    """Against transformers' loop over stacked experts; its training step takes most of a minute, so it runs twice."""
    block, _ = their_block(layer, "eager")
    ours = torch.no_grad()(lambda: layer(x_TD, None))
    theirs = torch.no_grad()(lambda: block(x_TD[None]))
    torch.testing.assert_close(ours(), theirs()[0], atol=1e-5, rtol=1e-4)
    forward, both = (f"{kind} {len(x_TD)} tokens, transformers eager" for kind in ("forward", "forward and backward"))
    return {
        forward: compare(forward, ours, theirs, rounds),
        both: compare(both, training_step(layer, x_TD), training_step(block, x_TD[None]), 1, 1),
    }


def with_torch(step: Step) -> Step:
    """The step with every product by torch."""

    def run() -> None:
        with patch.object(moe, "thread_product", return_value=torch_product):
            step()

    return run


def measure(layer: SparseMLP, rounds: int, loop_rounds: int, parts: Sequence[str]) -> dict[str, Row]:
    """All comparisons, by name."""
    generator = torch.Generator().manual_seed(1)
    inputs = {
        n: torch.randn(n, layer.gate.in_features, generator=generator)
        for n in (1, 4, 8, 256, TRAIN_TOKENS, LARGE_TOKENS)
    }
    results = {}
    if "decode" in parts:
        block, implementation = their_block(layer)
        for tokens in (1, 4, 8):
            x_TD = inputs[tokens]
            ours = torch.no_grad()(lambda x_TD=x_TD: layer(x_TD, None))
            theirs = torch.no_grad()(lambda x_TD=x_TD: block(x_TD[None]))
            torch.testing.assert_close(ours(), theirs()[0], atol=1e-5, rtol=1e-4)
            name = f"decode {tokens} tokens, transformers {implementation}"
            results[name] = compare(name, ours, theirs, 4 * rounds)
    if "loop" in parts:
        results["floor 256 tokens"] = floor(layer, 256)
        for tokens in (256, TRAIN_TOKENS):
            x_TD = inputs[tokens]
            forward = torch.no_grad()(lambda x_TD=x_TD: layer(x_TD, None))
            name = f"forward {tokens} tokens, loop"
            results[name] = compare(name, forward, loop_step(layer, x_TD, False), loop_rounds)
            name = f"forward and backward {tokens} tokens, loop"
            results[name] = compare(name, training_step(layer, x_TD), loop_step(layer, x_TD, True), loop_rounds)
    if "torch" in parts:
        for tokens in (256, TRAIN_TOKENS):
            step = training_step(layer, inputs[tokens])
            name = f"forward and backward {tokens} tokens, torch's products"
            results[name] = compare(name, step, with_torch(step), rounds)
    if "eager" in parts:
        results |= compare_eager(layer, inputs[256], rounds)
    if "dense" in parts:
        dense = DenseMLP(layer.gate.in_features, layer.k * layer.experts.down_proj.shape[2])
        for tokens in (256, TRAIN_TOKENS, LARGE_TOKENS):
            x_TD = inputs[tokens]
            name = f"forward and backward {tokens} tokens, dense"
            results[name] = compare(name, training_step(layer, x_TD), training_step(dense, x_TD), rounds)
    return results


def main() -> None:
    """Run the comparisons and write the table."""
    ensure_malloc_settings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--loop-rounds", type=int, default=3, help="the loop takes seconds")
    parser.add_argument("--experts", type=int, default=128, help="fewer for a try")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    results = measure(sparse_layer(arguments.experts), arguments.rounds, arguments.loop_rounds, arguments.parts)
    facts = {
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "experts": arguments.experts,
        "peak_memory_gb": round(peak_memory_bytes() / 1e9, 1),
    }
    write_json(arguments.out, {**facts, **results})


if __name__ == "__main__":
    main()
