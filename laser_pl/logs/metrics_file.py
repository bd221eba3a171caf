"""metrics.csv: one row a step, a fixed column for every metric of names.py."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, SupportsFloat

from laser_pl.logs.files import write_text_atomically
from laser_pl.logs.names import METRICS, check_names

COLUMNS = ("step", *METRICS)


class MetricsFile:
    """Appends rows to metrics.csv, and continues a file that is there already.

    A step may be written more than once (training, then evaluation): the values join in one row.
    Every write is on disk at once, so a crash loses nothing but the line it interrupts.

    Example:
        file.write(20, {"train/loss": 0.25})
        file.write(20, {"held_out/f1": 0.8})   # the same row

    Args:
        path: the file; made, with its folder, if it is missing.
    Raises:
        ValueError: the file is there with other columns.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._step = -1
        self._row: dict[str, float] = {}
        self._row_start = 0
        rows = read_metrics(self.path) if self.path.exists() else []
        if self.path.exists() and _header(self.path) not in ("", _line(COLUMNS)):
            raise ValueError(f"{self.path}: its columns are not those of this version")
        # Rewritten even if nothing is new: a line that a crash cut short must not stay.
        self._rewrite(rows)

    def write(self, step: int, metrics: Mapping[str, SupportsFloat | None]) -> None:
        """Add values to the row of a step.

        Args:
            step: 0 before the first update, then 1-based; the last step written, or a later one.
            metrics: name -> value; None leaves the cell empty, a value written twice replaces.
        Raises:
            ValueError: a name is not in names.py, or the step is before the last one.
        """
        check_names(metrics)
        if step < self._step:
            raise ValueError(f"step {step} after step {self._step}: rows are written in order")
        row = self._row if step == self._step else {}
        row = row | {name: float(v) for name, v in metrics.items() if v is not None}
        with self.path.open("r+b") as file:
            if step == self._step:
                file.seek(self._row_start)
                file.truncate()
            self._row_start = file.seek(0, io.SEEK_END)
            file.write(_format(step, row).encode())
        self._step, self._row = step, row

    def truncate_after(self, step: int) -> None:
        """Drop the rows of later steps, for a run resumed from the checkpoint of this step.

        Args:
            step: the last step to keep.
        """
        self._rewrite([row for row in read_metrics(self.path) if row["step"] <= step])

    def _rewrite(self, rows: list[dict[str, float]]) -> None:
        lines = [_line(COLUMNS), *(_format(int(row["step"]), row) for row in rows)]
        write_text_atomically(self.path, "".join(lines))
        # The last row stays open, so that an evaluation after a resume still joins it.
        last = rows[-1] if rows else {"step": -1.0}
        self._step = int(last["step"])
        self._row = {name: last[name] for name in METRICS if name in last}
        self._row_start = sum(len(line) for line in lines[:-1])


def read_metrics(path: Path | str) -> list[dict[str, float]]:
    """Read a metrics.csv.

    Args:
        path: the file; a last line without its end, as a crash leaves it, is skipped.
    Returns:
        a dict a row, in the file's order, with "step" and those metrics that have a value.
    """
    lines = Path(path).read_text(encoding="utf-8").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]
    return [
        {name: float(value) for name, value in row.items() if value}
        for row in csv.DictReader(whole)
    ]


def _header(path: Path) -> str:
    with path.open(encoding="utf-8") as file:
        return file.readline()


def _format(step: int, row: Mapping[str, float]) -> str:
    # repr is exact: two runs have the same text if and only if they have the same bits.
    return _line([step, *(repr(row[name]) if name in row else "" for name in METRICS)])


def _line(cells: Any) -> str:
    return ",".join(str(cell) for cell in cells) + "\n"
