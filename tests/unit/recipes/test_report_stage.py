from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from twofold.base.files import write_json, write_jsonl
from twofold.base.progress import SilentProgress
from twofold.base.records import InputError
from twofold.recipes.artefacts import ChainError
from twofold.recipes.chain import StageContext
from twofold.recipes.claims.case import MAIN_STAGES
from twofold.recipes.claims.declared import PROTOCOLS
from twofold.recipes.evidence import HARD, SKILLS, read_facts
from twofold.recipes.report import ReportConfig, build_report, print_summary, publish, write_stage_report
from twofold.recipes.report_training import agreement_section
from twofold.report.model import Report, Section
from twofold.report.text import number
from twofold.report.write import read_report, write_report
from twofold.tasks.query import HELD_OUT_PATTERNS

Facts = dict[str, dict[str, Any]]
CONFIG = ReportConfig(command="twofold run tiny --set controls=true", titles={"s1": "Pre-training 1: general"})
TITLES = [
    "Checkpoints", "Pre-training", "Cold start", "Reinforcement learning", "Thinking-mode fusion", "General RL",
    "Mode following", "Thinking budget", "Strong to weak", "Experts", "What each arm saw", "Rollouts and trainer agree",
    "Samples",
]  # fmt: skip


def lay_out(facts: Facts, folder: Path) -> dict[str, Path]:
    """Write facts as finished artefacts."""
    for name, stage in facts.items():
        for part, value in stage.items():
            if part == "metrics":
                write_jsonl(folder / name / "metrics.jsonl", value)
            else:
                write_json(folder / name / f"{part}.json", value)
    return {name: folder / name for name in facts}


def run_stage(facts: Facts, folder: Path) -> Report:
    inputs = lay_out(facts, folder)
    context = StageContext("report", CONFIG, 0, inputs, folder / "report", folder / "work", SilentProgress())
    write_stage_report(context)
    return read_report(folder / "report" / "report.json")


def section(report: Report, title: str) -> Section:
    return next(section for section in report.sections if section.title == title)


def test_the_stage_writes_a_whole_report(facts: Facts, tmp_path: Path) -> None:
    report = run_stage(facts, tmp_path)
    assert [part.title for part in report.sections] == TITLES
    assert [claim.verdict for claim in report.claims] == ["holds in this run"] * 9
    assert "this run alone" in report.claims_note and "docs/claims.md" in report.claims_note
    assert all(part.text and not part.text.startswith("None") for part in report.sections)
    assert report.data_card is not None and "PSF-2.0" in report.data_card.text
    assert report.total_seconds == pytest.approx(12.5 * len(facts)) and report.peak_memory_bytes == 900_000_000
    by_name = {stage.name: stage for stage in report.stages}
    assert by_name["s1"].title == "Pre-training 1: general" and by_name["s1"].tflops == pytest.approx(4.7)
    assert by_name["rl"].tokens == 1_700_000 and by_name["eval_rl"].tokens is None
    assert report.command == CONFIG.command and "python" in report.versions and "processor" in report.hardware
    for name in ("report.html", "report.md"):
        text = (tmp_path / "report" / name).read_text()
        assert CONFIG.command in text and "None" not in text and "nan" not in text.lower().replace("finance", "")


def test_without_arms_the_report_is_shorter_never_an_error(facts: Facts) -> None:
    report = build_report({name: stage for name, stage in facts.items() if name in MAIN_STAGES}, CONFIG, 0)
    assert [part.title for part in report.sections] == [t for t in TITLES if t not in ("Strong to weak", "Experts")]
    assert sum(not claim.judged for claim in report.claims) == 8


@pytest.mark.parametrize("gone", ["eval_fusion", "eval_final", "eval_uncut", "student_opd", "moe_micro", "fusion"])
def test_without_any_one_stage_the_report_is_no_error(facts: Facts, gone: str) -> None:
    del facts[gone]
    assert build_report(facts, CONFIG, 0).sections


def test_what_each_arm_saw_is_printed_for_each_claim(facts: Facts) -> None:
    facts["student_rl"]["result"]["saw"]["forms"] = {"/think": 3000}
    saw = section(build_report(facts, CONFIG, 0), "What each arm saw")
    tables = {table.title: table for table in saw.tables}
    assert list(tables) == [protocol.title for protocol in PROTOCOLS.values()]
    rl = next(row for row in tables["Reasoning RL helps"].rows if row[0] == "rl")
    assert rl[2:6] == ["no flag 100", "verifier", "900\u00a0k", "800\u00a0k"]
    assert rl[6] == pytest.approx(3.5) and rl[7] == "3: 0.001, 0.002, 0.004" and rl[8] == 0.9
    assert str(rl[9]).startswith("80.0 [")
    note = tables["Distilling beats RL on a small model"].note
    assert "may differ in labels, tokens" in note and "**Not declared:** Prompt forms differ" in note
    assert "Not declared" not in tables["Thinking pays"].note
    skills = next(row for row in tables["General RL teaches new things"].rows if row[0] == "general_sft_24")
    assert str(skills[9]).startswith("45.7 [")
    bases = tables["Later pre-training stages pay"].rows
    assert bases[0][2] == "tasks_reasoning 1.5\u00a0M, text 200\u00a0k" and str(bases[2][9]).startswith("85.0 [")


def test_a_run_of_pretraining_alone_is_reported(facts: Facts, tmp_path: Path) -> None:
    report = run_stage({name: facts[name] for name in ("data", "s1")}, tmp_path)
    assert [part.title for part in report.sections] == ["Pre-training"]
    assert {claim.verdict for claim in report.claims} == {"not judged"}


def test_tables_show_what_the_items_say(facts: Facts, tmp_path: Path) -> None:
    report = build_report(read_facts(lay_out(facts, tmp_path)), CONFIG, 0)
    (checkpoints,) = section(report, "Checkpoints").tables
    assert len(checkpoints.rows) == 14
    final = next(row for row in checkpoints.rows if "final" in str(row[0]))
    items = facts["eval_final"]["items"]["think"]
    hard = [row for row, kind in zip(items["correct"], items["kinds"], strict=True) if kind in HARD]
    share = 100 * sum(map(sum, hard)) / sum(map(len, hard))
    assert str(final[1]).startswith(f"{share:.1f} [")
    assert number(share) in section(report, "Checkpoints").text
    (general,) = section(report, "General RL").tables
    assert {row[0] for row in general.rows if row[1]} == set(SKILLS)
    (budget,) = section(report, "Thinking budget").plots
    assert [series.name for series in budget.series] == ["all replies", "stopped replies", "guessing"]
    assert budget.series[1].x == [0, 4, 8, 16, 24, 32, 48] and set(budget.series[2].y) == {25.0}
    assert len(section(report, "Thinking budget").tables) == 3
    (modes,) = section(report, "Mode following").tables
    assert [row[0] for row in modes.rows if not row[1]] == list(HELD_OUT_PATTERNS)
    assert budget.series[0].x == [0, 4, 8, 16, 24, 32, 48, 64]
    assert report.data_card is not None and report.data_card.tables[0].rows[0][5] == pytest.approx(100 * 12 / 17)
    samples = section(report, "Samples").samples
    assert [sample.correct for sample in samples] == [True, True, False] * 2
    assert samples[3].reasoning is None and samples[2].note == "expected: `2`"


def test_curves_use_on_policy_rows_alone(facts: Facts) -> None:
    report = build_report(facts, CONFIG, 0)
    reward = section(report, "Reinforcement learning").plots[0]
    assert [len(series.x) for series in reward.series] == [20, 15, 20]
    agreement = section(report, "Rollouts and trainer agree")
    assert [row[-1] for row in agreement.tables[0].rows] == [True] * 4 and "within" in agreement.text
    facts["rl"]["metrics"][2]["sampling/sampling_logp_difference/max"] = 3e-4
    worse = agreement_section(facts)
    assert worse is not None and "**beyond**" in worse.text and worse.tables[0].rows[0][-1] is False
    loss = section(report, "Pre-training").plots[0]
    assert loss.series[1].x[0] > loss.series[0].x[-1] and all(map(math.isfinite, loss.series[2].y))


def test_stages_of_other_code_are_named(facts: Facts) -> None:
    facts["rl"]["manifest"]["code"] = "0" * 16
    assert "another version of the code:** `rl`." in build_report(facts, CONFIG, 0).intro
    facts["rl"]["manifest"]["code"] = facts["s1"]["manifest"]["code"]
    assert "another version" not in build_report(facts, CONFIG, 0).intro


def test_publish_copies_and_links_resolve(facts: Facts, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--only report"):
        publish(tmp_path)
    run_stage(facts, tmp_path)
    publish(tmp_path)
    publish(tmp_path)
    assert (tmp_path / "report.html").read_bytes() == (tmp_path / "report" / "report.html").read_bytes()
    assert json.loads((tmp_path / "report.json").read_text())["seed"] == 0
    links = [part.split(")")[0] for part in (tmp_path / "report.md").read_text().split("](")[1:]]
    plots = [link for link in links if link.endswith(".svg")]
    assert len(plots) >= 10 and all((tmp_path / link).is_file() for link in plots)
    assert not list(tmp_path.glob(".*.tmp"))


def test_summary_has_a_line_a_claim_and_says_how_to_chat(facts: Facts, tmp_path: Path) -> None:
    facts["direct"]["result"]["tokens"] = 1
    report = build_report(facts, CONFIG, 0)
    write_report(report.model_copy(update={"sections": []}), tmp_path)
    (tmp_path / "general_rl").mkdir()
    lines = print_summary(tmp_path / "report.json")
    assert lines[0] == "8 of 9 claims hold in this run"
    assert sum(line.startswith("  holds in this run ") for line in lines) == 8
    assert sum(line.startswith("  does not hold in this run Thinking pays ") for line in lines) == 1
    assert not any(mark in line for mark in "✓✗✅❌" for line in lines)
    assert str(tmp_path / "report.html") in lines[-2] and lines[-1].endswith(f"twofold chat {tmp_path / 'general_rl'}")


def test_an_input_without_manifest_is_refused(facts: Facts, tmp_path: Path) -> None:
    inputs = lay_out({"s1": facts["s1"]}, tmp_path)
    (tmp_path / "s1" / "manifest.json").unlink()
    with pytest.raises(ChainError, match=r"no manifest\.json"):
        read_facts(inputs)
    with pytest.raises(ChainError, match="--only s2"):
        read_facts({"s2": tmp_path / "s2"})
