"""Rewards: each a named number in [0, 1] for one episode; a query kind decides how they are weighed.

Two sorts, as in Qwen3's general RL: rules (verdicts, formats, modes) and comparison with a reference answer. The
verifier is the task's own, the same one that evaluation uses. A reward that is no number is refused before it can spoil
the advantages of its group. Not here: advantages, judges by another model.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from numbers import Real

from twofold.base.records import InputError
from twofold.episodes.play import Trajectory
from twofold.tasks.instruct import follows_style


def reasoning_reward(trajectory: Trajectory) -> dict[str, float]:
    """Right answer after a closed thought (rule)."""
    final = trajectory.final
    whole = final is not None and final.closed and final.complete and not final.errors
    return {"correct": trajectory.correct if whole else 0.0}


def reference_similarity(answer: str, reference: str) -> float:
    """How close an answer comes to the reference text: matching characters, 0 to 1 (Ratcliff and Obershelp 1988)."""
    return difflib.SequenceMatcher(None, answer.strip(), reference).ratio()


def general_reward(trajectory: Trajectory) -> dict[str, float]:
    """Components for general RL, already weighed so that they add up to at most 1.

    Nothing is earned in the wrong mode or with a malformed reply. Direct answers of step-by-step items are at
    chance, so their correctness is not rewarded: chance rewards are noise for the whole group.
    """
    query, final = trajectory.query, trajectory.final
    if final is None or trajectory.truncated or final.errors or not trajectory.followed_mode:
        return {"mode": 0.0}
    if query.kind.startswith("style"):
        follows = float(follows_style(query.item, trajectory.answer))
        return {"mode": 0.2, "style": 0.4 * follows, "correct": 0.4 * trajectory.correct}
    if query.kind == "tool":
        called = float(bool(trajectory.tool_results) and not trajectory.tool_results[0].startswith("error"))
        return {"mode": 0.1, "tool_call": 0.3 * called, "correct": 0.6 * trajectory.correct}
    if query.mode == "no_think" and query.task.step_by_step:
        return {"mode": 1.0}
    if query.kind.startswith("order"):
        return {"mode": 0.2, "reference": 0.8 * reference_similarity(trajectory.answer, query.item.answer)}
    return {"mode": 0.4, "correct": 0.6 * trajectory.correct}


def brevity(trajectory: Trajectory, limit: int) -> float:
    """1 for a thought within ``limit`` tokens, falling linearly to 0 at twice that (length control)."""
    return max(0.0, min(1.0, 2.0 - trajectory.thinking_tokens / limit))


def checked(parts: object, trajectory: Trajectory) -> dict[str, float]:
    """What a reward function gave for one episode, as floats: names with finite numbers, whose sum is finite too.

    Raises:
        InputError: it is something else; the message has the reward's name, its value and the query.
    """
    where = f"for {trajectory.query.item.prompt[:80]!r}"
    if not isinstance(parts, Mapping):
        raise InputError(f"the reward function gave {parts!r} {where}; let it return {{name: number}}")
    for name, value in parts.items():
        if not isinstance(value, Real) or not _finite(value):
            raise InputError(
                f"reward {name!r} is {value!r} {where}, which is no finite number; nothing was trained on it. Let the "
                "reward function give a number there too, such as 0.0 for what cannot be judged"
            )
    values = {str(name): float(value) for name, value in parts.items()}
    if not math.isfinite(sum(values.values())):
        raise InputError(f"rewards {', '.join(map(repr, values))} are too large to be added {where}; scale them down")
    return values


def _finite(value: Real) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond all floats
        return False
