"""Advantages of a step's responses, from the verifier's rewards and the group each belongs to."""

from typing import NamedTuple

import torch
from torch import Tensor

from laser_pl.algorithm.shapes import check_same_shape


class GroupStatistics(NamedTuple):
    """Statistics of the group of each sequence.

    Values 1, 0, 1, 0, 5 in groups 7, 7, 7, 7, 2 give mean 0.5, 0.5, 0.5, 0.5, 0,
    std 0.58, 0.58, 0.58, 0.58, 1 and size 4, 4, 4, 4, 1.
    """

    mean: Tensor
    """[N] mean; 0 in a group of one, whose only value is thus not centred."""
    std: Tensor
    """[N] unbiased standard deviation; 1 in a group of one."""
    size: Tensor
    """[N] int, sequences in the group."""


def group_statistics(values: Tensor, groups: Tensor) -> GroupStatistics:
    """Mean, standard deviation and size of the group that each value belongs to.

    Args:
        values: [N] float.
        groups: [N] int, equal where the group is; any numbers in any order.
    Returns:
        Statistics [N], repeated for every member, with the dtype and device of values.
    """
    _, index, sizes = torch.unique(groups, return_inverse=True, return_counts=True)

    def group_sum(x: Tensor) -> Tensor:
        return x.new_zeros(sizes.shape).index_add(0, index, x)[index]

    size = sizes[index]
    lowest = values.new_zeros(sizes.shape).scatter_reduce(
        0, index, values, "amin", include_self=False
    )[index]
    # Counted from the lowest value, equal values have exactly their own mean and std 0. A rounding
    # error would be divided by an almost zero std, and pass for a difference between responses.
    mean = lowest + group_sum(values - lowest) / size
    variance = group_sum((values - mean).square()) / (size - 1).clamp(min=1)
    alone = size == 1
    return GroupStatistics(mean.masked_fill(alone, 0), variance.sqrt().masked_fill(alone, 1), size)


def grpo_advantage(
    rewards: Tensor, groups: Tensor, normalize_std: bool = True, eps: float = 1e-6
) -> Tensor:
    """Group-relative advantage: (r - mean_g) / (std_g + eps).

    The std is unbiased (n - 1). A group of one has mean 0 and std 1; equal rewards give 0.

    Args:
        rewards: [N] rewards; bool or int count as float32.
        groups: [N] int, the prompt each response answers; any numbers in any order.
        normalize_std: divide by the std; False is Dr. GRPO, r - mean_g.
        eps: added to the std.
    Returns:
        [N] advantages with the dtype and device of rewards.
    Raises:
        ValueError: rewards and groups are not 1-D of one length.
    Source: GRPO, arXiv 2402.03300; Dr. GRPO, arXiv 2503.20783.
    """
    check_same_shape(1, rewards=rewards, groups=groups)
    rewards = rewards if rewards.is_floating_point() else rewards.float()
    mean, std, _ = group_statistics(rewards, groups)
    return (rewards - mean) / (std + eps) if normalize_std else rewards - mean


def overlong_penalty(num_tokens: Tensor, max_tokens: int, buffer: int) -> Tensor:
    """Soft punishment of long responses, which is added to the reward before the advantages.

    0 up to max_tokens - buffer tokens, then falling linearly to -1 at max_tokens.

    Args:
        num_tokens: [N] int response tokens.
        max_tokens: the length limit.
        buffer: tokens before it in which the penalty grows, 1 to max_tokens.
    Returns:
        [N] float32 penalties, -1 to 0.
    Raises:
        ValueError: buffer is not 1 to max_tokens.
    Source: DAPO, arXiv 2503.14476, equation 13.
    """
    if not 1 <= buffer <= max_tokens:
        raise ValueError(f"buffer must be 1 to max_tokens = {max_tokens}, found {buffer}")
    return ((max_tokens - buffer - num_tokens).float() / buffer).clamp(-1, 0)


def rloo_advantage(rewards: Tensor, groups: Tensor) -> Tensor:
    """Leave-one-out advantage: the reward minus the mean reward of the others in the group.

    A group of one keeps its reward.

    Args:
        rewards: [N] rewards; bool or int count as float32.
        groups: [N] int, the prompt each response answers; any numbers in any order.
    Returns:
        [N] advantages with the dtype and device of rewards.
    Raises:
        ValueError: rewards and groups are not 1-D of one length.
    Source: RLOO, arXiv 2402.14740.
    """
    check_same_shape(1, rewards=rewards, groups=groups)
    rewards = rewards if rewards.is_floating_point() else rewards.float()
    mean, _, size = group_statistics(rewards, groups)
    # r - (n * mean - r) / (n - 1) = (r - mean) * n / (n - 1)
    return (rewards - mean) * size / (size - 1).clamp(min=1)
