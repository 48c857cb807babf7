"""State of the sequences being generated, one row each, as tensors: what is vectorised over a decode step.

Rows 0..n-1 are in use (some may have finished and wait for re-use). Nothing here runs the model.

Thinking is a small state machine on token ids: BEFORE an opening tag, IN the block, AFTER it. When a row has spent its
budget inside the block, the engine's stop text is forced on it token by token and the row moves to AFTER.

Shape legend: R rows, F tokens of the stop text, M longest completion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from twofold.base.records import Completion, Request

BEFORE, IN, AFTER = 0, 1, 2
NO_BUDGET = 2**31 - 1
_PER_ROW = (
    *("place", "made", "limit", "last", "phase", "thought", "budget", "forcing", "seed", "top_k", "temperature"),
    *("top_p", "live", "tokens", "logprobs", "entropies", "forced", "extended"),
)


@dataclass(frozen=True)
class ThinkTokens:
    """Token ids that the thinking state machine needs; None where a tokenizer has no think tokens."""

    opening: int
    closing: int
    stop_ids: tuple[int, ...]


@dataclass(frozen=True)
class Sample:
    """One sample of one request, not yet or currently running."""

    request_index: int
    sample_index: int
    request: Request


class Rows:
    """Per-row state for up to ``capacity`` samples of at most ``max_new`` tokens."""

    def __init__(
        self,
        capacity: int,
        max_new: int,
        think: ThinkTokens | None,
        eos_ids: Sequence[int],
        min_rows: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        self.think, self.min_rows = think, min_rows
        self._stop_text = torch.tensor(think.stop_ids if think else (0,), dtype=torch.int64, device=device)
        self._eos = torch.tensor(list(eos_ids), dtype=torch.int64, device=device)
        self.samples: list[Sample | None] = [None] * capacity
        self.any_stops = False  # whether a sample has stop tokens of its own
        self.count = 0
        numbers = torch.zeros(10, capacity, dtype=torch.int64, device=device).unbind()
        self.place, self.made, self.limit, self.last = numbers[:4]
        self.phase, self.thought, self.budget, self.forcing = numbers[4:8]
        self.seed, self.top_k = numbers[8:]
        self.temperature = torch.zeros(capacity, device=device)
        self.top_p = torch.ones(capacity, device=device)
        self.live, self.extended = torch.zeros(2, capacity, dtype=torch.bool, device=device).unbind()
        self.tokens = torch.zeros(capacity, max_new, dtype=torch.int64, device=device)
        self.logprobs, self.entropies = torch.zeros(2, capacity, max_new, device=device).unbind()
        self.forced = torch.zeros(capacity, max_new, dtype=torch.bool, device=device)

    def place_sample(self, row: int, sample: Sample, extended: bool = False) -> None:
        """Start ``sample`` in ``row``; its prompt is about to be prefilled.

        ``extended``: it is coded beyond the native length of a model with a long context.
        """
        params = sample.request.params
        self.samples[row] = sample
        self.any_stops |= bool(params.stop_token_ids)
        self.count = max(self.count, row + 1, self.min_rows)
        self.place[row] = len(sample.request.prompt_ids) - 1
        self.made[row] = 0
        self.limit[row] = params.max_tokens
        self.phase[row] = IN if sample.request.in_think else BEFORE
        self.thought[row] = 0
        self.budget[row] = NO_BUDGET if params.thinking_budget is None else params.thinking_budget
        self.forcing[row] = 0 if sample.request.in_think and params.thinking_budget == 0 else -1
        self.seed[row] = params.seed + sample.sample_index
        self.top_k[row] = params.top_k
        self.temperature[row] = params.temperature
        self.top_p[row] = params.top_p
        self.live[row] = True
        self.extended[row] = extended

    def force(self, tokens_R: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Replace sampled tokens by the stop text where a row is being forced. Returns (tokens, forced mask)."""
        forcing = self.forcing[rows]
        mask = forcing >= 0
        return torch.where(mask, self._stop_text[forcing.clamp(min=0)], tokens_R), mask

    def append(
        self,
        rows: torch.Tensor,
        tokens: torch.Tensor,
        forced: torch.Tensor,
        logprobs: torch.Tensor,
        entropies: torch.Tensor,
    ) -> None:
        """Record one token for each of ``rows`` and advance their state."""
        made = self.made[rows]
        self.tokens[rows, made] = tokens
        self.logprobs[rows, made] = logprobs
        self.entropies[rows, made] = entropies
        self.forced[rows, made] = forced
        self.last[rows] = tokens
        self.made[rows] = made + 1
        self.place[rows] += 1
        if self.think is not None:
            self._advance_thinking(self.think, rows, tokens, forced)
        ended = torch.isin(tokens, self._eos)
        if self.any_stops:
            own = [token in self._own_stops(row) for row, token in zip(rows.tolist(), tokens.tolist(), strict=True)]
            ended |= torch.tensor(own, device=ended.device)
        ended &= ~forced
        self.live[rows] = ~(ended | (self.made[rows] >= self.limit[rows]))

    def _own_stops(self, row: int) -> tuple[int, ...]:
        sample = self.samples[row]
        return sample.request.params.stop_token_ids if sample is not None else ()

    def _advance_thinking(
        self, think: ThinkTokens, rows: torch.Tensor, tokens: torch.Tensor, forced: torch.Tensor
    ) -> None:
        phase, forcing = self.phase[rows], self.forcing[rows]
        inside = (phase == IN) & ~forced & (tokens != think.closing)
        opened = (phase == BEFORE) & (tokens == think.opening)
        closed = (phase == IN) & (tokens == think.closing)
        self.thought[rows] += inside.long()
        phase = torch.where(opened, IN, torch.where(closed, AFTER, phase))
        forcing = torch.where(forced, forcing + 1, forcing)
        forcing = torch.where(forcing >= len(think.stop_ids), -1, forcing)
        spent = (phase == IN) & (self.thought[rows] >= self.budget[rows]) & ~forced
        self.forcing[rows] = torch.where(spent, 0, forcing)
        self.phase[rows] = phase

    def finished(self) -> list[int]:
        """Rows whose sample has ended but has not been taken yet."""
        return [row for row in (~self.live[: self.count]).nonzero().flatten().tolist() if self.samples[row] is not None]

    def take(self, row: int, version: int) -> Completion:
        """Turn a finished row into a Completion and free it."""
        sample, made = self.samples[row], int(self.made[row])
        assert sample is not None
        stops = {*self._eos.tolist(), *self._own_stops(row)}
        self.samples[row] = None
        tokens = self.tokens[row, :made].tolist()
        stopped = tokens[-1] in stops and not bool(self.forced[row, made - 1])
        return Completion(
            request_index=sample.request_index,
            sample_index=sample.sample_index,
            token_ids=tokens,
            logprobs=self.logprobs[row, :made].tolist(),
            forced=self.forced[row, :made].tolist(),
            entropies=self.entropies[row, :made].tolist(),
            finish_reason="stop" if stopped else "length",
            thinking_tokens=int(self.thought[row]),
            policy_version=version,
        )

    def compact(self) -> torch.Tensor:
        """Move live rows to the front, keeping their order. Returns the rows kept (ascending)."""
        keep = self.live[: self.count].nonzero().flatten()
        for name in _PER_ROW:
            value = getattr(self, name)
            value[: len(keep)] = value[keep]
        self.live[len(keep) :] = False
        self.samples[: len(keep)] = [self.samples[row] for row in keep.tolist()]
        self.samples[len(keep) :] = [None] * (len(self.samples) - len(keep))
        self.count = max(len(keep), self.min_rows)
        return keep
