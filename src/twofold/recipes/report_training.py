"""Report sections about training itself: pre-training, data made for post-training, RL curves, agreement, experts.

Each function turns facts into one section, or None where the run has nothing to show. Numbers in prose are computed.
Not here: accuracies of checkpoints (``report_sections``) and verdicts (``claims``). Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from twofold.recipes.evidence import (
    BLOCK,
    HARD,
    LOGP_MAX,
    Facts,
    block_means,
    difference,
    lookup,
    missing,
    on_policy_rows,
    shown,
    stored,
)
from twofold.report.model import Cell, Heatmap, Plot, Section, Series, Table
from twofold.report.text import amount, number

PRETRAINING = {
    "s1": "1 general",
    "s2": "2 reasoning",
    "s3": "3 long context",
    "s3_old_base": "3 with the old base",
    "student_s1": "student 1",
    "student_base": "student 2",
    "student_base_general": "student 1 continued",
    "moe_global": "MoE, global",
    "moe_micro": "MoE, micro-batch",
}
RL_STAGES = {"rl": "reasoning RL", "general_rl": "general RL", "student_rl": "RL on the student"}
ON_POLICY = {**RL_STAGES, "student_opd": "on-policy distillation"}
LOGP_LIMIT = 1e-5  # nats; larger gaps mean that rollouts and trainer do not run the same policy


def pretraining_section(facts: Facts) -> Section | None:
    """Loss, held-out bits per byte by position, the retrieval probe, and a table of all pre-training stages."""
    stages = [name for name in PRETRAINING if lookup(facts, f"{name}/result/bpb")]
    if not stages:
        return None
    plots = [plot for plot in (_loss_plot(facts), _bpb_plot(facts), _probe_plot(facts)) if plot is not None]
    tables = [_pretraining_table(facts, stages)]
    return Section(title="Pre-training", text=_pretraining_text(facts), plots=plots, tables=tables)


def _pretraining_text(facts: Facts) -> str:
    said = []
    spans = {name: lookup(facts, f"{name}/result/bpb") for name in ("s1", "s2", "s3")}
    if spans["s1"] and spans["s2"]:
        first, second = (number(spans[name][0]["interval"]["value"]) for name in ("s1", "s2"))
        said.append(f"Held-out text costs {first} bits per byte after the general stage and {second} after reasoning.")
    before = lookup(facts, "s3/result/before/bpb")
    if spans["s3"] and before:
        start, end = spans["s3"][-1]["span"]
        was, now = (number(entry[-1]["interval"]["value"]) for entry in (before, spans["s3"]))
        said.append(
            f"The long-context stage changes the RoPE base: at positions {start} to {end} bits per byte go from {was} "
            f"(base changed, nothing trained) to {now}."
        )
    return " ".join(said) or "Bits per byte on held-out text, lower is better."


def _loss_plot(facts: Facts) -> Plot | None:
    series, offset = [], 0.0
    for name in ("s1", "s2", "s3"):
        rows = lookup(facts, f"{name}/metrics") or []
        if not rows:
            continue
        tokens, means = block_means(rows, "num_tokens", "loss")
        series.append(Series(name=PRETRAINING[name], x=[(offset + count) / 1e6 for count in tokens], y=means))
        offset += rows[-1]["num_tokens"]
    if not series:
        return None
    return Plot(
        title="Pre-training loss",
        x_label="tokens seen, millions",
        y_label="nats a token",
        series=series,
        note=f"Mean of {BLOCK} steps. Stages mix different data, so steps between them are no surprise.",
    )


def _bpb_plot(facts: Facts) -> Plot | None:
    arms = {
        "after 1": "s1/result/bpb",
        "after 2": "s2/result/bpb",
        "base changed": "s3/result/before/bpb",
        "after 3": "s3/result/bpb",
        "3, old base": "s3_old_base/result/bpb",
    }
    found = {name: lookup(facts, path) for name, path in arms.items() if lookup(facts, path)}
    if not found:
        return None
    first = next(iter(found.values()))
    return Plot(
        title="Bits per byte by position",
        x_label="position in the window, tokens",
        y_label="bits per byte",
        kind="bar",
        x_names=["{}–{}".format(*entry["span"]) for entry in first],
        series=[_bars(name, [entry["interval"] for entry in bpb]) for name, bpb in found.items()],
        note="Held-out text; bars show 95 % intervals over windows, which the paired comparison in the claim narrows.",
    )


def _probe_plot(facts: Facts) -> Plot | None:
    arms = {
        "after 2": "s2/result/probe",
        "base changed": "s3/result/before/probe",
        "after 3": "s3/result/probe",
        "3, old base": "s3_old_base/result/probe",
    }
    found = {name: lookup(facts, path) for name, path in arms.items() if lookup(facts, path)}
    if not found:
        return None
    values = [{key: 100 * value for key, value in probe.items()} for probe in found.values()]
    return Plot(
        title="Retrieval from afar",
        x_label="",
        y_label="letters recalled, %",
        kind="bar",
        x_names=list(found),
        y_min=0,
        y_max=100,
        series=[_bars("recalled", values)],
        note="A note of random letters comes again far later in the same document; chance is 11 %.",
    )


def _pretraining_table(facts: Facts, stages: Sequence[str]) -> Table:
    spans = [entry["span"] for entry in facts[stages[0]]["result"]["bpb"]]
    rows: list[list[Cell]] = []
    for name in stages:
        result = facts[name]["result"]
        by_span = {tuple(entry["span"]): entry["interval"]["value"] for entry in result["bpb"]}
        probe = result.get("probe")
        rows.append(
            [
                PRETRAINING[name],
                amount(result.get("tokens")),
                *(by_span.get(tuple(span)) for span in spans),
                shown(stored(probe, 100)) if probe else "–",
            ]
        )
    columns = ["stage", "tokens", *("bits/byte at {}–{}".format(*span) for span in spans), "retrieval, %"]
    return Table(title="Every pre-training stage", columns=columns, rows=rows)


def _bars(name: str, values: Sequence[Mapping[str, float]]) -> Series:
    return Series(
        name=name,
        x=[float(place) for place in range(len(values))],
        y=[value["value"] for value in values],
        low=[value["low"] for value in values],
        high=[value["high"] for value in values],
    )


def cold_start_section(facts: Facts) -> Section | None:
    """What the query and response filters of the cold start kept and dropped."""
    result = lookup(facts, "cold_start/result")
    if result is None:
        return None
    known, rejected = result["answered_without_thinking"], result["rejected"]
    rows: list[list[Cell]] = [["queries", "drawn", result["queries_drawn"]]]
    rows += [["queries", f"dropped: {name} answered without thinking", count] for name, count in known.items()]
    rows += [["queries", "kept, balanced over families", result["queries_kept"]]]
    rows += [["responses", "candidates", result["candidates"]]]
    rows += [["responses", f"dropped: {reason}", count] for reason, count in sorted(rejected.items())]
    rows += [["responses", "kept", result["responses_kept"]]]
    if "responses_trained" in result:
        rows += [["responses", "trained on, the likeliest of each query", result["responses_trained"]]]
    text = (
        f"Queries that the base model already answers without thinking teach nothing and are dropped: "
        f"{number(sum(known.values()))} of {number(result['queries_drawn'])}. Of {number(result['candidates'])} "
        f"candidate responses {number(sum(rejected.values()))} failed a filter; a share of candidates is spoiled on "
        f"purpose, so that the filters have work. Training took {result['steps']} steps."
    )
    table = Table(title="Filters of the cold start", columns=["of", "what", "count"], rows=rows)
    return Section(title="Cold start", text=text, tables=[table])


def fusion_section(facts: Facts) -> Section | None:
    """How the fusion set was made and what fusion did to thinking."""
    result = lookup(facts, "fusion/result")
    if result is None:
        return None
    rejected = result["rejected"]
    rows: list[list[Cell]] = [[f"thoughts dropped: {reason}", count] for reason, count in sorted(rejected.items())]
    forms = (lookup(facts, "fusion/result/saw/forms") or {}).items()
    rows += [[f"prompts: {form}", count] for form, count in forms]
    rows += [["training examples in all", result["examples"]]]
    text = (
        f"The thinking half of the data is written by the model after reasoning RL: {number(sum(rejected.values()))} "
        "of its thoughts failed a filter and were dropped. The other half answers at once."
    )
    parts = ("eval_fusion/items/think", "eval_rl/items/think")
    if not missing(facts, *parts):
        text += f" Fusion changed thinking accuracy by {shown(difference(facts, *parts, HARD), 'points')}."
    table = Table(title="The fusion set", columns=["what", "count"], rows=rows)
    return Section(title="Thinking-mode fusion", text=text, tables=[table])


def rl_section(facts: Facts) -> Section | None:
    """Curves of every RL stage: reward, entropy and its bonus, groups without signal, cut-off replies, length."""
    found = {title: on_policy_rows(facts, name) for name, title in RL_STAGES.items()}
    found = {title: rows for title, rows in found.items() if rows}
    if not found:
        return None
    said = []
    for title, rows in found.items():
        tenth = max(1, len(rows) // 10)
        first, last = (sum(row["reward"] for row in part) / len(part) for part in (rows[:tenth], rows[-tenth:]))
        said.append(f"{title} from {number(first)} to {number(last)}")
    text = (
        f"Mean reward, first tenth of the rollout batches to the last: {'; '.join(said)}. The entropy bonus is moved "
        "by a controller; groups whose rewards are all equal carry no signal and are not trained on."
    )
    plots = [
        _rl_plot("Reward", "mean reward", found, "reward"),
        _rl_plot("Entropy of the policy", "nats a token", found, "rollout/entropy"),
        _rl_plot("Coefficient of the entropy bonus", "coefficient", found, "entropy_coef"),
        _rl_plot("Groups without signal", "share of groups", found, "frac_reward_zero_std"),
        _rl_plot("Replies cut off", "share of replies", found, "completions/clipped_ratio"),
        _rl_plot("Length of replies", "tokens", found, "completions/mean_length"),
    ]
    return Section(title="Reinforcement learning", text=text, plots=plots)


def _rl_plot(title: str, y_label: str, found: Mapping[str, Sequence[Mapping[str, Any]]], key: str) -> Plot:
    bottom = 0.0 if y_label.startswith("share") else None
    series = [
        Series(
            name=stage,
            x=[float(batch) for batch, row in enumerate(rows) if key in row],
            y=[row[key] for row in rows if key in row],
        )
        for stage, rows in found.items()
    ]
    return Plot(title=title, x_label="rollout batch", y_label=y_label, series=series, y_min=bottom)


def agreement_section(facts: Facts) -> Section | None:
    """Largest gap between the log-probabilities recorded while sampling and those of the trainer."""
    rows: list[list[Cell]] = []
    worst = 0.0
    for name, title in ON_POLICY.items():
        gaps = [row[LOGP_MAX] for row in on_policy_rows(facts, name) if LOGP_MAX in row]
        if gaps:
            worst = max(worst, *gaps)
            rows.append([title, len(gaps), max(gaps), LOGP_LIMIT, max(gaps) <= LOGP_LIMIT])
    if not rows:
        return None
    verdict = "within" if worst <= LOGP_LIMIT else "**beyond**"
    text = (
        "While sampling, the engine records the log-probability of every token; the trainer computes it again. On "
        f"steps that train on fresh samples the two should agree: the largest difference was {number(worst)} nats, "
        f"{verdict} the limit of {number(LOGP_LIMIT)}."
    )
    columns = ["stage", "steps checked", "largest difference, nats", "limit", "within"]
    return Section(title="Rollouts and trainer agree", text=text, tables=[Table(title="", columns=columns, rows=rows)])


def moe_section(facts: Facts) -> Section | None:
    """Loads, dead experts and specialisation of both arms, with one heat map an arm."""
    arms = {"global": "moe_global", "micro-batch": "moe_micro"}
    found = {title: lookup(facts, f"{name}/result/experts") for title, name in arms.items()}
    found = {title: experts for title, experts in found.items() if experts}
    if not found:
        return None
    rows: list[list[Cell]] = []
    for title, experts in found.items():
        loads = [share * len(layer) for layer in experts["load"] for share in layer]
        means = [_mean(experts[key]) for key in ("task_tv", "family_tv")]
        rows.append([title, experts["dead"], max(loads), min(loads), *means])
    distances = " and ".join(f"{number(row[4])} ({row[0]})" for row in rows if isinstance(row[4], float))
    text = (
        "The balance loss asks for even use of the experts, over the whole batch or within every micro-batch. The "
        f"distance between the routing of task families came out at {distances}; 0 means that all families use experts "
        "alike, 1 that they share none. Text is a kind of its own, far from every task; it counts in the last column."
    )
    columns = [
        *("balance loss", "dead experts", "largest load (fair = 1)", "smallest load"),
        *("distance between task families", "with text"),
    ]
    table = Table(title="Two ways to balance", columns=columns, rows=rows)
    heatmaps = [_experts_map(title, experts) for title, experts in found.items()]
    return Section(title="Experts", text=text, tables=[table], heatmaps=heatmaps)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _experts_map(title: str, experts: Mapping[str, Any]) -> Heatmap:
    families: Mapping[str, list[list[float]]] = experts["by_family"]
    layers, count = len(experts["load"]), len(experts["load"][0])
    return Heatmap(
        title=f"Share of a family's tokens by expert, {title} balance",
        row_labels=[f"layer {layer + 1}, {family}" for layer in range(layers) for family in families],
        column_labels=[f"e{expert}" for expert in range(count)],
        values=[shares[layer] for layer in range(layers) for shares in families.values()],
    )
