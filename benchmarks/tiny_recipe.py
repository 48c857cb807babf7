"""The whole tiny recipe with its control arms, for several training seeds, and the tables made from their reports.

    python -m benchmarks.tiny_recipe [--seeds 100 200 300 400 500] [--jobs 2] [--runs runs]
    python -m benchmarks.tiny_recipe --no-run        # the tables again, from the stored reports alone

Writes benchmarks/results/tiny-seed<N>.json (a run's report), tiny-seeds.md (every claim over the seeds) and the table
between the results marks of README.md and README.zh-CN.md. Runs that are already complete are only read. Not here: how
a claim is judged (src/twofold/recipes/claims).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from twofold.base.files import read_json, write_json, write_text
from twofold.base.records import InputError
from twofold.recipes.claims.protocol import CONFIRMING_SEEDS
from twofold.recipes.claims.seeds import claim_cell, combine, markdown_table
from twofold.report.model import Claim
from twofold.report.text import verdict_line

ROOT = Path(__file__).resolve().parent.parent
MARKS = ("<!-- results -->", "<!-- /results -->")
VERDICTS = {"holds": "成立", "does not hold": "不成立", "not judged": "未判定"}
# claim -> its title, condition -> its text; a test keeps this equal in keys to the protocols
CHINESE: dict[str, tuple[str, dict[str, str]]] = {
    "thinking_gain": (
        "思考的增益",
        {
            "control": "冷启动后思考，减去只学直接回答的对照",
            "own_switch": "最终模型思考，减去它自己的硬开关",
            "tokens": "对照的训练词元不少于冷启动",
        },
    ),
    "both_modes": (
        "一个模型，两种模式",
        {
            "thinking": "最终模型思考，最差的多步任务",
            "direct": "最终模型 `/no_think`，最差的简单任务",
            "fusion_cost": "融合减去只学思考的对照，思考",
            "fusion_cost_mixed": "融合减去只学思考的对照，思考，混合正负号",
        },
    ),
    "rl_gain": (
        "推理强化学习的增益",
        {
            "more_sft": "强化学习减去更多 SFT，较差的一类任务，T = 0.6",
            "rejection": "强化学习减去同一批题目上的拒绝采样 SFT，两类任务合计，T = 0.6",
            "greedy": "强化学习减去冷启动，较差的一类任务，贪心解码",
            "forgetting": "强化学习减去冷启动，训练文本中已有的任务",
        },
    ),
    "mode_following": (
        "开关听话",
        {
            "worst": "训练过的写法中最差的一种",
            "held_out": "八种从未训练的写法中最差的一种",
            "held_out_mean": "八种从未训练的写法合计",
        },
    ),
    "general_rl": (
        "通用强化学习教会新本领",
        {
            "gain": "七项本领的平均增益",
            "absent": "之前：七项本领平均高出随机的幅度",
            "smallest": "增益最小的一项",
            "sft_24": "各项平均减去用 24 个样例的 SFT",
            "thinking": "多步任务上思考的损失",
            "tool": "训练之后的工具使用",
        },
    ),
    "thinking_budget": (
        "思考预算有用",
        {
            "over_none": "被截停的回答减去同题不思考的回答",
            "over_chance": "被截停的回答减去猜测",
            "over_uncut": "被截停的回答：融合减去训练中没有截断思考的对照",
            "kept": "思考从不超出预算",
        },
    ),
    "distillation": (
        "小模型上蒸馏胜过强化学习",
        {
            "over_rl": "蒸馏减去强化学习，pass@1",
            "over_sft": "蒸馏减去更多 SFT，pass@1",
            "pass_k": "蒸馏减去强化学习，pass@8",
            "operations": "三组的运算量相差不超过 10 %",
        },
    ),
    "pretraining": (
        "后续预训练阶段有收益",
        {
            "stage2_tasks": "第二段减去按第一段配比继续训练，任务",
            "stage2_text": "第二段相对按第一段配比继续训练多花，文本，256 之内",
            "stage3_beyond": "第三段相对旧 RoPE 基数节省，512 至 1,024",
            "stage3_inside": "第三段相对旧 RoPE 基数多花，256 之内",
            "retrieval": "远距离检索，第三段减去旧 RoPE 基数",
        },
    ),
    "moe_balance": (
        "全局均衡让专家在任务类别之间分工",
        {"distance": "任务类别之间的距离，全局减去微批次", "dead": "全局均衡下没有闲置的专家"},
    ),
}
WORDS = {
    "lower end above": "要求下限大于",
    "lower end at least": "要求下限不低于",
    "upper end at most": "要求上限不超过",
    "estimate at least": "要求估计值不低于",
    "**not met**": "**未达到**",
    "\u00a0points": "\u00a0个百分点",
    " points": " 个百分点",
    ": yes": "：是",
    ": no": "：否",
    ": –": "：–",
}


def run(seed: int, runs: Path, one_thread: bool) -> dict[str, Any]:
    """Bring one seed's run up to date and return its report.

    Args:
        one_thread: for runs side by side: one thread, and the output in a file beside the run's folder.
    """
    folder = runs / ("tiny" if seed == 0 else f"tiny-seed{seed}")
    command = [sys.executable, "-m", "twofold.cli", "run", "tiny", "--set", "controls=true"]
    command += ["--seed", str(seed), "--out", str(folder)]
    if not one_thread:
        subprocess.run(command, check=True)
    else:
        runs.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with (runs / f"{folder.name}.log").open("w", encoding="utf-8") as log:
            subprocess.run(command, check=True, env=environment, stdout=log, stderr=subprocess.STDOUT)
    print(f"seed {seed}: {folder / 'report.html'}", flush=True)
    return dict(read_json(folder / "report.json"))


def stored_claims(results: Path, seeds: Sequence[int]) -> dict[int, list[Claim]]:
    """The claims of every seed's stored report.

    Raises:
        InputError: a seed without a stored report.
    """
    paths = {seed: results / f"tiny-seed{seed}.json" for seed in seeds}
    absent = [str(path) for path in paths.values() if not path.is_file()]
    if absent:
        raise InputError(f"no stored report at {', '.join(absent)}; run without --no-run to make them")
    return {seed: [Claim.model_validate(row) for row in read_json(path)["claims"]] for seed, path in paths.items()}


def write_tables(root: Path, seeds: Sequence[int]) -> list[Claim]:
    """tiny-seeds.md and the tables of both READMEs below ``root``, from the stored reports alone."""
    results = root / "benchmarks" / "results"
    claims = combine(stored_claims(results, seeds))
    write_text(results / "tiny-seeds.md", f"{summary(claims)}\n\n{markdown_table(claims)}")
    for name, text in (("README.md", english(claims)), ("README.zh-CN.md", chinese(claims))):
        path = root / name
        write_text(path, between_marks(path.read_text(encoding="utf-8"), text, name))
    return claims


def summary(claims: Sequence[Claim]) -> str:
    """How many hold, and over which seeds."""
    seeds = ", ".join(map(str, claims[0].seeds))
    return f"{verdict_line(list(claims))}, over training seeds {seeds}."


def english(claims: Sequence[Claim]) -> str:
    """The part of README.md between the marks."""
    lines = [
        summary(claims),
        "Each seed was run once with every control arm, on items of its own, and no setting was chosen with it. The",
        "intervals are 95 % over seeds, so they hold the luck of training and of items. Question, arms, controls and",
        "targets of each claim: [docs/claims.md](docs/claims.md).",
    ]
    return "\n".join(lines) + f"\n\n{markdown_table(claims)}"


def chinese(claims: Sequence[Claim]) -> str:
    """The part of README.zh-CN.md between the marks, with as many rows."""
    good = sum(claim.outcome == "holds" for claim in claims)
    seeds = "、".join(map(str, claims[0].seeds))
    lines = [
        f"九条主张中 {good} 条成立（训练种子 {seeds}）。每个种子连同全部对照只运行一次，",
        "各用自己的题目；没有任何设置是用这些种子选出的。",
        "区间是各种子之间的 95 % 区间，因此同时包含训练与题目的偶然性。",
        "每条主张的问题、各组、对照与要求见 [docs/claims.md](docs/claims.md)（英文）。",
        "",
        "| 主张 | 条件：各种子的平均 [95 % 区间]（要求） | 结论 |",
        "| --- | --- | --- |",
    ]
    for claim in claims:
        title, labels = CHINESE[claim.key]
        cell = claim_cell(claim, labels)
        for word, translated in WORDS.items():
            cell = cell.replace(word, translated)
        note = "<br>没有判定的原因见 benchmarks/results/tiny-seeds.md。" if claim.note else ""
        lines.append(f"| {title}（`{claim.key}`） | {cell} | **{VERDICTS[claim.verdict]}**{note} |")
    return "\n".join(lines) + "\n"


def between_marks(document: str, text: str, name: str) -> str:
    """``document`` with ``text`` between its two marks.

    Raises:
        InputError: the marks are not there, once each and in order.
    """
    start, end = (document.find(mark) for mark in MARKS)
    if not 0 <= start < end or any(document.count(mark) != 1 for mark in MARKS):
        raise InputError(f"{name} must have {MARKS[0]} and {MARKS[1]} once each, in this order")
    return f"{document[: start + len(MARKS[0])]}\n\n{text.strip()}\n\n{document[end:]}"


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> None:
    """Run the seeds, then write every table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(CONFIRMING_SEEDS))
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--jobs", type=int, default=1, help="seeds at a time; more than one: one thread each")
    parser.add_argument("--no-run", "--readme", action="store_true", help="only the tables, from the stored reports")
    given = parser.parse_args(arguments)
    if not given.no_run:
        with ThreadPoolExecutor(max_workers=given.jobs) as pool:
            waiting = {seed: pool.submit(run, seed, given.runs, given.jobs > 1) for seed in given.seeds}
            for seed, future in waiting.items():
                write_json(root / "benchmarks" / "results" / f"tiny-seed{seed}.json", future.result())
    print(markdown_table(write_tables(root, given.seeds)))


if __name__ == "__main__":
    main()
