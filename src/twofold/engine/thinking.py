"""Where each running sample is in its thought: a small state machine on token ids, one slot a sample.

BEFORE an opening tag, IN the block, AFTER it. When a thought has spent its budget or turns in circles, the stop text is
forced token by token and the sample moves to AFTER. Not here: what is drawn (``sampling.py``), what a loop is
(``loops.py``), what the tags mean (``text``).

Shape legend: R rows of this step, each a slot.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from twofold.base.records import Request

BEFORE, IN, AFTER = 0, 1, 2
NO_BUDGET = 2**31 - 1


@dataclass(frozen=True)
class ThinkTokens:
    """Token ids that the thinking state machine needs; None where a tokenizer has no think tokens."""

    opening: int
    closing: int
    stop_ids: tuple[int, ...]


class Thinking:
    """The state of ``capacity`` slots."""

    def __init__(self, capacity: int, think: ThinkTokens, device: torch.device | str = "cpu") -> None:
        self.think = think
        self._stop_text = torch.tensor(think.stop_ids, dtype=torch.int64, device=device)
        self._state = torch.zeros(5, capacity, dtype=torch.int64, device=device)
        self._bind()

    def _bind(self) -> None:
        self.phase, self.thought, self.budget, self.forcing, self.looped = self._state.unbind()

    def grow(self, capacity: int) -> None:
        """Room for more slots; the state of those in use stays."""
        self._state = torch.nn.functional.pad(self._state, (0, capacity - self._state.shape[1]))
        self._bind()

    def start(self, slot: int, request: Request) -> None:
        """Begin a sample where its prompt ends."""
        budget = request.params.thinking_budget
        phase = IN if request.in_think else AFTER if request.after_think else BEFORE
        forcing = 0 if request.in_think and budget == 0 else -1
        values = [phase, 0, NO_BUDGET if budget is None else budget, forcing, 0]
        self._state[:, slot] = torch.tensor(values, device=self._state.device)

    def force(self, slots_R: torch.Tensor, tokens_R: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Replace drawn tokens by the stop text where a sample is being forced. Returns (tokens, forced mask)."""
        forcing_R = self.forcing[slots_R]
        forced_R = forcing_R >= 0
        return torch.where(forced_R, self._stop_text[forcing_R.clamp(min=0)], tokens_R), forced_R

    def inside(self, slots_R: torch.Tensor, tokens_R: torch.Tensor, forced_R: torch.Tensor) -> torch.Tensor:
        """Which of these next tokens belong to a thought, its closing tag and forced text not counted."""
        return (self.phase[slots_R] == IN) & ~forced_R & (tokens_R != self.think.closing)

    def advance(
        self, slots_R: torch.Tensor, tokens_R: torch.Tensor, forced_R: torch.Tensor, looping_R: torch.Tensor | None
    ) -> torch.Tensor:
        """Take one token for each slot. Returns where a block was closed by it (bool [R]).

        ``looping_R``: where the thought repeats itself and is to be ended.
        """
        phase, forcing = self.phase[slots_R], self.forcing[slots_R]
        opened_R = (phase == BEFORE) & (tokens_R == self.think.opening)
        closed_R = (phase == IN) & (tokens_R == self.think.closing)
        thought = self.thought[slots_R] + self.inside(slots_R, tokens_R, forced_R).long()
        phase = torch.where(opened_R, IN, torch.where(closed_R, AFTER, phase))
        forcing = torch.where(forced_R, forcing + 1, forcing)
        forcing = torch.where(forcing >= len(self._stop_text), -1, forcing)
        spent_R = thought >= self.budget[slots_R]
        if looping_R is not None:
            self.looped[slots_R] |= looping_R.long()
            spent_R = spent_R | looping_R
        spent_R = spent_R & (phase == IN) & ~forced_R
        self.forcing[slots_R] = torch.where(spent_R, 0, forcing)
        self.thought[slots_R] = thought
        self.phase[slots_R] = phase
        return closed_R
