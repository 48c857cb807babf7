"""What changes a sample's logits before its token is drawn: bias, penalties, late ends, grammar.

Each costs something only for the samples that use it. The order is vLLM's: bias, then penalties, then what is not
allowed at all. Not here: temperature and filters (``ops/sample.py``), and log-probabilities, which stay the model's.

Shape legend: R rows of this step, each a slot, V vocabulary, W words of 32 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from twofold.base.records import Request
from twofold.engine.grammar import AnswerGrammar, Grammars, Place
from twofold.engine.thinking import BEFORE, IN, Thinking
from twofold.ops.sample import allow, penalise


@dataclass(frozen=True)
class Rows:
    """The rows of one step: slot and number of tokens made of each, and the table of those tokens, [slots, longest]."""

    slots_R: torch.Tensor
    made_R: torch.Tensor
    table: torch.Tensor


@dataclass(frozen=True)
class _Penalties:
    """Presence, frequency, repetition; and the tokens of the prompt, if the last one is on."""

    strengths: tuple[float, float, float]
    prompt: torch.Tensor


class Shaping:
    """Bias, penalties, least lengths and grammars of the running samples, by slot."""

    def __init__(
        self,
        eos_ids: Sequence[int],
        vocab_limit: int,
        device: torch.device | str = "cpu",
        compiler: Grammars | None = None,
    ) -> None:
        self._eos_ids, self._vocab_limit, self._device = tuple(eos_ids), vocab_limit, device
        self._compiler = compiler
        self._bias: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._penalties: dict[int, _Penalties] = {}
        self._least: dict[int, tuple[int, list[int]]] = {}  # tokens to make, and what must not be drawn until then
        self.grammars: dict[int, AnswerGrammar] = {}

    def start(self, slot: int, request: Request) -> None:
        """Begin a sample."""
        params = request.params
        if params.logit_bias:
            ids, values = zip(*params.logit_bias, strict=True)
            bias = torch.tensor(values, dtype=torch.float32, device=self._device)
            self._bias[slot] = torch.tensor(ids, device=self._device), bias
        if params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1:
            seen = sorted(set(request.prompt_ids)) if params.repetition_penalty != 1 else []
            strengths = params.presence_penalty, params.frequency_penalty, params.repetition_penalty
            prompt = torch.tensor(seen, dtype=torch.int64, device=self._device)
            self._penalties[slot] = _Penalties(strengths, prompt)
        if params.min_tokens:
            ends = [*params.stop_token_ids, *(() if params.ignore_eos else self._eos_ids)]
            self._least[slot] = params.min_tokens, [token for token in ends if token < self._vocab_limit]
        if params.grammar is not None and self._compiler is not None:
            self.grammars[slot] = self._compiler.start(params.grammar)

    def drop(self, slot: int) -> AnswerGrammar | None:
        """End a sample; returns its grammar, if it had one."""
        for held in (self._bias, self._penalties, self._least):
            held.pop(slot, None)
        return self.grammars.pop(slot, None)

    def apply(self, rows: Rows, logits_RV: torch.Tensor, thinking: Thinking | None) -> torch.Tensor:
        """Logits to draw from; those given may be overwritten."""
        used = self._bias or self._penalties or self._least or self.grammars
        slots = rows.slots_R.tolist() if used else []
        if used:
            self._add_bias(slots, logits_RV)
            self._penalise(slots, rows, logits_RV)
            self._keep_going(slots, rows, logits_RV)
        if self._vocab_limit < logits_RV.shape[-1]:
            logits_RV[:, self._vocab_limit :] = -torch.inf
        return self._constrain(slots, rows, logits_RV, thinking) if self.grammars else logits_RV

    def _add_bias(self, slots: list[int], logits_RV: torch.Tensor) -> None:
        for row, slot in enumerate(slots):
            if slot in self._bias:
                ids, bias = self._bias[slot]
                logits_RV[row, ids] += bias

    def _penalise(self, slots: list[int], rows: Rows, logits_RV: torch.Tensor) -> None:
        """Touches only the tokens that have occurred: L of them a row, some more than once."""
        made = rows.made_R.tolist() if self._penalties else []
        known = [(row, self._penalties[slots[row]]) for row in range(len(made)) if slots[row] in self._penalties]
        held = [(row, penalties) for row, penalties in known if made[row] or len(penalties.prompt)]
        if not held:
            return
        index_R = torch.tensor([row for row, _ in held], device=self._device)
        strengths_R3 = torch.tensor([penalties.strengths for _, penalties in held], device=self._device)
        prompts = [penalties.prompt for _, penalties in held]
        prompt_RL = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=-1)
        made_RL = rows.table[rows.slots_R[index_R], : max(made)]
        places_L = torch.arange(made_RL.shape[1], device=self._device)
        made_RL = made_RL.where(places_L < rows.made_R[index_R, None], -1)
        counts_RV = torch.zeros(len(held), logits_RV.shape[-1] + 1, device=self._device)  # the last column for padding
        counts_RV.scatter_add_(1, made_RL % counts_RV.shape[1], torch.ones_like(made_RL, dtype=torch.float32))
        ids_RL = torch.cat((prompt_RL, made_RL), dim=1)
        ids_RL = ids_RL.where(ids_RL >= 0, ids_RL.amax(1, keepdim=True))  # padding becomes a token that is there
        places = index_R[:, None], ids_RL
        seen_RL = torch.ones_like(ids_RL, dtype=torch.bool)
        logits_RV[places] = penalise(logits_RV[places], counts_RV.gather(1, ids_RL), seen_RL, *strengths_R3.T)

    def _keep_going(self, slots: list[int], rows: Rows, logits_RV: torch.Tensor) -> None:
        if not self._least:
            return
        for row, (slot, made) in enumerate(zip(slots, rows.made_R.tolist(), strict=True)):
            least, ends = self._least.get(slot, (0, []))
            if made < least:
                logits_RV[row, ends] = -torch.inf

    def _constrain(
        self, slots: list[int], rows: Rows, logits_RV: torch.Tensor, thinking: Thinking | None
    ) -> torch.Tensor:
        assert self._compiler is not None
        places = self.places(rows.slots_R, thinking)
        words = np.zeros((len(slots), self._compiler.words), dtype=np.int32)
        for row, (slot, place) in enumerate(zip(slots, places, strict=True)):
            grammar = self.grammars.get(slot)
            if grammar is None or place == "forced":
                words[row] = -1
            else:
                grammar.fill(words[row], place)
        return allow(logits_RV, torch.from_numpy(words).to(self._device))

    def places(self, slots_R: torch.Tensor, thinking: Thinking | None) -> list[Place]:
        """What the next token of each slot belongs to, as grammars distinguish it."""
        if thinking is None:
            return ["answer"] * len(slots_R)
        places: list[Place] = []
        for phase, forcing in zip(thinking.phase[slots_R].tolist(), thinking.forcing[slots_R].tolist(), strict=True):
            if forcing >= 0:
                places.append("forced")
            else:
                places.append("thought" if phase == IN else "before" if phase == BEFORE else "answer")
        return places

    def accept(self, slots: list[int], tokens: list[int], places: list[Place]) -> None:
        """Tell the grammars which tokens were written, and where."""
        for slot, token, place in zip(slots, tokens, places, strict=True):
            if slot in self.grammars:
                self.grammars[slot].accept(token, place)
