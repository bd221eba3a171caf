"""Measure a rank's memory by strategy on CPUs: `python benchmarks/zero_memory.py`.

Two steps of SmolLM2-135M (float32, prompts of 80 and responses of 16 tokens, 8 sequences a
micro-batch and rank), in one process and in two under each strategy. Prints the table of
docs/scaling.md: the peak resident memory of each rank.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = (
    "model=smollm2-135m", "max_steps=2", "prompts_per_step=2", "micro_batch_size=8", "logger=csv",
    "data.max_prompt_tokens=80", "evaluation.num_problems=2", "evaluation.samples_per_problem=1",
    "evaluation.every_n_steps=0", "trainer.num_threads=1",
)  # fmt: skip
STRATEGIES = ("ddp", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3")
# DeepSpeed's buffers are made for GPUs: 200 million numbers, more than this model has.
SMALL_BUCKETS = ("strategy.reduce_bucket_size=10000000", "strategy.allgather_bucket_size=10000000")


def main() -> None:
    """Run each case, print the table, and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("outputs/zero_memory.json"))
    parser.add_argument("--overrides", nargs="*", default=[])
    arguments = parser.parse_args()
    results = {}
    print("| strategy | peak of each rank, GB |\n| --- | --- |")
    for name in ("1 process", *STRATEGIES):
        overrides = [] if name == "1 process" else [f"strategy={name}", "trainer.devices=2"]
        buckets = SMALL_BUCKETS if "zero" in name else ()
        results[name] = peaks([*overrides, *buckets, *arguments.overrides], max(1, len(overrides)))
        sizes = ", ".join(f"{size / 1e9:.2f}" for size in results[name])
        print(f"| {name}{' x 2' if overrides else ''} | {sizes} |", flush=True)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=1))


def peaks(overrides: list[str], num_ranks: int) -> list[int]:
    """The peak resident memory of each rank of a run, in bytes, the largest first."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "run.py"), *SETTINGS, f"output_dir={folder}/run"]
        run = subprocess.Popen([*command, *overrides], stdout=subprocess.DEVNULL)
        found: dict[int, int] = {}
        while run.poll() is None:
            for process in ranks(run.pid):
                found[process.pid] = max(found.get(process.pid, 0), high_water(process.pid))
            time.sleep(0.05)
    if run.returncode != 0:
        raise SystemExit(f"{' '.join(overrides)}: the run ended with {run.returncode}")
    return sorted(found.values(), reverse=True)[:num_ranks]


def ranks(pid: int) -> list[psutil.Process]:
    """The process and those that it started with the same script, the verifier's workers aside."""
    first = psutil.Process(pid)
    return [first] + [p for p in first.children() if "run.py" in " ".join(_command(p))]


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def high_water(pid: int) -> int:
    """The peak resident memory of a process so far, in bytes; 0 once it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    line = next((line for line in status.splitlines() if line.startswith("VmHWM")), "VmHWM: 0 kB")
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
