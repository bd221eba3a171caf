"""The algorithm as pure functions of tensors: advantages, losses, scores and the warm-ups."""

from laser_pl.algorithm.advantage import grpo_advantage, overlong_penalty, rloo_advantage
from laser_pl.algorithm.policy_loss import (
    PolicyLoss,
    aggregate,
    cispo_policy_loss,
    clipped_policy_loss,
    gspo_policy_loss,
    importance_weights,
    kl_estimate,
)
from laser_pl.algorithm.schedule import integration_active, self_reward_loss_active
from laser_pl.algorithm.self_reward import (
    class_weights,
    integrate_advantages,
    partition_excess,
    score_of_kind,
    self_reward_loss,
    self_reward_score,
    sft_loss,
    two_token_score,
)

__all__ = [
    "PolicyLoss",
    "aggregate",
    "cispo_policy_loss",
    "class_weights",
    "clipped_policy_loss",
    "grpo_advantage",
    "gspo_policy_loss",
    "importance_weights",
    "integrate_advantages",
    "integration_active",
    "kl_estimate",
    "overlong_penalty",
    "partition_excess",
    "rloo_advantage",
    "score_of_kind",
    "self_reward_loss",
    "self_reward_loss_active",
    "self_reward_score",
    "sft_loss",
    "two_token_score",
]
