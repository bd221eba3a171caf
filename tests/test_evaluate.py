"""task=evaluate as its users run it: benchmarks, resume, several ranks, adaptive sampling."""

import json
import os
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from transformers import AutoConfig

from laser_pl import evaluate as evaluate_file
from laser_pl.errors import UserError
from laser_pl.evaluate import evaluate, with_length_that_fits
from laser_pl.logs.samples import read_samples
from laser_pl.models.loading import resolve_path
from laser_pl.setup import check_output_dir

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"
SMALL = (
    "task=evaluate", "self_reward.c_ref=-21.0", "data.num_held_out=8", "trainer.num_threads=1",
    "data.samples_per_problem=4", "rollout.max_sequences=8",
)  # fmt: skip
LINES = "problem", "response", "score", "reward"


def comparable(folder: Path) -> list[tuple]:
    return [tuple(row[name] for name in LINES) for row in read_samples(folder / "samples.jsonl")]


def start(folder: Path, *overrides: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "run.py"), *SMALL, f"output_dir={folder}", *overrides]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        command, cwd=folder.parent, env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def test_the_report_has_every_measure(compose_config, tmp_path, capsys):
    config = compose_config(*SMALL)
    assert evaluate(config) == 0
    folder = tmp_path / "run"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["num_problems"] == 8
    assert summary["num_samples"] == 32
    assert summary["voting_curves"]["k"] == [1, 2, 4]
    assert {"f1", "f1_binary", "auroc", "ece", "score_length_spearman"} <= set(
        summary["self_verification"]
    )
    assert 1 <= summary["adaptive"]["samples_per_problem"] <= 4
    adaptive, curves = summary["adaptive"], summary["voting_curves"]
    assert adaptive["weighted_fixed"] == summary["voting"]["weighted"]
    below = [
        a
        for k, a in zip(curves["k"], curves["weighted"], strict=True)
        if k < adaptive["equal_fixed_k"]
    ]
    assert all(accuracy < adaptive["weighted"] for accuracy in below)
    assert adaptive["saved_at_equal_accuracy"] == pytest.approx(
        1 - adaptive["samples_per_problem"] / adaptive["equal_fixed_k"]
    )
    lines = read_samples(folder / "samples.jsonl")
    reliability = summary["reliability"]
    assert sum(reliability["num_responses"]) == 32
    right = [
        (accuracy or 0) * number
        for accuracy, number in zip(
            reliability["accuracy"], reliability["num_responses"], strict=True
        )
    ]
    assert sum(right) == pytest.approx(sum(line["reward"] for line in lines))
    assert [line["problem"] for line in lines] == [i for i in range(8) for _ in range(4)]
    assert summary["accuracy"] == pytest.approx(sum(line["reward"] for line in lines) / 32)
    assert summary["response_tokens"] == sum(line["num_tokens"] for line in lines)
    figures = {path.name for path in (folder / "figures").iterdir()}
    names = ("score_histograms", "reliability", "voting")
    assert figures == {f"{name}.{kind}" for name in names for kind in ("png", "svg")}
    printed = capsys.readouterr().out
    assert "F1 of the class correct" in printed
    assert "32 responses" in printed
    assert "adaptive sampling would take" in printed
    assert not (folder / "progress").exists()


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_to_the_same_samples(compose_config, tmp_path):
    assert evaluate(compose_config(*SMALL, f"output_dir={tmp_path}/whole")) == 0
    folder = tmp_path / "killed"
    process = start(folder)
    progress = folder / "progress" / "rank-0.jsonl"
    while not (progress.is_file() and progress.stat().st_size):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert not (folder / "samples.jsonl").exists()
    with progress.open("a") as file:
        file.write('{"step": 0, "spl')  # cut in the middle of a line
    process = start(folder, "resume=auto")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "problems are sampled already" in output
    assert comparable(folder) == comparable(tmp_path / "whole")


def test_a_finished_evaluation_samples_nothing_again(compose_config, tmp_path, monkeypatch):
    assert evaluate(compose_config(*SMALL)) == 0
    before = (tmp_path / "run" / "samples.jsonl").read_bytes()

    def fail(*_):
        raise AssertionError("sampled again")

    monkeypatch.setattr(evaluate_file._Evaluation, "_sample", fail)
    assert evaluate(compose_config(*SMALL, "resume=auto")) == 0
    assert (tmp_path / "run" / "samples.jsonl").read_bytes() == before


def test_what_resumes_keeps_the_constant_that_its_scores_were_made_with(
    compose_config, tmp_path, monkeypatch
):
    measured = tuple(override for override in SMALL if "c_ref" not in override)
    evaluation = evaluate_file._Evaluation
    sample = evaluation._sample
    calls = iter(range(1))

    def interrupted(*arguments):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return sample(*arguments)

    monkeypatch.setattr(evaluation, "_sample", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(compose_config(*measured))
    kept = json.loads((tmp_path / "run" / "progress" / "c_ref.json").read_text())["c_ref"]
    monkeypatch.setattr(evaluation, "_sample", sample)

    def fail(*_):
        raise AssertionError("measured again")

    monkeypatch.setattr(evaluate_file, "calibrate", fail)
    for _ in range(2):  # from the progress, then from the finished evaluation
        assert evaluate(compose_config(*measured, "resume=auto")) == 0
        assert json.loads((tmp_path / "run" / "summary.json").read_text())["c_ref"] == kept


def test_a_problem_that_has_changed_is_sampled_again(compose_config, tmp_path):
    path = tmp_path / "problems.jsonl"
    problems = [{"problem": f"{n} + 1 =", "answer": str(n + 1)} for n in range(4)]
    overrides = (
        "task=evaluate", "self_reward.c_ref=-21.0", "data=file", f"data.path={path}",
        "data.num_train=0", "data.num_held_out=4", "data.samples_per_problem=2",
        "verifier=exact", "trainer.num_threads=1",
    )  # fmt: skip

    def run(*more: str) -> list[dict]:
        path.write_text("".join(json.dumps(problem) + "\n" for problem in problems))
        assert evaluate(compose_config(*overrides, *more)) == 0
        return read_samples(tmp_path / "run" / "samples.jsonl")

    run()
    problems[2] = {"problem": "7 + 2 =", "answer": "9"}
    lines = run("resume=auto")
    (changed,) = {line["problem"] for line in lines if "7 + 2" in line["prompt"]}
    assert [line["reference_answer"] for line in lines if line["problem"] == changed] == ["9", "9"]
    assert len(lines) == 8


def test_a_broken_line_of_samples_is_named(compose_config, tmp_path):
    assert evaluate(compose_config(*SMALL)) == 0
    path = tmp_path / "run" / "samples.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], "{broken\n", *lines[2:]]))
    with pytest.raises(UserError, match=r"samples.jsonl:2: is no sample"):
        evaluate(compose_config(*SMALL, "resume=auto"))


@pytest.mark.parametrize("task", ["evaluate", "calibrate", "train"])
def test_one_task_does_not_write_over_another(compose_config, tmp_path, task):
    folder = tmp_path / "run"
    folder.mkdir()
    other = compose_config("task=train" if task != "train" else "task=evaluate")
    text = yaml.safe_dump(other.model_dump(mode="json", by_alias=True))
    (folder / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=r"would overwrite; give a new folder|already holds files"):
        check_output_dir(compose_config(f"task={task}", "resume=auto", "resume_force=true"))


@pytest.mark.parametrize("adaptive", [False, True])
def test_interruptions_leave_each_problem_its_samples(
    compose_config, tmp_path, monkeypatch, adaptive
):
    sample = evaluate_file._Evaluation._sample
    overrides = (*SMALL, "evaluation.adaptive=true") if adaptive else SMALL

    def interrupted_after(number: int):
        calls = iter(range(number))

        def stop(*arguments):
            if next(calls, None) is None:
                raise KeyboardInterrupt
            return sample(*arguments)

        return stop

    progress = tmp_path / "run" / "progress"
    # Groups of 2 problems, then of 3: the second of these has a problem that is known already.
    for number, sequences in ((1, 8), (1, 12)):
        monkeypatch.setattr(evaluate_file._Evaluation, "_sample", interrupted_after(number))
        with pytest.raises(KeyboardInterrupt):
            evaluate(
                compose_config(*overrides, f"rollout.max_sequences={sequences}", "resume=auto")
            )
        # As if it had been killed within a group's lines.
        lines = (progress / "rank-0.jsonl").read_text().splitlines(keepends=True)
        (progress / "rank-0.jsonl").write_text("".join(lines[:-1]))
    monkeypatch.setattr(evaluate_file._Evaluation, "_sample", sample)
    assert evaluate(compose_config(*overrides, "resume=auto")) == 0
    rows = read_samples(tmp_path / "run" / "samples.jsonl")
    drawn = [sum(row["problem"] == i for row in rows) for i in range(8)]
    assert set(drawn) <= ({2, 4} if adaptive else {4})
    assert not progress.exists()


def test_a_benchmark_brings_its_length_limit_and_the_model_its_context(compose_config, tmp_path):
    config = compose_config("task=evaluate", f"model.path={tmp_path}", "data=math500")
    assert config.rollout.max_response_tokens == 8192
    assert compose_config("data=math500", "rollout=vllm").rollout.max_response_tokens == 8192
    said = StringIO()
    tiny = compose_config("task=evaluate", "rollout.max_response_tokens=8192")
    limit = with_length_that_fits(tiny, Console(file=said)).rollout.max_response_tokens
    positions = AutoConfig.from_pretrained(resolve_path("builtin:tiny")).max_position_embeddings
    assert limit + tiny.data.max_prompt_tokens == positions
    assert f"rollout.max_response_tokens: {limit} in place of 8192" in said.getvalue()
    assert with_length_that_fits(compose_config(*SMALL), Console()) == compose_config(*SMALL)


@pytest.mark.slow
def test_two_ranks_make_one_evaluation(tmp_path):
    folder = tmp_path / "run"
    process = start(folder, "trainer.devices=2", "rollout.max_sequences=16")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert output.count("held-out problems") == 1
    one = tmp_path / "one"
    process = start(one, "rollout.max_sequences=16")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    # The same groups of four problems, so the same samples.
    assert comparable(folder) == comparable(one)


@pytest.mark.slow
def test_a_mistake_on_one_rank_ends_all_ranks(tmp_path):
    (tmp_path / "strict.py").write_text(
        "from laser_pl.reward.exact_verifier import ExactVerifier\n"
        "class Strict(ExactVerifier):\n"
        "    def __call__(self, problem, response):\n"
        "        if problem.index == 7:\n"
        "            raise ValueError('no verdict on the last problem')\n"
        "        return super().__call__(problem, response)\n"
    )
    process = start(
        tmp_path / "run", "trainer.devices=2", "verifier=exact", "verifier._target_=strict.Strict",
        "verifier.on_error=stop",
    )  # fmt: skip
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 2, output
    assert output.count("no verdict on the last problem") == 1
    assert "Traceback" not in output


def test_adaptive_sampling_stops_where_the_vote_is_decided(compose_config, tmp_path):
    overrides = ("evaluation.adaptive=true", "data.samples_per_problem=8",
                 "evaluation.adaptive_confidence=0.6")  # fmt: skip
    assert evaluate(compose_config(*SMALL, *overrides)) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    lines = read_samples(tmp_path / "run" / "samples.jsonl")
    drawn = [sum(line["problem"] == i for line in lines) for i in range(8)]
    assert set(drawn) <= {2, 4, 6, 8}
    assert min(drawn) < 8
    assert summary["num_samples"] == sum(drawn)
    assert summary["adaptive"]["samples_per_problem"] == sum(drawn) / 8
    assert summary["adaptive"]["saved_fraction"] == pytest.approx(1 - sum(drawn) / 64)
    assert summary["voting"]["pass_at_k"] is None
    of_problem = [
        [line["reward"] for line in lines if line["problem"] == i] for i in range(8)
    ]  # fmt: skip
    means = [sum(rewards) / len(rewards) for rewards in of_problem]
    assert summary["accuracy"] == pytest.approx(sum(means) / 8)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data with the real problems")
@pytest.mark.parametrize("name", ["math500", "amc23", "aime24"])
def test_real_problems_are_evaluated_on(compose_config, tmp_path, name):
    config = compose_config(
        "task=evaluate", "model=smollm2-135m", "data=file", f"data.path={SHARED}/{name}.jsonl",
        "data.num_held_out=null", "data.max_prompt_tokens=256", "evaluation.num_problems=3",
        "data.samples_per_problem=2", "rollout.max_response_tokens=24",
        "self_reward.c_ref=-20.0", "trainer.num_threads=1",
    )  # fmt: skip
    assert config.verifier.target.endswith("MathVerifier")
    assert evaluate(config) == 0
    lines = read_samples(tmp_path / "run" / "samples.jsonl")
    problems = [json.loads(line) for line in (SHARED / f"{name}.jsonl").read_text().splitlines()]
    answers = {str(problem["answer"]) for problem in problems}
    assert len(lines) == 6
    assert all(line["reference_answer"] in answers for line in lines)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["resume=somewhere"], "resume = somewhere: an evaluation has no checkpoints; use auto"),
        (
            ["self_reward.token=auto"],
            "self_reward.token = auto: builtin:tiny has no self_reward.json that names one",
        ),
        (["data=file", "data.path=none.jsonl"], "data.path = none.jsonl: no such file"),
        (["evaluation.num_problems=9"], "evaluation.num_problems = 9: must be at most"),
        (["data.samples_per_problem=0"], "data.samples_per_problem = 0: must be greater than 0"),
        (["evaluation.adaptive_confidence=0.4"], "must be greater than 0.5"),
    ],
)
def test_a_mistake_gets_one_line(compose_config, overrides, message):
    with pytest.raises(UserError) as caught:
        evaluate(compose_config(*SMALL, *overrides))
    assert message in str(caught.value)
