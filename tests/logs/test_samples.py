"""samples.jsonl and how samples look in the terminal."""

import io
import math
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console

from laser_pl.logs.samples import (
    Sample,
    SamplesFile,
    read_samples,
    render_samples,
    telling_samples,
)

SAMPLE = Sample(
    step=1,
    split="train",
    problem=7,
    prompt="What is 2 + 3?",
    response="It is [bold]\u2028\n5.",
    answer="5",
    reference_answer="5",
    reward=1.0,
    score=0.9,
    advantage=0.5,
    finished=True,
    num_tokens=4,
)


def test_samples_are_read_back_whatever_line_ends_they_hold(tmp_path: Path) -> None:
    path = tmp_path / "run" / "samples.jsonl"
    file = SamplesFile(path)
    held_out = replace(SAMPLE, step=2, split="held_out", advantage=None, answer=None)
    file.write([SAMPLE])
    file.write([held_out])
    assert read_samples(path) == [asdict(SAMPLE), asdict(held_out)]


def test_a_score_that_is_nan_becomes_null(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    SamplesFile(path).write([replace(SAMPLE, score=math.nan)])
    assert read_samples(path)[0]["score"] is None


def test_truncating_keeps_the_samples_up_to_the_step_and_appending_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    SamplesFile(path).write(replace(SAMPLE, step=step) for step in (1, 1, 2, 3))
    resumed = SamplesFile(path)
    resumed.truncate_after(2)
    resumed.write([replace(SAMPLE, step=3, problem=8)])
    assert [(row["step"], row["problem"]) for row in read_samples(path)] == [
        (1, 7),
        (1, 7),
        (2, 7),
        (3, 8),
    ]


def test_a_line_cut_short_by_a_crash_is_skipped_and_then_removed(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    SamplesFile(path).write([SAMPLE])
    with path.open("a") as file:
        file.write('{"step": 2, "spl')
    assert len(read_samples(path)) == 1
    SamplesFile(path).write([replace(SAMPLE, step=2)])
    assert [row["step"] for row in read_samples(path)] == [1, 2]


def test_the_telling_samples_are_the_first_judged_right_of_each_verdict() -> None:
    right = replace(SAMPLE, problem=3)
    wrong = replace(SAMPLE, problem=4, reward=0.0, score=0.5)
    others = [
        replace(SAMPLE, problem=0, score=0.5),  # correct, judged incorrect
        replace(SAMPLE, problem=1, reward=0.0, score=0.51),  # incorrect, judged correct
        replace(SAMPLE, problem=2, reward=0.0, score=0.0, finished=False),
        replace(SAMPLE, problem=5, reward=0.0, score=0.0, answer=None),
    ]
    later = replace(SAMPLE, problem=9)
    assert telling_samples([*others, wrong, right, later]) == [right, wrong]
    assert telling_samples([*others, wrong]) == [wrong]
    assert telling_samples([]) == []


def test_rendered_samples_show_brackets_verdict_and_judgement() -> None:
    text = _rendered([SAMPLE, replace(SAMPLE, reward=0.0, score=0.1, reference_answer="6")])
    assert "It is [bold]" in text
    assert "correct, judged correct (score 0.90)" in text
    assert "incorrect, judged incorrect (score 0.10)" in text
    assert "answer 5   reference 6" in text


def test_a_long_response_loses_its_middle_only() -> None:
    response = "start" + "x" * 2000 + "end"
    text = _rendered([replace(SAMPLE, response=response)])
    assert "start" in text
    assert "end" in text
    assert "[... 1208 characters ...]" in text  # 2008 - 800


def _rendered(samples: list[Sample]) -> str:
    # Wide enough that nothing is broken over two lines.
    console = Console(file=io.StringIO(), width=1200)
    console.print(render_samples(samples))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()
