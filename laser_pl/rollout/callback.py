"""The rollout callback: makes the step's batch from the current weights, before its update."""

from __future__ import annotations

import math
import random
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from laser_pl.algorithm import partition_excess
from laser_pl.config import Config, check_partition_excess
from laser_pl.data.datamodule import PromptDataModule
from laser_pl.data.problem import Prompt
from laser_pl.distributed import (
    any_rank,
    derive_seed,
    gather_over_ranks,
    on_all_ranks,
    rank,
    sum_over_ranks,
    world_size,
)
from laser_pl.errors import UserError
from laser_pl.evaluation.metrics import verification_metrics
from laser_pl.logs.progress import set_phase
from laser_pl.logs.samples import Sample, SamplesFile
from laser_pl.rollout.batch import RolloutBatch, join
from laser_pl.rollout.collect import Collected, Collector
from laser_pl.rollout.micro_batches import deal_groups, make_plan
from laser_pl.rollout.scoring import (
    add_advantages,
    add_class_weights,
    add_scores,
    is_trained,
    mixes,
    step_totals,
)
from laser_pl.training.module import LaserModule

# Above this the score's optimum is visibly off its reward; config.py refuses much more.
WARN_PARTITION_EXCESS = 0.01
# Rollouts of a step that are kept in samples.jsonl.
SAMPLES_PER_STEP = 4


class RolloutCallback(Callback):
    """Samples, verifies and scores the rollouts of a step, and hands its micro-batches to the loop.

    Runs in `on_train_epoch_start`: one Lightning epoch is one step, and its batches are fetched
    after this hook, so that they come from the weights that the step updates.

    Args:
        collector: generates and verifies.
        config: batch sizes, algorithm, self-reward, seed.
        samples: where a few rollouts of each step are kept; None on other ranks.
        tell: shows a line to the user.
    """

    def __init__(
        self,
        collector: Collector,
        config: Config,
        samples: SamplesFile | None,
        tell: Callable[[str], None],
    ) -> None:
        self.collector = collector
        self.config = config
        self.samples = samples
        self.tell = tell
        self.samples_of_step: list[Sample] = []
        self.scores_of_step: dict[str, list[float]] = {}  # of all ranks, by verdict
        self.calibrate_s = 0.0
        self._step_start = 0.0
        self._update_start = 0.0

    def state_dict(self) -> dict[str, Any]:
        """What the verifiers of all ranks have counted so far."""
        counts = self.collector.verifier.counts
        totals = sum_over_ranks(torch.tensor(list(counts.values()))).tolist()
        return dict(zip(counts, totals, strict=True))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting from there; the counts are summed over the ranks."""
        if rank() == 0:
            for name, count in state_dict.items():
                setattr(self.collector.verifier, name, count)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure c_ref before the first update; a resumed run has it from its checkpoint."""
        module, data = _parts(trainer, pl_module)
        if trainer.current_epoch == 0:
            set_phase(trainer, "calibrate")
            start = time.perf_counter()
            calibrate(module, self.collector, data, self.config)
            self.calibrate_s = time.perf_counter() - start
            if not module.needs_reference:
                self.tell(_reference_line(module))
        warn_of_rounding(module, self.config.optimizer.lr)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the step's batch from the current weights."""
        module, data = _parts(trainer, pl_module)
        self._step_start = time.perf_counter()
        set_phase(trainer, "rollout")
        # Dropout, where a model has it, then depends on the step alone too.
        torch.manual_seed(derive_seed(self.config.seed, "update", module.step, rank()))
        with self.collector.engine.weights_of(module.policy):
            collected = self._collect(data, module.step)
        batch, settings = collected.batch, module.policy.config
        add_scores(batch, module, lambda: make_plan(batch, self.config, settings))
        add_advantages(batch, self.config, module.step)
        add_class_weights(batch)
        trained = self._trained(batch, module)
        plan = make_plan(trained, self.config, settings)
        data.loader.put([trained.select(rows) for rows in plan.parts], trainer)
        module.step_metrics = self._metrics(collected, module)
        module.step_metrics["train/lr"] = trainer.optimizers[0].param_groups[0]["lr"]
        module.step_metrics["train/skipped_fraction"] = 1 - len(trained) / len(batch)
        module.begin_step(step_totals(batch, trained, len(plan.parts)), plan.layout)
        self._keep_samples(collected, module.step)
        set_phase(trainer, "update")
        self._update_start = time.perf_counter()

    def _collect(self, data: PromptDataModule, step: int) -> Collected:
        """The step's rollouts; prompts with equal rewards are replaced if so configured."""
        seed = derive_seed(self.config.seed, "rollout", step, rank())
        collected = self._collect_together(data.prompts_of_step(step), seed)
        for round_number in range(1, self.config.algorithm.dynamic_sampling + 1):
            useless = groups_without_signal(collected.batch)
            # Every rank samples in every round: under ZeRO-3 they gather the weights together.
            if not any_rank(bool(useless)):
                break
            seed = derive_seed(self.config.seed, "dynamic", step, round_number, rank())
            prompts = random.Random(seed).choices(data.train, k=max(1, len(useless)))
            fresh = self._collect_together(prompts, seed)
            collected = replace_groups(collected, useless, fresh)
        return collected

    def _collect_together(self, prompts: Sequence[Prompt], seed: int) -> Collected:
        number = self.config.rollouts_per_prompt
        return on_all_ranks(lambda: self.collector.collect(prompts, number, seed))

    def _trained(self, batch: RolloutBatch, module: LaserModule) -> RolloutBatch:
        """The sequences that this rank trains on."""
        wanted = is_trained(batch, self.config, module)
        by_tokens = self.config.training.max_tokens_per_micro_batch is not None
        if any_rank(not bool(wanted.all())) or (by_tokens and world_size() > 1):
            return deal_groups(batch, wanted)
        return batch

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the step's own sums and times to its metrics."""
        module, _ = _parts(trainer, pl_module)
        now = time.perf_counter()
        module.finish_step()
        module.step_metrics["time/update_s"] = now - self._update_start
        module.step_metrics["time/step_s"] = now - self._step_start

    def _metrics(self, collected: Collected, module: LaserModule) -> dict[str, float]:
        """The step's rollout, verifier and self-verification measures, over all ranks."""
        facts = gather_over_ranks(_facts(collected))
        table = torch.tensor(facts, dtype=torch.float64)
        rewards, scores, finished, tokens, unparsed, no_signal, mixed = table.unbind(dim=1)
        judged = verification_metrics(scores, rewards > 0.5)
        done = finished > 0.5
        right, wrong = scores[done & (rewards > 0.5)], scores[done & (rewards < 0.5)]
        self.scores_of_step = {"correct": right.tolist(), "incorrect": wrong.tolist()}
        counts = self.collector.verifier.counts
        failures = zip(counts, sum_over_ranks(torch.tensor(list(counts.values()))), strict=True)
        metrics: dict[str, Tensor | float] = {
            "rollout/reward_mean": rewards.mean(),
            "rollout/finished_fraction": finished.mean(),
            "rollout/truncated_fraction": 1 - finished.mean(),
            "rollout/response_tokens_mean": tokens.mean(),
            "rollout/response_tokens_max": tokens.max(),
            "rollout/tokens_per_s": tokens.sum() / collected.rollout_s,
            "rollout/zero_signal_groups_fraction": no_signal.mean(),
            **{f"self_reward/{name}": judged[name] for name in _JUDGED},
            "self_reward/score_mean_correct": right.mean(),
            "self_reward/score_mean_incorrect": wrong.mean(),
            "self_reward/advantages_mixed_fraction": mixed.mean(),
            "self_reward/loss_active": module.self_reward_active,
            "self_reward/integration_active": mixes(module.self_reward, module.step),
            **{name.replace("num_", "verifier/"): count for name, count in failures},
            "verifier/unparsed_fraction": unparsed.mean(),
            "time/rollout_s": collected.rollout_s,
            "time/verify_s": collected.verify_s,
        }
        return {name: float(value) for name, value in metrics.items()}

    def _keep_samples(self, collected: Collected, step: int) -> None:
        if self.samples is None:
            return
        rows = range(min(SAMPLES_PER_STEP, len(collected.batch)))
        self.samples_of_step = training_samples(collected, rows, step, self.collector.tokenizer)
        self.samples.write(self.samples_of_step)


def groups_without_signal(batch: RolloutBatch) -> list[int]:
    """The prompts, by their number in the batch, whose responses all have the same reward."""
    without = _groups_without_signal(batch.rewards, batch.groups)
    numbers: list[int] = batch.groups[without].unique().tolist()
    return numbers


def replace_groups(collected: Collected, places: Sequence[int], fresh: Collected) -> Collected:
    """Put the fresh prompts whose rewards differ in the places of others, as far as they go.

    Source: dynamic sampling, DAPO, arXiv 2503.14476.
    """
    useless = set(groups_without_signal(fresh.batch))
    useful = [number for number in range(len(fresh.prompts)) if number not in useless]
    taken = dict(zip(places, useful, strict=False))
    parts = [
        _group(fresh, taken[place]) if place in taken else _group(collected, place)
        for place in range(len(collected.prompts))
    ]
    return Collected(
        prompts=[prompt for part in parts for prompt in part.prompts],
        batch=join([part.batch for part in parts]),
        responses=[text for part in parts for text in part.responses],
        verdicts=[verdict for part in parts for verdict in part.verdicts],
        rollout_s=collected.rollout_s + fresh.rollout_s,
        verify_s=collected.verify_s + fresh.verify_s,
    )


def _group(collected: Collected, number: int) -> Collected:
    """One prompt's part."""
    rows = (collected.batch.groups == number).nonzero().squeeze(1)
    return Collected(
        [collected.prompts[number]],
        collected.batch.select(rows),
        [collected.responses[row] for row in rows.tolist()],
        [collected.verdicts[row] for row in rows.tolist()],
        0.0,
        0.0,
    )


_JUDGED = ("f1", "auroc", "accuracy", "accuracy_on_correct", "accuracy_on_incorrect")


def _reference_line(module: LaserModule) -> str:
    """What it saves that no reference is kept: the policy was its own before the first update."""
    held = (getattr(p, "ds_tensor", p) for p in module.policy.parameters())
    size = sum(tensor.numel() * tensor.element_size() for tensor in held)
    return (
        f"reference: c_ref {module.c_ref:.2f} is known and there is no KL term, so that none is "
        f"kept: {size / 1e6:,.1f} MB given back on each rank"
    )


def warn_of_rounding(module: LaserModule, lr: float) -> None:
    """Warn if most updates are lost because the weights are bfloat16 without float32 copies.

    AdamW moves a weight by about lr; a bfloat16 number w does not move by less than |w| / 512.
    """
    parameters = list(module.trainable_parameters().values())
    if module.strategy_clips or parameters[0].dtype != torch.bfloat16:
        return  # DeepSpeed keeps float32 master weights
    lost = sum(int((p.detach().abs() > 512 * lr).sum()) for p in parameters)
    share = lost / sum(p.numel() for p in parameters)
    if share > 0.5:
        warnings.warn(
            f"optimizer.lr = {lr:g}: too small for weights in bfloat16, which round {share:.0%} of "
            "the updates away; use trainer.precision=bf16-mixed with model.dtype=float32, or a "
            "deepspeed strategy, which keeps float32 master weights",
            stacklevel=2,
        )


def calibrate(
    module: LaserModule, collector: Collector, data: PromptDataModule, config: Config
) -> None:
    """Measure log pi_ref(z_c | x, y) on responses to the first step's prompts.

    Before the first update the policy is the reference, so that no second model is needed. A number
    in the configuration takes the mean's place.

    Raises:
        UserError: no response finished, or beta does not fit the token (Z - 1 too large).
    """
    seed = derive_seed(config.seed, "calibrate", rank())
    with collector.engine.weights_of(module.policy):
        batch = collector.generate(data.prompts_of_step(1), config.rollouts_per_prompt, seed)
    measured = torch.tensor(gather_over_ranks(batch.token_logprob[batch.finished].tolist()))
    given = config.self_reward.c_ref
    if len(measured) == 0 and isinstance(given, str) and config.self_reward.is_trained:
        raise UserError(
            f"rollout.max_response_tokens = {config.rollout.max_response_tokens}: none of "
            f"{config.num_sequences} responses ended with EOS within it, so that there is no score "
            f"to calibrate; give a larger one{' or no rollout.stop' * bool(config.rollout.stop)}"
        )
    # Where nothing finished and nothing is trained: that of a uniform distribution.
    uniform = -math.log(module.policy.config.get_text_config().vocab_size)
    module.c_ref = float(measured.mean()) if len(measured) else uniform
    module.c_ref_std = float(measured.std()) if len(measured) > 1 else 0.0
    if not isinstance(given, str):
        module.c_ref = given
    beta = config.self_reward.beta
    if not config.beta_has_to_fit:
        return
    try:
        check_partition_excess(module.c_ref, beta)
    except ValueError as error:
        raise UserError(str(error)) from None
    excess = partition_excess(module.c_ref, beta)
    if excess > WARN_PARTITION_EXCESS:
        warnings.warn(
            f"self_reward.beta = {beta:g} hardly fits a token with c_ref = {module.c_ref:.2f}: "
            f"Z - 1 = {excess:.3g} exceeds {WARN_PARTITION_EXCESS}; a larger beta or a rarer token "
            "would fit better",
            stacklevel=2,
        )


def training_samples(
    collected: Collected, rows: Sequence[int], step: int, tokenizer: PreTrainedTokenizerBase
) -> list[Sample]:
    """Some rollouts of a training step as lines of samples.jsonl."""
    batch = collected.batch
    return [
        Sample(
            step=step,
            split="train",
            problem=collected.prompt_of(row).problem.index,
            prompt=str(tokenizer.decode(list(collected.prompt_of(row).token_ids))),
            response=collected.responses[row],
            answer=collected.verdicts[row].answer,
            reference_answer=collected.prompt_of(row).problem.answer,
            reward=float(batch.rewards[row]),
            score=float(batch.scores[row]),
            advantage=float(batch.advantages[row]),
            finished=bool(batch.finished[row]),
            num_tokens=int(batch.num_tokens[row]),
        )
        for row in rows
    ]


def _facts(collected: Collected) -> list[tuple[float, ...]]:
    """Per sequence: reward, score, finished, tokens, unparsed, group without signal, mixed."""
    batch = collected.batch
    no_signal = _groups_without_signal(batch.rewards, batch.groups)
    mixed = (batch.advantages - batch.verifier_advantages).abs() > 0
    unparsed = torch.tensor([verdict.answer is None for verdict in collected.verdicts])
    columns = (
        batch.rewards, batch.scores, batch.finished, batch.num_tokens, unparsed, no_signal, mixed,
    )  # fmt: skip
    return list(zip(*(column.tolist() for column in columns), strict=True))


def _groups_without_signal(rewards: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """[N] bool, all rewards of the sequence's group are equal."""
    same_group = groups.unsqueeze(0) == groups.unsqueeze(1)
    same_reward = rewards.unsqueeze(0) == rewards.unsqueeze(1)
    return (same_reward | ~same_group).all(dim=1)


def _parts(trainer: Trainer, module: LightningModule) -> tuple[LaserModule, PromptDataModule]:
    data = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(module, LaserModule) or not isinstance(data, PromptDataModule):
        raise TypeError("RolloutCallback works with LaserModule and PromptDataModule")
    return module, data
