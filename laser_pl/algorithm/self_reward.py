"""LaSeR's own part: the self-reward score, its loss, and its share in the advantages.

Source: LaSeR, arXiv 2510.14943.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from laser_pl.algorithm.advantage import group_statistics
from laser_pl.algorithm.shapes import check_same_shape


def self_reward_score(token_logprob: Tensor, reference: float | Tensor, beta: float) -> Tensor:
    """Self-reward score of each response: beta * (log pi(z_c | x, y) - c_ref).

    Args:
        token_logprob: [B] log-probability (nats, temperature 1) of the score token after EOS.
        reference: c_ref in nats, one number for all responses or [B].
        beta: scale of the score, greater than 0.
    Returns:
        [B] scores, not clipped, with the dtype, device and gradient of token_logprob.
    Raises:
        ValueError: token_logprob is not 1-D, or reference has another length.
    Source: LaSeR, arXiv 2510.14943, the definition of the self-reward score.
    """
    check_same_shape(1, token_logprob=token_logprob)
    if isinstance(reference, Tensor) and reference.dim() > 0:
        check_same_shape(1, token_logprob=token_logprob, reference=reference)
        reference = reference.to(token_logprob.dtype)
    return beta * (token_logprob - reference)


def two_token_score(correct_logprob: Tensor, incorrect_logprob: Tensor) -> Tensor:
    """Score from two reserved tokens: sigmoid(log pi(z_c | x, y) - log pi(z_i | x, y)).

    The chance that the model gives z_c, were it to choose between the two; no reference and no beta
    are needed. Trained with the squared error to the reward it is a Brier score.

    Args:
        correct_logprob: [B] log-prob (nats) after EOS of z_c, the token that says correct.
        incorrect_logprob: [B] the same of z_i, the token that says incorrect.
    Returns:
        [B] scores from 0 to 1 with the dtype, device and gradient of the log-probs.
    Raises:
        ValueError: the log-probs are not 1-D of one length.
    Source: CREDO, arXiv 2609.34857.
    """
    check_same_shape(1, correct_logprob=correct_logprob, incorrect_logprob=incorrect_logprob)
    return torch.sigmoid(correct_logprob - incorrect_logprob)


def score_of_kind(
    token_logprob: Tensor,
    incorrect_logprob: Tensor,
    c_ref: float | Tensor,
    beta: float,
    score: Literal["log_ratio", "two_token"],
    loss: Literal["mse", "sft"],
) -> Tensor:
    """Scores by the kind that a configuration, or a trained model's self_reward.json, names.

    Args:
        token_logprob: [B] log-prob (nats) after EOS of the score token.
        incorrect_logprob: [B] the same of the token that says incorrect; read where two are used.
        c_ref: in nats, one number or [B]; read by the log-ratio.
        beta: scale of the log-ratio.
        score: `self_reward_score` or `two_token_score`, where the loss is mse.
        loss: sft makes the score pi(token).
    Returns:
        [B] scores with the dtype, device and gradient of token_logprob.
    Raises:
        ValueError: the log-probs are not 1-D of one length.
    """
    if loss == "sft":
        return token_logprob.exp()
    if score == "two_token":
        return two_token_score(token_logprob, incorrect_logprob)
    return self_reward_score(token_logprob, c_ref, beta)


def partition_excess(c_ref: float, beta: float, reward: float = 1.0) -> float:
    """How far the method's approximation Z = 1 is off: Z - 1 = exp(c_ref) * (exp(r / beta) - 1).

    At the optimum the score is reward - beta * log Z. A token and beta for which this exceeds 0.01
    do not fit the method: a c_ref of -23 with beta 0.1 gives 2e-6, a c_ref of -10 gives 1.0.

    Args:
        c_ref: log-probability (nats) of the score token after EOS under the reference, at most 0.
        beta: scale of the score, greater than 0.
        reward: the verifier's reward.
    Returns:
        Z - 1; inf where that is too large for a float.
    Raises:
        ValueError: beta is not greater than 0.
    Source: LaSeR, arXiv 2510.14943, the partition function of the verification objective.
    """
    if not beta > 0:
        raise ValueError(f"beta must be greater than 0, found {beta}")
    exponent = reward / beta
    if exponent <= 0:
        return math.exp(c_ref) * math.expm1(exponent)
    # log(exp(x) - 1) = x + log(1 - exp(-x)), whose exp() cannot overflow
    log_excess = c_ref + exponent + math.log(-math.expm1(-exponent))
    try:
        return math.exp(log_excess)
    except OverflowError:
        return math.inf


def class_weights(rewards: Tensor, finished: Tensor) -> Tensor:
    """Weights that give correct and incorrect responses the same total: n / (2 n_class).

    Counts are over the finished responses; pass in those of the whole step on all ranks. Among
    rewards 1, 0, 0, 0, all finished, the weights are 2, 2/3, 2/3, 2/3.

    Args:
        rewards: [N] the verifier's rewards, 0 or 1 (above 0.5 counts as correct).
        finished: [N] bool, False where truncated.
    Returns:
        [N] weights with the dtype and device of rewards (float32 for bool or int). 0 where
        truncated; 1/2 for a class if the other is absent.
    Raises:
        ValueError: rewards and finished are not 1-D of one length.
    Source: LaSeR, arXiv 2510.14943, the class-level re-weighting.
    """
    check_same_shape(1, rewards=rewards, finished=finished)
    finished = finished.bool()
    correct, incorrect = (rewards > 0.5) & finished, (rewards <= 0.5) & finished
    dtype = rewards.dtype if rewards.is_floating_point() else torch.float32
    class_size = torch.where(correct, correct.sum(), incorrect.sum()).clamp(min=1)
    return finished.to(dtype) * finished.sum() / (2 * class_size)


def self_reward_loss(
    scores: Tensor,
    rewards: Tensor,
    finished: Tensor,
    weights: Tensor | None = None,
    normalizer: float | None = None,
) -> Tensor:
    """Squared distance of scores from rewards: sum_i w_i * f_i * (r_s,i - r_v,i)^2 / normalizer.

    Args:
        scores: [B] self-reward scores, with gradient; where truncated they may be anything.
        rewards: [B] the verifier's rewards, 0 or 1.
        finished: [B] bool, False where truncated.
        weights: [B] class weights made from the whole step; None is 1 for all.
        normalizer: sequences of the whole step, truncated ones included; None is B.
    Returns:
        Scalar with the dtype, device and gradient of scores.
    Raises:
        ValueError: the inputs are not 1-D of one length, or normalizer is not greater than 0.
    Source: LaSeR, arXiv 2510.14943, the self-rewarding loss.
    """
    check_same_shape(1, scores=scores, rewards=rewards, finished=finished)
    errors = (scores - rewards.to(scores.dtype)).masked_fill(~finished.bool(), 0)
    return _weighted_mean(errors.square(), finished, weights, normalizer)


def sft_loss(
    correct_logprob: Tensor,
    incorrect_logprob: Tensor,
    rewards: Tensor,
    finished: Tensor,
    weights: Tensor | None = None,
    normalizer: float | None = None,
) -> Tensor:
    """The ablation with two tokens: -sum_i w_i * f_i * log pi(z_{r_v,i} | x, y) / normalizer.

    The score that goes with it is pi(z_c | x, y) = exp(correct_logprob).

    Args:
        correct_logprob: [B] log-prob (nats) after EOS of z_c, the token that says correct.
        incorrect_logprob: [B] the same of z_i, the token that says incorrect.
        rewards: [B] the verifier's rewards, 0 or 1 (above 0.5 counts as correct).
        finished: [B] bool, False where truncated.
        weights: [B] class weights made from the whole step; None is 1 for all.
        normalizer: sequences of the whole step, truncated ones included; None is B.
    Returns:
        Scalar with the dtype, device and gradient of the log-probs.
    Raises:
        ValueError: the inputs are not 1-D of one length, or normalizer is not greater than 0.
    """
    check_same_shape(
        1,
        correct_logprob=correct_logprob,
        incorrect_logprob=incorrect_logprob,
        rewards=rewards,
        finished=finished,
    )
    target_logprob = torch.where(rewards > 0.5, correct_logprob, incorrect_logprob)
    losses = -target_logprob.masked_fill(~finished.bool(), 0)
    return _weighted_mean(losses, finished, weights, normalizer)


def _weighted_mean(
    losses: Tensor, finished: Tensor, weights: Tensor | None, normalizer: float | None
) -> Tensor:
    """Sum of weight * loss over the finished sequences, divided by normalizer or their number B."""
    if normalizer is not None and not normalizer > 0:
        raise ValueError(f"normalizer must be greater than 0, found {normalizer}")
    if weights is not None:
        check_same_shape(1, finished=finished, weights=weights)
        losses = losses * weights.to(losses.dtype).masked_fill(~finished.bool(), 0)
    return losses.sum() / (normalizer or max(len(losses), 1))


def integrate_advantages(
    verifier_advantages: Tensor,
    scores: Tensor,
    finished: Tensor,
    groups: Tensor,
    tau: float = 0.1,
    min_std: float = 0.1,
) -> Tensor:
    """Verifier advantages mixed with self-reward advantages: (1 - tau) * A_v + tau * A_s.

    A_s = (clip(r_s, 0, 1) - mean_g) / std_g over the group, truncated responses counting as 0; the
    std is unbiased and a group of one has mean 0 and std 1. Where std_g <= min_std, A_s is A_v.

    Args:
        verifier_advantages: [N] advantages made from the verifier's rewards.
        scores: [N] self-reward scores, not clipped; where truncated they may be anything.
        finished: [N] bool, False where truncated.
        groups: [N] int, the prompt each response answers; any numbers in any order.
        tau: share of the self-reward advantages, 0 to 1.
        min_std: std of a group's clipped scores up to which they are taken to be noise.
    Returns:
        [N] advantages with the dtype and device of verifier_advantages.
    Raises:
        ValueError: the inputs are not 1-D of one length.
    Source: LaSeR, arXiv 2510.14943, the advantage integration.
    """
    check_same_shape(
        1, verifier_advantages=verifier_advantages, scores=scores, finished=finished, groups=groups
    )
    clipped_scores = scores.clamp(0, 1).masked_fill(~finished.bool(), 0)
    mean, std, _ = group_statistics(clipped_scores, groups)
    normalized = ((clipped_scores - mean) / std).to(verifier_advantages.dtype)
    self_reward_advantages = torch.where(std > min_std, normalized, verifier_advantages)
    # lerp leaves a group that falls back exactly as it was
    return torch.lerp(verifier_advantages, self_reward_advantages, tau)
