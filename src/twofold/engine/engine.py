"""Engine: token-in, token-out generation and scoring with the very module that is trained.

It joins the parts: the scheduler says which tokens a step computes, the runner computes them over a paged cache, the
sampler draws what comes next. ``add`` and ``step`` are for servers; ``generate`` and ``stream`` are loops over them.
Texts, templates and tools are not known here. One thread at a time: it is not thread-safe.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass, field, replace

import torch

from twofold.base.batch import boundaries, positions
from twofold.base.interrupt import uninterrupted
from twofold.base.records import Completion, InputError, Request
from twofold.engine.blocks import BlockManager, root_key
from twofold.engine.draft import prompt_lookup
from twofold.engine.grammar import Grammars
from twofold.engine.inputs import StepInputs
from twofold.engine.memory import BLOCK, Shape, cache_bytes, paged_shape, whole_shape
from twofold.engine.replay import Replay
from twofold.engine.request import EngineOptions, EngineStats, Event, Sample
from twofold.engine.runner import Runner
from twofold.engine.sampling import Sampled, Sampler, ThinkTokens
from twofold.engine.scheduler import Scheduler
from twofold.engine.weights import Weights
from twofold.model.attn_inputs import AttnInputs, integers
from twofold.model.qwen3 import Adapter, Qwen3
from twofold.ops import loss as loss_ops

__all__ = ["Engine", "EngineOptions", "EngineStats", "Event", "ThinkTokens"]


@dataclass(slots=True)
class _Open:
    """A request on its way: where its events go, and how many of its samples have not ended.

    quiet: only last events are wanted.
    """

    sink: list[Event]
    left: int
    quiet: bool


@dataclass(slots=True)
class _Drawing:
    """Samples that get a token, each with the row of logits it is drawn from."""

    samples: list[Sample] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)


class Engine:
    """Generates and scores with ``model``; holds no copy of the weights.

    Args:
        model: the module, shared with the trainer. eos_ids: tokens that end a completion.
        think: think tags and budget stop text, or None for tokenizers without them.
        max_rows: most sequences decoded together. vocab_limit: ids at and above it are never sampled (padded rows).
        min_rows: fewest rows in a matrix product, idle ones included. Products with very few rows take another path in
            the library and round differently; 16 keeps log-probabilities equal to the trainer's.
        grammars: compiles grammars for the tokenizer; None refuses requests that have one.
    """

    def __init__(
        self,
        model: Qwen3,
        eos_ids: Sequence[int],
        think: ThinkTokens | None = None,
        max_rows: int = 512,
        vocab_limit: int | None = None,
        min_rows: int = 1,
        grammars: Grammars | None = None,
        options: EngineOptions | None = None,
    ) -> None:
        self.model, self.eos_ids, self.think = model, tuple(eos_ids), think
        self.max_rows, self.min_rows, self.grammars = max_rows, min_rows, grammars
        self.vocab_limit = min(vocab_limit or model.config.vocab_size, model.config.vocab_size)
        self.options = options or EngineOptions()
        self.policy_version = 0
        self.asleep = False
        nothing = BlockManager(0, self.options.block_size or BLOCK)
        self._scheduler = Scheduler(nothing, max_rows, self.options.step_tokens, self.options.mixed_tokens)
        self._stats = self._scheduler.stats
        self._runner: Runner | None = None
        self._weights = Weights(model)
        self._replay = Replay(model, self.options.replay_after)
        self._sampler = self._new_sampler()
        self._free_slots: list[int] = []
        self._adapter: Adapter | None = None
        self._requests = 0  # made so far; their ids
        self._open: dict[int, _Open] = {}
        self._loud = 0  # requests of which every event is wanted
        self._events: list[Event] = []

    @property
    def device(self) -> torch.device:
        """Where the model is, and so the cache and the state of samples."""
        return self.model.model.norm.weight.device

    @property
    def prompt_tokens(self) -> int:
        """Prompt tokens since the start, for cost reports; those found in the prefix cache included."""
        return self._stats.prompt_tokens

    @property
    def generated_tokens(self) -> int:
        """Tokens made since the start, for cost reports; a resumed run sets it."""
        return self._stats.generated_tokens

    @generated_tokens.setter
    def generated_tokens(self, count: int) -> None:
        self._stats.generated_tokens = count

    @property
    def replayed(self) -> int:
        """Decoding steps run from a recording since the start."""
        return self._replay.replayed

    @property
    def counters(self) -> EngineStats:
        """Where the engine stands now, and what it has done since its start."""
        scheduler = self._scheduler
        running, waiting, blocks = len(scheduler.running), len(scheduler.waiting), scheduler.blocks
        return replace(
            self._stats, running=running, waiting=waiting, blocks_used=blocks.used, blocks_total=blocks.total
        )

    @property
    def has_work(self) -> bool:
        """Whether ``step`` has something to do or to deliver."""
        return bool(self._scheduler.running or self._scheduler.waiting or self._events)

    def update_weights(self) -> None:
        """Say that the module's weights have changed; later completions carry the next version, and nothing that was
        computed with the old ones is used again.

        Raises:
            RuntimeError: samples are on their way, whose keys were computed with the old weights.
        """
        under_way = len(self._scheduler.running) + len(self._scheduler.waiting)
        if under_way:
            raise RuntimeError(f"weights change under {under_way} samples; finish or abort them before update_weights")
        self.policy_version += 1
        self._scheduler.blocks.flush()

    def sleep(self) -> None:
        """Give the cache's memory back; samples on their way are computed again after ``wake``."""
        self.asleep = True
        self._scheduler.restart(BlockManager(0, self.options.block_size or BLOCK))
        self._runner = None

    def wake(self) -> None:
        """Go on after ``sleep``; memory is taken when it is needed."""
        self.asleep = False

    def check_integrity(self) -> None:
        """Assert what must hold between steps: no block lost or held twice, no slot without a sample."""
        self._scheduler.check_integrity()
        slots = [s.slot for s in (*self._scheduler.running, *self._scheduler.waiting) if s.slot >= 0]
        assert sorted(slots + self._free_slots) == list(range(self._sampler.capacity)), "a slot is lost or held twice"
        assert self._runner is None or self._runner.shape.blocks == self._scheduler.blocks.total, "caches differ"
        left = {request_id: opened.left for request_id, opened in self._open.items()}
        for sample in (*self._scheduler.running, *self._scheduler.waiting):
            left[sample.request_id] -= 1
        assert not any(left.values()), "a request waits for samples that are not there"

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
            InputError: a request that cannot be honoured; then nothing is generated.
        """
        self._get_ready(requests)
        for index, request in enumerate(requests):
            self._check(request, f"request {index}")
        done: list[Event] = []
        ids = [self._queue(request, done, quiet=True, index=index) for index, request in enumerate(requests)]
        try:
            while any(request_id in self._open for request_id in ids):
                self.advance()
        finally:
            self.abort(ids)
        completions = [event.completion for event in done if event.completion is not None]
        return sorted(completions, key=lambda c: (c.request_index, c.sample_index))

    def stream(self, request: Request) -> Generator[tuple[int, bool], None, None]:
        """Yield (token id, forced) of one request (n = 1) as they are made. Closing the iterator ends the request."""
        if request.params.n != 1:
            raise InputError(f"a stream has one sample, n = {request.params.n} asks for more; use generate")
        self._get_ready()
        self._check(request, "the request")
        sink: list[Event] = []
        request_id = self._queue(request, sink)
        try:
            while sink or request_id in self._open:
                if not sink:  # what another's step has made comes first
                    self.advance()
                made = [(event.token_id, event.forced) for event in sink if event.token_id is not None]
                sink.clear()
                yield from made
        finally:
            self.abort(request_id)

    def add(self, request: Request, key: str | None = None, sink: list[Event] | None = None) -> int:
        """Queue a request with all its samples, and return its id.

        Args:
            key: requests share cached prefixes only with those of the same key. sink: where its events go, by
                ``advance`` or whatever else steps; None: ``step`` returns them.

        Raises:
            InputError: what it asks for cannot be honoured, or is larger than the cache.
        """
        self._get_ready()
        self._check(request, "the request")
        return self._queue(request, self._events if sink is None else sink, key=key)

    @uninterrupted()
    def abort(self, request_ids: int | Collection[int]) -> None:
        """End the samples of a request, or of several; their slots and blocks are free at once, and the next ``step``
        delivers their last events. Does nothing to a request that has ended."""
        for sample in self._scheduler.abort(request_ids):
            if sample.slot >= 0:
                completion = self._take(sample, aborted=True)
            else:
                completion = Completion(sample.index, sample.sample_index, finish_reason="aborted")
                completion.policy_version = self.policy_version
            self._emit(Event(sample.request_id, sample.sample_index, None, completion=completion))

    def step(self) -> list[Event]:
        """``advance`` if there is something to do; the new tokens of requests added without a sink, in order."""
        if self._scheduler.running or self._scheduler.waiting:
            self.advance()
        events = list(self._events)
        self._events.clear()
        return events

    def advance(self) -> None:
        """One forward pass for all requests, events to their sinks; an interruption loses and leaks nothing.

        Raises:
            RuntimeError: the engine is asleep, or another adapter was activated under running samples.
        """
        self._check_state()
        if self._runner is None:
            self._restore_cache()
        assert self._runner is not None
        try:
            self._run_step(self._runner)
        except BaseException:  # Ctrl-C as well: blocks may have been taken that no sample knows of
            shape = self._runner.shape
            self._scheduler.restart(BlockManager(shape.blocks, shape.block_size, shape.whole))
            for sample in self._scheduler.waiting:
                if sample.slot >= 0:
                    sample.tokens = self._sampler.tokens(sample.slot)
            raise

    def _check(self, request: Request, name: str) -> None:
        """Refuse what cannot be honoured."""
        if not request.prompt_ids:
            raise InputError(f"{name} has an empty prompt")
        self._sampler.check(request)
        self._scheduler.check_size(_positions(request))

    def _queue(
        self, request: Request, sink: list[Event], *, quiet: bool = False, index: int = 0, key: str | None = None
    ) -> int:
        request_id, self._requests = self._requests, self._requests + 1
        extended = self.extends(request)
        root = root_key(self.policy_version, self._adapter and self._adapter.name, extended, key)
        self._open[request_id] = _Open(sink, request.params.n, quiet)
        self._loud += not quiet
        for number in range(request.params.n):
            tokens = list(request.prompt_ids)
            limit = len(tokens) + request.params.max_tokens
            sample = Sample(request_id, index, number, request, root, extended, tokens, limit, request.params.speculate)
            self._scheduler.waiting.append(sample)
        return request_id

    def _get_ready(self, requests: Sequence[Request] = ()) -> None:
        """Have a cache of the right shape, on the model's device and in its type, and know the adapter in use."""
        under_way = self._scheduler.running or self._scheduler.waiting
        if not under_way:
            self._adapter = self.model.adapters.active
        self._check_state()
        if under_way:
            return
        if self._weights.changed():
            self._scheduler.blocks.flush()
        self._replay.refresh(self._adapter is not None)
        if self._sampler.device != self.device:
            self._sampler, self._free_slots = self._new_sampler(), []
        token_bytes = self.model.config.kv_bytes_per_token(self.model.attention_dtype.itemsize)
        shape = None
        if self.options.block_size is None and requests:
            shape = whole_shape(requests, self.max_rows, self._cache_bytes(), token_bytes)
        if shape is None:
            size = self.options.block_size or BLOCK
            shape = Shape(0, size, whole=False)
            if self._runner is None or not self._runner.fits(shape):
                shape = paged_shape(self._cache_bytes(), token_bytes, size)
        self._use(shape)

    def _check_state(self) -> None:
        if self.asleep:
            raise RuntimeError("the engine is asleep; call wake() first")
        if self.model.adapters.active is not self._adapter:
            raise RuntimeError("another adapter was activated under running samples; finish or abort them first")

    def _cache_bytes(self) -> int:
        if self.options.kv_bytes is not None:
            return self.options.kv_bytes
        itemsize = self.model.attention_dtype.itemsize
        held = 0 if self._runner is None else self._runner.cache.bytes
        return cache_bytes(self.model.config, itemsize, self.max_rows, self.device, held)

    def _use(self, shape: Shape) -> None:
        if self._runner is None or not self._runner.fits(shape):
            self._runner = None  # free the old cache first
            self._runner = Runner(self.model, shape, self.min_rows, self._replay)
            self._scheduler.restart(BlockManager(shape.blocks, shape.block_size, shape.whole))

    def _new_sampler(self) -> Sampler:
        return Sampler(
            0, self.think, self.eos_ids, self.vocab_limit, self.device, self.grammars, self.options.entropies
        )

    @torch.no_grad()
    def _run_step(self, runner: Runner) -> None:
        batch = self._scheduler.schedule()
        if not batch.rows and not batch.chunks:
            raise RuntimeError("samples wait but none fits the cache; abort them")
        hidden_TD, inputs = runner.run(batch)
        drawing, wanted = self._collect(inputs)
        if not wanted:
            return
        logits_RV = runner.logits(self._pick(hidden_TD, wanted))
        ended: list[Sample] = []
        place = 0
        with uninterrupted():  # a sample that has left the sampler but not the engine could not be aborted
            while drawing.samples:
                drawing = self._draw(drawing, logits_RV, place, ended)
                place += 1
            if ended:
                self._scheduler.end(ended)

    def _restore_cache(self) -> None:
        """After ``sleep``, samples wait that are to go on."""
        token_bytes = self.model.config.kv_bytes_per_token(self.model.attention_dtype.itemsize)
        self._use(paged_shape(self._cache_bytes(), token_bytes, self.options.block_size or BLOCK))

    def _collect(self, inputs: StepInputs) -> tuple[_Drawing, list[int]]:
        """Who gets a token from a forward pass, and the places in its stream whose logits are wanted for that."""
        self._scheduler.decoded(inputs.rows)
        wanted = list(range(len(inputs.rows)))
        drawing, start = _Drawing(list(inputs.rows), list(wanted)), len(wanted)
        for chunk in inputs.chunks:
            known = len(chunk.sample.tokens)
            ready = self._scheduler.computed(chunk.sample, min(chunk.end, known))
            if ready:
                drawing.samples += ready
                drawing.rows += [len(wanted)] * len(ready)
                wanted += range(start + known - 1 - chunk.begin, start + chunk.end - chunk.begin)
                self._stats.drafted += chunk.end - known
            start += chunk.end - chunk.begin
        return drawing, wanted

    def _draw(self, drawing: _Drawing, logits_RV: torch.Tensor, place: int, ended: list[Sample]) -> _Drawing:
        """One token for each sample. Returns those whose guess at ``place`` came true: they get another one."""
        for sample in drawing.samples:
            if sample.slot < 0:
                self._give_slot(sample)
        slots_R = integers([sample.slot for sample in drawing.samples], self.device)
        sampled = self._sampler.sample(slots_R, self._pick(logits_RV, drawing.rows))
        self._stats.generated_tokens += len(drawing.samples)
        again, finished = _Drawing(), sampled.finished_R.tolist()
        for row, (sample, token) in enumerate(zip(drawing.samples, sampled.tokens_R.tolist(), strict=True)):
            sample.tokens.append(token)
            if finished[row]:
                ended.append(sample)
            elif sample.speculate:
                self._guess(sample, drawing.rows[row], place, again)
        self._report(drawing.samples, sampled, finished)
        return again

    def _pick(self, table: torch.Tensor, rows: list[int]) -> torch.Tensor:
        """These rows of a table: a view where they are its first ones in order."""
        return table[: len(rows)] if rows == list(range(len(rows))) else table[integers(rows, self.device)]

    def _guess(self, sample: Sample, row: int, place: int, again: _Drawing) -> None:
        """See whether the guess at ``place`` came true; if not, or after the last, make the next guess."""
        if place < len(sample.draft) and sample.draft[place] == sample.tokens[-1]:
            self._stats.accepted += 1
            self._scheduler.accept(sample)
            again.samples.append(sample)
            again.rows.append(row + 1)
        else:
            sample.draft = prompt_lookup(sample.tokens, min(sample.speculate, sample.limit - len(sample.tokens) - 1))

    def _give_slot(self, sample: Sample) -> None:
        if not self._free_slots:
            old = self._sampler.capacity
            self._sampler.grow(min(self.max_rows, max(16, 2 * old)))
            self._free_slots = list(range(self._sampler.capacity - 1, old - 1, -1))
        sample.slot = self._free_slots.pop()
        self._sampler.start(sample.slot, sample.request, sample.sample_index, sample.index)

    def _take(self, sample: Sample, aborted: bool = False) -> Completion:
        """End a sample in the sampler."""
        completion = self._sampler.take(sample.slot, self.policy_version, aborted)
        self._free_slots.append(sample.slot)
        sample.slot = -1
        completion.cached_tokens = sample.cached or 0
        self._stats.forced_stops += any(completion.forced)
        self._stats.loops += completion.looped
        return completion

    def _report(self, samples: list[Sample], sampled: Sampled, finished: list[bool]) -> None:
        """Events of one token for each sample, where anybody wants them."""
        if self._loud:
            rows = [
                row for row, sample in enumerate(samples) if finished[row] or not self._open[sample.request_id].quiet
            ]
        else:
            rows = [row for row, ended in enumerate(finished) if ended]
        if not rows:
            return
        tokens, forced, logprobs = (t.tolist() for t in (sampled.tokens_R, sampled.forced_R, sampled.logprobs_R))
        for row in rows:
            sample = samples[row]
            top = tuple(sampled.top[row]) if sampled.top else ()
            completion = self._take(sample) if finished[row] else None
            self._emit(
                Event(
                    *(sample.request_id, sample.sample_index, tokens[row], forced[row], logprobs[row]),
                    *(top, sample.begun_at, completion),
                )
            )

    def _emit(self, event: Event) -> None:
        opened = self._open.get(event.request_id)
        if opened is None:  # an interruption came between a sample's last event and its end
            return
        opened.sink.append(event)
        if event.completion is not None:
            opened.left -= 1
            if opened.left == 0:
                self._loud -= not opened.quiet
                del self._open[event.request_id]


def _positions(request: Request) -> int:
    """Positions that a sample may take: the last token is never fed."""
    return len(request.prompt_ids) + request.params.max_tokens - 1
