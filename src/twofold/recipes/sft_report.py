"""The report of a fine-tuning run: what changed on held-out conversations, the curve, replies before and after, data.

Numbers in prose are computed from the stages' results. Not here: drawing (``report``), training (``sft``). No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from twofold.base.config import Config
from twofold.eval.stats import mean_interval
from twofold.recipes.chain import StageContext
from twofold.recipes.evidence import BLOCK, block_means, read_facts
from twofold.recipes.report import report_frame
from twofold.report.model import Claim, Plot, Report, Sample, Section, Series, Table
from twofold.report.text import amount, interval, number
from twofold.report.write import write_report

_LIMIT = 1500  # characters of a reply that the page shows


class SFTReportConfig(Config):
    """command: what reproduces the run, exactly."""

    command: str = ""


def write_sft_report(context: StageContext) -> None:
    """Write ``report.html``, ``report.md`` and ``report.json`` of a fine-tuning run."""
    facts = read_facts(context.inputs)
    rows, sft = facts["rows"]["result"], facts["sft"]["result"]
    report = Report(
        title="Fine-tuning",
        command=context.config.command,
        seed=context.seed,
        intro=_intro(rows, sft),
        claims=[_gain(sft)],
        sections=[_curve(facts["sft"]["metrics"]), _replies(sft)],
        data_card=_card(rows),
        **report_frame(facts, {"rows": "Conversations", "sft": "Training"}),
    )
    write_report(report, context.out)


def _intro(rows: Mapping[str, Any], sft: Mapping[str, Any]) -> str:
    method = "all weights" if sft["method"] == "full" else f"an adapter of {amount(sft['trained_parameters'])} weights"
    text = (
        f"`{sft['init']}`, {method} trained for {sft['steps']} steps at a learning rate of {sft['learning_rate']:g} on "
        f"{rows['views']['train']:,} views of {rows['rows']:,} conversations."
    )
    if rows["thinks"] and rows["thinking_rows"] in (0, rows["rows"]):
        mode = "without" if rows["thinking_rows"] == 0 else "with"
        text += (
            f"\n\n**Every conversation is {mode} thinking.** A model trained on one mode alone loses the other: add "
            "replies of the other mode, best made by the model itself."
        )
    return text


def _gain(sft: Mapping[str, Any]) -> Claim:
    """Held-out loss before minus after, paired by view."""
    statement = "Nats a trained token saved on held-out conversations"
    pairs = list(zip(sft["before"]["losses"], sft["after"]["losses"], strict=True))
    if len(pairs) < 2:
        note = "Fewer than two views were held out; raise rows.held_out."
        return Claim(name="Fine-tuning helps", statement=statement, judged=False, note=note)
    gain = mean_interval([before - after for before, after in pairs])
    loss = {when: number(sft[when]["loss"]) for when in ("before", "after")}
    accuracy = {when: number(100 * sft[when]["accuracy"], "%") for when in ("before", "after")}
    return Claim(
        name="Fine-tuning helps",
        statement=statement,
        value=gain.value,
        low=gain.low,
        high=gain.high,
        target=0.0,
        unit="nats",
        holds=gain.low > 0,
        note=f"Mean over {len(pairs)} views {interval(gain.low, gain.high)}; loss {loss['before']} before, "
        f"{loss['after']} after; tokens right {accuracy['before']} before, {accuracy['after']} after.",
    )


def _curve(metrics: list[dict[str, Any]]) -> Section:
    plots = []
    for title, name, key, unit in (
        ("Training loss", "loss", "loss", "nats a trained token"),
        ("Gradient norm", "gradient norm", "grad_norm", "before clipping"),
    ):
        ends, means = block_means(metrics, "step", key)
        series = [Series(name=name, x=[step + 1 for step in ends], y=means)]
        plots.append(Plot(title=title, x_label="step", y_label=unit, series=series, y_min=0.0))
    return Section(title="Training", text=f"Each point is the mean of {BLOCK} steps.", plots=plots)


def _replies(sft: Mapping[str, Any]) -> Section:
    samples = []
    for before, after in zip(sft["before"]["samples"], sft["after"]["samples"], strict=True):
        for mode, reply in (("before", before["reply"]), ("after", after["reply"]), ("the data's", after["reference"])):
            samples.append(Sample(title=mode, mode=mode, prompt=after["prompt"][-_LIMIT:], answer=reply[:_LIMIT]))
    return Section(title="Replies", text="Greedy, to held-out prompts, before and after.", samples=samples)


def _card(rows: Mapping[str, Any]) -> Section:
    cells: list[list[Any]] = [
        ["rows used", rows["rows"]],
        ["of them with thinking", rows["thinking_rows"]],
        ["views to train", rows["views"]["train"]],
        ["views held out", rows["views"]["held_out"]],
        ["tokens to train on", rows["tokens"]],
        ["of them with a loss weight", rows["trained_tokens"]],
    ]
    cells += [[f"trained: {part}", count] for part, count in rows["parts"].items()]
    cells += [[f"left out: {reason}", count] for reason, count in rows["dropped"].items()]
    cells += [[f"column not used: {name}", count] for name, count in rows["ignored_columns"].items()]
    table = Table(title="Conversations", columns=["what", "count"], rows=cells)
    return Section(
        title="Data",
        text=f"Read from `{rows['data']}`; rows left out are listed in `rows/dropped.jsonl`.",
        tables=[table],
    )
