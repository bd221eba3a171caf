"""Time a step against TRL's GRPOTrainer: `pip install trl==1.16.0 && python benchmarks/vs_trl.py`.

Both train the same model in float32 on the same prompts with GRPO, 8 prompts x 8 responses a step,
AdamW, and two threads. EOS is suppressed, so that both make and train on the same number of tokens.
TRL runs as it comes ("plain"), and with settings that suit a CPU ("tuned": no gradient
checkpointing, larger micro-batches). One after the other, each in a process of its own; the first
step of each is not counted (--warm-up). Prints the table of docs/speed.md and writes it as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

from step_times import PARTS, make_prompts, medians, run_steps, save

from laser_pl.models.loading import resolve_path

NUM_PROMPTS, GROUP_SIZE = 8, 8
MODELS = {"smollm2-135m": "builtin:smollm2-135m", "tiny": "builtin:tiny"}
# Sequences of a forward and backward; TRL plain keeps its default of 8.
MICRO_BATCH = {"smollm2-135m": 16, "tiny": 64}
SYSTEMS = ("laser_pl", "TRL tuned", "TRL plain")
# Seconds of a step's parts, and of the whole.
Times = dict[str, float]


def main() -> None:
    """Run every case, print the table, and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[44, 200])
    parser.add_argument("--new-tokens", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=list(SYSTEMS))
    parser.add_argument("--steps", type=int, default=2, help="counted steps")
    parser.add_argument("--warm-up", type=int, default=1, help="steps before them")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("outputs/vs_trl.json"))
    parser.add_argument("--trl", choices=["plain", "tuned"], help=argparse.SUPPRESS)
    parser.add_argument("--prompts", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.trl:
        return run_trl(arguments)
    results = []
    print("| model | prompt + new | system | s a step | rollout | update | times ours |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for model in arguments.models:
        for num_new in arguments.new_tokens:
            for num_prompt in arguments.prompt_tokens:
                ours = None
                for system in arguments.systems:
                    case = {"model": model, "prompt": num_prompt, "new": num_new, "system": system}
                    times = measure(case, arguments)
                    results.append(case | times)
                    ours = ours or times["step"]
                    print(f"| {model} | {num_prompt} + {num_new} | {system} | {times['step']:.2f} "
                          f"| {times['rollout']:.2f} | {times['update']:.2f} "
                          f"| {times['step'] / ours:.2f} |", flush=True)  # fmt: skip
                    save(results, arguments.output)


def measure(case: dict[str, Any], arguments: argparse.Namespace) -> Times:
    """The median times of a step of one system on one case."""
    if case["system"] == "laser_pl":
        overrides = [
            f"model={case['model']}", "self_reward=off", f"prompts_per_step={NUM_PROMPTS}",
            f"rollouts_per_prompt={GROUP_SIZE}", f"micro_batch_size={MICRO_BATCH[case['model']]}",
        ]  # fmt: skip
        made_up = (case["prompt"], case["new"])
        return medians(
            run_steps(overrides, arguments.steps, made_up, arguments.threads, arguments.warm_up)
        )
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "prompts.jsonl"
        prompts.write_text("".join(make_prompts(case["prompt"], 256)))
        command = [
            sys.executable, __file__, "--trl", case["system"].removeprefix("TRL "),
            "--models", case["model"], "--prompts", str(prompts),
            "--new-tokens", str(case["new"]), "--steps", str(arguments.steps + arguments.warm_up),
            "--threads", str(arguments.threads), "--output", f"{folder}/times.json",
        ]  # fmt: skip
        environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-3000:]}")
        steps = json.loads(Path(folder, "times.json").read_text())[arguments.warm_up :]
    return {part: statistics.median(step[part] for step in steps) for part in PARTS}


def run_trl(arguments: argparse.Namespace) -> None:
    """Train with TRL, and write the seconds of each step's parts."""
    import torch
    import transformers
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(arguments.threads)
    (name,), (num_new,) = arguments.models, arguments.new_tokens
    folder = resolve_path(MODELS[name])
    lines = arguments.prompts.read_text().splitlines()
    number = NUM_PROMPTS * GROUP_SIZE
    size = 8 if arguments.trl == "plain" else MICRO_BATCH[name]
    tuned = {} if arguments.trl == "plain" else {"gradient_checkpointing": False}
    settings = GRPOConfig(
        output_dir=str(arguments.output.parent / "trl"), use_cpu=True, bf16=False,
        per_device_train_batch_size=size, gradient_accumulation_steps=number // size,
        num_generations=GROUP_SIZE, max_completion_length=num_new,
        generation_kwargs={"min_new_tokens": num_new}, learning_rate=1e-6,
        max_steps=arguments.steps, report_to="none", save_strategy="no", logging_steps=1,
        optim="adamw_torch", disable_tqdm=True, **tuned,
    )  # fmt: skip
    times: list[Times] = []

    class Timed(GRPOTrainer):
        """Notes when the rollouts of a step are made."""

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            start = time.perf_counter()
            outputs = super()._generate_and_score_completions(inputs)
            times[-1]["rollout"] = time.perf_counter() - start
            return outputs

    class Clock(transformers.TrainerCallback):
        """Notes when a step begins and ends."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            times.append({"step": -time.perf_counter()})

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times[-1]["step"] += time.perf_counter()
            times[-1]["update"] = times[-1]["step"] - times[-1]["rollout"]

    def coin(completions: list[str], **_: Any) -> list[float]:
        return [float(zlib.crc32(text.encode()) & 1) for text in completions]

    trainer = Timed(
        model=transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder),
        reward_funcs=coin,
        args=settings,
        train_dataset=Dataset.from_list([{"prompt": json.loads(x)["problem"]} for x in lines]),
        callbacks=[Clock()],
    )
    trainer.train()
    arguments.output.write_text(json.dumps(times))


if __name__ == "__main__":
    main()
