"""task=compare: runs into rows, rows into a table and figures."""

import csv
import json
import math
import statistics
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from scipy.stats import t as student

from laser_pl.compare import (
    along,
    compare,
    find_runs,
    group_runs,
    show,
    summarize,
    varying_keys,
)
from laser_pl.errors import UserError
from laser_pl.evaluation.plots import Interval

QUIET = Console(quiet=True)


def make_run(folder: Path, compose_config, accuracy: float, *overrides: str) -> None:
    """A finished run's files, without the run."""
    folder.mkdir(parents=True)
    config = compose_config(f"output_dir={folder}", *overrides)
    (folder / "config.yaml").write_text(
        yaml.safe_dump(config.model_dump(mode="json", by_alias=True))
    )
    votes = {"majority": accuracy, "weighted": accuracy + 0.1, "best_of": accuracy}
    judge = {"f1": 1 - accuracy, "auroc": None}
    summary = {"accuracy": accuracy, "self_verification": judge, "voting": votes}
    summary |= {"steps": config.max_steps, "interrupted": False}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "metrics.csv").write_text(
        f"step,held_out/accuracy,held_out/f1\n0,0.1,0.2\n1,,\n2,{accuracy},{1 - accuracy}\n"
    )


@pytest.fixture
def sweep(tmp_path, compose_config) -> Path:
    folder = tmp_path / "sweep"
    number = 0
    for alpha, accuracies in ((1.0, (0.5, 0.6)), (0.0, (0.7, 0.9)), (0.1, (0.8,))):
        for seed, accuracy in enumerate(accuracies):
            overrides = (f"self_reward.alpha={alpha}", f"seed={seed}", "logger=csv")
            make_run(folder / str(number), compose_config, accuracy, *overrides)
            number += 1
    (folder / "unfinished").mkdir()
    (folder / "unfinished" / "config.yaml").write_text("seed: 0\n")
    of_wandb = folder / "0" / "wandb" / "run-0" / "files"
    of_wandb.mkdir(parents=True)
    (of_wandb / "config.yaml").write_text("seed: {value: 0}\n")
    return folder


@pytest.mark.parametrize("change", [{"interrupted": True}, {"steps": 79}])
def test_a_run_that_ended_before_its_last_step_is_left_out(sweep, change, capsys):
    path = sweep / "0" / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert len(find_runs(str(sweep), Console(width=1000))) == 4
    assert f"left out: {sweep / '0'} is no training run" in capsys.readouterr().out


def test_an_evaluation_is_left_out(sweep, compose_config):
    make_run(sweep / "evaluation", compose_config, 0.8, "task=evaluate", "seed=9")
    assert len(find_runs(str(sweep), QUIET)) == 5


def test_a_run_that_repeats_another_is_left_out(sweep, compose_config, capsys):
    overrides = ("self_reward.alpha=0.1", "seed=0", "logger=csv")
    make_run(sweep / "again", compose_config, 0.8, *overrides)
    assert len(find_runs(str(sweep), Console(width=1000))) == 5
    assert f"left out: {sweep / 'again'} is {sweep / '4'} again" in capsys.readouterr().out


def test_one_token_by_alias_and_by_id_is_one_row(tmp_path, compose_config):
    for seed, token in enumerate(("tiny-reserved-1", "3")):
        folder = tmp_path / "runs" / str(seed)
        make_run(folder, compose_config, 0.5, f"seed={seed}", f"self_reward.token={token}")
        summary = json.loads((folder / "summary.json").read_text())
        summary["special_token"] = "<|reserved_1|>"
        (folder / "summary.json").write_text(json.dumps(summary))
    runs = find_runs(str(tmp_path / "runs"), QUIET)
    assert len(runs) == 2
    assert varying_keys(runs) == []


def test_runs_that_differ_in_the_seed_alone_are_one_row(sweep):
    runs = find_runs(f"{sweep}/[0-2], {sweep}", QUIET)
    assert len(runs) == 5
    axes = varying_keys(runs)
    assert axes == ["self_reward.alpha"]
    groups = group_runs(runs, axes)
    assert list(groups) == [(0.0,), (0.1,), (1.0,)]
    assert sorted(run.seed for run in groups[(1.0,)]) == [0, 1]


def test_the_interval_is_students():
    values = [0.1, 0.4, 0.25, 0.3]
    interval = summarize([*values, math.nan])
    error = statistics.stdev(values) / 2
    assert interval.mean == pytest.approx(statistics.fmean(values))
    assert interval.half_width == pytest.approx(student.ppf(0.975, 3) * error)
    assert interval.number == 4
    assert show(summarize([0.5])) == "0.500"
    assert show(summarize([math.nan])) == "-"


def test_the_table_and_the_figures_are_written(sweep, compose_config, tmp_path, capsys):
    config = compose_config("task=compare", f"compare.runs={sweep}")
    assert compare(config) == 0
    folder = tmp_path / "run"
    rows = list(csv.DictReader((folder / "comparison.csv").open()))
    assert [row["self_reward.alpha"] for row in rows] == ["0.0", "0.1", "1.0"]
    assert float(rows[0]["accuracy"]) == pytest.approx(0.8)
    assert float(rows[0]["accuracy_half_width"]) == pytest.approx(12.706 * 0.1, rel=1e-3)
    assert rows[1]["accuracy_half_width"] == "nan"
    table = (folder / "comparison.md").read_text()
    assert "| 1.0 | 2 | 0.550 ± 0.635 |" in table
    loaded = json.loads((folder / "comparison.json").read_text())
    assert loaded[0]["settings"] == {"self_reward.alpha": 0.0}
    assert loaded[0]["auroc"]["mean"] is None
    figures = {path.name for path in (folder / "figures").iterdir()}
    names = ("self_reward.alpha", "steps")
    assert figures == {f"{name}.{kind}" for name in names for kind in ("png", "svg")}
    printed = capsys.readouterr().out
    assert "0.800 ± 1.271" in printed
    assert printed.count("left out") == 1
    assert "unfinished is no training run that has finished" in printed.replace("\n", "")


def test_each_setting_of_the_other_keys_is_a_line_of_its_own():
    def row(alpha: float, tau: float) -> dict:
        point = Interval(alpha, 0.0, 1)
        return {"settings": {"alpha": alpha, "tau": tau}, "accuracy": point, "f1": point}

    table = [row(0.1, 0), row(0.3, 0), row(0.1, 1), row(0.3, 1), row(0.1, 2)]
    lines = along("alpha", ["alpha", "tau"], table)
    assert list(lines) == [(("tau", 0),), (("tau", 1),)]
    assert [value for value, *_ in lines[(("tau", 1),)]] == [0.1, 0.3]


def test_a_single_run_is_a_table_of_one_row(compose_config, tmp_path):
    make_run(tmp_path / "alone", compose_config, 0.5)
    config = compose_config("task=compare", f"compare.runs={tmp_path}/alone")
    assert compare(config) == 0
    assert len(json.loads((tmp_path / "run" / "comparison.json").read_text())) == 1


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        (None, "compare.runs: missing; give runs=FOLDER"),
        ("nowhere/*", "compare.runs = nowhere/*: no such folder"),
        ("{tmp}", "no finished run"),
    ],
)
def test_a_mistake_gets_one_line(compose_config, tmp_path, runs, message):
    overrides = [] if runs is None else [f"compare.runs='{runs.format(tmp=tmp_path)}'"]
    with pytest.raises(UserError) as caught:
        compare(compose_config("task=compare", *overrides))
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()
