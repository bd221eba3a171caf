"""What a batch gets once, from the whole step: scores, advantages, class weights, totals."""

from __future__ import annotations

from collections.abc import Callable

import torch

from laser_pl.algorithm import (
    class_weights,
    grpo_advantage,
    integrate_advantages,
    integration_active,
    overlong_penalty,
    rloo_advantage,
)
from laser_pl.config import Config, SelfRewardConfig
from laser_pl.distributed import gather_over_ranks, rank, sum_over_ranks, world_size
from laser_pl.rollout.batch import RolloutBatch
from laser_pl.rollout.micro_batches import Plan
from laser_pl.training.module import LaserModule, StepTotals


def add_scores(batch: RolloutBatch, module: LaserModule, plan: Callable[[], Plan]) -> None:
    """Fill in c_ref and the self-reward scores, and the reference's log-probs if they are used.

    Args:
        batch: N sequences with the engine's token_logprob; filled in place.
        module: holds c_ref, beta and the frozen reference.
        plan: makes the micro-batches that go through the reference; called if it is used.
    """
    batch.c_ref = torch.full((len(batch),), module.c_ref)
    if module.needs_reference:
        _add_reference(batch, module, plan())
    scores = module.scores(batch.token_logprob, batch.incorrect_logprob, batch.c_ref)
    batch.scores = torch.where(batch.finished, scores, torch.zeros_like(scores))


def _add_reference(batch: RolloutBatch, module: LaserModule, plan: Plan) -> None:
    for index in plan.parts:
        part = batch.select(index)
        output = module.reference_forward(part.to(module.device), plan.layout)
        num_columns = part.response_mask.shape[1]
        batch.reference_logprobs[index, :num_columns] = output.logprobs.cpu()
        if module.self_reward.c_ref == "model":
            batch.c_ref[index] = output.token_logprob.cpu()


def add_advantages(batch: RolloutBatch, config: Config, step: int) -> None:
    """Fill in the verifier's advantages, and those that the loss uses.

    Args:
        batch: N sequences with rewards and scores; filled in place. A group is whole on one rank.
        config: which advantage, the length limit near which rewards may fall, tau, the warm-ups.
        step: from 1.
    """
    algorithm, self_reward = config.algorithm, config.self_reward
    rewards = batch.rewards
    if algorithm.overlong_fraction > 0:
        limit = config.rollout.max_response_tokens
        buffer = max(1, round(algorithm.overlong_fraction * limit))
        rewards = rewards + overlong_penalty(batch.num_tokens, limit, buffer)
    if algorithm.advantage == "grpo":
        verifier = grpo_advantage(rewards, batch.groups, algorithm.normalize_std)
    else:
        verifier = rloo_advantage(rewards, batch.groups)
    batch.verifier_advantages = batch.advantages = verifier
    if mixes(self_reward, step):
        batch.advantages = integrate_advantages(
            verifier,
            batch.scores,
            batch.finished,
            batch.groups,
            tau=self_reward.tau,
            min_std=self_reward.min_std,
        )


def mixes(self_reward: SelfRewardConfig, step: int) -> bool:
    """Whether self-reward advantages are mixed in at a step."""
    return self_reward.is_trained and integration_active(
        step, self_reward.reasoning_warmup_steps, self_reward.warmup_steps, self_reward.tau
    )


def add_class_weights(batch: RolloutBatch) -> None:
    """Fill in the class weights, from the finished sequences of the step on all ranks."""
    local = list(zip(batch.rewards.tolist(), batch.finished.tolist(), strict=True))
    everywhere = gather_over_ranks(local)
    weights = class_weights(
        torch.tensor([reward for reward, _ in everywhere]),
        torch.tensor([finished for _, finished in everywhere]),
    )
    batch.class_weights = weights[rank() * len(batch) : (rank() + 1) * len(batch)]


def is_trained(batch: RolloutBatch, config: Config, module: LaserModule) -> torch.Tensor:
    """[N] bool, whether anything trains on a sequence's group.

    Nothing does where all advantages are 0, there is no KL term, and no self-reward loss yet.
    """
    training = config.training
    if (
        not training.skip_zero_advantage
        or module.self_reward_active
        or config.algorithm.kl_coef > 0
    ):
        return torch.ones(len(batch), dtype=torch.bool)
    has_signal = batch.advantages != 0
    groups = batch.groups.unique(return_inverse=True)[1]
    counts = torch.zeros(len(batch), dtype=torch.long).index_add(0, groups, has_signal.long())
    return counts[groups] > 0


def step_totals(batch: RolloutBatch, trained: RolloutBatch, num_micro_batches: int) -> StepTotals:
    """The step's counts over all ranks.

    Args:
        batch: this rank's rollouts.
        trained: the sequences that it trains on.
        num_micro_batches: into which they are cut.
    """
    numbers = [int(batch.num_tokens.sum()), len(batch), int(trained.num_tokens.sum())]
    num_tokens, num_sequences, num_trained = sum_over_ranks(torch.tensor(numbers)).tolist()
    return StepTotals(num_tokens, num_sequences, num_trained, num_micro_batches, world_size())
