"""The two warm-ups: first the policy alone, then the self-reward loss too, then its advantages."""


def self_reward_loss_active(step: int, reasoning_warmup_steps: int) -> bool:
    """Whether the self-reward loss counts at a step: after the first warm-up.

    Args:
        step: from 1; with 200 warm-up steps the first active step is 201, with 0 it is 1.
        reasoning_warmup_steps: steps of the policy loss alone.
    Returns:
        True from step reasoning_warmup_steps + 1 on.
    """
    return step > reasoning_warmup_steps


def integration_active(
    step: int, reasoning_warmup_steps: int, warmup_steps: int, tau: float
) -> bool:
    """Whether self-reward advantages are mixed in at a step: after both warm-ups, if tau is not 0.

    Args:
        step: from 1; with 200 and 200 warm-up steps the first active step is 401.
        reasoning_warmup_steps: steps of the policy loss alone.
        warmup_steps: steps after those in which only the self-reward loss is added.
        tau: share of the self-reward advantages.
    Returns:
        True from step reasoning_warmup_steps + warmup_steps + 1 on, never if tau is 0.
    """
    return step > reasoning_warmup_steps + warmup_steps and tau > 0
