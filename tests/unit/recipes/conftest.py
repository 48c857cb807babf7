"""A made-up run in which all nine claims hold, small enough to read and to break part by part."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from twofold.recipes.artefacts import Cost, Manifest, code_fingerprint
from twofold.recipes.evidence import (
    EASY,
    HARD,
    HELD_OUT_KINDS,
    LOGP_MAX,
    SIGNED,
    SKILLS,
    SWITCH_KIND,
    TAUGHT_KINDS,
)
from twofold.tasks.base import canonical_key

ITEMS = 60  # of each kind
MODES = (*TAUGHT_KINDS, *HELD_OUT_KINDS, SWITCH_KIND)
BUDGETS = (0, 4, 8, 16, 24, 32, 48, 64)
STAGES = (
    *("data", "s1", "s2", "s3", "cold_start", "eval_cold_start", "rl", "eval_rl", "fusion", "eval_fusion"),
    *("general_rl", "eval_final", "direct", "eval_direct", "rl_rejection", "eval_rl_rejection"),
    *("rl_more_sft", "eval_rl_more_sft", "think_only", "eval_think_only", "uncut", "eval_uncut"),
    *("general_sft_24", "eval_general_sft_24", "general_sft_240", "eval_general_sft_240", "s3_old_base"),
    *("student_s1", "student_base", "student_base_general", "student_sft", "eval_student_sft"),
    *("student_opd", "eval_student_opd", "student_rl", "eval_student_rl", "student_more_sft"),
    *("eval_student_more_sft", "moe_global", "moe_micro"),
)


def part(shares: dict[str, float], samples: int = 1, followed: dict[str, float] | None = None) -> dict[str, Any]:
    """Item rows of a battery part; ``shares`` maps a kind to its accuracy, ``followed`` to its mode following."""
    out: dict[str, Any] = {"settings": {}, "kinds": [], "correct": [], "followed": [], "thinking_tokens": []}
    for kind, share in shares.items():
        for item in range(ITEMS):
            out["kinds"].append(kind)
            out["correct"].append([hit(item * samples + sample, share, ITEMS * samples) for sample in range(samples)])
            out["followed"].append([hit(item, (followed or {}).get(kind, 1.0), ITEMS)] * samples)
            out["thinking_tokens"].append([20 + item % 7] * samples)
    return out | {"truncated": 0.01, "unclosed": 0.01}


def hit(place: int, share: float, count: int) -> float:
    """1 for a ``share`` of the places, in an order that looks random but nests: more share, same items and more."""
    return float((place * 37) % count < share * count)


def short(share: float, easy: float = 0.95) -> dict[str, float]:
    return {**dict.fromkeys(HARD, share), **dict.fromkeys(EASY, easy)}


def core(think: float, direct: float = 0.1, easy: float = 0.95) -> dict[str, Any]:
    """items.json of one checkpoint: the parts that nearly all have."""
    return {
        "think": part(short(think), samples=2),
        "direct": part(short(direct, easy)),
        "no_think": part(short(direct, easy)),
        "beyond": part(dict.fromkeys(SIGNED, think / 3), samples=2),
    }


def mixed(cool: float, greedy: float, hot: float) -> dict[str, Any]:
    """Parts at sizes without traces."""
    return {
        "mixed": part(dict.fromkeys(SIGNED, cool), samples=2),
        "mixed_greedy": part(dict.fromkeys(SIGNED, greedy)),
        "mixed_hot": part(dict.fromkeys(SIGNED, hot), samples=8),
    }


def student(share: float) -> dict[str, Any]:
    """What a student's checkpoint has; its T = 1 parts are all at ``share``."""
    hot = {"hot": part(dict.fromkeys(HARD, share), samples=8)}
    flag = {"mixed_flag": part(dict.fromkeys(SIGNED, share), samples=8)}
    return {"think": part(short(share), samples=2), **hot, **mixed(share, share, share), **flag}


def general(gain: float, tool: float, **named: float) -> dict[str, Any]:
    """Skills at ``gain`` above chance; ``named`` sets single ones, with "_" for " "."""
    shares = {skill: chance / 100 + gain for skill, chance in SKILLS.items()}
    shares |= {name.replace("_", " "): share for name, share in named.items()}
    return part({"think": 0.8, "direct": 0.9, "tool": tool, **shares}, followed=shares)


def modes(share: float = 0.98, **named: float) -> dict[str, Any]:
    followed = dict.fromkeys(MODES, share) | {name.replace("_", " "): value for name, value in named.items()}
    return part(dict.fromkeys(MODES, 0.8), followed=followed)


def bpb(*levels: float) -> list[dict[str, Any]]:
    """Bits per byte of 24 windows at the three spans."""
    out = []
    for span, level in zip(((0, 256), (256, 512), (512, 1024)), levels, strict=True):
        values = [level + 0.3 * ((window * 7) % 5 - 2) + 0.01 * (window % 3) for window in range(24)]
        out.append({"span": list(span), "interval": interval(level, 0.15), "values": values})
    return out


def interval(value: float, half: float = 0.05) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half}


def budget_rows(partial: float = 0.6, none: float = 0.25) -> list[dict[str, Any]]:
    """Items need 10 to 59 tokens; they are right in 95 % when they get them, in ``partial`` when stopped before."""
    kinds = ["top"] * 2 * ITEMS
    needs = [10 + (item * 31) % 50 for item in range(2 * ITEMS)]
    rows = []
    for budget in BUDGETS:
        stopped = [need > budget for need in needs]
        shares = [none if budget == 0 else partial if cut else 0.95 for cut in stopped]
        rows.append(
            {
                "budget": budget,
                "kinds": kinds,
                "correct": [hit(item, share, 2 * ITEMS) for item, share in enumerate(shares)],
                "stopped": [float(cut) for cut in stopped],
                "chance": [0.25] * len(kinds),
                "thinking_tokens": [min(need, budget) for need in needs],
            }
        )
    return rows


def experts(distance: float, dead: int) -> dict[str, Any]:
    shares = [[0.125 + 0.01 * (expert - 3.5) for expert in range(8)] for _ in range(2)]
    samples = [distance + 0.001 * ((i * 7) % 40 - 20) for i in range(200)]
    return {
        "load": shares,
        "dead": dead,
        "task_tv": [distance, distance + 0.02],
        "task_tv_samples": samples,
        "family_tv": [distance + 0.1, distance + 0.12],
        "family_tv_samples": [sample + 0.1 for sample in samples],
        "by_family": {family: shares for family in (*HARD, *EASY, "text")},
    }


def saw(labels: str, trained: int, generated: int = 0, forms: tuple[str, ...] = ("no flag",)) -> dict[str, Any]:
    """result.json of a post-training stage."""
    cost = 1e6 * (3 * trained + generated)
    row = {
        "forms": dict.fromkeys(forms, 100),
        "labels": labels,
        "trained_tokens": trained,
        "generated_tokens": generated,
        "flops": cost,
        "tuned": [1e-3, 2e-3, 4e-3],
        "train_reward": 0.9 if labels == "verifier" else None,
    }
    return {"tokens": trained, "generated_tokens": generated, "flops": cost, "steps": 20, "saw": row}


def training(steps: int, start: float, end: float) -> list[dict[str, Any]]:
    return [
        {"step": step, "loss": start + (end - start) * step / steps, "num_tokens": 2560 * (step + 1)}
        for step in range(steps)
    ]


def rollouts(steps: int, gap: float) -> list[dict[str, Any]]:
    """Metric rows of RL: each rollout batch gives two updates, the first on-policy."""
    return [
        {
            "step": step,
            "reward": 0.4 + 0.01 * step,
            "rollout/entropy": 0.2 - 0.002 * step,
            "entropy_coef": 0.0,
            "frac_reward_zero_std": 0.2,
            "completions/clipped_ratio": 0.01,
            "completions/mean_length": 40.0,
            "on_policy": float(step % 2 == 0),
            LOGP_MAX: gap if step % 2 == 0 else 0.5,
        }
        for step in range(steps)
    ]


def sample_rows() -> list[dict[str, Any]]:
    return [
        {
            "title": title,
            "kind": kind,
            "mode": mode,
            "prompt": "sum mod 10: E1 B5 I6",
            "reasoning": " E0+1=1 B1+5=6 I6+6=2" if mode == "think" else "",
            "answer": "2" if right else "7",
            "calls": [],
            "tool_results": [],
            "expected": "2",
            "correct": right,
            "followed": True,
        }
        for title, kind, mode in (("thinking", "sum", "think"), ("/no_think", "sum", "no_think"))
        for right in (True, True, True, False, False)
    ]


def card() -> dict[str, Any]:
    rows = [
        {
            "name": name,
            "licence": licence,
            "documents": 700,
            "tokens": 2_400_000,
            "bytes": 5_000_000,
            "bytes_per_token": 2.083,
            "share": 0.0,
            "held_out": 70 if name == "text" else 0,
            "dropped": {"near-duplicate": 12} if name == "text" else {},
            "sha256": "0" * 64,
        }
        for name, licence in (("text", "PSF-2.0"), ("tasks_general", "CC0-1.0"))
    ]
    totals: dict[str, Any] = {"documents": 1400, "tokens": 4_800_000, "bytes": 10_000_000, "held_out": 70}
    totals["dropped"] = {"near-duplicate": 12}
    return {"sources": rows, "totals": totals, "licences": ["CC0-1.0", "PSF-2.0"], "hash": "0123456789abcdef"}


def pretrained(levels: tuple[float, float, float], probe: float | None = None, **more: Any) -> dict[str, Any]:
    result: dict[str, Any] = {"bpb": bpb(*levels), "tokens": 1_700_000, "flops": 4.7e12, "steps": 60, "before": None}
    result["tokens_by_source"] = {"text": 1_200_000, "tasks_general": 500_000}
    if probe is not None:
        result["probe"] = interval(probe)
    return {"result": result | more, "metrics": training(60, 4.0, levels[0])}


def post_training() -> dict[str, dict[str, Any]]:
    """Every stage after pre-training."""
    flags = ("no flag", "/think", "/no_think")
    filters = {
        "queries_drawn": 1600,
        "answered_without_thinking": {"max": 390, "let": 20},
        "queries_kept": 900,
        "candidates": 1890,
        "responses_kept": 1780,
        "responses_trained": 900,
        "rejected": {"wrong answer": 60, "contradiction": 50},
    }
    thoughts = "own thoughts that the verifier kept"
    made = {"rejected": {"malformed": 100}, "examples": 1900}
    results = {
        "cold_start": saw("solver traces", 300_000, 20_000) | filters,
        "direct": saw("answers alone", 450_000),
        "rl": saw("verifier", 900_000, 800_000),
        "rl_rejection": saw("own samples that the verifier kept", 1_100_000, 200_000),
        "rl_more_sft": saw("solver traces", 1_160_000),
        "fusion": saw(f"{thoughts}, solver answers", 400_000, 100_000, (*flags, "/think, thought cut")) | made,
        "uncut": saw(f"{thoughts}, solver answers", 410_000, 100_000, flags) | made,
        "think_only": saw(thoughts, 400_000, 100_000, flags[:2]) | made,
        "general_rl": saw("verifier", 900_000, 800_000, (*flags, "tool, /think")),
        "general_sft_24": saw("24 solved examples", 90_000, 0, ("/no_think",)),
        "general_sft_240": saw("240 solved examples", 90_000, 0, ("/no_think",)),
        "student_sft": saw("teacher's texts", 300_000, 0, flags),
        "student_opd": saw("teacher's distribution", 400_000, 300_000, flags[:2]),
        "student_rl": saw("verifier", 350_000, 450_000, flags[:2]),
        "student_more_sft": saw("teacher's texts", 500_000, 0, flags[:2]),
    }
    gaps = {"rl": (40, 2e-6), "general_rl": (30, 3e-6), "student_opd": (20, 4e-6), "student_rl": (40, 5e-6)}
    rows = {name: {"metrics": rollouts(*gaps[name])} for name in gaps}
    return {name: {"result": result, **rows.get(name, {})} for name, result in results.items()}


def batteries() -> dict[str, dict[str, Any]]:
    """items.json of every evaluation."""
    return {
        "cold_start": core(0.66) | mixed(0.3, 0.35, 0.25),
        "direct": core(0.1, 0.15),
        "rl": core(0.84) | mixed(0.8, 0.82, 0.7),
        "rl_rejection": core(0.75) | mixed(0.6, 0.62, 0.5),
        "rl_more_sft": core(0.9) | mixed(0.4, 0.42, 0.35),
        "think_only": core(0.86) | mixed(0.81, 0.8, 0.8),
        "fusion": core(0.85) | mixed(0.8, 0.8, 0.8) | {"general": general(0.0, 0.2), "modes": modes(0.9)},
        "final": core(0.85, 0.12) | {"general": general(0.6, 0.8), "modes": modes()},
        "uncut": {},
        "general_sft_24": {"think": part(short(0.8), samples=2), "general": general(0.3, 0.2)},
        "general_sft_240": {"think": part(short(0.8), samples=2), "general": general(0.65, 0.2)},
        "student_sft": student(0.3),
        "student_opd": student(0.7),
        "student_rl": student(0.05),
        "student_more_sft": student(0.5),
    }


def make_facts() -> dict[str, dict[str, Any]]:
    facts: dict[str, dict[str, Any]] = {name: {} for name in STAGES}
    facts["data"]["card"] = card()
    facts["s1"] = pretrained((2.4, 2.5, 2.6))
    facts["s2"] = pretrained((2.1, 2.2, 2.35), 0.12)
    before = {"bpb": bpb(2.2, 2.25, 2.3), "probe": interval(0.12)}
    facts["s3"] = pretrained((2.08, 2.0, 2.0), 0.85, before=before)
    facts["s3_old_base"] = pretrained((2.075, 2.05, 2.1), 0.7)
    facts["student_s1"] = pretrained((2.5, 2.6, 2.7))
    sources: dict[str, Any] = {"tokens_by_source": {"tasks_reasoning": 1_500_000, "text": 200_000}}
    continued: dict[str, Any] = {"tokens_by_source": {"tasks_reasoning": 600_000, "text": 1_100_000}}
    facts["student_base"] = pretrained((2.45, 2.6, 2.7), tasks=part(short(0.6)), **sources)
    facts["student_base_general"] = pretrained((2.4, 2.6, 2.7), tasks=part(short(0.4, 0.8)), **continued)
    facts["moe_global"] = pretrained((2.6, 2.7, 2.8), experts=experts(0.55, 0))
    facts["moe_micro"] = pretrained((2.6, 2.7, 2.8), experts=experts(0.34, 0))
    facts |= post_training()
    for name, items in batteries().items():
        facts[f"eval_{name}"]["items"] = items
    facts["eval_final"] |= {"scores": {"budget": budget_rows()}, "samples": sample_rows()}
    facts["eval_fusion"]["scores"] = {"budget": budget_rows(0.55)}
    facts["eval_uncut"]["scores"] = {"budget": budget_rows(0.3)}
    for name, stage in facts.items():
        stage["manifest"] = manifest(name).model_dump()
    return {name: facts[name] for name in STAGES}


def manifest(name: str) -> Manifest:
    return Manifest(
        stage=name,
        key="0" * 16,
        files={},
        cost=Cost(seconds=12.5, cpu_seconds=20.0, peak_memory_bytes=900_000_000, attempts=1),
        finished="2026-01-02T03:04:05Z",
        versions={},
        code=code_fingerprint(),
        seed=0,
        config={},
    )


FACTS = make_facts()


@pytest.fixture
def facts() -> dict[str, dict[str, Any]]:
    """Facts of a run in which every claim holds; change them freely."""
    return copy.deepcopy(FACTS)


@pytest.fixture
def make() -> SimpleNamespace:
    """The builders above, for tests that swap parts of a run."""
    builders = (bpb, budget_rows, core, experts, general, interval, mixed, modes, part, short, student)
    return SimpleNamespace(**{builder.__name__: builder for builder in builders})


def split_key(prompt: str) -> str:
    """What the split goes by: in `run` and `least` signs and digits, elsewhere the prompt with its letters renamed."""
    head, *rest = prompt.split(": ")
    entries = rest[-1].split() if rest else []
    if head == "run mod 10":
        return "run " + "".join("+-"[entry[0].islower()] + entry[1] for entry in entries)
    if head == "least":
        return f"{head} " + " ".join(entry[1] + "+-"[entry[0].islower()] + entry[2] for entry in entries)
    return canonical_key(prompt)


@pytest.fixture
def key_of() -> Callable[[str], str]:
    """The split key of a prompt, worked out without the families' own code."""
    return split_key
