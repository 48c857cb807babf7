"""Synthetic post-training data: query and response filters, rejection sampling, and fusion conversations.

Cold start (Qwen3 report 4.1, in miniature): drop queries the base model answers without thinking, balance families,
keep responses that pass every filter. Fusion (4.3): thinking by rejection from the current policy, direct answers,
random soft switches over several turns, and thoughts cut short by the budget's stop text. Each drop is counted by
reason. Not here: training.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from twofold.base.records import Message, Request, SamplingParams
from twofold.base.split import held_out
from twofold.data.tasktext import item_text
from twofold.engine.engine import Engine
from twofold.episodes.play import play
from twofold.tasks.base import Item, Task
from twofold.tasks.query import SYSTEM_PATTERNS, TAUGHT_PATTERNS, Query, flagged, single, user_turns, with_tools
from twofold.tasks.tools import ToolTask
from twofold.text.chat import Rendered, Renderer

_MIN_STEPS = 2  # fewer "=" or moves than this is guessing
_ALLOWED = re.compile(r"[ A-Ja-t0-9+=,;-]*")


@dataclass(frozen=True)
class Response:
    """A candidate response to an item: the thought and the final answer."""

    item: Item
    reasoning: str
    answer: str


def answered_directly(engine: Engine, renderer: Renderer, items: Sequence[Item], tasks: dict[str, Task]) -> list[bool]:
    """Which items a base model answers correctly without thinking, in its document format (greedy)."""
    tokenizer = renderer.tokenizer
    params = SamplingParams(temperature=0, max_tokens=8)
    requests = [Request(tuple(tokenizer.encode(item.prompt + "\n")), params) for item in items]
    replies = [tokenizer.decode(c.token_ids, skip_special_tokens=True) for c in engine.generate(requests)]
    return [
        not reply.startswith(" ") and tasks[item.family].verify(item, reply.split("\n")[0]) == 1.0
        for item, reply in zip(items, replies, strict=True)
    ]


def balance(items: Sequence[Item], per_family: int) -> list[Item]:
    """The first ``per_family`` items of each family, in order."""
    seen: Counter[str] = Counter()
    out = []
    for item in items:
        seen[item.family] += 1
        if seen[item.family] <= per_family:
            out.append(item)
    return out


def reject_reason(response: Response, task: Task) -> str | None:
    """Why a response must not be trained on, or None.

    The report's six filters: wrong final answer, repetition, guessing, thought against summary, mixed style, held out.
    """
    item, thought = response.item, response.reasoning
    if held_out(item.key):
        return "held-out"
    if task.verify(item, response.answer) != 1.0:
        return "wrong answer"
    if not _ALLOWED.fullmatch(thought):
        return "mixed style"
    steps = thought.split()
    if len(steps) < _MIN_STEPS:
        return "guess"
    if any(a == b == c for a, b, c in zip(steps, steps[1:], steps[2:], strict=False)):
        return "repetition"
    if not thought.endswith(response.answer):  # every family's trace ends with the value it arrived at
        return "contradiction"
    return None


def filter_responses(responses: Sequence[Response], tasks: dict[str, Task]) -> tuple[list[Response], Counter[str]]:
    """Responses that pass every filter, and how many fell to each."""
    kept, reasons = [], Counter[str]()
    for response in responses:
        reason = reject_reason(response, tasks[response.item.family])
        if reason is None:
            kept.append(response)
        else:
            reasons[reason] += 1
    return kept, reasons


def most_natural(engine: Engine, renderer: Renderer, responses: Sequence[Response], per_item: int) -> list[Response]:
    """Of each item's responses the ``per_item`` that the base model finds most likely per token, in item order.

    A cold start should call up what pre-training laid down, not teach another style.
    """
    tokenizer = renderer.tokenizer
    texts = [tokenizer.encode(item_text(r.item, r.reasoning)) for r in responses]
    means = [float(scores.mean()) for scores in engine.score(texts)]
    by_item: dict[str, list[tuple[float, int]]] = {}
    for index, response in enumerate(responses):
        by_item.setdefault(response.item.prompt, []).append((-means[index], index))
    return [responses[index] for rows in by_item.values() for _, index in sorted(rows)[:per_item]]


def rejection_sample(
    engine: Engine, renderer: Renderer, items: Sequence[Item], tasks: dict[str, Task], params: SamplingParams
) -> tuple[list[Response], Counter[str]]:
    """Thinking responses of the policy that pass every filter (at most one an item)."""
    groups = play(engine, renderer, [single(item, tasks[item.family]) for item in items], params)
    best, reasons = [], Counter[str]()
    for group in groups:
        for t in group:
            if t.truncated or t.final is None or not t.final.closed or t.final.errors:
                reasons["malformed"] += 1
                continue
            response = Response(t.query.item, t.final.reasoning or "", t.answer)
            reason = reject_reason(response, t.query.task)
            if reason is None:
                best.append(response)
                break
            reasons[reason] += 1
    return best, reasons


class FusionMaker:
    """Builds fusion examples from thinking responses and direct answers.

    Soft-switch patterns with a flag in the system turn are left out on purpose: general RL has to teach them. ``forms``
    counts the examples made by the form of their prompt.
    """

    def __init__(self, renderer: Renderer, tasks: dict[str, Task], responses: Sequence[Response], seed: int) -> None:
        self.renderer, self.tasks, self.rng = renderer, tasks, random.Random(f"fusion:{seed}")
        self.responses = list(responses)
        self.patterns = [name for name in TAUGHT_PATTERNS if name not in SYSTEM_PATTERNS]
        self.forms: Counter[str] = Counter()

    def conversation(self, pattern: str, direct_items: Sequence[Item]) -> list[Rendered]:
        """One conversation with the flags of ``pattern``: the last turn's exact view, thinking or not as called for."""
        thinking = self.rng.sample(self.responses, user_turns(pattern))
        chosen = [r.item for r in thinking]
        query = flagged([(item, self.tasks[item.family]) for item in chosen], pattern)
        if query.mode == "no_think":
            chosen[-1] = self.rng.choice(direct_items)
            query = flagged([(item, self.tasks[item.family]) for item in chosen], pattern)
            reply = Message("assistant", query.item.answer, "")
        else:
            reply = Message("assistant", thinking[-1].answer, thinking[-1].reasoning)
        self.forms[query.form] += 1
        return self.renderer.views([*query.messages, reply], empty_think_trained=True)[-1:]

    def hard_switch(self, item: Item) -> Rendered:
        """A direct answer after the template's own empty block; sometimes against a /think flag."""
        query = single(item, self.tasks[item.family], self.rng.choice(["think", None]), hard_switch=True)
        self.forms[query.form] += 1
        return self.renderer.views([*query.messages, Message("assistant", item.answer)])[-1]

    def direct(self, item: Item, task: Task) -> Rendered:
        """A direct answer under /no_think, after an empty block that the model writes."""
        query = single(item, task, "no_think")
        self.forms[query.form] += 1
        reply = Message("assistant", item.answer, "")
        return self.renderer.views([*query.messages, reply], empty_think_trained=True)[-1]

    def cut_thought(self, response: Response) -> Rendered:
        """A thought cut at a random token, the stop text, then the answer; only what follows the stop is trained."""
        tokenizer = self.renderer.tokenizer
        query = single(response.item, self.tasks[response.item.family], self.rng.choice(["think", None]))
        self.forms[f"{query.form}, thought cut"] += 1
        prompt = self.renderer.prompt_ids(query.messages)
        opening = tokenizer.encode_with_special("<think>\n")
        thought = tokenizer.encode(response.reasoning)
        kept = thought[: self.rng.randrange(len(thought))]
        before = [*prompt, *opening, *kept, *self.renderer.stop_ids]
        answer = [*tokenizer.encode(response.answer), tokenizer.im_end]
        return Rendered(before + answer, [0.0] * len(before) + [1.0] * len(answer))

    def document(self, text: str) -> Rendered:
        """A pre-training document as it was seen then: no chat markup, every token trained."""
        self.forms["document"] += 1
        ids = [*self.renderer.tokenizer.encode(text), self.renderer.tokenizer.endoftext]
        return Rendered(ids, [1.0] * len(ids))

    def tool_use(self, item: Item, task: ToolTask, thinking: bool) -> list[Rendered]:
        """A call, its real result and the answer, in either mode: one view for each assistant turn."""
        self.forms[with_tools(item, task, "think" if thinking else "no_think").form] += 1
        call = task.solution_call(item)
        result = task.execute(call)
        flag = " /think" if thinking else " /no_think"
        messages = [
            Message("user", item.prompt + flag),
            Message("assistant", "", f" {item.meta['expression']}" if thinking else "", (call,)),
            Message("tool", result),
            Message("assistant", result, f" {result}" if thinking else ""),
        ]
        return self.renderer.views(messages, task.tools, empty_think_trained=True)


def learnable(
    engine: Engine,
    renderer: Renderer,
    queries: Sequence[Query],
    params: SamplingParams,
    low: float,
    high: float,
) -> tuple[list[Query], list[float]]:
    """Queries whose pass rate under the policy lies in [low, high], and the pass rate of every query."""
    rates = [sum(t.correct for t in group) / len(group) for group in play(engine, renderer, queries, params)]
    return [query for query, rate in zip(queries, rates, strict=True) if low <= rate <= high], rates
