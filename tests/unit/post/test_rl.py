"""Rollouts as a source: what is refused, what is dropped and counted, advantages, and exact resumption."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from twofold.base.records import InputError
from twofold.engine.engine import Engine
from twofold.episodes.play import Trajectory
from twofold.post.rl import EntropyController, RLConfig, RolloutSource, draw, micro_batches
from twofold.tasks.query import Query
from twofold.text.chat import Renderer
from twofold.train.loop import OptimConfig, Trainer, TrainError
from twofold.train.objectives import LOGP_DIFFERENCE, PolicyGradient

CONFIG = RLConfig(steps=3, queries_per_step=4, group_size=4, minibatches=2, max_tokens=12)
MakeEngine = Callable[..., Engine]


def parity(trajectory: Trajectory) -> dict[str, float]:
    """A reward with variance for any policy."""
    return {"odd": 0.75 * (trajectory.token_ids[-1] // 4 % 2), "short": 0.25 * (len(trajectory.token_ids) % 2)}


@pytest.fixture
def make_source(make_engine: MakeEngine, renderer: Renderer, queries: list[Query]) -> Callable[..., RolloutSource]:
    def make(
        reward: Callable[[Trajectory], dict[str, float]] = parity, many_ends: bool = True, **changes: Any
    ) -> RolloutSource:
        config = CONFIG.model_copy(update=changes)
        engine = make_engine(many_ends=many_ends)
        return RolloutSource(engine, renderer, queries, reward, PolicyGradient(), config, seed=3)

    return make


def test_a_step_of_truncated_rollouts_is_refused(make_source: Callable[..., RolloutSource]) -> None:
    with pytest.raises(TrainError, match="every rollout was cut off at max_tokens=3; raise it"):
        make_source(many_ends=False, max_tokens=3).next_step()


def test_a_reward_that_never_differs_is_refused(make_source: Callable[..., RolloutSource]) -> None:
    source = make_source(lambda trajectory: {"same": 0.5})
    with pytest.raises(TrainError, match=r"8 rollout batches in a row .* \(mean 0.500\)"):
        source.next_step()
    assert source.metrics["frac_reward_zero_std"] == 1.0 and source.drawn == 8


def test_groups_without_variance_are_dropped_and_counted(make_source: Callable[..., RolloutSource]) -> None:
    source = make_source(minibatches=1)
    drawn = draw(source.queries, 0, CONFIG.queries_per_step, source.seed)
    dull = {drawn[0].item.prompt, drawn[2].item.prompt}
    source.reward = lambda t: {"flat": 1.0} if t.query.item.prompt in dull else parity(t)
    (batch,) = source.next_step()
    assert source.metrics["frac_reward_zero_std"] == 0.5
    assert len(batch.cu_seqlens) - 1 == 2 * CONFIG.group_size
    prompts = {tuple(source.renderer.prompt_ids(q.messages)) for q in drawn if q.item.prompt not in dull}
    starts = batch.cu_seqlens[:-1]
    assert all(any(tuple(batch.tokens_T[s : s + len(p)].tolist()) == p for p in prompts) for s in starts)


def test_advantages_sum_to_zero_in_every_group_and_only_sampled_tokens_count(
    make_source: Callable[..., RolloutSource],
) -> None:
    for scale in (True, False):
        source = make_source(minibatches=1, scale_by_std=scale)
        (batch,) = source.next_step()
        spans = list(zip(batch.cu_seqlens, batch.cu_seqlens[1:], strict=False))
        groups: dict[tuple[int, ...], list[float]] = {}
        for start, end in spans:
            sampled = batch.weights_T[start:end] > 0
            first = int(sampled.nonzero()[0])
            assert sampled[first:].all()  # nothing was forced and no tool spoke
            advantages = batch.extras["advantages"][start:end]
            assert len(advantages.unique()) == 1
            groups.setdefault(tuple(batch.tokens_T[start : start + first + 1].tolist()), []).append(
                float(advantages[0])
            )
        assert all(len(values) == CONFIG.group_size for values in groups.values())
        for values in groups.values():
            assert sum(values) == pytest.approx(0, abs=1e-5)
            if scale:
                assert sum(v * v for v in values) / len(values) == pytest.approx(1, rel=0.01)
            else:
                assert max(map(abs, values)) <= 1


def test_on_policy_flag_and_checkpoints_only_between_rollouts(make_source: Callable[..., RolloutSource]) -> None:
    source = make_source()
    assert source.can_checkpoint
    source.next_step()
    assert source.metrics["on_policy"] == 1.0 and not source.can_checkpoint and source.engine.policy_version == 1
    source.next_step()
    assert source.metrics["on_policy"] == 0.0 and source.can_checkpoint and source.drawn == 1
    source.next_step()
    assert source.metrics["on_policy"] == 1.0 and source.drawn == 2 and source.engine.policy_version == 2


def test_metrics_add_up(make_source: Callable[..., RolloutSource]) -> None:
    source = make_source()
    source.next_step()
    metrics = source.metrics
    parts = metrics["rewards/odd/mean"] + metrics["rewards/short/mean"]
    assert metrics["reward"] == pytest.approx(parts) and 0 < metrics["reward_std"] < 1
    assert 1 <= metrics["completions/mean_length"] <= 12 and 0 <= metrics["completions/clipped_ratio"] < 1
    assert metrics["rollout/entropy"] > 1


def trainer(source: RolloutSource, work: Path, on_step: Any = None) -> Trainer:
    optim = OptimConfig(muon_lr=0.0, adam_lr=1e-2, warmup=0, decay="constant")
    steps = CONFIG.steps * CONFIG.minibatches
    return Trainer(source.engine.model, source, source.objective, optim, steps, work, on_step)


def test_training_resumes_exactly_and_on_policy_steps_agree_with_the_sampler(
    make_source: Callable[..., RolloutSource], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("twofold.train.loop.CHECKPOINT_SECONDS", 0.0)
    band = {"entropy_low": 9.0}  # never reached: the coefficient moves, and its state must come back
    whole = trainer(make_source(**band), tmp_path / "whole")
    whole.fit()

    class Stop(Exception):
        pass

    def stop(step: int, row: Any) -> None:
        if step == 3:  # in the middle of the second rollout batch
            raise Stop

    with pytest.raises(Stop):
        trainer(make_source(**band), tmp_path / "cut", stop).fit()
    again = trainer(make_source(**band), tmp_path / "cut")
    again.fit()
    assert whole.metrics.rows() == again.metrics.rows() and len(whole.metrics.rows()) == 6
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert whole.source.state_dict() == again.source.state_dict()
    for row in whole.metrics.rows():
        gap = row[LOGP_DIFFERENCE + "/max"]
        assert gap < 1e-5 if row["on_policy"] else gap > 1e-4
        assert row["entropy_coef"] > 0


def test_the_controller_keeps_entropy_in_a_band() -> None:
    controller = EntropyController(0.5, 1.0, 0.02)
    rising = [controller.update(0.1) for _ in range(12)]
    assert rising[0] == pytest.approx(0.002) and rising == sorted(rising) and rising[-1] == pytest.approx(0.02)
    fading = [controller.update(0.7) for _ in range(40)]
    assert fading == sorted(fading, reverse=True) and fading[0] == pytest.approx(0.016) and fading[-1] == 0.0
    falling = [controller.update(2.0) for _ in range(12)]
    assert falling[0] == pytest.approx(-0.002) and falling[-1] == pytest.approx(-0.02)
    assert EntropyController(0.5, 1.0, 0.02).update(0.5) == 0.0 == EntropyController(0.5, 1.0, 0.02).update(1.0)


def test_draw_takes_every_query_once_an_epoch(queries: list[Query]) -> None:
    taken = [q.item.prompt for batch in range(8) for q in draw(queries, batch, 3, seed=1)]
    for epoch in range(3):
        assert Counter(taken[8 * epoch : 8 * epoch + 8]) == Counter(q.item.prompt for q in queries)
    assert taken[:8] != taken[8:16] and draw(queries, 5, 3, 1) == draw(queries, 5, 3, 1)
    assert [q.item.prompt for q in draw(queries, 0, 8, 2)] != taken[:8]


def test_micro_batches_hold_every_trajectory_in_order(
    queries: list[Query], make_trajectory: Callable[..., Trajectory], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("twofold.post.rl._MICRO_BATCH_TOKENS", 60)
    rng = random.Random(0)
    pairs = [(make_trajectory(q, "1" * rng.randint(1, 30) + "<|im_end|>"), float(i)) for i, q in enumerate(queries)]
    batches = micro_batches(pairs)
    assert len(batches) > 1 and sum(b.num_tokens for b in batches) == sum(len(t.token_ids) - 1 for t, _ in pairs)
    advantages = torch.cat([b.extras["advantages"] for b in batches]).unique_consecutive().tolist()
    assert advantages == [float(i) for i in range(len(pairs))]
    weights = torch.cat([b.weights_T for b in batches])
    assert int(weights.sum()) == sum(sum(t.sampled) for t, _ in pairs)
    assert (torch.cat([b.extras["old_logprobs"] for b in batches]) == -weights).all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"group_size": 1}, "group_size=1: an episode is compared"),
        ({"group_size": 0}, "group_size=0"),
        ({"minibatches": 0}, "minibatches=0 leaves nothing"),
        ({"queries_per_step": 0}, "queries_per_step=0 leaves nothing"),
        ({"temperature": 0.0}, "temperature=0 makes all episodes of a query the same"),
    ],
)
def test_settings_that_teach_nothing_are_refused_before_anything_is_sampled(
    make_source: Callable[..., RolloutSource], changes: dict[str, Any], words: str
) -> None:
    source = make_source(**changes)
    with pytest.raises(InputError, match=words):
        source.next_step()
    assert source.drawn == 0 and source.engine.generated_tokens == 0


def test_an_empty_pool_is_refused(make_source: Callable[..., RolloutSource]) -> None:
    source = make_source()
    source.queries = []
    with pytest.raises(InputError, match="no queries"):
        source.next_step()


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), None, "1.0"])
def test_a_reward_that_is_no_number_stops_the_run_by_its_name(
    make_source: Callable[..., RolloutSource], odd: object
) -> None:
    count = itertools.count(1)
    source = make_source(lambda t: parity(t) | {"judge": odd if next(count) == 7 else 0.5})  # type: ignore[dict-item]
    with pytest.raises(InputError, match=r"reward 'judge' is .* for '.*nothing was trained on it"):
        source.next_step()
    assert source.can_checkpoint and not source.metrics  # nothing of the batch is kept


def test_verdicts_and_whole_numbers_are_numbers(make_source: Callable[..., RolloutSource]) -> None:
    verdicts = make_source(lambda t: {"right": bool(t.token_ids[-1] // 4 % 2)})
    numbers = make_source(lambda t: {"right": float(t.token_ids[-1] // 4 % 2)})
    ours, theirs = verdicts.next_step(), numbers.next_step()
    for left, right in zip(ours, theirs, strict=True):
        assert torch.equal(left.extras["advantages"], right.extras["advantages"])
    assert verdicts.metrics == numbers.metrics
