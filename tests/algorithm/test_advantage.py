import statistics
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from laser_pl.algorithm.advantage import (
    group_statistics,
    grpo_advantage,
    overlong_penalty,
    rloo_advantage,
)

PROPERTY = settings(deadline=None, database=None, derandomize=True, max_examples=60)
GROUP_IDS = st.sampled_from([-7, 0, 3, 10**12])
ROWS = st.lists(st.tuples(st.floats(-5, 5, width=32), GROUP_IDS), min_size=1, max_size=20)
ESTIMATORS = [grpo_advantage, rloo_advantage]


def split(rows: list[tuple[float, int]]) -> tuple[Tensor, Tensor]:
    rewards, groups = zip(*rows, strict=True)
    return torch.tensor(rewards, dtype=torch.float64), torch.tensor(groups)


def members(rows: list[tuple[float, int]], group: int) -> list[float]:
    return [reward for reward, other in rows if other == group]


def slow_grpo(rows: list[tuple[float, int]], eps: float) -> list[float]:
    advantages = []
    for reward, group in rows:
        peers = members(rows, group)
        mean = statistics.fmean(peers) if len(peers) > 1 else 0.0
        std = statistics.stdev(peers) if len(peers) > 1 else 1.0
        advantages.append((reward - mean) / (std + eps))
    return advantages


def slow_rloo(rows: list[tuple[float, int]]) -> list[float]:
    advantages = []
    for row, (reward, group) in enumerate(rows):
        others = [r for i, (r, g) in enumerate(rows) if g == group and i != row]
        advantages.append(reward - statistics.fmean(others) if others else reward)
    return advantages


def test_grpo_of_one_success_in_four() -> None:
    # mean 1/4; unbiased variance (9/16 + 3 * 1/16) / 3 = 1/4, std 1/2; so 3/4 / 1/2 and -1/4 / 1/2
    advantages = grpo_advantage(
        torch.tensor([1.0, 0, 0, 0]), torch.zeros(4, dtype=torch.int64), eps=0
    )
    assert torch.equal(advantages, torch.tensor([1.5, -0.5, -0.5, -0.5]))


def test_dr_grpo_only_subtracts_the_mean() -> None:
    groups = torch.zeros(4, dtype=torch.int64)
    advantages = grpo_advantage(torch.tensor([1.0, 0, 0, 0]), groups, normalize_std=False)
    assert torch.equal(advantages, torch.tensor([0.75, -0.25, -0.25, -0.25]))


def test_rloo_subtracts_the_mean_of_the_others() -> None:
    # the success: 1 - 0; each failure: 0 - 1/3
    advantages = rloo_advantage(torch.tensor([1.0, 0, 0, 0]), torch.zeros(4, dtype=torch.int64))
    torch.testing.assert_close(advantages, torch.tensor([1.0, -1 / 3, -1 / 3, -1 / 3]))


def test_a_group_of_one_is_not_centred() -> None:
    rewards, groups = torch.tensor([1.0, 0.0, 0.5]), torch.tensor([5, -5, 10**12])
    assert torch.equal(grpo_advantage(rewards, groups, eps=0.25), rewards / 1.25)
    assert torch.equal(grpo_advantage(rewards, groups, normalize_std=False), rewards)
    assert torch.equal(rloo_advantage(rewards, groups), rewards)


def test_statistics_are_those_of_the_example_in_their_description() -> None:
    found = group_statistics(torch.tensor([1.0, 0, 1, 0, 5]), torch.tensor([7, 7, 7, 7, 2]))
    assert torch.equal(found.mean, torch.tensor([0.5, 0.5, 0.5, 0.5, 0]))
    torch.testing.assert_close(found.std, torch.tensor([3**-0.5] * 4 + [1.0]))
    assert found.size.tolist() == [4, 4, 4, 4, 1]


@PROPERTY
@given(ROWS, st.sampled_from([1e-6, 0.01, 1.0]))
def test_grpo_equals_a_loop_over_sequences(rows: list[tuple[float, int]], eps: float) -> None:
    expected = torch.tensor(slow_grpo(rows, eps), dtype=torch.float64)
    torch.testing.assert_close(grpo_advantage(*split(rows), eps=eps), expected, rtol=0, atol=1e-8)


@PROPERTY
@given(ROWS)
def test_rloo_equals_a_loop_over_sequences(rows: list[tuple[float, int]]) -> None:
    expected = torch.tensor(slow_rloo(rows), dtype=torch.float64)
    torch.testing.assert_close(rloo_advantage(*split(rows)), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@PROPERTY
@given(rows=ROWS, data=st.data())
def test_order_and_names_of_groups_do_not_matter(
    estimator: Callable[[Tensor, Tensor], Tensor],
    rows: list[tuple[float, int]],
    data: st.DataObject,
) -> None:
    rewards, groups = split(rows)
    order = torch.tensor(data.draw(st.permutations(range(len(rows)))))
    renamed = 17 - 2 * groups[order]
    torch.testing.assert_close(
        estimator(rewards[order], renamed), estimator(rewards, groups)[order], rtol=0, atol=1e-8
    )


@PROPERTY
@given(ROWS, st.floats(-3, 3), st.floats(0.1, 4))
def test_groups_of_two_or_more_ignore_a_shift_and_carry_a_scale(
    rows: list[tuple[float, int]], shift: float, scale: float
) -> None:
    rewards, groups = split(rows + rows)
    for estimate in (rloo_advantage, lambda r, g: grpo_advantage(r, g, normalize_std=False)):
        changed = estimate(scale * rewards + shift, groups)
        torch.testing.assert_close(changed, scale * estimate(rewards, groups), rtol=0, atol=1e-12)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@PROPERTY
@given(reward=st.floats(-1, 1, width=32), size=st.integers(2, 40))
def test_equal_rewards_give_exactly_zero_in_float32(
    estimator: Callable[[Tensor, Tensor], Tensor], reward: float, size: int
) -> None:
    advantages = estimator(torch.full((size,), reward), torch.zeros(size, dtype=torch.int64))
    assert torch.equal(advantages, torch.zeros(size))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_dtype_of_float_rewards_is_kept(
    estimator: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype
) -> None:
    rewards = torch.tensor([1, 0, 0], dtype=dtype)
    assert estimator(rewards, torch.tensor([1, 1, 2])).dtype == dtype


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_whole_number_and_bool_rewards_count_as_float32(
    estimator: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype
) -> None:
    rewards, groups = torch.tensor([1, 0, 0], dtype=dtype), torch.tensor([1, 1, 1])
    assert torch.equal(estimator(rewards, groups), estimator(rewards.float(), groups))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_no_rewards_give_no_advantages(estimator: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert estimator(torch.zeros(0), torch.zeros(0, dtype=torch.int64)).shape == (0,)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_inputs_are_not_written_to(estimator: Callable[[Tensor, Tensor], Tensor]) -> None:
    rewards, groups = torch.tensor([1.0, 0, 0]), torch.tensor([4, 4, 1])
    estimator(rewards, groups)
    assert rewards.tolist() == [1, 0, 0]
    assert groups.tolist() == [4, 4, 1]


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(("rewards", "groups"), [((3,), (4,)), ((2, 2), (2, 2)), ((), ())])
def test_shapes_that_do_not_fit_are_named(
    estimator: Callable[[Tensor, Tensor], Tensor],
    rewards: tuple[int, ...],
    groups: tuple[int, ...],
) -> None:
    with pytest.raises(ValueError, match=r"1-D.*rewards \[.*groups \["):
        estimator(torch.zeros(rewards), torch.zeros(groups, dtype=torch.int64))


def test_the_overlong_penalty_is_that_of_equation_13() -> None:
    # L_max = 100, L_cache = 20: none up to 80, -1 at 100
    lengths = torch.tensor([1, 80, 81, 90, 100])
    assert overlong_penalty(lengths, 100, 20).tolist() == pytest.approx([0, 0, -0.05, -0.5, -1])


@pytest.mark.parametrize("buffer", [0, 101])
def test_the_overlong_buffer_lies_within_the_limit(buffer: int) -> None:
    with pytest.raises(ValueError, match="buffer must be 1 to max_tokens = 100"):
        overlong_penalty(torch.tensor([5]), 100, buffer)
