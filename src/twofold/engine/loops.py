"""Thoughts that turn in circles: found while they are sampled, by counting at every distance how long text repeats.

For each period up to 512 tokens a score runs along: one up where a token equals the one that many tokens before it,
well down where it does not. Text that comes a third time in full, or nearly so, reaches the bound of its period;
enumerations whose lines differ in a number or two do not. No n-gram tables, no Python loop over rows.

Shape legend: R rows of this step, each a slot, P periods.
"""

from __future__ import annotations

import torch

PERIODS = 512  # longest period that is noticed
LEAST = 64  # least score: shorter repetitions (dots, dashes, digits) are no loop yet
_SLIP = 8  # what a differing token costs: text that differs in more than one token of nine never adds up


class LoopDetector:
    """Scores of ``capacity`` slots."""

    def __init__(self, capacity: int, device: torch.device | str = "cpu") -> None:
        self._periods_P = torch.arange(1, PERIODS + 1, device=device)
        self._bound_P = (2 * self._periods_P).clamp(min=LEAST)
        self._scores = torch.zeros(capacity, PERIODS, dtype=torch.int32, device=device)

    def grow(self, capacity: int) -> None:
        """Room for more slots; the state of those in use stays."""
        self._scores = torch.nn.functional.pad(self._scores, (0, 0, 0, capacity - len(self._scores)))

    def start(self, slot: int) -> None:
        """Begin a sample."""
        self._scores[slot] = 0

    def advance(
        self,
        slots_R: torch.Tensor,
        tokens_R: torch.Tensor,
        table: torch.Tensor,
        made_R: torch.Tensor,
        thought_R: torch.Tensor,
    ) -> torch.Tensor:
        """Take one token of each slot's thought; says where the thought repeats itself (bool [R]).

        Args:
            table: tokens generated so far, [slots, longest]. made_R: their number before these.
            thought_R: how many of the last of them belong to the thought; earlier ones are not compared.
        """
        places_RP = (made_R[:, None] - self._periods_P).clamp(min=0)
        same_RP = table[slots_R[:, None], places_RP] == tokens_R[:, None]
        same_RP &= self._periods_P <= thought_R[:, None]
        scores_RP = self._scores[slots_R]
        scores_RP = torch.where(same_RP, scores_RP + 1, (scores_RP - _SLIP).clamp(min=0))
        self._scores[slots_R] = scores_RP
        return (scores_RP >= self._bound_P).any(-1)
