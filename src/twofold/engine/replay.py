"""Replay: decoding steps recorded once and run again without Python, as CUDA graphs do on a GPU.

One token of a small model is hundreds of operations of a few microseconds each, and calling them from Python takes
longer than running them. A recording is the model's own forward pass as ``torch.jit.trace`` wrote it down: the same
operations in the same order, so the same bits. It serves any number of rows and any length; what it cannot know is
chosen by Python, so steps that need such a choice (prompts, several groups of rows, experts, sliding windows, long
context, adapters, hooks, weights packed by oneDNN) are run as ever, and so is everything on a GPU and across processes.

Shape legend: R rows being decoded, L keys of the longest row, D width.
"""

from __future__ import annotations

import logging
import warnings

import torch
from torch import nn

from twofold.base.interrupt import uninterrupted
from twofold.engine.inputs import StepInputs
from twofold.model.attn_inputs import AttnInputs, PagedKV, Pools
from twofold.model.quantised import PackedWeight
from twofold.model.qwen3 import Qwen3
from twofold.ops.attention import RowGroup
from twofold.ops.quant import MOST_ROWS

logger = logging.getLogger("twofold")

Kind = tuple[bool, bool, bool]  # one row, blocks that are gathered, blocks that hold whole sequences


class _Step(nn.Module):
    """The model on one group of rows, as a function of tensors alone."""

    def __init__(self, model: Qwen3) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        tokens_R: torch.Tensor,
        positions_R: torch.Tensor,
        block_R: torch.Tensor,
        place_R: torch.Tensor,
        mask_RL: torch.Tensor,
        pools: list[torch.Tensor],
        table: torch.Tensor | None = None,
    ) -> torch.Tensor:
        layers = list(zip(pools[::2], pools[1::2], strict=True))
        group = RowGroup(slice(None), 0, None, table, positions_R, mask_RL)
        attn = AttnInputs([], None, 0, Pools(layers), block_R, place_R, (group,))
        hidden_RD: torch.Tensor = self.model(tokens_R, positions_R, attn)
        return hidden_RD


class Replay:
    """Recordings of one model.

    Args:
        after: steps of a kind from which it is recorded, which takes as long as about a hundred steps; None: never.
    """

    def __init__(self, model: Qwen3, after: int | None) -> None:
        self.model, self.after = model, after
        self.replayed = 0  # steps
        self._steps: dict[Kind, int] = {}
        self._recordings: dict[Kind, torch.jit.ScriptModule] = {}
        self._made_of: tuple[object, ...] = ()
        self._usable = False

    def refresh(self, adapted: bool) -> None:
        """Drop recordings of what the model no longer is; to be called before samples begin, not at every step."""
        self._usable = self.after is not None and not adapted and _recordable(self.model)
        if not self._usable:
            return
        tensors = [tensor.data_ptr() for tensor in (*self.model.parameters(), *self.model.buffers())]
        modules = list(self.model.modules())
        made_of = (*map(id, modules), *tensors, self.model.attention_dtype)
        if made_of != self._made_of:
            self._made_of = made_of
            self._recordings.clear()
        self._usable = not any(module._forward_hooks or module._forward_pre_hooks for module in modules)

    def run(self, inputs: StepInputs) -> torch.Tensor | None:
        """Final hidden states [R, D] of a decoding step, its keys written; None where it has to be run otherwise."""
        attn, rows = inputs.attn, len(inputs.rows)
        plain = not inputs.chunks and not attn.idle and len(attn.groups) == 1 and attn.extended_S is None
        if not self._usable or not plain or rows > MOST_ROWS or not isinstance(attn.cache, PagedKV):
            return None
        group = attn.groups[0]
        kind = (rows == 1, group.table is not None, attn.cache.whole)
        self._steps[kind] = self._steps.get(kind, 0) + 1
        if self._steps[kind] <= (self.after or 0):
            return None
        pools = [pool for layer in attn.cache.layers for pool in layer]
        block_R = attn.block_T
        assert block_R is not None
        if group.first is not None and group.table is None:
            pools = [pool.narrow(1, group.first, rows * group.blocks) for pool in pools]
            block_R = block_R - group.first
        given: tuple[object, ...] = (inputs.tokens_T, inputs.positions_T, block_R, attn.place_T, group.mask_RL, pools)
        if group.table is not None:
            given = (*given, group.table)
        if kind not in self._recordings:
            recording = self._record(given)
            if recording is None:
                return None
            self._recordings[kind] = recording
        self.replayed += 1
        hidden_RD: torch.Tensor = self._recordings[kind](*given)
        return hidden_RD

    def _record(self, given: tuple[object, ...]) -> torch.jit.ScriptModule | None:
        with uninterrupted(), warnings.catch_warnings():  # the tracer loses a KeyboardInterrupt, or dies of it
            warnings.simplefilter("ignore")  # of torch.jit's age, and of sizes that are fixed by the model
            try:
                return torch.jit.trace(_Step(self.model), given, check_trace=False)
            except RuntimeError as error:
                reason = str(error).strip().splitlines()[0]
                logger.warning("decoding goes on unrecorded, and slower: torch.jit.trace: %s", reason)
                self.after = None
                self._usable = False
                return None


def _recordable(model: Qwen3) -> bool:
    config = model.config
    layers = range(config.num_hidden_layers)
    plain = not any(config.is_moe_layer(i) or config.layer_window(i) is not None for i in layers)
    alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
    held = all(module.recordable for module in model.modules() if isinstance(module, PackedWeight))
    return plain and alone and held and config.context is None and model.model.norm.weight.device.type == "cpu"
