"""What the benchmarks share: runs of `python run.py` on made-up prompts, and their times a step."""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

from laser_pl.data.problem import Problem
from laser_pl.logs.metrics_file import read_metrics

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("rollout", "update", "step")


def reward(problem: Problem, response: str) -> float:
    """A coin that the response throws: what is learned does not matter to the time."""
    return float(zlib.crc32(response.encode()) & 1)


def make_prompts(num_tokens: int, number: int) -> list[str]:
    """Lines of JSON with strings of digits: one token a digit in both models."""
    generator = random.Random(0)
    texts = ["".join(generator.choices("123456789", k=num_tokens)) for _ in range(number)]
    return [json.dumps({"problem": text, "answer": "1"}) + "\n" for text in texts]


def run_steps(
    overrides: list[str],
    steps: int,
    made_up: tuple[int, int] | None = None,
    threads: int = 2,
    warm_up: int = 1,
) -> list[dict[str, float]]:
    """Metrics of a run's steps.

    Args:
        overrides: model, batch sizes, method.
        steps: that are returned.
        made_up: tokens of made-up prompts and of responses to them, EOS suppressed so that all are
            as long; None takes the model's own task.
        threads: of each process.
        warm_up: steps before them, which are left out.
    """
    with tempfile.TemporaryDirectory() as folder:
        data: list[str] = []
        if made_up is not None:
            prompts = Path(folder) / "prompts.jsonl"
            prompts.write_text("".join(make_prompts(made_up[0], 256)))
            data = _same_length(prompts, *made_up)
        command = [
            sys.executable, str(ROOT / "run.py"), *overrides, *data, "self_reward.c_ref=-16.0",
            "evaluation.num_problems=1", "evaluation.samples_per_problem=1",
            "evaluation.interim_samples_per_problem=1", "evaluation.every_n_steps=0",
            "checkpoint.every_n_steps=0", "logger=csv", f"max_steps={warm_up + steps}",
            f"output_dir={folder}/run",
        ]  # fmt: skip
        environment = os.environ | {
            "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT / "benchmarks"),
        }  # fmt: skip
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-3000:]}")
        return read_metrics(Path(folder) / "run" / "metrics.csv")[1 + warm_up :]


def _same_length(prompts: Path, prompt_tokens: int, new_tokens: int) -> list[str]:
    return [
        "data=file", f"data.path={prompts}", "data.template=plain",
        "data.instruction='{problem}'", "data.system_prompt=null",
        "data.num_held_out=8", "data.num_train=null", f"data.max_prompt_tokens={prompt_tokens}",
        "verifier=exact", "verifier._target_=step_times.reward", "verifier.num_workers=0",
        f"rollout.max_response_tokens={new_tokens}", f"rollout.min_response_tokens={new_tokens}",
        "optimizer=adamw", "optimizer.lr=1.0e-6",
    ]  # fmt: skip


def medians(rows: list[dict[str, float]]) -> dict[str, float]:
    """The median seconds of a step and of its parts."""
    return {part: statistics.median(row[f"time/{part}_s"] for row in rows) for part in PARTS}


def save(results: object, path: Path) -> None:
    """Write a benchmark's results as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1))
