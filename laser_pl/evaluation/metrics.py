"""Measures of an evaluation: self-verification, calibration, voting and pass@k."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def verification_metrics(
    scores: Tensor, correct: Tensor, threshold: float = 0.5
) -> dict[str, float]:
    """How well the scores judge the responses; judged correct means score > threshold.

    Args:
        scores: [N] self-reward scores; 0 for truncated responses.
        correct: [N] bool, what the verifier said.
        threshold: a score of exactly this is judged incorrect.
    Returns:
        accuracy_on_correct and accuracy_on_incorrect (share of each class judged right), accuracy
        (of all), f1 (harmonic mean of the first two, the paper's measure), f1_binary (the usual
        one, of precision and recall of the class correct), all 0 where there is nothing to count;
        auroc (nan if a class is absent); num_correct and num_incorrect (int).
    Raises:
        ValueError: scores and correct are not 1-D of one length.
    Source: LaSeR, arXiv 2510.14943, the self-verification F1.
    """
    _check_pairs(scores, correct)
    correct = correct.bool()
    judged_right = (scores > threshold) == correct
    num_correct, num_right = int(correct.sum()), int(judged_right.sum())
    num_incorrect = len(correct) - num_correct
    correct_right = int((judged_right & correct).sum())
    on_correct = correct_right / max(num_correct, 1)
    on_incorrect = (num_right - correct_right) / max(num_incorrect, 1)
    recalls = on_correct + on_incorrect
    num_judged_correct = int((scores > threshold).sum())
    return {
        "accuracy_on_correct": on_correct,
        "accuracy_on_incorrect": on_incorrect,
        "accuracy": num_right / max(len(correct), 1),
        "f1": 2 * on_correct * on_incorrect / recalls if recalls > 0 else 0.0,
        "f1_binary": 2 * correct_right / max(num_correct + num_judged_correct, 1),
        "auroc": auroc(scores, correct),
        "num_correct": num_correct,
        "num_incorrect": num_incorrect,
    }


def auroc(scores: Tensor, correct: Tensor) -> float:
    """Probability that a correct response has a larger score than an incorrect one; ties are 1/2.

    Args:
        scores: [N] self-reward scores.
        correct: [N] bool, what the verifier said.
    Returns:
        0 to 1, 0.5 by chance; nan if all or none are correct.
    Raises:
        ValueError: scores and correct are not 1-D of one length.
    """
    _check_pairs(scores, correct)
    positives, negatives = scores[correct.bool()], scores[~correct.bool()].sort().values
    if len(positives) == 0 or len(negatives) == 0:
        return math.nan
    below = torch.searchsorted(negatives, positives, right=False).sum()
    below_or_equal = torch.searchsorted(negatives, positives, right=True).sum()
    return int(below + below_or_equal) / (2 * len(positives) * len(negatives))


class ReliabilityCurve(NamedTuple):
    """Scores against accuracy, in bins of equal width over [0, 1].

    Scores 0.1, 0.2, 0.9 of responses wrong, right, right in two bins give mean_score 0.15, 0.9,
    accuracy 0.5, 1.0 and num_responses 2, 1.
    """

    mean_score: Tensor
    """[num_bins] mean of the clipped scores in the bin; nan in an empty bin."""
    accuracy: Tensor
    """[num_bins] share of correct responses in the bin; nan in an empty bin."""
    num_responses: Tensor
    """[num_bins] int, responses in the bin."""


def reliability_curve(scores: Tensor, correct: Tensor, num_bins: int = 10) -> ReliabilityCurve:
    """Accuracy of the responses by their score, clipped to [0, 1].

    Args:
        scores: [N] float self-reward scores, not clipped.
        correct: [N] bool, what the verifier said.
        num_bins: bins of equal width; a score on an edge belongs to the upper bin, 1 to the last.
    Returns:
        A point a bin, with the dtype and device of scores.
    Raises:
        ValueError: scores and correct are not 1-D of one length, or num_bins is below 1.
    """
    _check_pairs(scores, correct)
    if num_bins < 1:
        raise ValueError(f"num_bins must be at least 1, found {num_bins}")
    clipped_scores = scores.clamp(0, 1)
    inner_edges = torch.arange(1, num_bins, device=scores.device).to(scores.dtype) / num_bins
    index = torch.bucketize(clipped_scores, inner_edges, right=True)
    num_responses = torch.bincount(index, minlength=num_bins)
    empty_sums = clipped_scores.new_zeros(num_bins)
    score_sums = empty_sums.index_add(0, index, clipped_scores)
    correct_sums = empty_sums.index_add(0, index, correct.to(scores.dtype))
    return ReliabilityCurve(
        mean_score=score_sums / num_responses,
        accuracy=correct_sums / num_responses,
        num_responses=num_responses,
    )


def expected_calibration_error(scores: Tensor, correct: Tensor, num_bins: int = 10) -> float:
    """Mean distance between score and accuracy over the bins, each weighted by its responses.

    Args:
        scores: [N] float self-reward scores; clipped to [0, 1] here.
        correct: [N] bool, what the verifier said.
        num_bins: bins of equal width over [0, 1].
    Returns:
        0 (calibrated) to 1; nan without responses.
    Raises:
        ValueError: scores and correct are not 1-D of one length, or num_bins is below 1.
    Source: arXiv 1706.04599.
    """
    mean_score, accuracy, num_responses = reliability_curve(scores, correct, num_bins)
    distance = ((accuracy - mean_score).abs() * num_responses).nansum()
    return float(distance) / len(scores) if len(scores) else math.nan


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased estimate of the chance that at least one of k samples is correct.

    1 - C(n - c, k) / C(n, k), in exact integers up to the last division.

    Args:
        n: samples of the problem.
        c: correct ones among them.
        k: samples one may try, 1 to n.
    Returns:
        0 to 1; c / n for k = 1.
    Raises:
        ValueError: not 1 <= k <= n, or not 0 <= c <= n.
    Source: arXiv 2107.03374.
    """
    if not 1 <= k <= n:
        raise ValueError(f"k must be 1 to n = {n}, found {k}")
    if not 0 <= c <= n:
        raise ValueError(f"c must be 0 to n = {n}, found {c}")
    draws = math.comb(n, k)
    return (draws - math.comb(n - c, k)) / draws


def majority_vote(
    answers: Sequence[str | None], weights: Sequence[float] | Tensor | None = None
) -> str | None:
    """The answer with the most votes; ties go to the answer that came first.

    Args:
        answers: an answer a sample, equivalent ones already made one string; None where there is
            none, which has no vote.
        weights: a self-reward score a sample, clipped to [0, 1] here; None is one vote each.
    Returns:
        The winner; None if there is no answer at all.
    Raises:
        ValueError: answers and weights have different lengths.
    Source: arXiv 2203.11171 (majority); LaSeR, arXiv 2510.14943 (weighted).
    """
    if weights is not None and len(weights) != len(answers):
        raise ValueError(f"expected a weight an answer, found {len(weights)} for {len(answers)}")
    votes = tally(answers, [1.0] * len(answers) if weights is None else weights)
    # dicts keep their order and max takes the first of equals
    return max(votes, key=lambda answer: votes[answer], default=None)


def tally(answers: Sequence[str | None], weights: Sequence[float] | Tensor) -> dict[str, float]:
    """The votes of each answer, in the order in which the answers came.

    Args:
        answers: an answer a sample; None has no vote.
        weights: one a sample, clipped to [0, 1] here.
    Returns:
        answer -> sum of its weights.
    """
    votes: dict[str, list[float]] = {}
    for answer, weight in zip(answers, weights, strict=True):
        if answer is not None:
            votes.setdefault(answer, []).append(min(1.0, max(0.0, float(weight))))
    # fsum does not depend on the order of the samples
    return {answer: math.fsum(parts) for answer, parts in votes.items()}


def best_of(scores: Sequence[float] | Tensor) -> int:
    """Index of the sample with the largest score; the earliest of equals.

    Args:
        scores: a self-reward score a sample, not clipped.
    Returns:
        0-based index.
    Raises:
        ValueError: there is no sample.
    """
    values = [float(score) for score in scores]
    if not values:
        raise ValueError("expected at least one score, found none")
    return values.index(max(values))


def _check_pairs(scores: Tensor, correct: Tensor) -> None:
    if scores.dim() != 1 or scores.shape != correct.shape:
        raise ValueError(
            "expected 1-D scores and correct of one length, "
            f"found scores {list(scores.shape)}, correct {list(correct.shape)}"
        )
