"""Compute what ZeRO's stages need on many GPUs: `python benchmarks/scaling_table.py`.

Prints the table of docs/scaling.md. Nothing is run, measured or downloaded: the memory is that of
laser_pl/preflight.py, the communication that of ZeRO (arXiv 1910.02054, section 7).
"""

from __future__ import annotations

from hydra import compose, initialize_config_dir

from laser_pl.cli import config_dir, to_config
from laser_pl.config import Config
from laser_pl.launch import register_resolvers
from laser_pl.preflight import Shape, Sharing, estimate_memory, model_settings, model_shape

LLAMA_70B = (
    "model.architecture={model_type: llama, hidden_size: 8192, intermediate_size: 28672, "
    "num_hidden_layers: 80, num_attention_heads: 64, num_key_value_heads: 8, vocab_size: 128256, "
    "max_position_embeddings: 8192, tie_word_embeddings: false}"
)
MODELS: dict[str, list[str]] = {"8B": [], "70B": [LLAMA_70B]}
GPUS = (8, 64, 512)
STRATEGIES = {"DDP": 0, "ZeRO-1": 1, "ZeRO-2": 2, "ZeRO-3": 3}
COLUMNS = (
    "model", "GPUs", "strategy", "weights", "gradients", "optimizer", "activations, logits", "sum",
    "sent for an update", "for rollouts",
)  # fmt: skip


def main() -> None:
    """Print the table."""
    print(table())


def table() -> str:
    """Memory and communication of a GPU in GB, as Markdown."""
    lines = [f"| {' | '.join(COLUMNS)} |", "| --- " * len(COLUMNS) + "|"]
    for model, overrides in MODELS.items():
        config = compose_recipe(overrides)
        shape = model_shape(config, model_settings(config))
        for num_gpus in GPUS:
            for strategy, stage in STRATEGIES.items():
                sharing = Sharing(stage, is_deepspeed=stage > 0, num_ranks=num_gpus, offloads=False)
                sizes = [*memory(config, shape, sharing), *communication(config, shape, sharing)]
                cells = [model, str(num_gpus), strategy, *(f"{size / 1e9:,.1f}" for size in sizes)]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def compose_recipe(overrides: list[str]) -> Config:
    """The recipe `model=llama3-8b`, with another model's shape."""
    register_resolvers()
    with initialize_config_dir(version_base="1.3", config_dir=str(config_dir())):
        return to_config(compose("config", ["model=llama3-8b", *overrides]))


def memory(config: Config, shape: Shape, sharing: Sharing) -> list[float]:
    """Bytes of a GPU: the three model states, what a micro-batch needs, and the sum.

    The recipe needs no reference. What the rollouts take comes at another time, and is not here.
    """
    parts = estimate_memory(config, shape, sharing)
    states = [parts["weights"], parts["gradients"], parts["optimizer"]]
    passing = parts["activations"] + parts["logits"]
    return [*states, passing, sum(states) + passing]


def communication(config: Config, shape: Shape, sharing: Sharing) -> list[float]:
    """Bytes that a GPU sends in a step: for the update, and to gather weights for the rollouts.

    DDP reduces gradients once, and so does ZeRO-1, which then gathers weights; ZeRO-2 scatters
    gradients in every micro-batch; ZeRO-3 gathers weights twice there as well.
    """
    # A step has the recipe's prompts, or one for each GPU if there are more GPUs.
    prompts = max(config.prompts_per_step, sharing.num_ranks)
    sequences = prompts * config.rollouts_per_prompt // sharing.num_ranks
    micro_batches = -(-sequences // config.micro_batch_size)
    passes = {0: 2, 1: 2, 2: micro_batches + 1, 3: 3 * micro_batches}[sharing.stage]
    weights = 2.0 * shape.num_parameters * (1 - 1 / sharing.num_ranks)  # bfloat16, a ring's share
    return [passes * weights, weights if sharing.stage == 3 else 0.0]


if __name__ == "__main__":
    main()
