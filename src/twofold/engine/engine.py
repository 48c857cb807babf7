"""Engine: token-in, token-out generation and scoring with the very module that is trained.

Continuous batching over a row cache: samples wait, are admitted into free rows (a prompt shared by several samples is
prefilled once), and decode together; when nothing waits, finished rows are squeezed out. Texts, templates and tools
are not known here. Changing weights under running rows is an error: ``update_weights`` says when it happened.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import torch

from twofold.base.batch import boundaries, positions
from twofold.base.records import Completion, InputError, Request
from twofold.engine.rows import Rows, Sample, ThinkTokens
from twofold.model.attn_inputs import AttnInputs, KVCache
from twofold.model.qwen3 import Qwen3
from twofold.ops import loss as loss_ops
from twofold.ops.sample import counter_uniform, filter_logits, sample

_PREFILL_TOKENS = 8192  # most prompt tokens in one forward pass
_SQUEEZE_BELOW = 0.75  # squeeze rows out when fewer than this share of them still run


class Engine:
    """Generates and scores with ``model``; holds no copy of the weights.

    Args:
        model: the module, shared with the trainer. eos_ids: tokens that end a completion.
        think: think tags and budget stop text, or None for tokenizers without them.
        max_rows: most sequences decoded together. vocab_limit: ids at and above it are never sampled (padded rows).
        min_rows: fewest rows in a matrix product while decoding, idle ones included. Products with very few rows take
            another path in the library and round differently; 16 keeps log-probabilities equal to the trainer's.
    """

    def __init__(
        self,
        model: Qwen3,
        eos_ids: Sequence[int],
        think: ThinkTokens | None = None,
        max_rows: int = 512,
        vocab_limit: int | None = None,
        min_rows: int = 1,
    ) -> None:
        self.model, self.eos_ids, self.think = model, tuple(eos_ids), think
        self.max_rows, self.min_rows = max(max_rows, min_rows), min_rows
        self.vocab_limit = vocab_limit if vocab_limit is not None else model.config.vocab_size
        self.policy_version = 0
        self.prompt_tokens = 0  # counters since the start, for cost reports
        self.generated_tokens = 0
        self._cache: KVCache | None = None

    @property
    def device(self) -> torch.device:
        """Where the model is, and so the cache and the state of rows."""
        return self.model.model.embed_tokens.weight.device

    def update_weights(self) -> None:
        """Say that the module's weights have changed; later completions carry the next version."""
        self.policy_version += 1

    @torch.no_grad()
    def score(
        self,
        token_lists: Sequence[Sequence[int]],
        tokens_per_batch: int = 16384,
        extended: Sequence[bool] | None = None,
    ) -> list[torch.Tensor]:
        """fp32 log-probability of each token given those before it, from the second token on (length - 1 each).

        Args:
            extended: for models with a long context, which sequences to code beyond the native length (None: those
                that need it). A completion that ended early was sampled as ``extends(request)`` says.
        """
        out: list[torch.Tensor] = []
        batch: list[Sequence[int]] = []
        for index, tokens in enumerate(token_lists):
            if len(tokens) < 2:
                raise InputError(f"sequence {index} has {len(tokens)} tokens; scoring needs at least 2")
            batch.append(tokens)
            if sum(map(len, batch)) >= tokens_per_batch or index == len(token_lists) - 1:
                flags = None if extended is None else extended[index + 1 - len(batch) : index + 1]
                out.extend(self._score_batch(batch, flags))
                batch = []
        return out

    def _score_batch(self, batch: list[Sequence[int]], extended: Sequence[bool] | None) -> list[torch.Tensor]:
        device = self.device
        flat = torch.tensor([t for tokens in batch for t in tokens[:-1]], device=device)
        targets = torch.tensor([t for tokens in batch for t in tokens[1:]], device=device)
        lengths = [len(tokens) - 1 for tokens in batch]
        attn = AttnInputs.packed(boundaries(lengths), device, extended)
        hidden = self.model(flat, positions(lengths).to(device), attn)
        return list(loss_ops.token_logprobs(self.model.logits(hidden), targets).split(lengths))

    def extends(self, request: Request) -> bool:
        """True where the positions this request may use (the last token takes none) pass the native length.

        Decided before it begins and kept to its end, because cached keys are rotated.
        """
        context = self.model.config.context
        return context is not None and context.extends(len(request.prompt_ids) + request.params.max_tokens - 1)

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Complete every request; order is by request, then sample.

        Raises:
            InputError: an empty prompt, or a thinking budget when the tokenizer has no think tokens.
        """
        run = _Run(self, requests)
        while run.step():
            pass
        return sorted(run.completions, key=lambda c: (c.request_index, c.sample_index))

    def stream(self, request: Request) -> Iterator[tuple[int, bool]]:
        """Yield (token id, forced) of one request (n = 1) as they are made."""
        run = _Run(self, [request])
        seen = 0
        more = True
        while more:
            more = run.step()
            made = run.completions[0].token_ids if run.completions else run.rows.tokens[0].tolist()
            forced = run.completions[0].forced if run.completions else run.rows.forced[0].tolist()
            count = len(made) if run.completions else int(run.rows.made[0])
            yield from zip(made[seen:count], forced[seen:count], strict=True)
            seen = count

    def cache(self, rows: int, capacity: int) -> KVCache:
        """A row cache at least this large, re-used between calls."""
        kind, held = (self.model.attention_dtype, self.device), self._cache
        if held is None or held.rows < rows or held.capacity < capacity or (held.dtype, held.device) != kind:
            self._cache = held = None  # free the old one first
            held = self._cache = KVCache(self.model.config, rows, -(-capacity // 64) * 64, *kind)
        return held

    def check(self, index: int, request: Request) -> None:
        """Refuse what cannot be honoured."""
        if not request.prompt_ids:
            raise InputError(f"request {index} has an empty prompt")
        if self.think is None and request.params.thinking_budget is not None:
            raise InputError("thinking_budget needs a tokenizer with <think> and </think>; this one has none")


class _Run:
    """One call of generate: its queue, rows and finished completions."""

    def __init__(self, engine: Engine, requests: Sequence[Request]) -> None:
        self.engine = engine
        self.waiting: deque[Sample] = deque()
        for index, request in enumerate(requests):
            engine.check(index, request)
            self.waiting.extend(Sample(index, s, request) for s in range(request.params.n))
        capacity = max((len(r.prompt_ids) + r.params.max_tokens for r in requests), default=1)
        max_new = max((r.params.max_tokens for r in requests), default=1)
        rows = min(engine.max_rows, max(engine.min_rows, len(self.waiting)))
        self.cache = engine.cache(rows, capacity)
        self.rows = Rows(rows, max_new, engine.think, engine.eos_ids, engine.min_rows, engine.device)
        self.free = list(range(rows - 1, -1, -1))
        self.completions: list[Completion] = []
        self.filtered = any(r.params.top_k > 0 or r.params.top_p < 1 for r in requests)

    @torch.no_grad()
    def step(self) -> bool:
        """Admit waiting samples if rows are free, else decode one token for every row. False when all is done."""
        admitted = self._admit()
        if admitted:
            self._prefill(admitted)
        elif self.rows.count:
            self._decode()
        self._collect()
        return bool(self.waiting) or bool(self.rows.live.any())

    def _admit(self) -> list[int]:
        admitted: list[int] = []
        budget = _PREFILL_TOKENS
        while self.waiting and self.free and budget > 0:
            row = self.free.pop()
            sample = self.waiting.popleft()
            budget -= len(sample.request.prompt_ids) if sample.sample_index == 0 else 0  # siblings share it
            self.rows.place_sample(row, sample, self.engine.extends(sample.request))
            admitted.append(row)
        return admitted

    def _prefill(self, admitted: list[int]) -> None:
        by_prompt: dict[tuple[tuple[int, ...], bool], list[int]] = {}  # and by coding: it is part of the cached keys
        for row in admitted:
            by_prompt.setdefault(self._prompt(row), []).append(row)
        lengths = [len(prompt) for prompt, _ in by_prompt]
        tokens = self._tensor([t for prompt, _ in by_prompt for t in prompt])
        cu = boundaries(lengths)
        leaders = self._tensor([rows[0] for rows in by_prompt.values()])
        model = self.engine.model
        attn = AttnInputs.prefill(cu, self.cache, leaders, extended_S=[extended for _, extended in by_prompt])
        last = model(tokens, positions(lengths).to(tokens.device), attn)[self._tensor(cu[1:]) - 1]
        for (prompt, _), (leader, *followers) in by_prompt.items():
            if followers:
                self.cache.copy_prefix(leader, self._tensor(followers), len(prompt))
        self.engine.prompt_tokens += len(tokens)
        which = self._tensor([index for index, rows in enumerate(by_prompt.values()) for _ in rows])
        rows = self._tensor([row for rows in by_prompt.values() for row in rows])
        self._sample(rows, self._logits(last)[which])

    def _tensor(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, device=self.cache.device)

    def _prompt(self, row: int) -> tuple[tuple[int, ...], bool]:
        sample = self.rows.samples[row]
        assert sample is not None
        return sample.request.prompt_ids, self.engine.extends(sample.request)

    def _decode(self) -> None:
        count = self.rows.count
        places = self.rows.place[:count]
        attn = AttnInputs.decode(self.cache, places, self.rows.extended[:count])
        hidden = self.engine.model(self.rows.last[:count], places, attn)
        live = self.rows.live[:count].nonzero().flatten()
        self._sample(live, self._logits(hidden[live] if len(live) < count else hidden))

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        missing = max(0, self.engine.min_rows - len(hidden))
        return self.engine.model.logits(torch.nn.functional.pad(hidden, (0, 0, 0, missing)))[: len(hidden)]

    def _sample(self, rows: torch.Tensor, logits: torch.Tensor) -> None:
        state = self.rows
        logp = logits.log_softmax(-1)  # over every row, as the trainer's; padded rows are only kept from being drawn
        if self.engine.vocab_limit < logits.shape[-1]:
            logits[:, self.engine.vocab_limit :] = -torch.inf
        entropies = -(logp.exp() * logp.clamp(min=-1e30)).sum(-1)
        allowed = filter_logits(logits, state.top_k[rows], state.top_p[rows]) if self.filtered else logits
        uniform = counter_uniform(state.seed[rows], state.made[rows])
        tokens, forced = state.force(sample(allowed, state.temperature[rows], uniform), rows)
        state.append(rows, tokens, forced, logp.gather(-1, tokens[:, None]).squeeze(-1), entropies)
        self.engine.generated_tokens += len(rows)

    def _collect(self) -> None:
        for row in self.rows.finished():
            self.completions.append(self.rows.take(row, self.engine.policy_version))
            if self.waiting:
                self.free.append(row)
        live = int(self.rows.live.sum())
        if not self.waiting and live < _SQUEEZE_BELOW * self.rows.count and self.rows.count > self.engine.min_rows:
            length = int(self.rows.place[: self.rows.count].max()) + 1
            self.cache.compact(self.rows.compact(), length)
