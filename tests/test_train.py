"""Whole runs of the shipped tiny model: what they write, that they repeat, stop and resume."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from laser_pl.config import validate
from laser_pl.errors import UserError
from laser_pl.evaluate import evaluate
from laser_pl.logs.metrics_file import read_metrics
from laser_pl.logs.samples import read_samples
from laser_pl.train import train
from laser_pl.training import module as module_file
from laser_pl.training.checkpoint import CheckpointReader

SMALL = (
    "prompts_per_step=4", "rollouts_per_prompt=4", "micro_batch_size=4", "max_steps=4",
    "data.num_train=64", "data.num_held_out=8", "evaluation.num_problems=4",
    "evaluation.samples_per_problem=4", "evaluation.every_n_steps=2",
    "evaluation.interim_samples_per_problem=2", "self_reward.reasoning_warmup_steps=1",
    "self_reward.warmup_steps=1", "checkpoint.every_n_steps=2", "optimizer.lr=1.0e-3",
)  # fmt: skip
ROOT = Path(__file__).parent.parent


@pytest.fixture
def run(compose_config):
    """Train in this process; returns (exit code, folder)."""

    def call(*overrides: str) -> tuple[int, Path]:
        config = compose_config(*SMALL, "logger=csv", *overrides)
        return train(config), Path(config.output_dir)

    return call


def comparable(folder: Path) -> list[dict[str, float]]:
    """The rows of metrics.csv as text, without what depends on the clock."""
    return [
        {name: repr(value) for name, value in row.items() if not name.endswith(("_s", "per_s"))}
        for row in read_metrics(folder / "metrics.csv")
    ]


def test_a_run_writes_everything_that_it_says(run):
    code, folder = run("logger=wandb")
    assert code == 0
    expected = {
        "config.yaml", "metrics.csv", "summary.json", "samples.jsonl", "figures", "checkpoints",
        "model", "wandb", "wandb_run.json",
    }  # fmt: skip
    assert {path.name for path in folder.iterdir()} == expected
    figures = {path.name for path in (folder / "figures").iterdir()}
    names = ("training_curves", "score_histograms", "reliability", "voting")
    assert figures == {f"{name}.{kind}" for name in names for kind in ("png", "svg")}
    assert [row["step"] for row in read_metrics(folder / "metrics.csv")] == [0, 1, 2, 3, 4]
    assert list((folder / "wandb").glob("offline-run-*/run-*.wandb"))
    assert [p.name for p in sorted((folder / "checkpoints").iterdir())] == [
        "best.json", "step-000002", "step-000004",
    ]  # fmt: skip
    config = validate(yaml.safe_load((folder / "config.yaml").read_text()))
    assert config.output_dir == str(folder)


@pytest.mark.parametrize(
    "choice",
    [
        ("algorithm=dapo",),
        ("algorithm=gspo",),
        ("algorithm=cispo",),
        ("self_reward=two_token", "self_reward.incorrect_token=tiny-reserved-1"),
        ("self_reward=sft", "self_reward.incorrect_token=tiny-reserved-1"),
    ],
)
def test_what_a_choice_has_trained_is_evaluated_with_its_own_score(
    run, compose_config, tmp_path, choice
):
    code, folder = run("max_steps=2", "evaluation.every_n_steps=0", *choice)
    assert code == 0
    trained = [row for row in read_samples(folder / "samples.jsonl") if row["step"] == 2]
    held_out = [row for row in trained if row["split"] == "held_out"]
    arguments = ("task=evaluate", f"model.path={folder}/model", f"output_dir={tmp_path}/again")
    assert evaluate(compose_config(*SMALL, *arguments)) == 0
    again = read_samples(tmp_path / "again" / "samples.jsonl")
    assert len(again) == len(held_out) == 16
    assert all(math.isfinite(row["score"]) for row in again)
    if choice[0].startswith("self_reward="):  # probabilities, of two tokens or of one
        assert all(0 <= row["score"] <= 1 for row in [*again, *held_out])


def test_the_summary_has_what_the_run_was_for(run):
    _, folder = run()
    summary = json.loads((folder / "summary.json").read_text())
    measures = {"f1", "accuracy", "accuracy_on_correct", "accuracy_on_incorrect", "auroc"}
    assert measures <= set(summary["self_verification"])
    assert measures <= set(summary["self_verification_before"])
    assert {"k", "majority", "weighted", "best_of", "pass_at_k"} <= set(summary["voting"])
    assert summary["voting"]["k"] == 4
    assert summary["special_token"] == "<|reserved_0|>"
    assert (summary["steps"], summary["seed"]) == (4, 0)
    assert 0 <= summary["partition_excess"] < 0.05
    assert summary["c_ref"] < -5
    assert summary["c_ref_std"] > 0
    assert summary["interrupted"] is False
    rows = read_metrics(folder / "metrics.csv")
    assert summary["accuracy_before"] == rows[0]["held_out/accuracy"]
    assert summary["accuracy"] == rows[-1]["held_out/accuracy"]
    assert summary["num_tokens"] == rows[-1]["train/num_tokens"]
    tokens = sum(round(16 * row["rollout/response_tokens_mean"]) for row in rows[1:])
    assert summary["num_tokens"] == tokens
    assert {"rollout", "verify", "update", "calibrate", "evaluate", "total"} == set(summary["time"])


def test_samples_have_verdict_score_and_advantage(run):
    _, folder = run()
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    held_out = [line for line in lines if line["split"] == "held_out"]
    assert {line["step"] for line in held_out} == {0, 4}
    assert len(held_out) == 2 * 4 * 4
    train_lines = [line for line in lines if line["split"] == "train"]
    assert {line["step"] for line in train_lines} == {1, 2, 3, 4}
    for line in lines:
        assert line["reward"] in (0.0, 1.0)
        assert (line["reward"] == 1.0) <= (line["answer"] == line["reference_answer"])
        assert line["finished"] or line["score"] == 0
        assert (line["advantage"] is None) == (line["split"] == "held_out")


def test_held_out_problems_are_not_trained_on(run):
    _, folder = run()
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    prompts = {
        split: {line["prompt"] for line in lines if line["split"] == split}
        for split in ("train", "held_out")
    }
    assert len(prompts["held_out"]) == 4
    assert not prompts["train"] & prompts["held_out"]


def test_the_model_folder_holds_the_trained_weights(run):
    _, folder = run()
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    checkpoint = CheckpointReader(folder / "checkpoints" / "step-000004")
    for name in checkpoint.weight_names:
        assert torch.equal(model.state_dict()[name], checkpoint.weight(name))
    facts = json.loads((folder / "model" / "self_reward.json").read_text())
    assert tokenizer.convert_ids_to_tokens(facts["token_id"]) == facts["special_token"]
    summary = json.loads((folder / "summary.json").read_text())
    assert facts["c_ref"] == summary["c_ref"]


def test_rollouts_come_from_the_weights_that_the_step_updates(run):
    _, folder = run("optimizer.lr=1.0e-3", "optimizer.schedule=constant")
    rows = read_metrics(folder / "metrics.csv")[1:]
    assert all(row["rollout/logprob_gap_mean"] < 1e-4 for row in rows)
    # The updates move the weights far more than that, so stale rollouts would show.
    first, last = (CheckpointReader(folder / "checkpoints" / f"step-{step:06d}") for step in (2, 4))
    moved = [(first.weight(n) - last.weight(n)).abs().max() for n in first.weight_names]
    assert float(max(moved)) > 1e-3


def test_the_same_seed_gives_the_same_bits_and_another_does_not(run, tmp_path):
    folders = [
        run(f"output_dir={tmp_path}/{name}", f"seed={seed}")[1]
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    first, again, other = (comparable(folder) for folder in folders)
    assert first == again
    assert first != other
    a, b = (folder / "model" / "model.safetensors" for folder in folders[:2])
    assert a.read_bytes() == b.read_bytes()


@pytest.mark.parametrize(
    "extra",
    [
        (),
        ("algorithm.kl_coef=0.1", "self_reward.c_ref=model"),
        # Steps of different numbers of micro-batches: cut by tokens, and groups left out.
        ("self_reward=off", "training.max_tokens_per_micro_batch=200"),
    ],
    ids=["laser", "reference", "by tokens"],
)
def test_a_resumed_run_ends_with_the_same_bits(run, tmp_path, extra):
    _, whole = run(f"output_dir={tmp_path}/whole", *extra)
    _, part = run(f"output_dir={tmp_path}/part", "max_steps=4", *extra)
    # As if killed after step 3: what was written after the checkpoint of step 2 is there, too.
    shutil.rmtree(part / "checkpoints" / "step-000004")
    code, resumed = run(f"output_dir={part}", "resume=auto", *extra)
    assert code == 0
    assert comparable(whole) == comparable(resumed)
    for name in ("samples.jsonl", "model/model.safetensors"):
        assert (whole / name).read_bytes() == (resumed / name).read_bytes()


def test_grpo_leaves_groups_without_signal_out_and_learns_the_same(run, tmp_path):
    _, skipping = run(f"output_dir={tmp_path}/a", "self_reward=off")
    _, whole = run(
        f"output_dir={tmp_path}/b", "self_reward=off", "training.skip_zero_advantage=false"
    )
    found, expected = (read_metrics(folder / "metrics.csv")[1:] for folder in (skipping, whole))
    shares = [row["train/skipped_fraction"] for row in found]
    assert {row["train/skipped_fraction"] for row in expected} == {0.0}
    # The first step's rollouts are the same.
    assert shares[0] == expected[0]["rollout/zero_signal_groups_fraction"]
    assert max(shares) > 0
    for row, other in zip(found, expected, strict=True):
        assert row["train/grad_norm"] == pytest.approx(other["train/grad_norm"], rel=1e-3)
        assert row["train/num_tokens"] == other["train/num_tokens"]


def test_a_finished_run_can_be_made_longer(run, tmp_path):
    constant = ("optimizer.schedule=constant",)
    _, whole = run(f"output_dir={tmp_path}/whole", "max_steps=6", *constant)
    _, part = run(f"output_dir={tmp_path}/part", "max_steps=4", *constant)
    run(f"output_dir={part}", "max_steps=6", "resume=auto", *constant)
    weights = [folder / "model" / "model.safetensors" for folder in (whole, part)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_resuming_a_finished_run_changes_nothing(run, tmp_path):
    _, folder = run(f"output_dir={tmp_path}/done")
    before = comparable(folder)
    summary = json.loads((folder / "summary.json").read_text())
    code, _ = run(f"output_dir={tmp_path}/done", "resume=auto")
    assert code == 0
    assert comparable(folder) == before
    again = json.loads((folder / "summary.json").read_text())
    assert summary | {"time": None} == again | {"time": None}


def test_resume_auto_after_a_crash_before_any_checkpoint_starts_anew(run, tmp_path):
    _, whole = run(f"output_dir={tmp_path}/whole")
    _, part = run(f"output_dir={tmp_path}/part")
    shutil.rmtree(part / "checkpoints")
    code, _ = run(f"output_dir={part}", "resume=auto")
    assert code == 0
    assert comparable(part) == comparable(whole)
    assert (part / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()


def test_a_damaged_checkpoint_is_told_and_the_one_before_used(run, tmp_path, capsys):
    _, whole = run(f"output_dir={tmp_path}/whole")
    _, part = run(f"output_dir={tmp_path}/part")
    newest = part / "checkpoints" / "step-000004"
    weights = newest / "weights-00000.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    capsys.readouterr()
    run(f"output_dir={part}", "resume=auto")
    output = " ".join(capsys.readouterr().out.split())
    assert "step-000004: is damaged (weights-00000.safetensors has 5000 bytes of" in output
    assert "going on from" in output and "step-000002" in output
    assert comparable(part) == comparable(whole)
    (newest / "trainer.ckpt").unlink()
    with pytest.raises(UserError, match="is damaged"):
        run(f"output_dir={tmp_path}/new", f"resume={newest}")


def test_a_run_is_not_resumed_with_another_configuration(run, tmp_path):
    _, folder = run(f"output_dir={tmp_path}/run")
    before = (folder / "config.yaml").read_text()
    with pytest.raises(UserError, match=r"\(seed = 0 there, 1 here, self_reward.token = .* here\)"):
        run(f"output_dir={folder}", "resume=auto", "seed=1", "self_reward.token=tiny-reserved-1")
    assert (folder / "config.yaml").read_text() == before
    checkpoint = folder / "checkpoints" / "step-000002"
    with pytest.raises(
        UserError, match=r"seed = 0 there, 1 here\); give the same, .* resume_force"
    ):
        run(f"output_dir={tmp_path}/other", f"resume={checkpoint}", "seed=1")


def test_another_configuration_can_be_forced(run, tmp_path, capsys):
    _, folder = run(f"output_dir={tmp_path}/run")
    code, _ = run(
        f"output_dir={folder}", "resume=auto", "optimizer.lr=1.0e-4", "max_steps=5",
        "resume_force=true",
    )  # fmt: skip
    assert code == 0
    assert "optimizer.lr = 0.001 there, 0.0001 here" in " ".join(capsys.readouterr().out.split())
    assert json.loads((folder / "summary.json").read_text())["steps"] == 5


def test_a_run_goes_on_from_another_runs_checkpoint(run, tmp_path):
    _, whole = run(f"output_dir={tmp_path}/whole")
    checkpoint = whole / "checkpoints" / "step-000002"
    _, other = run(f"output_dir={tmp_path}/other", f"resume={checkpoint}")
    one, two = (folder / "model" / "model.safetensors" for folder in (whole, other))
    assert one.read_bytes() == two.read_bytes()
    assert [row["step"] for row in read_metrics(other / "metrics.csv")] == [3, 4]


def test_a_resumed_run_is_the_same_wandb_run(run, tmp_path):
    arguments = (f"output_dir={tmp_path}/run", "logger=wandb", "optimizer.schedule=constant")
    run(*arguments, "max_steps=2")
    first = json.loads((tmp_path / "run" / "wandb_run.json").read_text())["id"]
    run(*arguments, "max_steps=3", "resume=auto")
    assert json.loads((tmp_path / "run" / "wandb_run.json").read_text())["id"] == first
    folders = list((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert len(folders) >= 1
    assert all(folder.name.endswith(first) for folder in folders)


def test_resume_auto_starts_anew_where_there_is_nothing(run):
    code, folder = run("resume=auto")
    assert code == 0
    assert (folder / "summary.json").is_file()


def test_a_step_with_a_loss_that_is_not_finite_is_skipped_and_counted(run, monkeypatch):
    break_losses(monkeypatch, steps={2})
    code, folder = run()
    assert code == 0
    rows = read_metrics(folder / "metrics.csv")
    assert [row["train/bad_steps"] for row in rows[1:]] == [0, 1, 1, 1]
    assert math.isfinite(rows[-1]["train/loss"])


def test_weights_that_are_not_finite_end_the_run_with_what_there_is(run, capsys):
    code, folder = run("optimizer.lr=1.0e10")
    assert code == 1
    assert "weights that are not finite" in capsys.readouterr().out
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] < 4
    assert not (folder / "model").exists()


def test_too_many_bad_steps_end_the_run_with_a_checkpoint(run, monkeypatch, capsys):
    break_losses(monkeypatch, steps={2, 3})
    code, folder = run("trainer.max_bad_steps=1")
    assert code == 1
    assert "trainer.max_bad_steps" in capsys.readouterr().out
    assert (folder / "checkpoints" / "step-000003").is_dir()
    assert json.loads((folder / "summary.json").read_text())["steps"] == 3


def break_losses(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Make the policy loss of some steps NaN, as an overflow would."""
    whole = module_file.LaserModule.training_step

    def broken(self, batch, batch_idx):
        loss = whole(self, batch, batch_idx)
        return loss * math.nan if self.step in steps else loss

    monkeypatch.setattr(module_file.LaserModule, "training_step", broken)


@pytest.mark.parametrize(
    ("number", "devices"),
    [(signal.SIGINT, 1), (signal.SIGTERM, 1), (signal.SIGUSR1, 1), (signal.SIGUSR1, 2)],
)
def test_a_signal_saves_tells_and_says_so_in_the_exit_code_and_the_run_goes_on(
    tmp_path, number, devices
):
    folder = tmp_path / "run"
    command = [
        sys.executable, str(ROOT / "run.py"), *SMALL, "logger=csv", "max_steps=400",
        f"output_dir={folder}", f"trainer.devices={devices}",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    wait_for_step(folder / "metrics.csv", 3)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert "interrupted" in output
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["interrupted"] is True
    assert (folder / "model" / "self_reward.json").is_file()
    # What was not measured since the first step is not shown as measured.
    assert (summary["evaluated_at_step"] is None) == ("accuracy" not in summary)
    assert (folder / "checkpoints" / f"step-{summary['steps']:06d}").is_dir()
    steps = summary["steps"]
    resumed = subprocess.run(
        [*command, "resume=auto", f"max_steps={steps + 2}"], env=environment, timeout=120
    )
    assert resumed.returncode == 0
    rows = read_metrics(folder / "metrics.csv")
    assert [row["step"] for row in rows] == list(range(steps + 3))


def wait_for_step(path: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if path.exists() and any(row["step"] >= step for row in read_metrics(path)):
            return
        time.sleep(0.1)
    raise TimeoutError(f"no step {step} in {path}")


def test_a_verifier_that_fails_on_one_rank_ends_all_with_its_message(tmp_path):
    (tmp_path / "picky.py").write_text(
        "import os\n"
        "def check(problem, response):\n"
        "    if os.environ.get('LOCAL_RANK') == '1':\n"
        "        raise ValueError('not here')\n"
        "    return 0.0\n"
    )
    command = [
        sys.executable, str(ROOT / "run.py"), *SMALL, "logger=csv", "trainer.devices=2",
        "verifier._target_=picky.check", "evaluation.every_n_steps=0", f"output_dir={tmp_path}/run",
        "self_reward.c_ref=-21.0", "evaluation.num_problems=1",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode != 0
    assert "ValueError: not here; verifier.on_error=zero would go on" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_multirun_on_several_devices_is_refused(tmp_path):
    command = [
        sys.executable, str(ROOT / "run.py"), "--multirun", "seed=0", "trainer.devices=2",
        f"hydra.sweep.dir={tmp_path}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert "trainer.devices = 2: a --multirun starts no further processes" in done.stderr


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_lower_precisions_train(run, precision):
    code, folder = run(f"trainer.precision={precision}", "max_steps=2")
    assert code == 0
    rows = read_metrics(folder / "metrics.csv")[1:]
    # Sampling and training forward round alike: bfloat16 has three digits.
    assert all(row["rollout/logprob_gap_mean"] < 0.05 for row in rows)
    assert all(math.isfinite(row["train/grad_norm"]) for row in rows)


def test_a_multirun_over_two_axes_makes_a_run_a_point_that_compare_reads(tmp_path):
    def run(*arguments):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
        command = [sys.executable, str(ROOT / "run.py"), *arguments]
        done = subprocess.run(
            command, env=environment, cwd=tmp_path, timeout=400, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    out = run("--multirun", *SMALL, "max_steps=1", "self_reward.alpha=0,0.1", "seed=1,2")
    summaries = sorted(tmp_path.glob("multirun/*/*/*/summary.json"))
    assert [path.parent.name for path in summaries] == ["0", "1", "2", "3"]
    found = [json.loads(path.read_text()) for path in summaries]
    assert [summary["seed"] for summary in found] == [1, 2, 1, 2]
    for path in summaries:
        (offline,) = (path.parent / "wandb").glob("offline-run-*")
        assert out.count(f"wandb sync {offline}") == 1
    run("task=compare", "runs=multirun", "output_dir=compared")
    rows = json.loads((tmp_path / "compared" / "comparison.json").read_text())
    assert [(row["settings"], row["seeds"]) for row in rows] == [
        ({"self_reward.alpha": 0.0}, [1, 2]), ({"self_reward.alpha": 0.1}, [1, 2])
    ]  # fmt: skip
    accuracies = [summary["accuracy"] for summary in found]
    means = [row["accuracy"]["mean"] for row in rows]
    assert means == pytest.approx([sum(accuracies[:2]) / 2, sum(accuracies[2:]) / 2])


def test_a_job_of_a_multirun_that_fails_leaves_the_next_a_wandb_run_of_its_own(tmp_path):
    command = [
        sys.executable, str(ROOT / "run.py"), "--multirun", *SMALL, "max_steps=1",
        "self_reward.beta=0.03,0.5", f"hydra.sweep.dir={tmp_path}/sweep",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    done = subprocess.run(command, env=environment, timeout=240, capture_output=True, text=True)
    assert done.returncode == 2
    assert "self_reward.beta = 0.03 does not fit" in done.stderr
    for job in (0, 1):
        assert len(list((tmp_path / "sweep" / str(job) / "wandb").glob("offline-run-*"))) == 1
    assert (tmp_path / "sweep" / "1" / "summary.json").is_file()


def test_two_ranks_make_one_run(tmp_path):
    folder = tmp_path / "two"
    command = [
        sys.executable, str(ROOT / "run.py"), *SMALL, "logger=csv", "max_steps=1",
        f"output_dir={folder}", "trainer.devices=2", "trainer.accelerator=cpu",
    ]  # fmt: skip
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=180, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("batch: 4 prompts x 4 rollouts") == 1
    assert "2 micro-batches x 4 x 2 ranks" in done.stdout
    rows = read_metrics(folder / "metrics.csv")
    assert [row["step"] for row in rows] == [0, 1]
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    # Every held-out problem once, whichever rank had it.
    after = [line["problem"] for line in lines if line["split"] == "held_out" and line["step"] == 1]
    assert sorted(after) == sorted([0, 1, 2, 3] * 4)
    assert (folder / "model" / "model.safetensors").is_file()


def test_tensorboard_gets_the_metrics(run):
    _, folder = run("logger=tensorboard", "max_steps=1")
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    (point,) = events.Scalars("rollout/reward_mean")
    rows = read_metrics(folder / "metrics.csv")
    assert point.step == 1
    assert point.value == pytest.approx(rows[1]["rollout/reward_mean"])


def test_a_beta_that_does_not_fit_the_measured_token_is_refused(run):
    with pytest.raises(UserError, match=r"self_reward.beta = 0.03 does not fit a token"):
        run("self_reward.beta=0.03")


def test_responses_that_never_finish_are_told_before_the_first_step(run):
    with pytest.raises(UserError, match=r"rollout.max_response_tokens = 2: none of 16 responses"):
        run("rollout.max_response_tokens=2")


def test_a_failing_verifier_names_the_problem_and_its_message(run, monkeypatch, tmp_path):
    (tmp_path / "strict.py").write_text(
        "def check(problem, response):\n    raise ValueError('no units')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    verifier = "verifier._target_=strict.check"
    with pytest.raises(UserError, match=r"problem \d+: ValueError: no units"):
        run(verifier, f"output_dir={tmp_path}/stop")
    _, folder = run(verifier, "verifier.on_error=zero", f"output_dir={tmp_path}/zero")
    rows = read_metrics(folder / "metrics.csv")[1:]
    assert all(row["rollout/reward_mean"] == 0 for row in rows)
    assert rows[-1]["verifier/errors"] >= 16 * 4


def test_evaluating_the_exported_model_reads_its_own_score(run, compose_config, tmp_path):
    _, folder = run()
    config = compose_config(
        *SMALL, "task=evaluate", f"model.path={folder}/model", f"output_dir={tmp_path}/evaluated"
    )
    assert evaluate(config) == 0
    trained = json.loads((folder / "summary.json").read_text())
    summary = json.loads((tmp_path / "evaluated" / "summary.json").read_text())
    for name in ("c_ref", "token_id", "beta", "special_token"):
        assert summary[name] == trained[name]
    assert summary["num_samples"] == 16
    names = {path.name for path in (tmp_path / "evaluated").iterdir()}
    assert names == {"config.yaml", "summary.json", "samples.jsonl", "figures"}


def test_over_long_prompts_are_dropped_with_a_line_that_says_how_many(run, capsys):
    # Prompts of 4 terms have 9 tokens, those of 5 and 6 terms more.
    code, _ = run("data.max_prompt_tokens=10", "max_steps=1", "data.num_held_out=24")
    assert code == 0
    text = " ".join(capsys.readouterr().out.split())
    found = re.search(
        r"data: dropped (\d+) of 64 training problems: their prompts are longer", text
    )
    assert found is not None
    assert 20 < int(found[1]) < 60


def test_no_reference_is_kept_and_the_log_says_what_that_saves(run, capsys):
    run("max_steps=1")
    size = 935_040 * 4 / 1e6
    assert f"none is kept: {size:.1f} MB given back on each rank" in capsys.readouterr().out
    run("max_steps=1", "algorithm.kl_coef=0.1", "resume_force=true", "resume=auto")
    assert "none is kept" not in capsys.readouterr().out


def test_updates_that_bfloat16_rounds_away_are_warned_of(run, tmp_path):
    small = ("max_steps=1", "trainer.precision=bf16-true")
    with pytest.warns(UserWarning, match="optimizer.lr = 1e-08: too small for weights in bfloat16"):
        run(*small, "optimizer.lr=1.0e-8", f"output_dir={tmp_path}/small")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run("max_steps=1", "optimizer.lr=1.0e-8", f"output_dir={tmp_path}/float32")


@pytest.mark.parametrize("keep", ["keep", "release"])
def test_two_ranks_of_zero_3_make_the_run_of_ddp(tmp_path, keep):
    shard = "strategy.extra_config.zero_optimization.stage3_param_persistence_threshold=0"
    rows = []
    for strategy in (("ddp",), ("deepspeed_zero3", f"rollout.gathered_weights={keep}", shard)):
        folder = tmp_path / strategy[0]
        command = [
            sys.executable, str(ROOT / "run.py"), *SMALL, "logger=csv", "trainer.devices=2",
            f"strategy={strategy[0]}", *strategy[1:], f"output_dir={folder}",
        ]  # fmt: skip
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, timeout=240, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        rows.append(read_metrics(folder / "metrics.csv"))
    for ddp, zero in zip(*rows, strict=True):
        for name in ("train/loss", "train/grad_norm", "held_out/accuracy", "rollout/reward_mean"):
            assert zero.get(name, 0.0) == pytest.approx(ddp.get(name, 0.0), rel=1e-3, abs=1e-5)
