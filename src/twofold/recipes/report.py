"""The last stage of a run: judge its claims, gather its curves and costs, and write the report.

``write_stage_report`` is the stage; ``publish`` puts the report at the top of the run folder; ``print_summary`` says
in a few lines what came out. Not here: rules (``claims``), sections (``report_sections``), drawing (the ``report``
package). Imports no torch.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from twofold.base.config import Config
from twofold.base.files import write_text
from twofold.base.log import usable_processors
from twofold.base.records import InputError
from twofold.recipes.artefacts import code_fingerprint, now_text, versions
from twofold.recipes.chain import StageContext
from twofold.recipes.claims import judge
from twofold.recipes.evidence import HARD, Facts, level, missing, read_facts, rows
from twofold.recipes.models import MODEL_STAGES
from twofold.recipes.report_sections import build_sections, data_card
from twofold.report.markdown import plot_files
from twofold.report.model import Report, StageCost
from twofold.report.text import amount, memory, number, seconds, verdict_line
from twofold.report.write import read_report, write_report

REPORT_STAGE = "report"
CLAIMS_NOTE = (
    "**One run.** The intervals cover the items of this run alone, not what another training seed would give. A "
    "verdict here is about this run. The claims themselves are judged over several training seeds, by the protocols in "
    "`docs/claims.md`; what each arm saw is in a section below."
)


class ReportConfig(Config):
    """command: what reproduces the run, exactly. titles: of stages, by name (the name itself where one is absent)."""

    command: str
    title: str = "Twofold tiny: one model, two modes"
    titles: dict[str, str] = Field(default_factory=dict)


def write_stage_report(context: StageContext) -> None:
    """Write ``report.html``, ``report.md`` with ``plots/``, and ``report.json`` from all other stages of the chain.

    The inputs are artefact folders by stage name. Absent control arms leave their claims unjudged.

    Raises:
        ChainError: an input without a readable manifest. InputError: checkpoints measured on different items.
    """
    context.progress.start(3, "part")
    facts = read_facts(context.inputs)
    context.progress.update(1)
    report = build_report(facts, context.config, context.seed)
    context.progress.update(2)
    write_report(report, context.out)
    context.progress.update(3)
    context.progress.finish()


def build_report(facts: Facts, config: ReportConfig, seed: int) -> Report:
    """The whole report as data."""
    frame = report_frame(facts, config.titles)
    return Report(
        title=config.title,
        command=config.command,
        seed=seed,
        intro=intro(facts, sum(cost.tokens or 0 for cost in frame["stages"])),
        claims=judge(facts),
        claims_note=CLAIMS_NOTE,
        sections=build_sections(facts),
        data_card=data_card(facts),
        **frame,
    )


def report_frame(facts: Facts, titles: Mapping[str, str]) -> dict[str, Any]:
    """Fields of ``Report`` that say where, when and at what cost a run was made, whatever it did."""
    costs = [stage_cost(name, stage, titles) for name, stage in facts.items()]
    peaks = [stage["manifest"]["cost"]["peak_memory_bytes"] for stage in facts.values()]
    return {
        "versions": versions() | {"code": code_fingerprint()},
        "hardware": hardware(),
        "created": now_text(),
        "stages": costs,
        "peak_memory_bytes": max(peaks, default=None),
        "total_seconds": sum(cost.seconds for cost in costs),
    }


def stage_cost(name: str, stage: Mapping[str, Any], titles: Mapping[str, str]) -> StageCost:
    """What one stage took: its manifest's time, and tokens and operations where its result counts them."""
    result, cost = stage.get("result", {}), stage["manifest"]["cost"]
    generated = result.get("generated_tokens")
    notes = [f"{result['steps']} steps"] if "steps" in result else []
    notes += [f"{amount(generated)} tokens generated"] if generated else []
    notes += [f"{cost['attempts']} attempts"] if cost["attempts"] > 1 else []
    trained = result.get("tokens")
    return StageCost(
        name=name,
        title=titles.get(name, name.replace("_", " ")),
        seconds=cost["seconds"],
        tokens=None if trained is None else int(trained + (generated or 0)),
        tflops=result["flops"] / 1e12 if "flops" in result else None,
        note=", ".join(notes),
    )


def intro(facts: Facts, tokens: int) -> str:
    """What the run did, in a few computed sentences; stages that other versions of the code made are named."""
    text = f"One run of the recipe, from raw text to a finished model: {len(facts)} stages, {amount(tokens)} tokens."
    parts = [f"eval_final/items/{name}" for name in ("think", "direct")]
    if not missing(facts, *parts):
        thinking, direct = (level(rows(facts, path, HARD)).value for path in parts)
        text += (
            f" On tasks that need several steps the finished model is right in {number(thinking, '%')} when it thinks "
            f"and in {number(direct, '%')} when it answers at once."
        )
    other = [name for name, stage in facts.items() if stage["manifest"]["code"] != code_fingerprint()]
    if other:
        text += f"\n\n**Made by another version of the code:** {', '.join(f'`{name}`' for name in other)}."
    return text


def hardware() -> str:
    """Processors, architecture and memory of this machine, in words."""
    usable = usable_processors()
    total = memory(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return f"{usable} {'processor' if usable == 1 else 'processors'}, {platform.machine()} {platform.system()}, {total}"


def publish(run_folder: Path) -> None:
    """Copy the report stage's page, Markdown and JSON to the top of the run folder; each file is whole or absent.

    The Markdown copy shows the plots where they lie, in the stage's folder.

    Raises:
        InputError: the report stage has not finished.
    """
    source = run_folder / REPORT_STAGE
    if not (source / "report.json").is_file():
        raise InputError(f"{source} holds no report: make it with --only {REPORT_STAGE}")
    markdown = (source / "report.md").read_text(encoding="utf-8")
    for name in plot_files(read_report(source / "report.json")):
        markdown = markdown.replace(f"](plots/{name})", f"]({REPORT_STAGE}/plots/{name})")
    write_text(run_folder / "report.md", markdown)
    for name in ("report.html", "report.json"):
        write_text(run_folder / name, (source / name).read_text(encoding="utf-8"))


def print_summary(report_json: Path) -> list[str]:
    """Lines for the terminal: every claim with its verdict, cost, where the page is, and how to talk to the model.

    Args:
        report_json: the published file at the top of the run folder.

    Raises:
        InputError: not a report of this version.
    """
    report, folder = read_report(report_json), report_json.parent
    lines = [verdict_line(report.claims)]
    for claim in report.claims:
        measured = f"{claim.name:<40} {number(claim.value, claim.unit) if claim.value is not None else ''}"
        lines.append(f"  {claim.verdict:<25} {measured}".rstrip())
    cost = f"{seconds(report.total_seconds or 0.0)} in all"
    lines.append(f"{cost}, peak memory {memory(report.peak_memory_bytes)}")
    lines.append(f"report: {folder / 'report.html'}")
    lines += [f"chat:   twofold chat {folder / stage}" for stage in MODEL_STAGES if (folder / stage).is_dir()][:1]
    return lines
