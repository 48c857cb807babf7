"""What ``twofold plan`` does once the command line has been read: rehearse, estimate, and show it.

Not here: options and exit codes (``cli.py``), the estimates themselves (``recipes/plan.py``).
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from twofold.base.progress import duration_text
from twofold.model.inspect import gigabytes, ram_bytes
from twofold.recipes import plan as planning
from twofold.recipes.chain import Chain
from twofold.recipes.plan import Estimate
from twofold.train.footprint import HELD, total


def plan(recipe: str, chain: Chain, overrides: Sequence[str], price: float | None, console: Console) -> None:
    """Show what a run would take: a line a stage, and where the memory of those that train goes.

    Args:
        price: of an hour on this machine, in any currency; None leaves cost out.

    Raises:
        InputError: a stage that fails when rehearsed.
    """

    def say(line: str) -> None:
        console.print(escape(line), style="dim", highlight=False, soft_wrap=True)

    with tempfile.TemporaryDirectory(prefix="twofold-plan-") as folder:
        estimates = planning.plan(recipe, chain, overrides, Path(folder), say)
    console.print(table(estimates, price))
    for line in explanations(estimates):
        console.print(escape(line), highlight=False, soft_wrap=True)
    largest = max((e.peak_bytes for e in estimates if e.peak_bytes is not None), default=None)
    if largest is not None and largest > ram_bytes():
        warning = f"this machine has {gigabytes(ram_bytes())}, which is not enough"
        console.print(warning, style="bold red", highlight=False, soft_wrap=True)


def table(estimates: Sequence[Estimate], price: float | None) -> Table:
    """A row a stage, and the sum of what was estimated."""
    out = Table("stage", "tokens", "PFLOP", "% of ceiling", "memory", "time", box=None, header_style="bold")
    for column in out.columns[1:]:
        column.justify = "right"
    if price is not None:
        out.add_column("cost", justify="right")
    out.add_column("")
    for e in estimates:
        out.add_row(*_cells(e, price), escape(e.note))
    known = [e for e in estimates if e.seconds is not None]
    if len(known) > 1:
        seconds = sum(e.seconds or 0.0 for e in known)
        peak = max(e.peak_bytes or 0.0 for e in known)
        left_out = len(estimates) - len(known)
        note = f"without {left_out} that are not estimated" if left_out else ""
        together = Estimate("all", "", sum(e.tokens for e in known), sum(e.flops for e in known), seconds, peak)
        out.add_section()
        out.add_row(*_cells(together, price), note, style="bold")
    return out


def _cells(e: Estimate, price: float | None) -> list[str]:
    cells = [e.stage, f"{e.tokens:,.0f}" if e.tokens else "", f"{e.flops / 1e15:.3g}" if e.flops else ""]
    cells += [f"{e.efficiency:.0%}" if e.efficiency else "", gigabytes(e.peak_bytes) if e.peak_bytes else ""]
    cells.append("" if e.seconds is None else duration_text(e.seconds))
    if price is not None:
        cells.append("" if e.seconds is None else f"{price * e.seconds / 3600:,.2f}")
    return cells


def explanations(estimates: Sequence[Estimate]) -> list[str]:
    """Where the memory of each stage that trains goes, by formula."""
    lines = []
    for e in estimates:
        if not e.parts:
            continue
        parts = e.parts
        each = " + ".join(f"{name} {gigabytes(parts[name])}" for name in HELD)
        lines.append(
            f"{e.stage}: process {gigabytes(e.process)} + {each} = {gigabytes(e.process + total(parts))} by formula; "
            f"activations would be {gigabytes(parts['activations_recomputed'])} with recompute=full"
        )
    return lines
