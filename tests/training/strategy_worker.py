"""One training step of the tiny model on given rollouts, under each strategy; run by torchrun.

Usage: strategy_worker.py FOLDER STRATEGY:NUM_MICRO_BATCHES ...
Writes FOLDER/STRATEGY-NUM_MICRO_BATCHES.pt with the gradient norm and the updated weights.
"""

import os
import sys
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from lightning.pytorch import Callback, Trainer

from laser_pl.cli import config_dir, to_config
from laser_pl.config import Config
from laser_pl.data.datamodule import PromptDataModule
from laser_pl.distributed import rank, world_size
from laser_pl.models.gathered import gathered
from laser_pl.models.loading import load_policy
from laser_pl.rollout.batch import RolloutBatch, pad_rollouts
from laser_pl.rollout.engine import Rollout
from laser_pl.rollout.micro_batches import deal_groups, make_plan
from laser_pl.rollout.scoring import add_advantages, add_class_weights, step_totals
from laser_pl.training.module import LaserModule
from laser_pl.training.strategy import build_strategy, zero3_config

NUM_GROUPS, GROUP_SIZE, EOS, SCORE_TOKEN = 8, 4, 1, 2
# ZeRO-3 keeps small parameters whole, which all of the tiny model's would be.
SHARD_ALL = "++strategy.extra_config.zero_optimization.stage3_param_persistence_threshold=0"


def make_rollouts() -> RolloutBatch:
    """Rollouts of very different lengths, about a quarter truncated, the same on every rank."""
    generator = torch.Generator().manual_seed(0)

    def draw(low: int, high: int, count: int) -> list[int]:
        return torch.randint(low, high, (count,), generator=generator).tolist()

    prompts = [tuple(draw(5, 40, length)) for length in draw(2, 9, NUM_GROUPS)]
    rollouts = []
    for row, length in enumerate(draw(1, 30, NUM_GROUPS * GROUP_SIZE)):
        ids = draw(5, 40, length)
        if row % 4:
            ids[-1] = EOS
        rollouts.append(
            Rollout(
                row // GROUP_SIZE, tuple(ids), (0.0,) * length, "eos" if row % 4 else "length", -9.0
            )
        )
    batch = pad_rollouts(rollouts, prompts, pad_token_id=0)
    batch.rewards = torch.tensor(draw(0, 2, len(batch)), dtype=torch.float32)
    batch.c_ref = torch.full((len(batch),), -9.0)
    batch.reference_logprobs = torch.where(batch.response_mask, -2.0, 0.0)
    return batch


class GivenRollouts(Callback):
    """Hands this rank's share of the rollouts to the loop, as the rollout callback would."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LaserModule) -> None:
        share = NUM_GROUPS * GROUP_SIZE // world_size()
        batch = make_rollouts().select(torch.arange(share) + rank() * share)
        add_advantages(batch, self.config, step=1)
        add_class_weights(batch)
        if self.config.training.max_tokens_per_micro_batch is not None:
            batch = deal_groups(batch, torch.ones(len(batch), dtype=torch.bool))
        plan = make_plan(batch, self.config, pl_module.policy.config)
        trainer.datamodule.loader.put([batch.select(rows) for rows in plan.parts], trainer)
        pl_module.begin_step(step_totals(batch, batch, len(plan.parts)), plan.layout)


def one_step(config: Config) -> dict[str, object]:
    strategy = build_strategy(config)
    module = LaserModule(
        lambda: load_policy(config.model, zero3_config(strategy)), SCORE_TOKEN, config.algorithm,
        config.self_reward, config.optimizer, temperature=0.7, max_steps=10,
    )  # fmt: skip
    data = PromptDataModule([], [], NUM_GROUPS, config.num_micro_batches, seed=0)
    trainer = Trainer(
        accelerator="cpu", devices=config.trainer.devices, strategy=strategy, max_epochs=1,
        precision=config.trainer.precision, accumulate_grad_batches=config.num_micro_batches,
        gradient_clip_val=config.trainer.gradient_clip, callbacks=[GivenRollouts(config)],
        logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, num_sanity_val_steps=0,
    )  # fmt: skip
    torch.manual_seed(0)  # of a LoRA adapter
    trainer.fit(module, data)
    weights = {}
    for name, parameter in module.trainable_parameters().items():
        with gathered([parameter]):
            weights[name] = parameter.detach().float().clone()
    held = sum(p.numel() for p in module.trainable_parameters().values())
    return {
        "grad_norm": module.step_metrics["train/grad_norm"],
        "weights": weights,
        "num_whole_parameters": held,
        "num_micro_batches": module.totals.num_micro_batches,
    }


def main() -> None:
    folder, cases = Path(sys.argv[1]), sys.argv[2:]
    devices = int(os.environ.get("WORLD_SIZE", "1"))
    for case in cases:
        strategy, number, *extra = case.split(":")
        overrides = [
            f"prompts_per_step={NUM_GROUPS}", f"rollouts_per_prompt={GROUP_SIZE}",
            f"micro_batch_size={NUM_GROUPS * GROUP_SIZE // devices // int(number)}",
            f"trainer.devices={devices}", f"strategy={strategy}", "trainer.accelerator=cpu",
            f"output_dir={folder}", "self_reward.alpha=0.5", "self_reward.reasoning_warmup_steps=0",
            "algorithm.kl_coef=0.1", "self_reward.c_ref=-9.0", "logger=csv",
            "optimizer.lr=1.0e-3", "optimizer.warmup_steps=0", *extra,
        ]  # fmt: skip
        if strategy.startswith("deepspeed_zero3"):
            overrides.append(SHARD_ALL)
        with initialize_config_dir(version_base="1.3", config_dir=str(config_dir())):
            config = to_config(compose("config", overrides))
        result = one_step(config)
        if rank() == 0:
            name = "-".join(part.replace("/", "_") for part in (strategy, number, *extra))
            torch.save(result, folder / f"{name}.pt")


if __name__ == "__main__":
    main()
