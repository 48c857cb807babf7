"""What a training arm saw: prompt forms, labels, tokens, operations, tuning.

Every post-training stage writes this as ``saw`` into its result; the claims refuse arms that differ in it without
their protocol saying so. Not here: which differences are allowed (``claims/protocol.py``).
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from twofold.llm import LLM
from twofold.post.sft import Example
from twofold.tasks.query import Query
from twofold.train.loop import Trainer

_LAST_STEPS = 10
_CONTEXT = 64  # tokens that a token attends to on average in these short conversations


def forms_of(queries: Iterable[Query]) -> Counter[str]:
    """How many queries ask for their mode in each form."""
    return Counter(query.form for query in queries)


def flops(policy: LLM, trained_tokens: float, generated_tokens: float = 0.0, scored_tokens: float = 0.0) -> float:
    """Floating-point operations: 3 x forward for trained tokens, 1 x for generated and scored ones."""
    forward = policy.model.config.flops_per_token(context=_CONTEXT, backward=False)
    return float(forward * (3 * trained_tokens + generated_tokens + scored_tokens))


def saw(
    policy: LLM,
    trainer: Trainer,
    forms: Counter[str],
    labels: str,
    tuned: Sequence[float],
    beside: float = 0.0,
) -> dict[str, Any]:
    """Fields of a stage's result: tokens, operations and ``saw``.

    Args:
        labels: what told right from wrong. tuned: learning rates that were tried on the tuning seeds. beside:
            operations of other models, such as a teacher.
    """
    generated = policy.engine.generated_tokens
    cost = flops(policy, trainer.tokens, generated) + beside
    row = {
        "forms": dict(sorted(forms.items())),
        "labels": labels,
        "trained_tokens": trainer.tokens,
        "generated_tokens": generated,
        "flops": cost,
        "tuned": list(tuned),
        "train_reward": _last_reward(trainer),
    }
    return {"tokens": trainer.tokens, "generated_tokens": generated, "flops": cost, "steps": trainer.step, "saw": row}


def _last_reward(trainer: Trainer) -> float | None:
    rewards = [row["reward"] for row in trainer.metrics.rows() if "reward" in row]
    return statistics.fmean(rewards[-_LAST_STEPS:]) if rewards else None


def steps_for(policy: LLM, budget: float, examples: Sequence[Example], batch_size: int) -> int:
    """Supervised steps of ``batch_size`` examples that cost about ``budget`` operations."""
    mean = statistics.fmean(len(example.token_ids) for example in examples)
    return max(1, round(budget / flops(policy, mean * batch_size)))
