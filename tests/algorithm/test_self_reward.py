import math
import statistics
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from laser_pl.algorithm.self_reward import (
    class_weights,
    integrate_advantages,
    partition_excess,
    self_reward_loss,
    self_reward_score,
    sft_loss,
    two_token_score,
)

PROPERTY = settings(deadline=None, database=None, derandomize=True, max_examples=60)
LOSS_INPUTS = ["scores", "rewards", "finished", "weights"]
INTEGRATION_INPUTS = ["verifier_advantages", "scores", "finished", "groups"]
GARBAGE = [math.inf, -math.inf, math.nan, 1e30]
# reward, finished, score, group
Row = tuple[float, bool, float, int]
ROWS = st.lists(
    st.tuples(
        st.sampled_from([0.0, 1.0]),
        st.booleans(),
        st.floats(-1, 2, width=32),
        st.sampled_from([-4, 0, 9]),
    ),
    min_size=1,
    max_size=16,
)


def float64(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def columns(rows: list[Row]) -> dict[str, Any]:
    rewards, finished, scores, groups = zip(*rows, strict=True)
    return {
        "rewards": float64(rewards),
        "finished": torch.tensor(finished),
        "scores": float64(scores),
        "groups": torch.tensor(groups),
        "verifier_advantages": float64(rewards) * 2 - 0.7,
    }


def integrate(step: dict[str, Any], **options: Any) -> Tensor:
    inputs = {name: step[name] for name in INTEGRATION_INPUTS}
    return integrate_advantages(**inputs, **options)


def loss_and_gradient(
    step: dict[str, Any], weights: Tensor | None = None, normalizer: float | None = None
) -> tuple[Tensor, Tensor]:
    scores = step["scores"].clone().requires_grad_()
    loss = self_reward_loss(scores, step["rewards"], step["finished"], weights, normalizer)
    (gradient,) = torch.autograd.grad(loss, scores)
    return loss.detach(), gradient


# the score


def test_score_is_beta_times_the_distance_from_the_reference() -> None:
    token_logprob = float64([-13.0, -23.0, -33.0])
    scores = self_reward_score(token_logprob, -23.0, 0.1)
    torch.testing.assert_close(scores, float64([1.0, 0.0, -1.0]))
    scores = self_reward_score(token_logprob, float64([-13.0, -24.0, -23.0]), 0.5)
    torch.testing.assert_close(scores, float64([0.0, 0.5, -5.0]))


def test_score_has_gradient_beta_and_the_dtype_of_the_log_probability() -> None:
    token_logprob = torch.tensor([-20.0, -25.0], requires_grad=True)
    scores = self_reward_score(token_logprob, float64([-23.0, -24.0]), 0.25)
    scores.sum().backward()
    assert scores.dtype == torch.float32
    assert token_logprob.grad is not None
    assert token_logprob.grad.tolist() == [0.25, 0.25]


@pytest.mark.parametrize(
    ("token_logprob", "reference", "message"),
    [
        (torch.zeros(2, 1), -23.0, r"token_logprob \[2, 1\]"),
        (torch.zeros(()), -23.0, r"token_logprob \[\]"),
        (torch.zeros(2), torch.zeros(3), r"reference \[3\]"),
        (torch.zeros(2), torch.zeros(1), r"reference \[1\]"),
    ],
)
def test_score_names_shapes_that_do_not_fit(
    token_logprob: Tensor, reference: float | Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        self_reward_score(token_logprob, reference, 0.1)


# the partition function


def test_partition_excess_of_the_paper_and_of_a_token_that_does_not_fit() -> None:
    # exp(-23) * exp(10) = exp(-13); exp(-10) * exp(10) = 1, each less exp(c_ref)
    assert partition_excess(-23.0, 0.1) == pytest.approx(math.exp(-13) - math.exp(-23), rel=1e-12)
    assert partition_excess(-10.0, 0.1) == pytest.approx(1 - math.exp(-10), rel=1e-12)


@PROPERTY
@given(st.floats(-40, 0), st.floats(0.05, 10), st.floats(-2, 2))
def test_partition_excess_is_the_sum_over_the_two_outcomes_less_one(
    c_ref: float, beta: float, reward: float
) -> None:
    # Z = sum_z pi_ref(z) * exp(r(z) / beta), where r is reward for z_c and 0 for all other tokens
    expected = math.exp(c_ref) * (math.exp(reward / beta) - 1)
    assert partition_excess(c_ref, beta, reward) == pytest.approx(expected, rel=1e-9, abs=1e-15)


def test_partition_excess_does_not_lose_a_small_reward() -> None:
    # exp(1e-20) - 1 is 0 in floats, expm1 is not
    assert partition_excess(0.0, 1.0, 1e-20) == pytest.approx(1e-20, rel=1e-9)


def test_partition_excess_too_large_for_a_float_is_inf() -> None:
    assert partition_excess(-1.0, 0.001) == math.inf
    # where exp(1 / beta) alone would overflow the product need not
    assert partition_excess(-1000.0, 0.001) == pytest.approx(1.0)


def test_partition_excess_of_no_reward_is_zero() -> None:
    assert partition_excess(-5.0, 0.1, 0.0) == 0


@pytest.mark.parametrize("beta", [0.0, -0.1])
def test_partition_excess_refuses_a_beta_that_is_not_positive(beta: float) -> None:
    with pytest.raises(ValueError, match="beta must be greater than 0"):
        partition_excess(-23.0, beta)


# class weights


def test_class_weights_of_the_example_in_their_description() -> None:
    weights = class_weights(float64([1, 0, 0, 0]), torch.ones(4, dtype=torch.bool))
    torch.testing.assert_close(weights, float64([2, 2 / 3, 2 / 3, 2 / 3]))


def test_truncated_responses_have_no_weight_and_are_not_counted() -> None:
    weights = class_weights(float64([1, 1, 0, 0]), torch.tensor([True, False, True, True]))
    # n_c = 1, n_i = 2: 3 / 2 and 3 / 4
    assert torch.equal(weights, float64([1.5, 0, 0.75, 0.75]))


def test_one_class_alone_weighs_one_half() -> None:
    finished = torch.tensor([True, True, False])
    assert torch.equal(class_weights(float64([1, 1, 0]), finished), float64([0.5, 0.5, 0]))
    assert torch.equal(class_weights(float64([0, 0, 1]), finished), float64([0.5, 0.5, 0]))


def test_with_nothing_finished_all_weights_are_zero() -> None:
    weights = class_weights(float64([1, 0]), torch.tensor([False, False]))
    assert torch.equal(weights, float64([0, 0]))


@PROPERTY
@given(ROWS)
def test_both_classes_have_half_of_the_total_weight(rows: list[Row]) -> None:
    step = columns(rows)
    weights = class_weights(step["rewards"], step["finished"])
    num_finished = int(step["finished"].sum())
    for reward in (0, 1):
        of_class = weights[(step["rewards"] == reward) & step["finished"]]
        if len(of_class):
            assert of_class.sum().item() == pytest.approx(num_finished / 2)
    assert not weights[~step["finished"]].any()


def test_class_weights_keep_a_float_dtype_and_are_float32_for_bool() -> None:
    finished = torch.tensor([True, True])
    assert class_weights(float64([1, 0]), finished).dtype == torch.float64
    weights = class_weights(torch.tensor([True, False]), finished)
    assert weights.dtype == torch.float32
    assert weights.tolist() == [1, 1]


def test_class_weights_name_shapes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"rewards \[3\], finished \[2\]"):
        class_weights(torch.zeros(3), torch.ones(2, dtype=torch.bool))


# the loss


def test_loss_of_a_worked_example() -> None:
    step = {
        "scores": float64([0.5, 0.25, 7.0, 0.0]),
        "rewards": float64([1, 0, 1, 1]),
        "finished": torch.tensor([True, True, False, True]),
    }
    # (0.25 + 0.0625 + nothing + 1) / 4, the truncated one counted below the line
    loss, gradient = loss_and_gradient(step)
    assert loss.item() == 1.3125 / 4
    assert torch.equal(gradient, float64([-1.0, 0.5, 0.0, -2.0]) / 4)
    # (2 * 0.25 + 4 * 0.0625 + 0.5 * 1) / 10
    loss, _ = loss_and_gradient(step, float64([2, 4, 9, 0.5]), normalizer=10)
    assert loss.item() == pytest.approx(0.125)


@PROPERTY
@given(ROWS, st.booleans())
def test_loss_equals_a_loop_over_sequences(rows: list[Row], balanced: bool) -> None:
    step = columns(rows)
    weights = class_weights(step["rewards"], step["finished"]) if balanced else None
    factors = weights.tolist() if weights is not None else [1.0] * len(rows)
    terms = zip(factors, rows, strict=True)
    expected = sum(w * (s - r) ** 2 for w, (r, f, s, _) in terms if f) / len(rows)
    assert loss_and_gradient(step, weights)[0].item() == pytest.approx(expected, abs=1e-12)


@PROPERTY
@given(ROWS, st.integers(1, 4), st.randoms(use_true_random=False))
def test_micro_batches_in_any_order_add_up_to_the_step(
    rows: list[Row], micro_batch_size: int, random: Any
) -> None:
    step = columns(rows)
    weights = class_weights(step["rewards"], step["finished"])
    order = torch.tensor(random.sample(range(len(rows)), len(rows)))
    total, gradient = float64(0.0), torch.zeros(len(rows), dtype=torch.float64)
    for part in order.split(micro_batch_size):
        micro_batch = {name: values[part] for name, values in step.items()}
        part_loss, part_gradient = loss_and_gradient(micro_batch, weights[part], len(rows))
        total, gradient[part] = total + part_loss, part_gradient
    loss, step_gradient = loss_and_gradient(step, weights)
    torch.testing.assert_close(total, loss, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient, step_gradient, rtol=0, atol=1e-15)


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("where", ["scores", "rewards", "weights"])
def test_anything_may_stand_where_a_response_is_truncated(garbage: float, where: str) -> None:
    step = columns([(1.0, True, 0.3, 0), (0.0, False, 0.4, 0), (0.0, True, 0.5, 0)])
    weights = class_weights(step["rewards"], step["finished"])
    dirty = {name: values.clone() for name, values in (step | {"weights": weights}).items()}
    dirty[where][1] = garbage
    clean_results = loss_and_gradient(step, weights)
    dirty_results = loss_and_gradient(dirty, dirty["weights"])
    for clean_result, dirty_result in zip(clean_results, dirty_results, strict=True):
        assert torch.equal(clean_result, dirty_result)


def test_with_nothing_finished_the_loss_and_its_gradient_are_zero() -> None:
    step = columns([(1.0, False, 0.3, 0), (0.0, False, 0.4, 0)])
    loss, gradient = loss_and_gradient(step)
    assert loss.item() == 0
    assert gradient.tolist() == [0, 0]


def test_loss_has_the_dtype_of_the_scores() -> None:
    step = columns([(1.0, True, 0.3, 0)])
    weights = class_weights(step["rewards"], step["finished"])
    scores = step["scores"].float()
    assert (
        self_reward_loss(scores, step["rewards"], step["finished"], weights).dtype == scores.dtype
    )


@pytest.mark.parametrize("wrong", LOSS_INPUTS)
def test_loss_names_shapes_that_do_not_fit(wrong: str) -> None:
    inputs: dict[str, Any] = dict.fromkeys(LOSS_INPUTS, torch.ones(3))
    with pytest.raises(ValueError, match=rf"{wrong} \[2\]"):
        self_reward_loss(**(inputs | {wrong: torch.ones(2)}))


def test_a_normalizer_that_is_not_positive_is_refused() -> None:
    ones = torch.ones(2)
    with pytest.raises(ValueError, match="normalizer must be greater than 0, found 0"):
        self_reward_loss(ones, ones, ones, normalizer=0)


def test_sft_loss_is_the_cross_entropy_of_the_token_of_the_verdict() -> None:
    logits = float64([[2.0, 1.0, 0.0], [0.5, 0.0, 3.0], [1.0, 1.0, 1.0]]).requires_grad_()
    log_probs = logits.log_softmax(dim=1)
    rewards, finished = float64([1, 0, 1]), torch.tensor([True, True, False])
    weights = float64([0.5, 2.0, 7.0])
    loss = sft_loss(log_probs[:, 0], log_probs[:, 1], rewards, finished, weights, normalizer=6)
    # token 0 for the correct one, token 1 for the incorrect one, nothing for the truncated one
    targets = torch.tensor([0, 1, 0])
    entropies = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    expected = (0.5 * entropies[0] + 2.0 * entropies[1]) / 6
    torch.testing.assert_close(loss, expected)
    found = torch.autograd.grad(loss, logits, retain_graph=True)
    torch.testing.assert_close(found, torch.autograd.grad(expected, logits))


def test_sft_loss_names_shapes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"incorrect_logprob \[2\]"):
        sft_loss(torch.ones(3), torch.ones(2), torch.ones(3), torch.ones(3))


# the advantages


def slow_integration(step: dict[str, Any], tau: float, min_std: float) -> list[float]:
    scores = [
        min(max(s, 0.0), 1.0) if f else 0.0
        for s, f in zip(step["scores"].tolist(), step["finished"].tolist(), strict=True)
    ]
    groups, mixed = step["groups"].tolist(), []
    for i, verifier_advantage in enumerate(step["verifier_advantages"].tolist()):
        peers = [s for s, group in zip(scores, groups, strict=True) if group == groups[i]]
        mean, std = (statistics.fmean(peers), statistics.stdev(peers)) if peers[1:] else (0.0, 1.0)
        own = (scores[i] - mean) / std if std > min_std else verifier_advantage
        mixed.append((1 - tau) * verifier_advantage + tau * own)
    return mixed


@PROPERTY
@given(ROWS, st.sampled_from([0.0, 0.1, 0.7, 1.0]), st.sampled_from([0.05, 0.1, 0.3, 1.0]))
def test_integration_equals_a_loop_over_sequences(
    rows: list[Row], tau: float, min_std: float
) -> None:
    step = columns(rows)
    expected = float64(slow_integration(step, tau, min_std))
    mixed = integrate(step, tau=tau, min_std=min_std)
    torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-10)


def test_integration_of_a_worked_example() -> None:
    step = {
        "verifier_advantages": float64([1.5, -0.5, -0.5, -0.5, 3.0, -3.0]),
        # group 8 clips to 1, 0, 0 and the truncated 0: mean 1/4, std 1/2, so 1.5 and -0.5;
        # group 2 clips to 0.5, 0.6: std 0.07, which is noise
        "scores": float64([1.3, -0.2, 0.0, 0.9, 0.5, 0.6]),
        "finished": torch.tensor([True, True, True, False, True, True]),
        "groups": torch.tensor([8, 8, 8, 8, 2, 2]),
    }
    own = integrate(step, tau=1.0)
    torch.testing.assert_close(own, float64([1.5, -0.5, -0.5, -0.5, 3.0, -3.0]))
    flipped = integrate(step | {"verifier_advantages": -step["verifier_advantages"]}, tau=0.25)
    torch.testing.assert_close(flipped, float64([-0.75, 0.25, 0.25, 0.25, -3.0, 3.0]))


@pytest.mark.parametrize("garbage", GARBAGE)
def test_scores_of_truncated_responses_do_not_matter(garbage: float) -> None:
    step = columns([(1.0, True, 0.9, 3), (0.0, False, 0.4, 3), (0.0, True, 0.1, 3)])
    dirty = step | {"scores": step["scores"].clone()}
    dirty["scores"][1] = garbage
    assert torch.equal(integrate(dirty), integrate(step))


@PROPERTY
@given(ROWS, st.floats(0, 1))
def test_integrated_advantages_are_bounded(rows: list[Row], tau: float) -> None:
    step = columns(rows)
    groups = step["groups"]
    size = (groups[:, None] == groups).sum(dim=1).double()
    # of n numbers one can be at most (n - 1) / sqrt(n) unbiased standard deviations off the mean
    own_bound = torch.where(size > 1, (size - 1) / size.sqrt(), 1.0)
    verifier = step["verifier_advantages"].abs()
    bound = (1 - tau) * verifier + tau * torch.maximum(verifier, own_bound)
    assert (integrate(step, tau=tau).abs() <= bound + 1e-12).all()


@PROPERTY
@given(ROWS, st.randoms(use_true_random=False))
def test_order_and_names_of_groups_do_not_matter(rows: list[Row], random: Any) -> None:
    step = columns(rows)
    order = torch.tensor(random.sample(range(len(rows)), len(rows)))
    changed = {name: values[order] for name, values in step.items()}
    changed["groups"] = 5 - 3 * changed["groups"]
    # a threshold that no std of these scores meets but for rounding
    mixed, expected = integrate(changed, min_std=0.123), integrate(step, min_std=0.123)[order]
    torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-10)


@PROPERTY
@given(ROWS, st.floats(0, 1))
def test_groups_below_the_threshold_keep_their_advantages_exactly(
    rows: list[Row], tau: float
) -> None:
    step = columns(rows)
    assert torch.equal(integrate(step, tau=tau, min_std=1.0), step["verifier_advantages"])


def test_equal_scores_are_never_normalised_even_with_threshold_zero() -> None:
    step = columns([(1.0, True, 0.1, 0), (0.0, True, 0.1, 0), (0.0, True, 0.1, 0)])
    step["scores"] = step["scores"].float()
    assert torch.equal(integrate(step, min_std=0.0), step["verifier_advantages"])


def test_a_share_of_zero_changes_nothing() -> None:
    step = columns([(1.0, True, 0.9, 0), (0.0, True, 0.1, 0)])
    assert torch.equal(integrate(step, tau=0.0), step["verifier_advantages"])


def test_integration_keeps_the_dtype_and_does_not_write_to_its_inputs() -> None:
    step = columns([(1.0, True, 1.9, 0), (0.0, False, 0.1, 0), (0.0, True, 0.3, 0)])
    step["verifier_advantages"] = step["verifier_advantages"].float()
    copies = {name: values.clone() for name, values in step.items()}
    assert integrate(step).dtype == torch.float32
    assert all(torch.equal(step[name], copies[name]) for name in step)


@pytest.mark.parametrize("wrong", INTEGRATION_INPUTS)
def test_integration_names_shapes_that_do_not_fit(wrong: str) -> None:
    inputs: dict[str, Any] = dict.fromkeys(INTEGRATION_INPUTS, torch.ones(3))
    with pytest.raises(ValueError, match=rf"{wrong} \[2\]"):
        integrate_advantages(**(inputs | {wrong: torch.ones(2)}))


def test_the_two_token_score_is_the_chance_of_correct_among_the_two() -> None:
    correct, incorrect = float64([0.6, 0.02]).log(), float64([0.2, 0.08]).log()
    assert two_token_score(correct, incorrect).tolist() == pytest.approx([0.75, 0.2])


def test_the_brier_loss_moves_both_tokens_against_each_other() -> None:
    correct, incorrect = float64([-3.0]).requires_grad_(), float64([-2.5]).requires_grad_()
    score = two_token_score(correct, incorrect)
    self_reward_loss(score, float64([1.0]), torch.tensor([True])).backward()
    s = 1 / (1 + math.exp(0.5))
    assert correct.grad is not None and incorrect.grad is not None
    assert correct.grad.item() == pytest.approx(2 * (s - 1) * s * (1 - s))
    assert incorrect.grad.item() == pytest.approx(-correct.grad.item())


def test_two_tokens_need_log_probs_of_one_length() -> None:
    with pytest.raises(ValueError, match="incorrect_logprob"):
        two_token_score(torch.zeros(3), torch.zeros(2))
