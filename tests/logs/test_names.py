"""The list of metrics."""

import re

import pytest

from laser_pl.logs.names import METRICS, check_names, metrics_as_markdown


def test_every_name_is_a_place_and_a_thing_and_every_metric_says_unit_and_meaning() -> None:
    for name, metric in METRICS.items():
        assert re.fullmatch(r"[a-z_]+/[a-z0-9_]+", name)
        assert metric.unit
        assert metric.meaning
        assert "\n" not in metric.meaning


def test_a_suffix_that_is_a_unit_agrees_with_the_unit() -> None:
    for name, metric in METRICS.items():
        if name.endswith("_s"):
            assert metric.unit.endswith("s"), name
        if name.endswith("_fraction"):
            assert metric.unit == "fraction", name


def test_an_unknown_name_is_refused_and_named() -> None:
    check_names(["train/loss", "held_out/f1"])
    with pytest.raises(ValueError, match="train/losss"):
        check_names(["train/loss", "train/losss"])


def test_the_markdown_table_has_a_line_a_metric_of_three_cells() -> None:
    lines = metrics_as_markdown().splitlines()
    assert len(lines) == 2 + len(METRICS)
    for line in lines:
        assert len(re.findall(r"(?<!\\)\|", line)) == 4
