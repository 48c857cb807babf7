"""Weights: whether a model's weights are still those that the keys in the cache were computed with.

Tensors are held weakly and compared as objects: an address may be given out again, a tensor that is gone does not come
back. Writes in place are known by torch's own count of them. It does not count those through ``.data``; whoever writes
so says it by ``Engine.update_weights``.
"""

from __future__ import annotations

import operator
import weakref

import torch

from twofold.model.qwen3 import Qwen3


class Weights:
    """The weights of ``model`` as they were when ``changed`` was last asked."""

    def __init__(self, model: Qwen3) -> None:
        self.model = model
        self._held: list[weakref.ref[torch.Tensor]] = []
        self._marks: list[tuple[int, int]] = []

    def changed(self) -> bool:
        """Whether a weight was added, removed, replaced or written since the last call; a millisecond or two."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        marks = [(tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in tensors]
        held = [reference() for reference in self._held]
        same = marks == self._marks and all(map(operator.is_, held, tensors))
        if not same:
            self._held, self._marks = [weakref.ref(tensor) for tensor in tensors], marks
        return not same
