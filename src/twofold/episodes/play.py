"""Play queries: render, sample, parse, run tools, go on; tokens in, tokens and log-probabilities out.

A trajectory grows only at its end: what the model sampled is never decoded and re-encoded, and tool results are
appended as tokens. Which tokens the model chose itself is recorded, because only those may carry a gradient.
Not here: rewards, advantages, scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from twofold.base.records import Completion, Request, SamplingParams
from twofold.engine.engine import Engine
from twofold.tasks.query import Query
from twofold.text.chat import Renderer
from twofold.text.parse import Parsed, ParseOptions, parse

MAX_TURNS = 3
_TURN_STRIDE = 1_000_000_007  # keeps the seeds of later turns away from those of other episodes


@dataclass
class Trajectory:
    """One episode. Lists run in step with ``token_ids``.

    sampled: True where the model chose the token (not prompt, tool result or forced stop text). logprobs: as
    sampled, at temperature 1; 0 elsewhere. final: the last assistant turn, parsed; first: the first one.
    """

    query: Query
    prompt_length: int
    token_ids: list[int]
    sampled: list[bool]
    logprobs: list[float]
    entropies: list[float]
    first: Parsed | None = None
    final: Parsed | None = None
    truncated: bool = False
    forced: bool = False
    thinking_tokens: int = 0
    tool_results: list[str] = field(default_factory=list)
    seed: int = 0

    @property
    def answer(self) -> str:
        """Content of the final turn, or an empty string when the episode was cut short."""
        return "" if self.truncated or self.final is None else self.final.content

    @property
    def correct(self) -> float:
        """The task's verdict on the answer."""
        return self.query.task.verify(self.query.item, self.answer) if self.answer else 0.0

    @property
    def followed_mode(self) -> bool:
        """Whether the reply used the mode the query called for, in the proper form.

        Thinking: a closed, non-empty block. Soft switch off: an empty block written by the model. Hard switch: none.
        """
        reply = self.first
        if reply is None or (self.truncated and not reply.closed):
            return False
        if self.query.mode == "think":
            return bool(reply.reasoning and reply.reasoning.strip() and reply.closed)
        if "<think>" in reply.content:  # a block opened after an empty one: the parser keeps it as text
            return False
        return reply.reasoning is None if self.query.hard_switch else reply.reasoning == ""


def play(
    engine: Engine, renderer: Renderer, queries: Sequence[Query], params: SamplingParams
) -> list[list[Trajectory]]:
    """Sample ``params.n`` episodes of every query.

    Sample j of query i uses seed ``params.seed + i * n + j``, so episodes do not depend on which others are played.

    Returns:
        For each query its n trajectories.
    """
    groups: list[list[Trajectory]] = []
    requests = []
    for index, query in enumerate(queries):
        tools = query.tools.tools if query.tools else None
        prompt = renderer.prompt_ids(query.messages, tools, thinking=not query.hard_switch)
        requests.append(Request(tuple(prompt), replace(params, seed=params.seed + index * params.n)))
        first = params.seed + index * params.n
        groups.append([_start(query, prompt, first + sample) for sample in range(params.n)])
    open_episodes: list[Trajectory] = []
    for completion in engine.generate(requests):
        trajectory = groups[completion.request_index][completion.sample_index]
        if _absorb(trajectory, completion, renderer):
            open_episodes.append(trajectory)
    for turn in range(1, MAX_TURNS):
        open_episodes = _next_turn(engine, renderer, open_episodes, params, turn)
    for trajectory in open_episodes:
        trajectory.truncated = True  # still calling tools after the last turn
    return groups


def _start(query: Query, prompt: list[int], seed: int) -> Trajectory:
    nothing = [0.0] * len(prompt)
    return Trajectory(query, len(prompt), list(prompt), [False] * len(prompt), nothing, list(nothing), seed=seed)


def _absorb(trajectory: Trajectory, completion: Completion, renderer: Renderer) -> bool:
    """Append one assistant turn. True when it called tools that are on offer, so the episode goes on."""
    offered = trajectory.query.tools
    options = ParseOptions(tools=offered.tools if offered else None)
    parsed = parse(renderer.tokenizer, completion.token_ids, trajectory.token_ids, options)
    trajectory.token_ids += completion.token_ids
    trajectory.sampled += [not forced for forced in completion.forced]
    trajectory.logprobs += completion.logprobs
    trajectory.entropies += completion.entropies
    trajectory.thinking_tokens += completion.thinking_tokens
    trajectory.forced |= any(completion.forced)
    trajectory.first = trajectory.first or parsed
    trajectory.final = parsed
    trajectory.truncated = completion.finish_reason == "length"
    return bool(trajectory.query.tools and parsed.tool_calls and not trajectory.truncated)


def _next_turn(
    engine: Engine, renderer: Renderer, episodes: list[Trajectory], params: SamplingParams, turn: int
) -> list[Trajectory]:
    """Run the tools of every open episode, append their results as tokens and sample one more turn each."""
    requests = []
    for trajectory in episodes:
        tools, reply = trajectory.query.tools, trajectory.final
        assert tools is not None and reply is not None
        results = [tools.execute(call) for call in reply.tool_calls]
        trajectory.tool_results += results
        added = renderer.tool_result_ids(results, thinking=not trajectory.query.hard_switch)
        trajectory.token_ids += added
        for values in (trajectory.logprobs, trajectory.entropies):
            values += [0.0] * len(added)
        trajectory.sampled += [False] * len(added)
        seed = trajectory.seed + _TURN_STRIDE * turn
        requests.append(Request(tuple(trajectory.token_ids), replace(params, n=1, seed=seed)))
    completions = engine.generate(requests) if requests else []
    return [episode for episode, done in zip(episodes, completions, strict=True) if _absorb(episode, done, renderer)]
