"""What LaSeR costs over GRPO in this code: `python benchmarks/overhead.py`.

The same runs with `self_reward=laser` (every part active from the first step) and
`self_reward=off`, in turn, several times, at a learning rate so small that both sample the same
responses. Both read the score while sampling, one decoded token a finished response. GRPO leaves
groups with equal rewards out of its update, LaSeR learns to judge from them: the difference is
shown against GRPO that updates on all groups, too. Prints the table of docs/speed.md and writes it
as JSON.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from step_times import PARTS, run_steps, save

METHODS = {
    "GRPO": ["self_reward=off"],
    "GRPO, all groups": ["self_reward=off", "training.skip_zero_advantage=false"],
    "LaSeR": ["self_reward.reasoning_warmup_steps=0", "self_reward.warmup_steps=0"],
}
MODELS = {
    "tiny": ["model=tiny", "optimizer.lr=1.0e-12"],
    "smollm2-135m": ["model=smollm2-135m", "prompts_per_step=8", "optimizer.lr=1.0e-12"],
}


def main() -> None:
    """Run both methods in turn, print the table, and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--output", type=Path, default=Path("outputs/overhead.json"))
    arguments = parser.parse_args()
    results = []
    print("| model | method | s a step | rollout | update | trained tokens a step |")
    print("| --- | --- | --- | --- | --- | --- |")
    for model in arguments.models:
        rows: dict[str, list[dict[str, float]]] = {name: [] for name in METHODS}
        for _ in range(arguments.repeats):
            for name, settings in METHODS.items():
                rows[name] += run_steps([*MODELS[model], *settings], arguments.steps)
        for name, some in rows.items():
            times = {p: statistics.median(row[f"time/{p}_s"] for row in some) for p in PARTS}
            tokens = some[1]["train/num_tokens"] - some[0]["train/num_tokens"]
            results.append({"model": model, "method": name, "tokens": tokens, **times})
            print(f"| {model} | {name} | {times['step']:.3f} | {times['rollout']:.3f} "
                  f"| {times['update']:.3f} | {tokens:.0f} |", flush=True)  # fmt: skip
        *others, laser = results[-len(METHODS) :]
        for other in others:
            change = {part: laser[part] / other[part] - 1 for part in PARTS}
            print(f"| {model} | LaSeR / {other['method']} | {change['step']:+.1%} "
                  f"| {change['rollout']:+.1%} | {change['update']:+.1%} | |",
                  flush=True)  # fmt: skip
    save(results, arguments.output)


if __name__ == "__main__":
    main()
