"""metrics.csv."""

import math
from pathlib import Path

import pytest
import torch

from laser_pl.logs.metrics_file import COLUMNS, MetricsFile, read_metrics


def test_rows_are_read_back_bit_for_bit_and_missing_cells_are_absent(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.csv"
    file = MetricsFile(path)
    file.write(1, {"train/loss": 0.1 + 0.2, "train/num_tokens": 2**40})
    file.write(2, {"train/loss": torch.tensor(0.1), "train/lr": 5e-324, "train/entropy": None})
    assert read_metrics(path) == [
        {"step": 1.0, "train/loss": 0.30000000000000004, "train/num_tokens": 2.0**40},
        # 0.1 in float32
        {"step": 2.0, "train/loss": 0.10000000149011612, "train/lr": 5e-324},
    ]


def test_the_columns_are_fixed_and_in_the_order_of_names(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    MetricsFile(path).write(1, {"held_out/f1": 0.5, "rollout/reward_mean": 0.25})
    header, row = path.read_text().splitlines()
    assert header.split(",") == list(COLUMNS)
    assert header.startswith("step,rollout/reward_mean,")
    assert row.split(",")[:2] == ["1", "0.25"]
    assert len(row.split(",")) == len(COLUMNS)


def test_nan_and_infinity_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    MetricsFile(path).write(1, {"self_reward/auroc": math.nan, "train/loss": -math.inf})
    (row,) = read_metrics(path)
    assert math.isnan(row["self_reward/auroc"])
    assert row["train/loss"] == -math.inf


def test_values_of_one_step_join_in_one_row(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    file = MetricsFile(path)
    file.write(1, {"train/loss": 123456.5, "train/lr": 0.25})
    # A shorter row than the one it replaces: nothing of the old one may be left.
    file.write(1, {"train/loss": 1.0, "held_out/f1": 0.5})
    file.write(2, {"train/loss": 2.0})
    assert read_metrics(path) == [
        {"step": 1.0, "train/loss": 1.0, "train/lr": 0.25, "held_out/f1": 0.5},
        {"step": 2.0, "train/loss": 2.0},
    ]


def test_every_row_is_on_disk_as_soon_as_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    file = MetricsFile(path)
    for step in (0, 1, 2):
        file.write(step, {"train/loss": float(step)})
        assert [row["step"] for row in read_metrics(path)] == [float(s) for s in range(step + 1)]


def test_an_unknown_name_is_refused_and_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    file = MetricsFile(path)
    with pytest.raises(ValueError, match="train/los"):
        file.write(1, {"train/loss": 1.0, "train/los": 1.0})
    assert read_metrics(path) == []


def test_an_earlier_step_is_refused(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.csv")
    file.write(3, {"train/loss": 1.0})
    with pytest.raises(ValueError, match="step 2 after step 3"):
        file.write(2, {"train/loss": 1.0})


def test_a_resumed_run_continues_where_the_checkpoint_was(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    first = MetricsFile(path)
    for step in (1, 2, 3, 4):
        first.write(step, {"train/loss": step / 10})
    resumed = MetricsFile(path)
    resumed.truncate_after(2)
    resumed.write(3, {"train/loss": 7.0})
    assert [(row["step"], row["train/loss"]) for row in read_metrics(path)] == [
        (1.0, 0.1),
        (2.0, 0.2),
        (3.0, 7.0),
    ]


def test_the_last_row_stays_open_over_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    MetricsFile(path).write(1, {"train/loss": 0.5})
    MetricsFile(path).write(1, {"held_out/f1": 0.25})
    assert read_metrics(path) == [{"step": 1.0, "train/loss": 0.5, "held_out/f1": 0.25}]


def test_an_interrupted_run_has_the_same_bytes_as_one_that_was_not(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole.csv", tmp_path / "parts.csv"
    rows = [(step, {"train/loss": 1 / (step + 3)}) for step in range(5)]
    file = MetricsFile(whole)
    for step, metrics in rows:
        file.write(step, metrics)
    file = MetricsFile(parts)
    for step, metrics in rows[:4]:
        file.write(step, metrics)
    file = MetricsFile(parts)
    file.truncate_after(1)
    for step, metrics in rows[2:]:
        file.write(step, metrics)
    assert parts.read_bytes() == whole.read_bytes()


def test_a_line_cut_short_by_a_crash_is_skipped_and_then_removed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    MetricsFile(path).write(1, {"train/loss": 0.5})
    with path.open("a") as file:
        file.write("2,0.1")
    assert [row["step"] for row in read_metrics(path)] == [1.0]
    MetricsFile(path).write(2, {"train/loss": 0.75})
    assert [row.get("train/loss") for row in read_metrics(path)] == [0.5, 0.75]


def test_a_file_with_other_columns_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,other\n1,2\n")
    with pytest.raises(ValueError, match="columns"):
        MetricsFile(path)
    assert path.read_text() == "step,other\n1,2\n"
