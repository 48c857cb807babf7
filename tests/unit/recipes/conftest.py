"""A made-up run in which all nine claims hold, small enough to read and to break part by part."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest

from twofold.recipes.artefacts import Cost, Manifest, code_fingerprint
from twofold.recipes.evidence import HARD, LOGP_MAX, SYSTEM_KINDS

ITEMS = 60  # of each kind
FAMILIES = (*HARD, "max")
GENERAL = ("think", "direct", "format", "length", "tool", "reference", *SYSTEM_KINDS, "mode: /think", "mode: no flag")
MODES = ("mode: no flag", "mode: /think", "mode: /no_think", "mode: hard switch", *SYSTEM_KINDS)
STAGES = (
    *("data", "s1", "s2", "s3", "cold_start", "eval_cold_start", "rl", "eval_rl", "fusion", "eval_fusion"),
    *("general_rl", "eval_final", "direct", "eval_direct", "s3_old_base", "student_s1", "student_base"),
    *("student_sft", "eval_student_sft", "student_opd", "eval_student_opd", "student_rl", "eval_student_rl"),
    *("moe_s1", "moe_global", "moe_micro_s1", "moe_micro"),
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


def hard(share: float, easy: float = 0.95) -> dict[str, float]:
    return {**dict.fromkeys(HARD, share), "max": easy}


def battery(think: float, direct: float, hot: float | None = None, easy: float = 0.95) -> dict[str, Any]:
    """items.json of one checkpoint."""
    items = {
        "think": part(hard(think), samples=2),
        "direct": part(hard(direct, easy)),
        "no_think": part(hard(direct, easy)),
    }
    if hot is not None:
        items["hot"] = part(dict.fromkeys(HARD, hot), samples=8)
        items["greedy"] = part(dict.fromkeys(HARD, think))
    return items


def general(untaught: float) -> dict[str, Any]:
    taught = {kind: 0.9 for kind in GENERAL}
    followed = {kind: untaught if kind in SYSTEM_KINDS else 1.0 for kind in GENERAL}
    return part(taught | {"format": untaught, "length": untaught}, followed=followed)


def bpb(*levels: float) -> list[dict[str, Any]]:
    """Bits per byte of 24 windows at the three spans."""
    out = []
    for span, level in zip(((0, 256), (256, 512), (512, 1024)), levels, strict=True):
        values = [level + 0.3 * ((window * 7) % 5 - 2) + 0.01 * (window % 3) for window in range(24)]
        out.append({"span": list(span), "interval": interval(level, 0.15), "values": values})
    return out


def interval(value: float, half: float = 0.05) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half}


def budget_rows() -> list[dict[str, Any]]:
    rows = []
    for place, budget in enumerate((0, 4, 8, 16, 24, 32, 48, 64)):
        forced = [[hit(item, 0.05 + 0.11 * place, ITEMS)] for item in range(ITEMS)]
        cut = [[hit(item, 0.1 * place, ITEMS)] for item in range(ITEMS)]
        shares = {name: sum(r[0] for r in rows_) / ITEMS for name, rows_ in (("forced", forced), ("truncated", cut))}
        rows.append(
            {
                "budget": budget,
                "forced": interval(shares["forced"]),
                "truncated": interval(shares["truncated"]),
                "forced_share": 1 - place / 8,
                "max_thinking_tokens": budget,
                "forced_items": forced,
                "truncated_items": cut,
            }
        )
    return rows


def experts(distance: float, dead: int) -> dict[str, Any]:
    shares = [[0.125 + 0.01 * (expert - 3.5) for expert in range(8)] for _ in range(2)]
    return {
        "load": shares,
        "dead": dead,
        "family_tv": [distance, distance + 0.02],
        "family_tv_samples": [distance + 0.001 * ((i * 7) % 40 - 20) for i in range(200)],
        "by_family": {family: shares for family in (*FAMILIES, "text")},
    }


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


def make_facts() -> dict[str, dict[str, Any]]:
    facts: dict[str, dict[str, Any]] = {name: {} for name in STAGES}
    facts["data"]["card"] = card()
    facts["s1"] = pretrained((2.4, 2.5, 2.6))
    facts["s2"] = pretrained((2.1, 2.2, 2.35), 0.12)
    before = {"bpb": bpb(2.2, 2.25, 2.3), "probe": interval(0.12)}
    facts["s3"] = pretrained((2.08, 2.0, 2.0), 0.85, before=before)
    facts["s3_old_base"] = pretrained((2.08, 2.05, 2.1), 0.7)
    for name in ("student_s1", "student_base", "moe_s1", "moe_micro_s1"):
        facts[name] = pretrained((2.5, 2.6, 2.7))
    facts["moe_global"] = pretrained((2.6, 2.7, 2.8), experts=experts(0.55, 0))
    facts["moe_micro"] = pretrained((2.6, 2.7, 2.8), experts=experts(0.34, 0))
    facts["cold_start"]["result"] = {
        "queries_drawn": 1600,
        "answered_without_thinking": {"max": 390, "let": 20},
        "queries_kept": 900,
        "candidates": 1890,
        "responses_kept": 1780,
        "responses_trained": 900,
        "rejected": {"wrong answer": 60, "contradiction": 50},
        "tokens": 300_000,
        "steps": 60,
    }
    rl = {"tokens": 900_000, "generated_tokens": 800_000, "steps": 20, "queries": 100}
    facts["rl"] = {"result": rl, "metrics": rollouts(40, 2e-6)}
    facts["general_rl"] = {"result": rl, "metrics": rollouts(30, 3e-6)}
    made = {"asked": 900, "rejection_kept": 800, "rejected": {"malformed": 100}, "examples": 1900}
    facts["fusion"]["result"] = made | {"tokens": 400_000, "steps": 70}
    facts["direct"]["result"] = {"tokens": 450_000, "steps": 250}
    facts["student_sft"]["result"] = {"tokens": 300_000, "flops": 2e12, "examples": 900}
    opd = {"tokens": 200_000, "generated_tokens": 150_000, "flops": 1e12}
    facts["student_opd"] = {"result": opd, "metrics": rollouts(20, 4e-6)}
    facts["student_rl"] = {"result": rl | {"flops": 5e12}, "metrics": rollouts(40, 5e-6)}
    batteries = {
        "cold_start": battery(0.66, 0.08, 0.40),
        "rl": battery(0.84, 0.10, 0.75),
        "fusion": battery(0.83, 0.10),
        "final": battery(0.83, 0.12),
        "direct": battery(0.10, 0.15),
        "student_sft": battery(0.5, 0.1, 0.06),
        "student_opd": battery(0.66, 0.1, 0.5),
        "student_rl": battery(0.55, 0.1, 0.08),
    }
    for name, items in batteries.items():
        facts[f"eval_{name}"]["items"] = items
    facts["eval_fusion"]["items"] |= {"general": general(0.3), "modes": part(dict.fromkeys(MODES, 0.8))}
    facts["eval_final"]["items"] |= {"general": general(0.9), "modes": part(dict.fromkeys(MODES, 0.8))}
    facts["eval_final"] |= {"scores": {"budget": budget_rows()}, "samples": sample_rows()}
    for name, stage in facts.items():
        stage["manifest"] = manifest(name).model_dump()
    return facts


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
    return SimpleNamespace(
        battery=battery, bpb=bpb, experts=experts, general=general, interval=interval, part=part, modes=MODES
    )
