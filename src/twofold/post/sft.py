"""Supervised fine-tuning as a batch source: rendered conversations, a fixed number a step, reshuffled each epoch.

Conversations lie in memory, or tokenised in one file that is mapped, so that a data set need not fit. Not here: reading
rows and rendering (``text``), and which conversations are left out (a recipe's business).
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from twofold.base.batch import TokenBatch, pack
from twofold.base.files import atomic_path
from twofold.base.records import InputError


class Example(Protocol):
    """A tokenised conversation: ids, and the loss weight of predicting each."""

    @property
    def token_ids(self) -> Sequence[int]: ...

    @property
    def weights(self) -> Sequence[float]: ...


class StoredExample(NamedTuple):
    """An ``Example`` read from a file."""

    token_ids: list[int]
    weights: list[float]


class StoredExamples(Sequence[StoredExample]):
    """Conversations of a file that ``write_examples`` made, read one by one.

    Raises:
        InputError: no such file, or not one of these.
    """

    def __init__(self, path: Path) -> None:
        try:
            file = safe_open(str(path), framework="numpy")
            self.offsets = file.get_tensor("offsets")
            self._tokens, self._weights = file.get_slice("tokens"), file.get_slice("weights")
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path} cannot be read ({error}); make the data again") from None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        start, end = (int(offset) for offset in self.offsets[index : index + 2])
        return StoredExample(self._tokens[start:end].tolist(), self._weights[start:end].tolist())


def write_examples(path: Path, examples: Iterable[Example]) -> None:
    """Write conversations as one safetensors file: tokens (int32), weights (fp32) and offsets, end to end."""
    kept = list(examples)
    tokens = np.array([token for example in kept for token in example.token_ids], dtype=np.int32)
    weights = np.array([weight for example in kept for weight in example.weights], dtype=np.float32)
    lengths = [len(example.token_ids) for example in kept]
    offsets = np.array(list(accumulate(lengths, initial=0)), dtype=np.int64)
    with atomic_path(path) as temporary:
        temporary.write_bytes(save({"tokens": tokens, "weights": weights, "offsets": offsets}))


class ChatSource:
    """Batches of rendered examples; the state is one counter.

    Args:
        micro_tokens: most tokens in one forward pass; a step is cut into as many micro-batches as that needs (None:
            one). The numbers do not depend on it.

    Raises:
        InputError: no example, or one without any trained token (it would be a silent no-op).
    """

    can_checkpoint = can_prefetch = True

    def __init__(
        self, examples: Sequence[Example], batch_size: int, seed: int, micro_tokens: int | None = None
    ) -> None:
        if not examples:
            raise InputError("there are no training conversations; the filters may have dropped all of them")
        for index, example in enumerate(examples):
            if not any(example.weights[1:]):
                raise InputError(f"training conversation {index} has no token with a loss weight")
        self.examples, self.batch_size, self.seed, self.micro_tokens = examples, batch_size, seed, micro_tokens
        self.taken = 0
        self._order: tuple[int, list[int]] = (-1, [])

    def next_step(self) -> list[TokenBatch]:
        """The next ``batch_size`` examples."""
        rows = []
        for number in range(self.taken, self.taken + self.batch_size):
            epoch, place = divmod(number, len(self.examples))
            rows.append(self.examples[self._epoch(epoch)[place]])
        self.taken += self.batch_size
        return [pack([r.token_ids for r in part], [r.weights for r in part]) for part in split(rows, self.micro_tokens)]

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.taken = state["taken"]

    def _epoch(self, epoch: int) -> list[int]:
        if self._order[0] != epoch:
            order = list(range(len(self.examples)))
            random.Random(f"{self.seed}:{epoch}").shuffle(order)
            self._order = (epoch, order)
        return self._order[1]


def split(examples: Sequence[Example], limit: int | None) -> list[list[Example]]:
    """Cut a step into runs of at most ``limit`` tokens each (a longer example is a run of its own)."""
    runs: list[list[Example]] = [[]]
    size = 0
    for example in examples:
        if limit is not None and runs[-1] and size + len(example.token_ids) > limit:
            runs.append([])
            size = 0
        runs[-1].append(example)
        size += len(example.token_ids)
    return runs
