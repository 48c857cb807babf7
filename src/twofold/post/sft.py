"""Supervised fine-tuning as a batch source: rendered conversations, a fixed number a step, reshuffled each epoch."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from twofold.base.batch import TokenBatch, pack
from twofold.base.records import InputError
from twofold.text.chat import Rendered


class ChatSource:
    """Batches of rendered examples; the state is one counter.

    Raises:
        InputError: no example, or one without any trained token (it would be a silent no-op).
    """

    can_checkpoint = True

    def __init__(self, examples: Sequence[Rendered], batch_size: int, seed: int) -> None:
        if not examples:
            raise InputError("there are no training conversations; the filters may have dropped all of them")
        for index, example in enumerate(examples):
            if not any(example.weights[1:]):
                raise InputError(f"training conversation {index} has no token with a loss weight")
        self.examples, self.batch_size, self.seed = list(examples), batch_size, seed
        self.taken = 0
        self._order: tuple[int, list[int]] = (-1, [])

    def next_step(self) -> list[TokenBatch]:
        """The next ``batch_size`` examples."""
        rows = []
        for number in range(self.taken, self.taken + self.batch_size):
            epoch, place = divmod(number, len(self.examples))
            rows.append(self.examples[self._epoch(epoch)[place]])
        self.taken += self.batch_size
        return [pack([row.token_ids for row in rows], [row.weights for row in rows])]

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
