"""Decoding state of the samples being generated, one slot each, as tensors: what is vectorised over a step.

A slot belongs to one sample from its first admission to its end, also while it waits after a preemption. A step takes
one row of logits for each of any slots, draws their tokens, forces the stop text where a thought has to end, and
records everything. Nothing here runs the model or knows of caches, scheduling or texts.

Shape legend: R rows of this step, each a slot, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from twofold.base.records import Completion, FinishReason, InputError, Request
from twofold.engine.grammar import Grammars
from twofold.engine.loops import LoopDetector
from twofold.engine.shaping import Rows, Shaping
from twofold.engine.thinking import Thinking, ThinkTokens
from twofold.ops.sample import counter_uniform, sample, sample_filtered

__all__ = ["Sampled", "Sampler", "ThinkTokens", "TopTokens"]

TopTokens = list[tuple[int, float]]

_COLD = 1e-5  # lower temperatures are greedy

_INTEGERS = ("made", "limit", "last", "seed", "top_k", "answer_top_k")
_TABLES = (torch.int64, torch.float32, torch.float32, torch.bool)  # tokens, log-probabilities, entropies, forced
_NUMBERS = ("temperature", "top_p", "min_p", "answer_temperature", "answer_top_p", "answer_min_p")


@dataclass(frozen=True)
class Sampled:
    """One step's tokens, row by row.

    logprobs_R: natural-log probabilities under the model at temperature 1. finished_R: the sample ends with this token;
    take it. top: the likeliest (id, log-probability) pairs of the rows that asked for them, None where no row did.
    """

    tokens_R: torch.Tensor
    forced_R: torch.Tensor
    logprobs_R: torch.Tensor
    finished_R: torch.Tensor
    top: list[TopTokens] | None


@dataclass
class _Sample:
    request: Request
    request_index: int
    sample_index: int
    top: list[TopTokens]


class Sampler:
    """Samples up to ``capacity`` running samples.

    Args:
        think: think tags and stop text, or None for tokenizers without them. eos_ids: tokens that end a completion.
        vocab_limit: ids at and above it (rows that pad the vocabulary) are never drawn.
        grammars: compiles grammars for the tokenizer; None refuses requests that have one.
        entropies: record the entropy at each token (needed for training; costs passes over the vocabulary).
    """

    def __init__(
        self,
        capacity: int,
        think: ThinkTokens | None,
        eos_ids: Sequence[int],
        vocab_limit: int,
        device: torch.device | str = "cpu",
        grammars: Grammars | None = None,
        entropies: bool = True,
    ) -> None:
        self.think, self.vocab_limit, self.device = think, vocab_limit, torch.device(device)
        self._thinking = None if think is None else Thinking(capacity, think, device)
        self._shaping = Shaping(eos_ids, vocab_limit, device, grammars)
        self._loops: LoopDetector | None = None
        self._grammars, self._with_entropies = grammars, entropies
        self._eos = torch.tensor(list(eos_ids), dtype=torch.int64, device=device)
        self._samples: list[_Sample | None] = [None] * capacity
        self._integers = torch.zeros(len(_INTEGERS), capacity, dtype=torch.int64, device=device)
        self._numbers = torch.zeros(len(_NUMBERS), capacity, device=device)
        self._tables = [torch.zeros(capacity, 0, dtype=kind, device=device) for kind in _TABLES]
        self._longest = 0  # no sample has made more tokens than this
        # Slots that use a feature; a feature without slots costs nothing.
        self._filtered: set[int] = set()
        self._answering: set[int] = set()
        self._looping: set[int] = set()
        self._topped: dict[int, int] = {}
        self._stops: dict[int, frozenset[int]] = {}
        self._endless: set[int] = set()
        self._bind()

    def _bind(self) -> None:
        self.made, self.limit, self.last, self.seed, self.top_k, self.answer_top_k = self._integers.unbind()
        self.temperature, self.top_p, self.min_p = self._numbers[:3].unbind()

    @property
    def capacity(self) -> int:
        """Number of slots."""
        return len(self._samples)

    def grow(self, capacity: int, max_new: int = 0) -> None:
        """Room for at least so many slots, of so many tokens each; what is there stays.

        Completions longer than ``max_new`` make room for themselves.
        """
        more = max(0, capacity - self.capacity)
        if more:
            self._samples += [None] * more
            self._integers = torch.nn.functional.pad(self._integers, (0, more))
            self._numbers = torch.nn.functional.pad(self._numbers, (0, more))
            self._bind()
            for part in (self._thinking, self._loops):
                if part is not None:
                    part.grow(self.capacity)
        wider = max(0, max_new - self._tables[0].shape[1])
        if more or wider:
            self._tables = [torch.nn.functional.pad(table, (0, wider, 0, more)) for table in self._tables]

    def check(self, request: Request) -> None:
        """Refuse what cannot be honoured.

        Raises:
            InputError: thinking controls without think tokens, a bias outside the vocabulary, an invalid grammar.
        """
        params = request.params
        controls = {
            "thinking_budget": params.thinking_budget is not None,
            "stop_loops": params.stop_loops,
            "post_thinking": params.post_thinking is not None,
        }
        for name, used in controls.items():
            if used and self.think is None:
                message = f"{name} needs a tokenizer with <think> and </think>; this one has none"
                raise InputError(message, field=name)
        for token, _ in params.logit_bias:
            if token >= self.vocab_limit:
                message = f"logit_bias names token {token}, the vocabulary has {self.vocab_limit}"
                raise InputError(message, field="logit_bias")
        if params.grammar is not None:
            if self._grammars is None:
                raise InputError("a grammar needs the tokenizer; make the engine with grammars=Grammars(tokenizer)")
            self._grammars.check(params.grammar)

    def start(self, slot: int, request: Request, sample_index: int = 0, request_index: int = 0) -> None:
        """Begin sample ``sample_index`` of a request that ``check`` has passed in a free slot."""
        assert self._samples[slot] is None, f"slot {slot} is in use"
        params = request.params
        self._samples[slot] = _Sample(request, request_index, sample_index, [])
        then = params.post_thinking or params
        own = then if request.after_think else params
        integers = [0, params.max_tokens, request.prompt_ids[-1], params.seed + sample_index, own.top_k, then.top_k]
        numbers = [value for part in (own, then) for value in (_warmth(part.temperature), part.top_p, part.min_p)]
        self._integers[:, slot] = torch.tensor(integers, device=self.device)
        self._numbers[:, slot] = torch.tensor(numbers, device=self.device)
        if any(part.top_k > 0 or part.top_p < 1 or part.min_p > 0 for part in (own, then)):
            self._filtered.add(slot)
        if params.post_thinking is not None:
            self._answering.add(slot)
        if params.top_logprobs:
            self._topped[slot] = min(params.top_logprobs, self.vocab_limit)
        if params.stop_token_ids:
            self._stops[slot] = frozenset(params.stop_token_ids)
        if params.stop_loops:
            self._loops = self._loops or LoopDetector(self.capacity, self.device)
            self._loops.start(slot)
            self._looping.add(slot)
        if params.ignore_eos:
            self._endless.add(slot)
        self._shaping.start(slot, request)
        if self._thinking is not None:
            self._thinking.start(slot, request)

    @torch.no_grad()
    def sample(self, slots_R: torch.Tensor, logits_RV: torch.Tensor) -> Sampled:
        """One token for each of these slots (all different) from fp32 logits, which may be overwritten."""
        self._make_room()
        made_R = self.made[slots_R]
        logp_RV = logits_RV.log_softmax(-1)  # over all of V, as the trainer's; padding is only kept from being drawn
        entropies_R = self._entropies(logp_RV)
        slots = slots_R.tolist() if self._by_row() else []
        top = self._top(slots, logp_RV) if self._topped else None
        shaped_RV = self._shaping.apply(Rows(slots_R, made_R, self._tables[0]), logits_RV, self._thinking)
        drawn_R = self._draw(slots_R, made_R, shaped_RV)
        forced_R = torch.zeros_like(drawn_R, dtype=torch.bool)
        tokens_R = drawn_R
        if self._thinking is not None:
            tokens_R, forced_R = self._thinking.force(slots_R, drawn_R)
        logprobs_R = logp_RV.gather(-1, tokens_R[:, None]).squeeze(-1)
        places = self._shaping.places(slots_R, self._thinking) if self._shaping.grammars else []
        if self._thinking is not None:
            looping_R = self._looping_rows(self._thinking, slots, slots_R, tokens_R, forced_R)
            closed_R = self._thinking.advance(slots_R, tokens_R, forced_R, looping_R)
            self._begin_answers(slots_R[closed_R])
        self._record(slots_R, made_R, (tokens_R, logprobs_R, entropies_R, forced_R))
        finished_R = self._finished(slots_R, slots, tokens_R, forced_R)
        if places:
            self._shaping.accept(slots, tokens_R.tolist(), places)
        return Sampled(tokens_R, forced_R, logprobs_R, finished_R, top)

    def _by_row(self) -> bool:
        """Whether a sample uses something that is done row by row."""
        per_row = self._topped, self._stops, self._endless, self._looping, self._shaping.grammars
        return any(map(bool, per_row))

    def _make_room(self) -> None:
        width = self._tables[0].shape[1]
        if self._longest == width:
            self._longest = int(self.made.max())
            if self._longest == width:
                self.grow(self.capacity, max(64, 2 * width))
        self._longest += 1

    def _draw(self, slots_R: torch.Tensor, made_R: torch.Tensor, logits_RV: torch.Tensor) -> torch.Tensor:
        uniform_R = counter_uniform(self.seed[slots_R], made_R)
        temperature_R = self.temperature[slots_R]
        if not self._filtered:
            return sample(logits_RV, temperature_R, uniform_R)
        filters = self.top_k[slots_R], self.top_p[slots_R], self.min_p[slots_R]
        return sample_filtered(logits_RV, temperature_R, *filters, uniform_R)

    def _entropies(self, logp_RV: torch.Tensor) -> torch.Tensor:
        if not self._with_entropies:
            return torch.zeros(len(logp_RV), device=self.device)
        return -(logp_RV.exp() * logp_RV.clamp(min=-1e30)).sum(-1)

    def _looping_rows(
        self,
        thinking: Thinking,
        slots: list[int],
        slots_R: torch.Tensor,
        tokens_R: torch.Tensor,
        forced_R: torch.Tensor,
    ) -> torch.Tensor | None:
        """Where a thought that is to be watched repeats itself with this token; None where none is."""
        if self._loops is None or not self._looping:
            return None
        inside_R = thinking.inside(slots_R, tokens_R, forced_R)
        watched_R = inside_R & torch.tensor([slot in self._looping for slot in slots], device=self.device)
        rows, looping_R = slots_R[watched_R], torch.zeros_like(watched_R)
        looping_R[watched_R] = self._loops.advance(
            rows, tokens_R[watched_R], self._tables[0], self.made[rows], thinking.thought[rows]
        )
        return looping_R

    def _begin_answers(self, closed: torch.Tensor) -> None:
        """From here on these slots draw as their answers are to be drawn."""
        if self._answering:
            self.top_k[closed] = self.answer_top_k[closed]
            self._numbers[:3, closed] = self._numbers[3:, closed]

    def _record(self, slots_R: torch.Tensor, made_R: torch.Tensor, values: tuple[torch.Tensor, ...]) -> None:
        for table, value_R in zip(self._tables, values, strict=True):
            table[slots_R, made_R] = value_R
        self.last[slots_R] = values[0]
        self.made[slots_R] = made_R + 1

    def _finished(
        self, slots_R: torch.Tensor, slots: list[int], tokens_R: torch.Tensor, forced_R: torch.Tensor
    ) -> torch.Tensor:
        ended_R = torch.isin(tokens_R, self._eos)
        if self._endless:
            ended_R &= torch.tensor([slot not in self._endless for slot in slots], device=self.device)
        if self._stops:
            pairs = zip(slots, tokens_R.tolist(), strict=True)
            own = [token in self._stops.get(slot, ()) for slot, token in pairs]
            ended_R |= torch.tensor(own, device=self.device)
        return (ended_R & ~forced_R) | (self.made[slots_R] >= self.limit[slots_R])

    def _top(self, slots: list[int], logp_RV: torch.Tensor) -> list[TopTokens]:
        """Likeliest tokens of the rows that asked, which are also kept for the completion; nothing for the others."""
        top: list[TopTokens] = [[] for _ in slots]
        rows = [row for row, slot in enumerate(slots) if slot in self._topped]
        if not rows:
            return top
        most = max(self._topped[slots[row]] for row in rows)
        values, ids = logp_RV[torch.tensor(rows, device=self.device), : self.vocab_limit].topk(most, dim=-1)
        for row, row_ids, row_values in zip(rows, ids.tolist(), values.tolist(), strict=True):
            count = self._topped[slots[row]]
            top[row] = list(zip(row_ids[:count], row_values[:count], strict=True))
            self._sample_at(slots[row]).top.append(top[row])
        return top

    def last_R(self, slots_R: torch.Tensor) -> torch.Tensor:
        """The newest token of each slot (of the prompt, where none is made yet): the next input ids."""
        return self.last[slots_R]

    def tokens(self, slot: int) -> list[int]:
        """Prompt and tokens made so far: what is computed again after a preemption."""
        return [*self._sample_at(slot).request.prompt_ids, *self.made_tokens(slot)]

    def made_tokens(self, slot: int) -> list[int]:
        """Tokens made so far, sampled and forced."""
        return self._tables[0][slot, : int(self.made[slot])].tolist()

    def take(self, slot: int, version: int, aborted: bool = False) -> Completion:
        """End a sample and free its slot.

        Args:
            version: of the weights that made it. aborted: it was ended from outside, whatever it had made.
        """
        ended = self._sample_at(slot)
        made = int(self.made[slot])
        tokens, logprobs, entropies, forced = (table[slot, :made].tolist() for table in self._tables)
        stopped = made > 0 and not forced[-1] and self._ends(slot, tokens[-1])
        grammar = self._shaping.drop(slot)
        error = grammar.error if grammar is not None else ""
        reason: FinishReason = "aborted" if aborted or error else "stop" if stopped else "length"
        self._free(slot)
        return Completion(
            request_index=ended.request_index,
            sample_index=ended.sample_index,
            token_ids=tokens,
            logprobs=logprobs,
            forced=forced,
            entropies=entropies if self._with_entropies else [],
            finish_reason=reason,
            thinking_tokens=0 if self._thinking is None else int(self._thinking.thought[slot]),
            policy_version=version,
            top_logprobs=ended.top,
            looped=self._thinking is not None and bool(self._thinking.looped[slot]),
            error=error,
        )

    def _ends(self, slot: int, token: int) -> bool:
        if token in self._stops.get(slot, ()):
            return True
        return slot not in self._endless and token in self._eos.tolist()

    def _sample_at(self, slot: int) -> _Sample:
        held = self._samples[slot]
        assert held is not None, f"slot {slot} holds no sample"
        return held

    def _free(self, slot: int) -> None:
        self._samples[slot] = None
        self.made[slot] = 0
        for users in (self._filtered, self._answering, self._looping, self._endless):
            users.discard(slot)
        self._topped.pop(slot, None)
        self._stops.pop(slot, None)


def _warmth(temperature: float) -> float:
    """0 where dividing by the temperature could leave fp32."""
    return temperature if temperature >= _COLD else 0.0
