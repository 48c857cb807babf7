"""The whole tiny recipe with its control arms, for several seeds; keeps each seed's report and a summary of the claims.

    python -m benchmarks.tiny_recipe [--seeds 0 1 2] [--runs runs]

Writes benchmarks/results/tiny-seed<N>.json (the report's numbers) and tiny-seeds.md (one row a claim, one column a
seed). Runs that are already complete are only read.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

from twofold.base.files import read_json, write_json, write_text

RESULTS = Path(__file__).parent / "results"


def run(seed: int, runs: Path) -> dict[str, Any]:
    """Bring one seed's run up to date and return its report."""
    folder = runs / ("tiny" if seed == 0 else f"tiny-seed{seed}")
    command = [sys.executable, "-m", "twofold.cli", "run", "tiny", "--set", "controls=true"]
    subprocess.run([*command, "--seed", str(seed), "--out", str(folder)], check=True)
    return dict(read_json(folder / "report.json"))


def table(reports: dict[int, dict[str, Any]]) -> str:
    """Claims by seeds in Markdown."""
    seeds = list(reports)
    lines = ["| claim | target | " + " | ".join(f"seed {s}" for s in seeds) + " |", "|---" * (len(seeds) + 2) + "|"]
    for index, claim in enumerate(reports[seeds[0]]["claims"]):
        cells = []
        for seed in seeds:
            row = reports[seed]["claims"][index]
            if not row["judged"]:
                cells.append("not judged")
                continue
            interval = "" if row["low"] is None else f" [{row['low']:.3g}, {row['high']:.3g}]"
            cells.append(f"{'holds' if row['holds'] else 'does not hold'}: {row['value']:.3g}{interval}")
        lines.append(f"| {claim['name']} | {claim['target']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the seeds in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    arguments = parser.parse_args()
    reports = {}
    for seed in arguments.seeds:
        reports[seed] = run(seed, arguments.runs)
        write_json(RESULTS / f"tiny-seed{seed}.json", reports[seed])
        write_text(RESULTS / "tiny-seeds.md", table(reports))
    print(table(reports))


if __name__ == "__main__":
    main()
