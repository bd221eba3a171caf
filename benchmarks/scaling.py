"""What a step costs by rollouts, length and ranks: `python benchmarks/scaling.py`.

The tiny model, 8 prompts of 44 tokens a step; one number varies at a time. Ranks have a thread
each. Prints the table of docs/speed.md and writes it as JSON.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from step_times import medians, run_steps, save

# (rollouts a prompt, new tokens, ranks)
CASES = (
    (4, 64, 1), (8, 64, 1), (16, 64, 1), (32, 64, 1),
    (8, 32, 1), (8, 128, 1), (8, 256, 1),
    (8, 64, 2), (32, 64, 2),
)  # fmt: skip


def main() -> None:
    """Run every case, print the table, and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--output", type=Path, default=Path("outputs/scaling.json"))
    arguments = parser.parse_args()
    results: list[dict[str, Any]] = []
    print("| rollouts a prompt | new tokens | ranks | s a step | rollout | update | tokens/s |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for rollouts, new, ranks in CASES:
        times = medians(
            run_steps(
                [
                    "model=tiny", "prompts_per_step=8", f"rollouts_per_prompt={rollouts}",
                    f"micro_batch_size={min(64, 8 * rollouts // ranks)}",
                    f"trainer.devices={ranks}",
                ],
                arguments.steps,
                made_up=(44, new),
                threads=1,
            )
        )  # fmt: skip
        rate = 8 * rollouts * new / times["step"]
        results.append({"rollouts": rollouts, "new": new, "ranks": ranks, **times})
        print(f"| {rollouts} | {new} | {ranks} | {times['step']:.3f} | {times['rollout']:.3f} "
              f"| {times['update']:.3f} | {rate:,.0f} |", flush=True)  # fmt: skip
    save(results, arguments.output)


if __name__ == "__main__":
    main()
