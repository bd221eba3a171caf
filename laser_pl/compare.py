"""`task=compare`: one table, and a figure an axis, from the folders of finished runs."""

from __future__ import annotations

import csv
import glob
import io
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from scipy.stats import t as student

from laser_pl.config import Config, flatten
from laser_pl.errors import UserError, one_line
from laser_pl.evaluation.plots import Interval, plot_axis, plot_steps
from laser_pl.logs.files import write_json_atomically, write_text_atomically
from laser_pl.logs.metrics_file import read_metrics
from laser_pl.setup import check_output_dir

# What distinguishes runs without making them different experiments.
_IGNORED = (
    "output_dir",
    "resume",
    "logger",
    "compare",
    "checkpoint",
    "export",
    "score",
    "calibrate",
)
# Of summary.json, by the name of the column.
MEASURES = {
    "accuracy": ("accuracy",),
    "f1": ("self_verification", "f1"),
    "auroc": ("self_verification", "auroc"),
    "majority": ("voting", "majority"),
    "weighted": ("voting", "weighted"),
    "best_of": ("voting", "best_of"),
}
_UNFINISHED = "is no training run that has finished"
# Those that a terminal has room for.
SHOWN = ("accuracy", "f1", "auroc", "weighted")
STEP_METRICS = ("held_out/accuracy", "held_out/f1")


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        folder: where it is.
        settings: its configuration with dotted keys, without the seed.
        seed: of the run.
        measures: by the names of MEASURES; NaN where not defined.
        rows: of metrics.csv.
    """

    folder: Path
    settings: Mapping[str, Any]
    seed: int
    measures: Mapping[str, float]
    rows: Sequence[Mapping[str, float]]


def compare(config: Config) -> int:
    """Write comparison.md, .csv, .json and the figures to output_dir, and print the table.

    Runs that differ in nothing but the seed are one row.

    Returns:
        The exit code, 0.
    Raises:
        UserError: there is no finished run, or runs differ in too much to be compared.
    """
    console = Console()
    if config.compare.runs is None:
        raise UserError("compare.runs: missing; give runs=FOLDER, which is searched for runs")
    check_output_dir(config)
    runs = find_runs(config.compare.runs, console)
    axes = varying_keys(runs)
    groups = group_runs(runs, axes)
    folder = Path(config.output_dir)
    table = [
        {"settings": dict(zip(axes, key, strict=True)), "seeds": sorted(r.seed for r in members)}
        | {name: summarize([r.measures[name] for r in members]) for name in MEASURES}
        for key, members in groups.items()
    ]
    figures = folder / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    for axis in axes:
        for others, points in along(axis, axes, table).items():
            name = "_".join([axis, *(f"{key}={value}" for key, value in others)])
            plot_axis(
                axis, points, ", ".join(f"{k} = {v}" for k, v in others), _safe(name), figures
            )
    curves = {_label(axes, key): _curves(members) for key, members in groups.items()}
    plot_steps(curves, figures)
    _write(axes, table, folder)
    _print(axes, table, len(runs), folder, console)
    return 0


def find_runs(patterns: str, console: Console) -> list[Run]:
    """The finished runs in folders that patterns name, each found once, a repeated one left out.

    Raises:
        UserError: a pattern matches nothing, or there is no finished run.
    """
    folders: dict[Path, None] = {}
    for pattern in (part.strip() for part in patterns.split(",")):
        matches = sorted(glob.glob(str(Path(pattern).expanduser())))
        if not matches:
            raise UserError(f"compare.runs = {pattern}: no such folder")
        for match in matches:
            folders |= {
                path.parent.resolve(): None for path in sorted(Path(match).rglob("config.yaml"))
            }
    runs: list[Run] = []
    for folder in folders:
        if any(parent in folders for parent in folder.parents):
            continue  # a run's own checkpoints, and what wandb keeps there
        run = _read(folder)
        twin = next((r for r in runs if run and _is_twin(r, run)), None)
        if run is not None and twin is None:
            runs.append(run)
            continue
        why = f"is {twin.folder} again, settings and seed" if twin else _UNFINISHED
        console.print(f"left out: {folder} {why}", markup=False, highlight=False, soft_wrap=True)
    if not runs:
        raise UserError(f"compare.runs = {patterns}: no finished run (config.yaml, summary.json)")
    return runs


def _is_twin(run: Run, other: Run) -> bool:
    return run.seed == other.seed and run.settings == other.settings


def varying_keys(runs: Sequence[Run]) -> list[str]:
    """The keys in which runs differ, the seed and what does not matter left out."""
    keys = sorted({key for run in runs for key in run.settings})
    return [key for key in keys if len({repr(run.settings.get(key)) for run in runs}) > 1]


def group_runs(runs: Sequence[Run], axes: Sequence[str]) -> dict[tuple[Any, ...], list[Run]]:
    """Runs by their values of the keys, in order."""
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        key = tuple(_hashable(run.settings.get(axis)) for axis in axes)
        groups.setdefault(key, []).append(run)
    return dict(sorted(groups.items(), key=lambda item: tuple(map(_order, item[0]))))


def summarize(values: Sequence[float]) -> Interval:
    """Mean and 95 % interval of a measure over seeds; NaN is left out."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return Interval(math.nan, math.nan, 0)
    mean, number = statistics.fmean(known), len(known)
    if number == 1:
        return Interval(mean, math.nan, 1)
    error = statistics.stdev(known) / math.sqrt(number)
    return Interval(mean, float(student.ppf(0.975, number - 1)) * error, number)


def along(
    axis: str, axes: Sequence[str], table: Sequence[Mapping[str, Any]]
) -> dict[tuple[tuple[str, Any], ...], list[tuple[Any, Interval, Interval]]]:
    """Accuracy and F1 along one axis, for each setting of the others with two points or more."""
    lines: dict[tuple[tuple[str, Any], ...], list[tuple[Any, Interval, Interval]]] = {}
    for row in table:
        others = tuple((key, row["settings"][key]) for key in axes if key != axis)
        point = (row["settings"][axis], row["accuracy"], row["f1"])
        lines.setdefault(others, []).append(point)
    return {others: points for others, points in lines.items() if len(points) > 1}


def _read(folder: Path) -> Run | None:
    """The run in a folder; None if it has not finished all its steps."""
    if not (folder / "summary.json").is_file() or not (folder / "metrics.csv").is_file():
        return None
    try:
        settings = flatten(yaml.safe_load((folder / "config.yaml").read_text()))
        summary = json.loads((folder / "summary.json").read_text())
        rows = read_metrics(folder / "metrics.csv")
        if settings["task"] != "train":
            return None
        seed = int(settings.pop("seed"))
        if summary["interrupted"] or summary["steps"] < settings["max_steps"]:
            return None
        measures = {name: _value(summary, keys) for name, keys in MEASURES.items()}
    except (ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise UserError(f"{folder}: is not the folder of a run ({one_line(error)})") from None
    kept = {key: value for key, value in settings.items() if not key.startswith(_IGNORED)}
    # An alias, an id and the text are one token.
    kept["self_reward.token"] = summary.get("special_token", settings.get("self_reward.token"))
    return Run(folder, kept, seed, measures, rows)


def _value(summary: Mapping[str, Any], keys: Sequence[str]) -> float:
    value: Any = summary
    for key in keys:
        value = (value or {}).get(key)
    return math.nan if value is None else float(value)


def _curves(members: Sequence[Run]) -> dict[str, list[tuple[float, Interval]]]:
    """Metric -> (step, mean over seeds), at the steps that were evaluated."""
    curves: dict[str, list[tuple[float, Interval]]] = {}
    for metric in STEP_METRICS:
        by_step: dict[float, list[float]] = {}
        for run in members:
            for row in run.rows:
                if metric in row and not math.isnan(row[metric]):
                    by_step.setdefault(row["step"], []).append(row[metric])
        curves[metric] = [(step, summarize(values)) for step, values in sorted(by_step.items())]
    return curves


def _write(axes: Sequence[str], table: Sequence[Mapping[str, Any]], folder: Path) -> None:
    header = [*axes, "seeds", *MEASURES]
    lines = ["| " + " | ".join(header) + " |", "| " + " | ".join("---" for _ in header) + " |"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    intervals = [part for name in MEASURES for part in (name, f"{name}_half_width")]
    writer.writerow([*axes, "seeds", *intervals])
    for row in table:
        settings = [row["settings"][axis] for axis in axes]
        cells = [
            *map(str, settings),
            str(len(row["seeds"])),
            *(show(row[name]) for name in MEASURES),
        ]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        numbers = [part for n in MEASURES for part in (row[n].mean, row[n].half_width)]
        writer.writerow([*settings, len(row["seeds"]), *numbers])
    write_text_atomically(folder / "comparison.md", "\n".join(lines) + "\n")
    write_text_atomically(folder / "comparison.csv", text.getvalue())
    rows = [
        {"settings": row["settings"], "seeds": row["seeds"]}
        | {name: row[name]._asdict() for name in MEASURES}
        for row in table
    ]
    write_json_atomically(folder / "comparison.json", rows)


def _print(
    axes: Sequence[str],
    table: Sequence[Mapping[str, Any]],
    num_runs: int,
    folder: Path,
    console: Console,
) -> None:
    shown = Table(
        title=f"{num_runs} runs: mean and 95 % interval over seeds", title_justify="left",
        box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False,
    )  # fmt: skip
    short = [axis.rpartition(".")[2] for axis in axes]
    names = short if len(set(short)) == len(short) else axes
    # A long setting is folded: measures that wrap could not be read.
    for name in [*names, "seeds"]:
        shown.add_column(Text(name), overflow="fold")
    for name in SHOWN:
        shown.add_column(Text(name), no_wrap=True)
    for row in table:
        settings = [Text(str(row["settings"][axis])) for axis in axes]
        shown.add_row(*settings, str(len(row["seeds"])), *(show(row[name]) for name in SHOWN))
    console.print()
    console.print(shown)
    console.print(
        f"\nWritten to {folder}: comparison.md, .csv, .json, figures",
        highlight=False,
        soft_wrap=True,
    )


def show(interval: Interval) -> str:
    """A mean and its interval as text."""
    if math.isnan(interval.mean):
        return "-"
    if math.isnan(interval.half_width):
        return f"{interval.mean:.3f}"
    return f"{interval.mean:.3f} ± {interval.half_width:.3f}"


def _label(axes: Sequence[str], key: tuple[Any, ...]) -> str:
    return (
        ", ".join(f"{axis} = {value}" for axis, value in zip(axes, key, strict=True)) or "all runs"
    )


def _hashable(value: Any) -> Any:
    return str(value) if isinstance(value, list | dict) else value


def _order(value: Any) -> tuple[int, float, str]:
    """Numbers by size, before texts."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return (0, float(value), "") if is_number else (1, 0.0, str(value))


def _safe(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "._=-" else "-" for letter in name)[:120]
