"""Measure the embedded default: `python benchmarks/embedded_default.py --seeds 0 1 2`.

Trains with LaSeR and with plain GRPO for each seed, one run after the other, and prints the table
of docs/first_run.md. Every run is `python run.py` itself; runs that are finished in --output are
not made again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = (
    ("accuracy before", lambda s: s["accuracy_before"]),
    ("after", lambda s: s["accuracy"]),
    ("F1 before", lambda s: s["self_verification_before"]["f1"]),
    ("after", lambda s: s["self_verification"]["f1"]),
    ("AUROC before", lambda s: s["self_verification_before"]["auroc"]),
    ("after", lambda s: s["self_verification"]["auroc"]),
    ("majority@K", lambda s: s["voting"]["majority"]),
    ("weighted@K", lambda s: s["voting"]["weighted"]),
    ("best of K", lambda s: s["voting"]["best_of"]),
)


def main() -> None:
    """Run what is missing, then print the table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=["laser", "off"], help="self_reward=...")
    parser.add_argument("--output", type=Path, default=Path("outputs/embedded_default"))
    parser.add_argument("--overrides", nargs="*", default=[], help="such as experiment=tiny_long")
    arguments = parser.parse_args()
    summaries: list[dict[str, Any]] = []
    for method in arguments.methods:
        for seed in arguments.seeds:
            folder = arguments.output / f"{method}-seed{seed}"
            summary = run(folder, [f"self_reward={method}", f"seed={seed}", *arguments.overrides])
            summaries.append({"self_reward": method, **summary})
    (arguments.output / "table.json").write_text(json.dumps(summaries, indent=1))
    print(table(summaries))


def run(folder: Path, overrides: list[str]) -> dict[str, Any]:
    """One training run, unless its summary is there; returns the summary."""
    if not (folder / "summary.json").is_file():
        command = [sys.executable, str(ROOT / "run.py"), f"output_dir={folder}", "logger=csv"]
        subprocess.run([*command, *overrides], check=True)
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


def table(summaries: list[dict[str, Any]]) -> str:
    """The runs as a Markdown table."""
    names = ["self_reward", "seed", *(name for name, _ in COLUMNS), "steps", "total s"]
    lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    for summary in summaries:
        cells = [summary["self_reward"], str(summary["seed"])]
        for _, read in COLUMNS:
            value = read(summary)
            cells.append("-" if value is None else f"{value:.3f}")
        cells += [str(summary["steps"]), f"{summary['time']['total']:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
