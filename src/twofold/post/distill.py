"""On-policy distillation as a batch source: the student answers, the teacher's distribution is the target.

Phase 2 of strong-to-weak distillation (Qwen3 report, section 4.5): the student samples in either mode, and its logits
are aligned with the teacher's on those very tokens by ``objectives.TokenKL``. No gradient flows through sampling.
Phase 1 (off-policy) is plain SFT on teacher outputs.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, Literal

from twofold.base.batch import TokenBatch
from twofold.base.config import Config
from twofold.base.records import SamplingParams
from twofold.engine.engine import Engine
from twofold.episodes.play import play
from twofold.post.rl import draw, micro_batches
from twofold.tasks.query import Query
from twofold.text.chat import Renderer


class DistillConfig(Config):
    """On-policy distillation: ``steps`` updates of ``queries_per_step`` student samples each."""

    steps: int
    queries_per_step: int = 96
    temperature: float = 1.0
    max_tokens: int = 128
    direction: Literal["reverse", "forward"] = "reverse"


class DistillSource:
    """Student episodes, one a query; every update is on-policy."""

    can_checkpoint = True

    def __init__(
        self, engine: Engine, renderer: Renderer, queries: Sequence[Query], config: DistillConfig, seed: int
    ) -> None:
        self.engine, self.renderer, self.queries = engine, renderer, list(queries)
        self.config, self.seed = config, seed
        self.drawn = 0
        self.metrics: dict[str, float] = {}

    def next_step(self) -> list[TokenBatch]:
        """Sample a batch of episodes with the current student."""
        self.engine.update_weights()
        queries = draw(self.queries, self.drawn, self.config.queries_per_step, self.seed)
        first_seed = (self.seed * 1_000_003 + self.drawn) * self.config.queries_per_step
        params = SamplingParams(self.config.temperature, max_tokens=self.config.max_tokens, seed=first_seed)
        self.drawn += 1
        episodes = [group[0] for group in play(self.engine, self.renderer, queries, params)]
        self.metrics = {
            "reward": statistics.fmean(t.correct for t in episodes),
            "completions/mean_length": statistics.fmean(sum(t.sampled) for t in episodes),
            "completions/clipped_ratio": statistics.fmean(t.truncated for t in episodes),
            "on_policy": 1.0,
        }
        return micro_batches([(t, 0.0) for t in episodes])

    def state_dict(self) -> dict[str, Any]:
        return {
            "drawn": self.drawn,
            "version": self.engine.policy_version,
            "generated_tokens": self.engine.generated_tokens,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.drawn = state["drawn"]
        self.engine.policy_version = state["version"]
        self.engine.generated_tokens = state["generated_tokens"]
