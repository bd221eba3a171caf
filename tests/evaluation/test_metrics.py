import itertools
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from laser_pl.evaluation.metrics import (
    auroc,
    best_of,
    expected_calibration_error,
    majority_vote,
    pass_at_k,
    reliability_curve,
    verification_metrics,
)

PROPERTY = settings(deadline=None, database=None, derandomize=True, max_examples=60)
# few different scores, so that ties and the threshold itself are common
JUDGED = st.lists(
    st.tuples(st.sampled_from([-0.5, 0.0, 0.25, 0.5, 0.75, 1.0, 1.5]), st.booleans()), max_size=20
)


def columns(rows: list[tuple[float, bool]]) -> tuple[Tensor, Tensor]:
    scores = torch.tensor([score for score, _ in rows], dtype=torch.float64)
    return scores, torch.tensor([correct for _, correct in rows], dtype=torch.bool)


# self-verification


def test_verification_of_a_worked_example() -> None:
    scores = torch.tensor([0.9, 0.5, 0.7, 0.1, 0.6, -2.0, 3.0])
    correct = torch.tensor([True, True, True, False, False, False, False])
    # correct: 0.9 and 0.7 of three (0.5 is not above the threshold); incorrect: 0.1 and -2 of four
    found = verification_metrics(scores, correct)
    assert found["accuracy_on_correct"] == pytest.approx(2 / 3)
    assert found["accuracy_on_incorrect"] == pytest.approx(1 / 2)
    assert found["accuracy"] == pytest.approx(4 / 7)
    # harmonic mean of 2/3 and 1/2 = 2 / (3/2 + 2)
    assert found["f1"] == pytest.approx(4 / 7)
    # 0.9 beats three of four, 0.5 two, 0.7 three
    assert found["auroc"] == pytest.approx(8 / 12)
    assert (found["num_correct"], found["num_incorrect"]) == (3, 4)


def test_verification_threshold_can_be_chosen() -> None:
    scores, correct = columns([(0.3, True), (0.1, False)])
    assert verification_metrics(scores, correct, threshold=0.2)["f1"] == 1
    assert verification_metrics(scores, correct, threshold=0.3)["accuracy_on_correct"] == 0


def test_verification_of_nothing_is_zero_and_its_auroc_undefined() -> None:
    found = verification_metrics(torch.zeros(0), torch.zeros(0, dtype=torch.bool))
    assert math.isnan(found.pop("auroc"))
    assert set(found.values()) == {0}


@pytest.mark.parametrize("only", [True, False])
def test_an_absent_class_has_accuracy_zero_and_makes_f1_zero(only: bool) -> None:
    scores = torch.tensor([1.0, 1.0] if only else [0.0, 0.0])
    found = verification_metrics(scores, torch.tensor([only, only]))
    assert found["accuracy"] == 1
    assert found["f1"] == 0
    assert {found["accuracy_on_correct"], found["accuracy_on_incorrect"]} == {0, 1}
    assert math.isnan(found["auroc"])


def test_verification_gives_plain_numbers() -> None:
    found = verification_metrics(torch.tensor([0.9, 0.1]), torch.tensor([True, False]))
    kinds = {name: type(value) for name, value in found.items()}
    assert kinds.pop("num_correct") is int
    assert kinds.pop("num_incorrect") is int
    assert set(kinds.values()) == {float}


@PROPERTY
@given(JUDGED, st.sampled_from([0.0, 0.25, 0.5]))
def test_verification_equals_counting(rows: list[tuple[float, bool]], threshold: float) -> None:
    found = verification_metrics(*columns(rows), threshold=threshold)
    of_correct = [score > threshold for score, correct in rows if correct]
    of_incorrect = [score <= threshold for score, correct in rows if not correct]
    shares = [sum(judged) / max(len(judged), 1) for judged in (of_correct, of_incorrect)]
    assert [found["accuracy_on_correct"], found["accuracy_on_incorrect"]] == shares
    assert found["accuracy"] == sum(of_correct + of_incorrect) / max(len(rows), 1)
    harmonic_mean = 2 / (1 / shares[0] + 1 / shares[1]) if all(shares) else 0.0
    assert found["f1"] == pytest.approx(harmonic_mean)


@PROPERTY
@given(JUDGED)
def test_auroc_equals_counting_pairs(rows: list[tuple[float, bool]]) -> None:
    positives = [score for score, correct in rows if correct]
    negatives = [score for score, correct in rows if not correct]
    wins = [(p > n) + (p == n) / 2 for p, n in itertools.product(positives, negatives)]
    found = auroc(*columns(rows))
    assert found == pytest.approx(sum(wins) / len(wins)) if wins else math.isnan(found)


@PROPERTY
@given(JUDGED, st.randoms(use_true_random=False))
def test_verification_ignores_the_order(
    rows: list[tuple[float, bool]], shuffler: random.Random
) -> None:
    shuffled = shuffler.sample(rows, len(rows))
    found = verification_metrics(*columns(shuffled))
    assert found == pytest.approx(verification_metrics(*columns(rows)), nan_ok=True)


@pytest.mark.parametrize(
    "measure", [verification_metrics, auroc, reliability_curve, expected_calibration_error]
)
@pytest.mark.parametrize(("scores", "correct"), [((3,), (2,)), ((2, 2), (2, 2))])
def test_shapes_that_do_not_fit_are_named(measure, scores, correct) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=r"found scores \[.*, correct \["):
        measure(torch.zeros(scores), torch.zeros(correct, dtype=torch.bool))


# calibration


def test_reliability_of_the_example_in_its_description() -> None:
    curve = reliability_curve(*columns([(0.1, False), (0.2, True), (0.9, True)]), num_bins=2)
    torch.testing.assert_close(curve.mean_score, torch.tensor([0.15, 0.9], dtype=torch.float64))
    assert curve.accuracy.tolist() == [0.5, 1.0]
    assert curve.num_responses.tolist() == [2, 1]


def test_scores_are_clipped_into_the_outer_bins_and_edges_go_up() -> None:
    rows = [(-3.0, False), (0.0, False), (0.25, False), (0.75, True), (1.0, True), (9.0, False)]
    curve = reliability_curve(*columns(rows), num_bins=4)
    assert curve.num_responses.tolist() == [2, 1, 0, 3]
    assert curve.mean_score[[0, 1, 3]].tolist() == pytest.approx([0.0, 0.25, 2.75 / 3])
    assert curve.accuracy[[0, 1, 3]].tolist() == pytest.approx([0.0, 0.0, 2 / 3])
    assert curve.mean_score[2].isnan()
    assert curve.accuracy[2].isnan()


def test_calibration_error_of_a_worked_example() -> None:
    # bins [0, 1/2) and [1/2, 1]: two responses off by |0.5 - 0.15|, one by |1 - 0.9|
    rows = [(0.1, False), (0.2, True), (0.9, True)]
    error = expected_calibration_error(*columns(rows), num_bins=2)
    assert error == pytest.approx((2 * 0.35 + 0.1) / 3)


def test_calibration_error_of_nothing_is_undefined() -> None:
    assert math.isnan(expected_calibration_error(*columns([])))


@PROPERTY
@given(JUDGED.filter(bool), st.integers(1, 12))
def test_one_bin_or_many_hold_all_responses(rows: list[tuple[float, bool]], num_bins: int) -> None:
    scores, correct = columns(rows)
    curve = reliability_curve(scores, correct, num_bins)
    assert curve.num_responses.sum().item() == len(rows)
    num_correct = (curve.accuracy * curve.num_responses).nansum().item()
    assert num_correct == pytest.approx(int(correct.sum()))
    whole = abs(correct.double().mean().item() - scores.clamp(0, 1).mean().item())
    # splitting a bin cannot make the weighted mean distance smaller
    assert whole - 1e-12 <= expected_calibration_error(scores, correct, num_bins) <= 1


def test_reliability_refuses_less_than_one_bin() -> None:
    with pytest.raises(ValueError, match="num_bins must be at least 1, found 0"):
        reliability_curve(*columns([(0.1, False)]), num_bins=0)


# pass@k


@PROPERTY
@given(st.integers(1, 7).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))), st.data())
def test_pass_at_k_equals_trying_every_choice(counts: tuple[int, int], data: st.DataObject) -> None:
    n, c = counts
    k = data.draw(st.integers(1, n))
    choices = list(itertools.combinations([1] * c + [0] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, choices)) / len(choices))


def test_pass_at_1_is_the_accuracy_and_large_counts_do_not_overflow() -> None:
    assert pass_at_k(8, 3, 1) == 3 / 8
    assert pass_at_k(4, 1, 2) == 1 / 2
    assert pass_at_k(4000, 4, 2000) == pytest.approx(1 - 0.5**4, abs=1e-3)


@pytest.mark.parametrize(
    ("n", "c", "k", "message"),
    [
        (4, 2, 5, "k must be 1 to n = 4, found 5"),
        (4, 2, 0, "k must be 1 to n = 4, found 0"),
        (4, 5, 2, "c must be 0 to n = 4, found 5"),
        (4, -1, 2, "c must be 0 to n = 4, found -1"),
        (0, 0, 1, "k must be 1 to n = 0, found 1"),
    ],
)
def test_pass_at_k_refuses_counts_that_do_not_fit(n: int, c: int, k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pass_at_k(n, c, k)


# votes


@pytest.mark.parametrize(
    ("answers", "winner"),
    [
        (["a", "b", "b"], "b"),
        (["b", "a", "a", "b"], "b"),
        (["a", None, None, None], "a"),
        ([None, "b", "a"], "b"),
        ([None, None], None),
        ([], None),
    ],
)
def test_majority_and_its_ties(answers: list[str | None], winner: str | None) -> None:
    assert majority_vote(answers) == winner


@pytest.mark.parametrize(
    ("answers", "weights", "winner"),
    [
        (["a", "b", "b"], [0.9, 0.3, 0.4], "a"),
        (["a", "b", "b"], [7.0, 0.6, 0.5], "b"),  # 7 counts as 1
        (["a", "a", "b"], [0.6, -9.0, 0.5], "a"),  # -9 counts as 0
        ([None, "b", "a"], [1.0, 0.1, 0.2], "a"),
        (["b", "a", "a", "b"], [0.5, 0.25, 0.5, 0.25], "b"),  # a tie
        ([None, "b", "a"], [1.0, 0.0, -1.0], "b"),  # all zero: a tie
        (["a", "b"], [math.nan, 0.1], "b"),  # no score is no vote
    ],
)
def test_weighted_vote_and_its_ties(
    answers: list[str | None], weights: list[float], winner: str
) -> None:
    assert majority_vote(answers, weights) == winner
    assert majority_vote(answers, torch.tensor(weights)) == winner


@PROPERTY
@given(
    st.lists(st.sampled_from(["a", "b", "c", None]), max_size=12), st.randoms(use_true_random=False)
)
def test_only_the_order_of_first_answers_can_decide_a_vote(
    answers: list[str | None], shuffler: random.Random
) -> None:
    winner, shuffled = majority_vote(answers), shuffler.sample(answers, len(answers))
    counts = {answer: answers.count(answer) for answer in answers if answer is not None}
    most = [answer for answer in counts if counts[answer] == max(counts.values())]
    assert winner == (most[0] if most else None)
    assert majority_vote(shuffled) == min(most, key=shuffled.index, default=None)


def test_sums_of_weights_do_not_depend_on_their_order() -> None:
    # one after the other, 0.1 + 0.2 + 0.3 is larger than 0.3 + 0.2 + 0.1 by its last digit
    assert majority_vote(["b", "b", "b", "a", "a", "a"], [0.3, 0.2, 0.1, 0.1, 0.2, 0.3]) == "b"


def test_a_vote_needs_a_weight_an_answer() -> None:
    with pytest.raises(ValueError, match="found 1 for 2"):
        majority_vote(["a", "b"], [0.5])


def test_best_of_is_the_earliest_largest_score() -> None:
    assert best_of([0.1, 2.0, -1.0, 2.0]) == 1
    assert best_of(torch.tensor([-3.0, -2.5])) == 1


def test_best_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one score"):
        best_of([])
