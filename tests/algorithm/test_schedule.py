import pytest

from laser_pl.algorithm.schedule import integration_active, self_reward_loss_active


@pytest.mark.parametrize(("warmup", "first"), [(0, 1), (1, 2), (200, 201)])
def test_the_self_reward_loss_starts_one_step_after_the_reasoning_warm_up(
    warmup: int, first: int
) -> None:
    active = [self_reward_loss_active(step, warmup) for step in range(1, 300)]
    assert active == [step >= first for step in range(1, 300)]


@pytest.mark.parametrize(
    ("reasoning", "warmup", "first"), [(0, 0, 1), (200, 200, 401), (0, 200, 201), (5, 3, 9)]
)
def test_mixing_starts_one_step_after_both_warm_ups(
    reasoning: int, warmup: int, first: int
) -> None:
    active = [integration_active(step, reasoning, warmup, 0.1) for step in range(1, 500)]
    assert active == [step >= first for step in range(1, 500)]


def test_without_a_share_nothing_is_mixed_in() -> None:
    assert not any(integration_active(step, 0, 0, 0.0) for step in range(1, 10))


def test_mixing_never_starts_before_the_loss() -> None:
    for step in range(1, 12):
        if integration_active(step, 5, 3, 0.1):
            assert self_reward_loss_active(step, 5)
