"""What is printed of evaluations."""

import io
import math
from typing import Any

from rich.console import Console

from laser_pl.logs.terminal import print_evaluation, print_summary


def make_summary(accuracy: float = 0.5, f1: float = 0.25, truncated: float = 0.125) -> dict:
    return {
        "accuracy": accuracy,
        "accuracy_interval": [accuracy - 0.1, accuracy + 0.1],
        "self_verification": {
            "f1": f1,
            "accuracy": 0.5,
            "accuracy_on_correct": 0.25,
            "accuracy_on_incorrect": 0.75,
            "auroc": 0.625,
            "ece": 0.2,
        },
        "voting": {"k": 16, "majority": 0.6, "weighted": 0.7, "best_of": 0.65, "pass_at_k": 0.9},
        "truncated_fraction": truncated,
        "unparsed_fraction": 0.1,
        "response_tokens_mean": 40.0,
        "num_problems": 32,
        "num_samples": 512,
    }


def test_the_summary_shows_before_after_and_signed_change() -> None:
    text = _printed(print_summary, make_summary(0.5, truncated=0.2), make_summary(0.75), {})
    lines = {line.strip().split("  ")[0]: line.split() for line in text.splitlines() if line}
    assert lines["accuracy (pass@1)"][-3:] == ["0.500", "0.750", "+0.250"]
    assert lines["truncated"][-3:] == ["0.200", "0.125", "-0.075"]
    assert lines["majority vote @16"][-3:] == ["0.600", "0.600", "0.000"]
    assert "32 held-out problems, 16 samples each" in text


def test_an_evaluation_shows_its_votes_by_k() -> None:
    curves = {
        "k": [1, 2, 3], "majority": [0.5, 0.5, 0.6], "weighted": [0.5, 0.55, 0.7],
        "best_of": [0.5, 0.53, 0.65], "pass_at_k": [0.5, 0.7, 0.9],
    }  # fmt: skip
    text = _printed(print_summary, None, make_summary() | {"voting_curves": curves}, {})
    rows = [line.split() for line in text.splitlines()]
    assert ["2", "0.500", "0.550", "0.530", "0.700"] in rows
    assert ["calibration", "error", "(ECE)", "0.200"] in rows


def test_more_truncation_is_shown_as_worse_and_more_accuracy_as_better() -> None:
    text = _printed(
        print_summary, make_summary(0.5, truncated=0.1), make_summary(0.75, truncated=0.3), {},
        force_terminal=True, color_system="standard",
    )  # fmt: skip
    green, red = "\x1b[32m", "\x1b[31m"
    assert f"{green}+0.250" in text
    assert f"{red}+0.200" in text


def test_without_a_measure_before_there_is_one_column() -> None:
    text = _printed(print_summary, None, make_summary(), {})
    assert "measured" in text
    assert "change" not in text


def test_measures_that_are_not_defined_show_as_a_dash() -> None:
    before, after = make_summary(), make_summary()
    before["self_verification"]["auroc"] = None  # as read from a JSON file
    after["self_verification"]["auroc"] = math.nan
    text = _printed(print_summary, before, after, {})
    (line,) = (line for line in text.splitlines() if "AUROC" in line)
    assert line.split() == ["AUROC", "-", "-", "-"]


def test_files_are_listed_relative_to_their_common_folder() -> None:
    files = {
        "/out/a[1]/metrics.csv": "a row a step",
        "/out/a[1]/figures/voting.png": "accuracy against k",
    }
    text = _printed(print_summary, None, make_summary(), files)
    assert "Written to /out/a[1]\n" in text
    assert "  metrics.csv         a row a step" in text
    assert "  figures/voting.png  accuracy against k" in text


def test_a_single_file_is_listed_by_its_name() -> None:
    text = _printed(print_summary, None, make_summary(), {"/out/summary.json": "the numbers"})
    assert "Written to /out" in text
    assert "  summary.json  the numbers" in text


def test_an_evaluation_is_one_line_even_where_the_terminal_is_narrow() -> None:
    text = _printed(print_evaluation, 20, make_summary(0.5, f1=0.75), width=30)
    assert text == (
        "held out, step 20:  accuracy 0.500 (0.40 to 0.60)  F1 0.750  AUROC 0.625  "
        "vote@16 0.600  weighted 0.700\n"
    )


def _printed(function: Any, *args: Any, width: int = 100, **options: Any) -> str:
    console = Console(file=io.StringIO(), width=width, **options)
    function(*args, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()
