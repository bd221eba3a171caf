"""What the terminal shows of evaluations: a line as each is made, and the table at the end."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

Summary = Mapping[str, Any]


class _Row(NamedTuple):
    label: str
    keys: tuple[str, ...]
    better: int  # +1 if more is better, -1 if less is


_ROWS = (
    _Row("accuracy (pass@1)", ("accuracy",), +1),
    _Row("self-verification F1", ("self_verification", "f1"), +1),
    _Row("  F1 of the class correct", ("self_verification", "f1_binary"), +1),
    _Row("  AUROC", ("self_verification", "auroc"), +1),
    _Row("  accuracy on correct", ("self_verification", "accuracy_on_correct"), +1),
    _Row("  accuracy on incorrect", ("self_verification", "accuracy_on_incorrect"), +1),
    _Row("  calibration error (ECE)", ("self_verification", "ece"), -1),
    _Row("majority vote @{k}", ("voting", "majority"), +1),
    _Row("  weighted by score @{k}", ("voting", "weighted"), +1),
    _Row("  best of {k} by score", ("voting", "best_of"), +1),
    _Row("  pass@{k} (any right)", ("voting", "pass_at_k"), +1),
    _Row("adaptive: samples a problem", ("adaptive", "samples_per_problem"), -1),
    _Row("  weighted vote there", ("adaptive", "weighted"), +1),
    _Row("score against length (Spearman)", ("self_verification", "score_length_spearman"), 0),
    _Row("truncated", ("truncated_fraction",), -1),
)


def print_summary(
    before: Summary | None, after: Summary, files: Mapping[str, str], console: Console
) -> None:
    """Print the end of a run: held-out measures before and after, and what was written.

    Args:
        before: `evaluation_summary` before the first update; None if it was not made.
        after: the same after the last one, or `detailed_summary`, whose votes are shown by k.
        files: path -> a few words on what it holds, in the order to show.
        console: where to print.
    """
    console.print()
    console.print(_summary_table(before, after))
    if "voting_curves" in after:
        console.print(_votes_table(after["voting_curves"]))
    if files:
        folder = _common_folder(files)
        # Text, not markup: a path may contain [brackets].
        console.print(Text(f"Written to {folder}", style="italic"), soft_wrap=True)
        console.print(_files_table(files, folder))


def print_evaluation(step: int, summary: Summary, console: Console) -> None:
    """Print one evaluation on one line.

    Args:
        step: the step after which it was made, 0 before the first.
        summary: what `evaluation_summary` gave.
        console: where to print; that of the progress bar, so that the line goes above it.
    """
    judge, voting = summary["self_verification"], summary["voting"]
    parts = [
        f"held out, step {step}:",
        f"accuracy {_number(summary['accuracy'])}{_interval(summary)}",
        f"F1 {_number(judge['f1'])}",
        f"AUROC {_number(judge['auroc'])}",
        f"vote@{voting['k']} {_number(voting['majority'])}",
        f"weighted {_number(voting['weighted'])}",
    ]
    console.print("  ".join(parts), markup=False, highlight=False, soft_wrap=True)


def _summary_table(before: Summary | None, after: Summary) -> Table:
    problems, samples = after["num_problems"], after["num_samples"]
    table = Table(
        title=f"{problems} held-out problems, {samples / problems:.3g} samples each",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("", no_wrap=True)
    alone = ("measured", "95 % interval")
    for heading in ("before", "after", "change") if before is not None else alone:
        table.add_column(heading, justify="right", no_wrap=True)
    most = after["voting"]["k"]
    if "adaptive" in after and "voting_curves" not in after:
        most = f"1-{most}"  # where sampling stopped
    for row in _ROWS:
        if len(row.keys) == 2 and row.keys[1] not in after.get(row.keys[0], {}):
            continue  # of an evaluation of its own
        label = row.label.format(k=most)
        new = _value(after, row.keys)
        if before is None:
            interval = _interval(after).strip(" ()") if row.keys == ("accuracy",) else ""
            table.add_row(label, _number(new), interval)
        else:
            old = _value(before, row.keys)
            table.add_row(label, _number(old), _number(new), _change(old, new, row.better))
    return table


def _votes_table(curves: Mapping[str, list[float]]) -> Table:
    table = Table(title="votes of k samples", title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("k", "majority", "weighted by score", "best by score", "pass@k"):
        table.add_column(heading, justify="right", no_wrap=True)
    names = ("majority", "weighted", "best_of", "pass_at_k")
    for k, *values in zip(curves["k"], *(curves[name] for name in names), strict=True):
        table.add_row(str(k), *map(_number, values))
    return table


def _files_table(files: Mapping[str, str], folder: Path) -> Table:
    table = Table.grid(padding=(0, 2))
    for path, words in files.items():
        table.add_row(Text(f"  {Path(path).relative_to(folder)}"), Text(words, style="dim"))
    return table


def _common_folder(files: Mapping[str, str]) -> Path:
    first, *others = (Path(path) for path in files)
    return next(folder for folder in first.parents if all(folder in o.parents for o in others))


def _value(summary: Summary, keys: tuple[str, ...]) -> float | None:
    value: Any = summary
    for key in keys:
        value = value[key]
    # None is what NaN becomes in a JSON file.
    return None if value is None or math.isnan(value) else float(value)


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.3f}"


def _interval(summary: Summary) -> str:
    low, high = summary["accuracy_interval"]
    return f" ({low:.2f} to {high:.2f})"


def _change(old: float | None, new: float | None, better: int) -> Text:
    if old is None or new is None:
        return Text("-")
    change = round(new - old, 3)
    style = "" if change == 0 else "green" if change * better > 0 else "red"
    return Text(f"{change:+.3f}" if change else "0.000", style=style)
