"""When sampling may stop, against counting and integration."""

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from laser_pl.evaluation.adaptive import is_decided, replay, stopping_point
from laser_pl.evaluation.metrics import majority_vote

PROPERTY = settings(deadline=None, database=None, derandomize=True, max_examples=60)
SAMPLES = st.lists(
    st.tuples(st.sampled_from(["1", "2", None]), st.floats(-0.5, 1.5)), min_size=1, max_size=5
)


@given(SAMPLES, st.integers(1, 3))
@PROPERTY
def test_a_vote_called_certain_cannot_be_changed(samples, num_left) -> None:
    answers, scores = map(list, zip(*samples, strict=True))
    # At this confidence only certainty counts.
    if not is_decided(answers, scores, num_left, 1 - 1e-12):
        return
    winner = majority_vote(answers, scores)
    for more in product(["1", "2", "3"], repeat=num_left):
        assert majority_vote(answers + list(more), scores + [1.0] * num_left) == winner


def test_the_leader_needs_the_stated_probability() -> None:
    # P(share > 1/2) for weights 3 and 0 is that of Beta(4, 1): 1 - (1/2)^4 = 0.9375
    answers, scores = ["1", "1", "1"], [1.0, 1.0, 1.0]
    assert is_decided(answers, scores, 10, 0.93)
    assert not is_decided(answers, scores, 10, 0.94)


def test_the_posterior_is_that_of_an_integral() -> None:
    # Beta(1 + 2.5, 1 + 0.5) above 1/2, by a sum over the density
    x = torch.linspace(0.5, 1, 200_001, dtype=torch.float64)
    density = x**2.5 * (1 - x) ** 0.5
    beta = math.gamma(3.5) * math.gamma(1.5) / math.gamma(5)
    expected = float(torch.trapezoid(density, x)) / beta
    answers, scores = ["1", "1", "1", "2"], [1.0, 1.0, 0.5, 0.5]
    assert is_decided(answers, scores, 9, expected - 1e-6)
    assert not is_decided(answers, scores, 9, expected + 1e-6)


def test_answers_without_weight_decide_nothing() -> None:
    assert not is_decided(["1", None], [-1.0, 1.0], 2, 0.6)
    assert is_decided(["1", None], [-1.0, 1.0], 0, 0.99)


def test_looks_are_a_batch_apart_and_the_last_takes_all() -> None:
    same = ["1"] * 10
    assert stopping_point(same, [1.0] * 10, batch=4, confidence=0.9) == 4
    assert stopping_point(same, [1.0] * 10, batch=3, confidence=0.95) == 6
    assert stopping_point(["1", "2"] * 5, [1.0] * 10, batch=4, confidence=0.99) == 10
    assert stopping_point(["1"], [1.0], batch=4, confidence=0.9) == 1


def test_a_replay_counts_what_is_saved_and_what_it_costs() -> None:
    answers = [["1"] * 8, ["2", "2", "2", "1", "1", "1", "1", "1"]]
    correct = [[True] * 8, [answer == "1" for answer in answers[1]]]
    found = replay(answers, [[1.0] * 8] * 2, correct, batch=3, confidence=0.93)
    # Both stop at three samples; the second problem then votes for the wrong answer.
    assert found == {
        "samples_per_problem": 3.0, "saved_fraction": 10 / 16, "weighted": 0.5,
        "weighted_fixed": 1.0,
    }  # fmt: skip


@pytest.mark.parametrize("weights", [[0.2, 0.9], [2.0, 0.9]])
def test_weights_are_clipped_as_in_the_vote(weights) -> None:
    clipped = [min(1.0, weight) for weight in weights]
    answers = ["1", "2"]
    for confidence in (0.55, 0.6, 0.7):
        assert is_decided(answers, weights, 5, confidence) == is_decided(
            answers, clipped, 5, confidence
        )
