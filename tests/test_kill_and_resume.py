"""A run killed at any moment and resumed ends as one that was never killed, bit for bit."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from laser_pl.logs.metrics_file import read_metrics

ROOT = Path(__file__).parent.parent
SETTINGS = (
    "prompts_per_step=4", "rollouts_per_prompt=4", "micro_batch_size=4", "max_steps=40",
    "data.num_train=64", "data.num_held_out=8", "evaluation.num_problems=4",
    "evaluation.samples_per_problem=2", "evaluation.every_n_steps=5",
    "evaluation.interim_samples_per_problem=2", "self_reward.reasoning_warmup_steps=1",
    "self_reward.warmup_steps=1", "checkpoint.every_n_steps=2", "optimizer.lr=1.0e-3", "logger=csv",
)  # fmt: skip
# Steps whose number is drawn, and what is going on when the kill comes.
MOMENTS = ("any", "any", "partial", "any", "rollout", "partial", "any", "rollout", "any", "partial")


def start(folder: Path, log: Path) -> subprocess.Popen:
    command = [
        sys.executable,
        str(ROOT / "run.py"),
        *SETTINGS,
        f"output_dir={folder}",
        "resume=auto",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with log.open("w") as output:
        return subprocess.Popen(command, env=environment, stdout=output, stderr=output)


def last_step(folder: Path) -> int:
    path = folder / "metrics.csv"
    rows = read_metrics(path) if path.exists() else []
    return int(rows[-1]["step"]) if rows else -1


def wait_for_moment(
    process: subprocess.Popen, folder: Path, moment: str, draw: random.Random
) -> None:
    """Return at a moment: after some steps, and inside a save or at the start of a rollout."""
    first = last_step(folder)
    wanted = first + draw.randint(1, 4)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if moment == "partial" and any((folder / "checkpoints").glob(".step-*.partial")):
            return
        if moment != "partial" and last_step(folder) >= wanted:
            # A step takes about 0.1 s, of which the rollout is the first half.
            time.sleep(draw.uniform(0, 0.12) if moment == "any" else 0.02)
            return
        time.sleep(0.001 if moment == "partial" else 0.01)


def comparable(folder: Path) -> list[dict[str, str]]:
    return [
        {name: repr(value) for name, value in row.items() if not name.endswith(("_s", "per_s"))}
        for row in read_metrics(folder / "metrics.csv")
    ]


@pytest.mark.slow
def test_ten_kills_change_nothing(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(whole, tmp_path / "whole.log").wait(200) == 0
    draw = random.Random(0)
    seen_partial = 0
    for number, moment in enumerate(MOMENTS):
        log = tmp_path / f"{number}.log"
        process = start(killed, log)
        wait_for_moment(process, killed, moment, draw)
        assert process.poll() is None, log.read_text()
        process.send_signal(signal.SIGKILL)
        process.wait()
        seen_partial += any((killed / "checkpoints").glob(".step-*.partial"))
    log = tmp_path / "last.log"
    assert start(killed, log).wait(200) == 0, log.read_text()
    assert "going on from" in log.read_text()
    assert seen_partial >= 1  # a kill inside the writing of a checkpoint
    assert comparable(killed) == comparable(whole)
    for name in ("samples.jsonl", "model/model.safetensors"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    assert not list((killed / "checkpoints").glob(".step-*"))
