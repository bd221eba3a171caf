"""The clipped policy loss, the KL estimators, and how values a token become one loss."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from laser_pl.algorithm.shapes import check_same_shape


class PolicyLoss(NamedTuple):
    """The policy loss of a micro-batch, and what to log of it; scalars, dtype of the log-probs.

    The three measures have no gradient. They are means over the counted tokens of THIS micro-batch
    whatever the aggregation and the normalizer: to add them up, weight them by its token count.
    """

    loss: Tensor
    """The loss to minimise, divided by the normalizer."""
    clip_fraction: Tensor
    """Share of tokens where the clipped objective is the one that counts, before the dual clip."""
    dual_clip_fraction: Tensor
    """Share of tokens, with a negative advantage, whose loss the dual clip bounds."""
    approx_kl: Tensor
    """Mean of old minus new log-prob in nats: the k1 estimate of KL(old, new); may be negative."""


def aggregate(
    values: Tensor, mask: Tensor, aggregation: str = "token_mean", normalizer: float | None = None
) -> Tensor:
    """One number from values a token: a sum over the mask, divided by the normalizer.

    token_mean sums over tokens, sequence_mean_token_sum sums each row's sum,
    sequence_mean_token_mean each row's mean. With the normalizer of the whole step the results of
    its micro-batches add up to that of the step.

    Args:
        values: [B, T]; where the mask is False they may be anything, inf and nan included.
        mask: [B, T] bool, True on the tokens that count. A row without one contributes 0.
        aggregation: token_mean, sequence_mean_token_sum or sequence_mean_token_mean.
        normalizer: divisor, greater than 0: the tokens that count (token_mean) or the sequences
            (the others). None counts those of this batch, rows without a token among them.
    Returns:
        Scalar with the dtype, device and gradient of values; 0 if no token counts.
    Raises:
        ValueError: shapes do not fit, unknown aggregation, or normalizer not greater than 0.
    """
    check_same_shape(2, values=values, mask=mask)
    if normalizer is not None and not normalizer > 0:
        raise ValueError(f"normalizer must be greater than 0, found {normalizer}")
    mask = mask.bool()
    row_sums, num_tokens = values.masked_fill(~mask, 0).sum(dim=1), mask.sum(dim=1)
    num_sequences = max(len(mask), 1)
    if aggregation == "token_mean":
        return row_sums.sum() / (normalizer or num_tokens.sum().clamp(min=1))
    if aggregation == "sequence_mean_token_sum":
        return row_sums.sum() / (normalizer or num_sequences)
    if aggregation == "sequence_mean_token_mean":
        return (row_sums / num_tokens.clamp(min=1)).sum() / (normalizer or num_sequences)
    raise ValueError(
        f"aggregation {aggregation!r} is none of token_mean, sequence_mean_token_sum, "
        "sequence_mean_token_mean"
    )


def importance_weights(logprobs: Tensor, rollout_logprobs: Tensor, cap: float) -> Tensor:
    """Weights that correct for an engine that samples from slightly other numbers.

    min(exp(logprobs - rollout_logprobs), cap) a token: truncated importance sampling, by which an
    advantage is multiplied. Engine and trainer round differently, so that their log-probs of the
    same weights differ.

    Args:
        logprobs: [B, T] of the policy at the step's start, in nats.
        rollout_logprobs: [B, T] as the engine reported them; NaN where it does not know.
        cap: largest weight, at least 1.
    Returns:
        [B, T] weights without gradient; 1 where rollout_logprobs is NaN.
    Raises:
        ValueError: shapes differ, or cap is less than 1.
    Source: truncated importance sampling, Ionides 2008; for rollout engines as in verl and TRL.
    """
    check_same_shape(2, logprobs=logprobs, rollout_logprobs=rollout_logprobs)
    if cap < 1:
        raise ValueError(f"cap must be at least 1, found {cap}")
    log_ratio = torch.nan_to_num(logprobs.detach() - rollout_logprobs, nan=0.0)
    return log_ratio.clamp(max=math.log(cap)).exp()


def clipped_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = 3.0,
    aggregation: str = "token_mean",
    normalizer: float | None = None,
) -> PolicyLoss:
    """Clipped surrogate loss: max(-A * ratio, -A * clip(ratio, 1 - clip_low, 1 + clip_high)).

    ratio = exp(clamp(logprobs - old_logprobs, -20, 20)), without gradient beyond the clamp. Where
    A < 0 the loss is at most -A * dual_clip. Where the mask is False no input matters, inf and nan
    included, and the gradient is 0.

    Args:
        logprobs: [B, T] log-probs of the response tokens (nats), of the distribution sampled from.
        old_logprobs: [B, T] the same at the step's start; a constant (no gradient flows into it).
        advantages: [B] or [B, T]; a constant.
        mask: [B, T] bool, True on response tokens, EOS included.
        clip_low: distance of the lower clip from a ratio of 1.
        clip_high: distance of the upper clip from a ratio of 1.
        dual_clip: bound of the ratio where A < 0, greater than 1; None is no bound.
        aggregation: as in aggregate.
        normalizer: as in aggregate.
    Returns:
        The loss, and what to log of it, with the dtype and device of logprobs.
    Raises:
        ValueError: shapes do not fit, unknown aggregation, dual_clip not greater than 1, or
            normalizer not greater than 0.
    Source: PPO, arXiv 1707.06347; dual clip, arXiv 1912.09729; two clips, arXiv 2503.14476.
    """
    check_same_shape(2, logprobs=logprobs, old_logprobs=old_logprobs, mask=mask)
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip must be greater than 1 or None, found {dual_clip}")
    advantages = _token_advantages(advantages, logprobs)
    # Filled here although aggregate masks the loss: in the backward pass 0 * inf would be nan.
    log_ratio = (logprobs - old_logprobs.detach()).masked_fill(~mask.bool(), 0).clamp(-20, 20)
    ratio = log_ratio.exp()

    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    surrogate = torch.maximum(unclipped, clipped)
    bound = torch.where(advantages < 0, -advantages * (dual_clip or math.inf), math.inf)
    return PolicyLoss(
        loss=aggregate(torch.minimum(surrogate, bound), mask, aggregation, normalizer),
        clip_fraction=aggregate((clipped > unclipped).to(logprobs.dtype), mask),
        dual_clip_fraction=aggregate((surrogate > bound).to(logprobs.dtype), mask),
        approx_kl=aggregate(-log_ratio.detach(), mask),
    )


def gspo_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    normalizer: float | None = None,
) -> PolicyLoss:
    """Clipped surrogate loss with one ratio a sequence: the mean of max(-A * s, -A * clip(s)).

    s = exp(mean over the response's tokens of logprobs - old_logprobs), the exponent clamped to
    [-20, 20]. Its clip is much narrower than a token's, since a mean of many log-ratios is small.

    Args:
        logprobs: [B, T] log-probs of the response tokens (nats), of the distribution sampled from.
        old_logprobs: [B, T] the same at the step's start; a constant.
        advantages: [B], or [B, T] with a weight a token; a constant.
        mask: [B, T] bool, True on response tokens, EOS included.
        clip_low: distance of the lower clip from a ratio of 1.
        clip_high: distance of the upper clip from a ratio of 1.
        normalizer: sequences of the whole step; None is B.
    Returns:
        The loss, and what to log of it; dual_clip_fraction is 0.
    Raises:
        ValueError: shapes do not fit, or normalizer not greater than 0.
    Source: GSPO, arXiv 2507.18071, equations 5 to 7.
    """
    check_same_shape(2, logprobs=logprobs, old_logprobs=old_logprobs, mask=mask)
    # Filled, since the ratio is the whole row's: in the backward pass 0 * inf would be nan.
    advantages = _token_advantages(advantages, logprobs).masked_fill(~mask.bool(), 0)
    log_ratio = (logprobs - old_logprobs.detach()).masked_fill(~mask.bool(), 0)
    num_tokens = mask.sum(dim=1, keepdim=True).clamp(min=1)
    mean = (log_ratio.sum(dim=1, keepdim=True) / num_tokens).clamp(-20, 20)
    ratio = mean.exp().expand_as(logprobs)
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    surrogate = torch.maximum(unclipped, clipped)
    return PolicyLoss(
        loss=aggregate(surrogate, mask, "sequence_mean_token_mean", normalizer),
        clip_fraction=aggregate((clipped > unclipped).to(logprobs.dtype), mask),
        dual_clip_fraction=logprobs.new_zeros(()),
        approx_kl=aggregate(-log_ratio.detach(), mask),
    )


def cispo_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float = 1.0,
    clip_high: float = 4.0,
    aggregation: str = "token_mean",
    normalizer: float | None = None,
) -> PolicyLoss:
    """REINFORCE with a clipped ratio as a constant weight: -sg(clip(ratio)) * A * logprobs.

    Unlike in the clipped surrogate, a token beyond the clip keeps its gradient.

    Args:
        logprobs: [B, T] log-probs of the response tokens (nats), of the distribution sampled from.
        old_logprobs: [B, T] the same at the step's start; a constant.
        advantages: [B] or [B, T]; a constant.
        mask: [B, T] bool, True on response tokens, EOS included.
        clip_low: distance of the lower clip from a ratio of 1; 1 or more is no lower clip.
        clip_high: distance of the upper clip from a ratio of 1.
        aggregation: as in aggregate.
        normalizer: as in aggregate.
    Returns:
        The loss, and what to log of it; dual_clip_fraction is 0.
    Raises:
        ValueError: shapes do not fit, unknown aggregation, or normalizer not greater than 0.
    Source: CISPO, MiniMax-M1, arXiv 2506.13585, equations 4 and 5.
    """
    check_same_shape(2, logprobs=logprobs, old_logprobs=old_logprobs, mask=mask)
    advantages = _token_advantages(advantages, logprobs)
    logprobs = logprobs.masked_fill(~mask.bool(), 0)
    log_ratio = (logprobs - old_logprobs).detach().masked_fill(~mask.bool(), 0).clamp(-20, 20)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return PolicyLoss(
        loss=aggregate(-clipped * advantages * logprobs, mask, aggregation, normalizer),
        clip_fraction=aggregate((clipped != ratio).to(logprobs.dtype), mask),
        dual_clip_fraction=logprobs.new_zeros(()),
        approx_kl=aggregate(-log_ratio, mask),
    )


def _token_advantages(advantages: Tensor, logprobs: Tensor) -> Tensor:
    """Advantages [B] or [B, T] as a constant [B, T] with the dtype of logprobs."""
    if advantages.dim() == 1:
        if len(advantages) != len(logprobs):
            raise ValueError(
                f"expected an advantage a row of logprobs {list(logprobs.shape)}, "
                f"found advantages {list(advantages.shape)}"
            )
        advantages = advantages[:, None].expand_as(logprobs)
    check_same_shape(2, logprobs=logprobs, advantages=advantages)
    return advantages.detach().to(logprobs.dtype)


def kl_estimate(logprobs: Tensor, reference_logprobs: Tensor, kind: str = "k3") -> Tensor:
    """Estimate a token of KL(policy, reference) from the log-probs of the sampled token.

    With d = reference - policy: k1 is -d, abs is |d|, k2 is d^2 / 2 and k3 is exp(d) - d - 1,
    with d clamped to [-20, 20] and the result to [-10, 10]. Clamped values have no gradient.

    Args:
        logprobs: [B, T] log-probs of the policy (nats). Entries that a mask is to leave out later
            must be finite: masking afterwards does not undo a nan in the gradient.
        reference_logprobs: [B, T] log-probs of the reference.
        kind: k1, abs, k2 or k3.
    Returns:
        [B, T] in nats with the dtype, device and gradient of logprobs.
    Raises:
        ValueError: the shapes differ or are not 2-D, or the kind is unknown.
    Source: J. Schulman, http://joschu.net/blog/kl-approx.html.
    """
    check_same_shape(2, logprobs=logprobs, reference_logprobs=reference_logprobs)
    difference = reference_logprobs - logprobs
    if kind == "k1":
        return -difference
    if kind == "abs":
        return difference.abs()
    if kind == "k2":
        return difference.square() / 2
    if kind == "k3":
        difference = difference.clamp(-20, 20)
        # expm1: in float32, exp(d) - d - 1 is all rounding error for |d| below about 1e-3.
        return (torch.expm1(difference) - difference).clamp(-10, 10)
    raise ValueError(f"kind {kind!r} is none of k1, abs, k2, k3")
