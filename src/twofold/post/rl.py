"""Reasoning and general RL as a batch source: rollouts by the engine, rewards, group advantages, mini-batches.

GRPO advantages (arXiv 2402.03300) over groups of one query; groups without variance carry no signal and are counted,
not trained; truncated episodes are counted, and a step of nothing else is refused. The policy that samples is the
module being trained, so sampled and trained log-probabilities agree, and the loop's metrics show by how much.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from typing import Any, Literal

from twofold.base.batch import TokenBatch, pack
from twofold.base.config import Config
from twofold.base.records import InputError, SamplingParams
from twofold.engine.engine import Engine
from twofold.episodes.play import Trajectory, play
from twofold.post.rewards import checked
from twofold.tasks.query import Query
from twofold.text.chat import Renderer
from twofold.train.loop import TrainError
from twofold.train.objectives import PolicyGradient

Reward = Callable[[Trajectory], dict[str, float]]

_MAX_REDRAWS = 8  # rollout batches tried before a step without any signal is an error
_MICRO_BATCH_TOKENS = 16384


class RLConfig(Config):
    """Rollouts and the policy objective. ``steps`` counts rollout batches; each gives ``minibatches`` updates."""

    steps: int
    queries_per_step: int = 16
    group_size: int = 16
    minibatches: int = 2
    temperature: float = 1.0
    max_tokens: int = 128
    kind: Literal["grpo", "gspo"] = "grpo"
    clip_low: float = 0.2
    clip_high: float = 0.28
    kl_coef: float = 0.0
    scale_by_std: bool = True
    entropy_low: float = 0.0
    entropy_high: float = 10.0
    entropy_coef_max: float = 0.02

    def problem(self) -> str | None:
        """Why no step with these settings could learn anything; None where one could."""
        if self.group_size < 2:
            return f"group_size={self.group_size}: an episode is compared with others of its query; give 2 or more"
        for name in ("queries_per_step", "minibatches"):
            if getattr(self, name) < 1:
                return f"{name}={getattr(self, name)} leaves nothing to train on; give 1 or more"
        if self.temperature < 1e-5:
            return f"temperature={self.temperature:g} makes all episodes of a query the same; give more than 0"
        return None


class EntropyController:
    """Keeps the policy's entropy in a band by moving the coefficient of an entropy bonus.

    Below the band the coefficient rises by a tenth of its maximum a step, above it falls (to minus the maximum),
    inside it decays towards 0.
    """

    def __init__(self, low: float, high: float, maximum: float) -> None:
        self.low, self.high, self.maximum = low, high, maximum
        self.coefficient = 0.0

    def update(self, entropy: float) -> float:
        """Take the measured entropy (nats a token), return the new coefficient."""
        move = self.maximum / 10
        if entropy < self.low:
            self.coefficient = min(self.maximum, self.coefficient + move)
        elif entropy > self.high:
            self.coefficient = max(-self.maximum, self.coefficient - move)
        else:
            self.coefficient *= 0.8
            if abs(self.coefficient) < move / 100:
                self.coefficient = 0.0
        return self.coefficient


class RolloutSource:
    """Batches from the policy's own episodes; ``next_step`` gives one mini-batch, sampling anew when they are used up.

    Args:
        queries: the pool; drawn without replacement, reshuffled each epoch. reward: named parts of an episode's
            reward. objective: whose entropy coefficient the controller moves. reference: a frozen policy, needed
            for the KL term.
    """

    def __init__(
        self,
        engine: Engine,
        renderer: Renderer,
        queries: Sequence[Query],
        reward: Reward,
        objective: PolicyGradient,
        config: RLConfig,
        seed: int,
        reference: Engine | None = None,
    ) -> None:
        if config.kl_coef and reference is None:
            raise InputError("kl_coef needs a reference policy; give one or set kl_coef to 0")
        self.reference = reference if config.kl_coef else None
        self.engine, self.renderer, self.queries, self.reward = engine, renderer, list(queries), reward
        self.objective, self.config, self.seed = objective, config, seed
        self.controller = EntropyController(config.entropy_low, config.entropy_high, config.entropy_coef_max)
        self.drawn = 0  # rollout batches sampled so far, redraws included
        self.metrics: dict[str, float] = {}
        self._pending: list[list[TokenBatch]] = []

    @property
    def can_checkpoint(self) -> bool:
        """Only between rollout batches: a pending mini-batch belongs to weights that are gone."""
        return not self._pending

    def next_step(self) -> list[TokenBatch]:
        """The next mini-batch; new rollouts when the last are used up.

        Raises:
            InputError: settings with which nothing can be learnt, before anything is sampled; a reward that is no
                number. TrainError: rollouts without any signal.
        """
        if self._pending:
            self.metrics = {**self.metrics, "on_policy": 0.0}
            return self._pending.pop(0)
        problem = self.config.problem() or (None if self.queries else "there are no queries to sample from; give some")
        if problem:
            raise InputError(problem)
        self.engine.update_weights()
        for _ in range(_MAX_REDRAWS):
            groups = self._sample()
            parts = [[checked(self.reward(t), t) for t in group] for group in groups]
            rewards = [[sum(named.values()) for named in row] for row in parts]
            self.metrics = self._metrics(groups, parts, rewards)
            chosen = self._with_advantages(groups, rewards)
            if chosen:
                break
        else:
            raise TrainError(
                f"{_MAX_REDRAWS} rollout batches in a row had the same reward in every group "
                f"(mean {self.metrics['reward']:.3f}): choose queries the policy sometimes solves"
            )
        self.objective.entropy_coef = self.controller.update(self.metrics["rollout/entropy"])
        self.metrics["entropy_coef"] = self.objective.entropy_coef
        self._pending = self._minibatches(chosen)
        return self._pending.pop(0)

    def state_dict(self) -> dict[str, Any]:
        return {
            "drawn": self.drawn,
            "entropy_coef": self.controller.coefficient,
            "version": self.engine.policy_version,
            "generated_tokens": self.engine.generated_tokens,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.drawn = state["drawn"]
        self.controller.coefficient = state["entropy_coef"]
        self.engine.policy_version = state["version"]
        self.engine.generated_tokens = state["generated_tokens"]

    def _sample(self) -> list[list[Trajectory]]:
        queries = draw(self.queries, self.drawn, self.config.queries_per_step, self.seed)
        config = self.config
        first_seed = (self.seed * 1_000_003 + self.drawn) * config.queries_per_step * config.group_size
        params = SamplingParams(config.temperature, max_tokens=config.max_tokens, n=config.group_size, seed=first_seed)
        self.drawn += 1
        groups = play(self.engine, self.renderer, queries, params)
        if all(t.truncated for group in groups for t in group):
            raise TrainError(
                f"every rollout was cut off at max_tokens={config.max_tokens}; raise it, or check that the policy "
                "ends its turns"
            )
        return groups

    def _with_advantages(
        self, groups: list[list[Trajectory]], rewards: list[list[float]]
    ) -> list[tuple[Trajectory, float]]:
        out = []
        for group, values in zip(groups, rewards, strict=True):
            spread = statistics.pstdev(values)
            if spread < 1e-6:
                continue
            mean = statistics.fmean(values)
            scale = spread + 1e-4 if self.config.scale_by_std else 1.0
            out += [(t, (value - mean) / scale) for t, value in zip(group, values, strict=True)]
        return out

    def _minibatches(self, chosen: list[tuple[Trajectory, float]]) -> list[list[TokenBatch]]:
        random.Random(f"{self.seed}:{self.drawn}").shuffle(chosen)
        count = min(self.config.minibatches, len(chosen))
        return [micro_batches(chosen[part::count], self.reference) for part in range(count)]

    def _metrics(
        self, groups: list[list[Trajectory]], parts: list[list[dict[str, float]]], rewards: list[list[float]]
    ) -> dict[str, float]:
        flat = [t for group in groups for t in group]
        values = [value for row in rewards for value in row]
        lengths = [sum(t.sampled) for t in flat]
        entropy = sum(e for t in flat for e, mine in zip(t.entropies, t.sampled, strict=True) if mine)
        named: dict[str, list[float]] = {}
        for part in (part for row in parts for part in row):
            for name, value in part.items():
                named.setdefault(f"rewards/{name}/mean", []).append(value)
        return {
            "reward": statistics.fmean(values),
            "reward_std": statistics.fmean(statistics.pstdev(row) for row in rewards),
            "frac_reward_zero_std": statistics.fmean(statistics.pstdev(row) < 1e-6 for row in rewards),
            "completions/mean_length": statistics.fmean(lengths),
            "completions/clipped_ratio": statistics.fmean(t.truncated for t in flat),
            "rollout/entropy": entropy / max(1, sum(lengths)),
            "on_policy": 1.0,
        } | {name: sum(v) / len(flat) for name, v in named.items()}


def draw(queries: Sequence[Query], batch: int, count: int, seed: int) -> list[Query]:
    """Queries number batch * count … of an endless sequence of seeded shuffles of the pool."""
    orders: dict[int, list[Query]] = {}
    out = []
    for number in range(batch * count, (batch + 1) * count):
        epoch, place = divmod(number, len(queries))
        if epoch not in orders:
            orders[epoch] = list(queries)
            random.Random(f"{seed}:epoch:{epoch}").shuffle(orders[epoch])
        out.append(orders[epoch][place])
    return out


def micro_batches(chosen: Sequence[tuple[Trajectory, float]], reference: Engine | None = None) -> list[TokenBatch]:
    """Pack trajectories with their advantages; only sampled tokens carry weight.

    With ``reference`` its log-probabilities of the same tokens go along as ``extras["ref_logprobs"]``.
    """
    out: list[TokenBatch] = []
    part: list[tuple[Trajectory, float]] = []
    for index, pair in enumerate(chosen):
        part.append(pair)
        if sum(len(t.token_ids) for t, _ in part) >= _MICRO_BATCH_TOKENS or index == len(chosen) - 1:
            rows = [t.token_ids for t, _ in part]
            extras: dict[str, Sequence[Sequence[float]]] = {
                "old_logprobs": [t.logprobs for t, _ in part],
                "advantages": [[advantage] * len(t.token_ids) for t, advantage in part],
            }
            if reference is not None:
                extras["ref_logprobs"] = [[0.0, *scores.tolist()] for scores in reference.score(rows)]
            out.append(pack(rows, [[float(s) for s in t.sampled] for t, _ in part], extras))
            part = []
    return out
