"""A step against what this machine can do: `python benchmarks/floor.py`.

Update: 6 FLOPs a parameter of the layers and token that goes in, 6 a parameter of the output layer
and response token, and 12 * width a layer and pair of tokens that attend (forward 2, backward 4,
times 2 for scores and values), over the rate of float32 matrix products at the model's own shapes.
Rollout: each decoded step reads the weights and the cache, over the bandwidth of a copy, or makes 2
FLOPs a parameter and row, over the rate at that number of rows, whichever is longer. Prints the
table of docs/speed.md and writes it as JSON.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from step_times import medians, run_steps, save
from transformers import AutoConfig, PretrainedConfig

from laser_pl.models.loading import resolve_path

NUM_PROMPTS, GROUP_SIZE, PROMPT, NEW = 8, 8, 44, 32
MICRO_BATCH = 16


def main() -> None:
    """Measure the machine and a run, print both, and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("outputs/floor.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    model = AutoConfig.from_pretrained(resolve_path("builtin:smollm2-135m"))
    rows = NUM_PROMPTS * GROUP_SIZE
    tokens = NUM_PROMPTS * PROMPT + rows * NEW  # each prompt once
    part = tokens * MICRO_BATCH // rows
    update = flops_of_layers(model, tokens) / rate_of_layers(model, part)
    update += 6 * head(model) * rows * NEW / rate(1024, model.hidden_size, model.vocab_size)
    decode = max(
        2 * layers(model) * rows / rate_of_layers(model, rows)
        + 2 * head(model) * rows / rate(rows, model.hidden_size, model.vocab_size),
        bytes_read(model, rows) / bandwidth(),
    )
    prefill = 2 * layers(model) * NUM_PROMPTS * PROMPT / rate_of_layers(model, NUM_PROMPTS * PROMPT)
    floor = {"rollout": prefill + NEW * decode, "update": update}
    overrides = [
        "model=smollm2-135m", f"prompts_per_step={NUM_PROMPTS}", "self_reward=off",
        f"rollouts_per_prompt={GROUP_SIZE}", f"micro_batch_size={MICRO_BATCH}",
    ]  # fmt: skip
    found = medians(run_steps(overrides, arguments.steps, made_up=(PROMPT, NEW)))
    print("| part | floor, s | measured, s | times the floor |\n| --- | --- | --- | --- |")
    for name, seconds in floor.items():
        ratio = found[name] / seconds
        print(f"| {name} | {seconds:.2f} | {found[name]:.2f} | {ratio:.2f} |")
    save({"floor": floor, "measured": found}, arguments.output)


def head(model: PretrainedConfig) -> int:
    """Parameters of the output layer."""
    return int(model.hidden_size * model.vocab_size)


def shapes(model: PretrainedConfig) -> list[tuple[int, int]]:
    """Inputs and outputs of a layer's matrices."""
    width, inner = model.hidden_size, model.intermediate_size
    keys = width // model.num_attention_heads * model.num_key_value_heads
    return [(width, width), (width, keys), (width, keys), (width, width),
            (width, inner), (width, inner), (inner, width)]  # fmt: skip


def layers(model: PretrainedConfig) -> int:
    """Parameters of all layers' matrices."""
    return model.num_hidden_layers * sum(a * b for a, b in shapes(model))


def flops_of_layers(model: PretrainedConfig, tokens: int) -> float:
    """Forward and backward of the layers, attention over each sequence's earlier tokens."""
    pairs = NUM_PROMPTS * PROMPT**2 / 2 + NUM_PROMPTS * GROUP_SIZE * NEW * (PROMPT + NEW / 2)
    attention = 12 * model.hidden_size * model.num_hidden_layers * pairs
    return 6 * layers(model) * tokens + attention


def bytes_read(model: PretrainedConfig, rows: int) -> float:
    """Weights, and half the final cache on average, in float32."""
    keys = model.hidden_size // model.num_attention_heads * model.num_key_value_heads
    cache = rows * (PROMPT + NEW / 2) * model.num_hidden_layers * 2 * keys
    return 4 * (layers(model) + head(model) + cache)


def rate_of_layers(model: PretrainedConfig, rows: int) -> float:
    """FLOPs a second of a layer's matrix products over some rows."""
    seconds = sum(2 * rows * a * b / rate(rows, a, b) for a, b in shapes(model))
    return sum(2 * rows * a * b for a, b in shapes(model)) / seconds


def rate(rows: int, inputs: int, outputs: int) -> float:
    """FLOPs a second of one matrix product, the best of several."""
    x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
    return 2 * rows * inputs * outputs / best_time(lambda: torch.nn.functional.linear(x, weight))


def bandwidth() -> float:
    """Bytes a second that a sum over a large tensor reads."""
    x = torch.ones(100_000_000)
    return x.numel() * 4 / best_time(lambda: x.sum())


def best_time(function: Callable[[], object], repeats: int = 7) -> float:
    """The shortest time of several calls, in seconds."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times[1:])


if __name__ == "__main__":
    main()
