"""When enough samples of a problem have voted: adaptive sampling by the score-weighted vote."""

import math
from collections.abc import Sequence

from scipy.stats import beta

from laser_pl.evaluation.metrics import majority_vote, tally


def is_decided(
    answers: Sequence[str | None],
    scores: Sequence[float],
    num_left: int,
    confidence: float,
) -> bool:
    """Whether further samples of a problem would hardly change its weighted vote.

    They cannot change it if the leader is ahead by more than they all could give another answer.
    They hardly would if the leader's share of the weight that it and the runner-up have is above
    1/2 with the given probability; with weights a and b that share is Beta(1 + a, 1 + b), from a
    uniform prior.

    Args:
        answers: of the samples drawn so far, equivalent ones already made one string.
        scores: their self-reward scores, clipped to [0, 1] here.
        num_left: samples that may still be drawn.
        confidence: probability, 0.5 to 1.
    Returns:
        True if sampling may stop.
    Source: the Beta criterion of Adaptive-Consistency, arXiv 2305.11860, with weighted votes.
    """
    weights = sorted(tally(answers, scores).values(), reverse=True)
    lead, second = [*weights, 0.0, 0.0][:2]
    if num_left <= 0 or lead - second > num_left:
        return True
    return float(beta.sf(0.5, 1 + lead, 1 + second)) > confidence


def stopping_point(
    answers: Sequence[str | None], scores: Sequence[float], batch: int, confidence: float
) -> int:
    """How many of K samples would have been drawn, `batch` at a time, in their order.

    Args:
        answers: [K] of all samples.
        scores: [K].
        batch: samples between two looks, at least 1.
        confidence: as for `is_decided`.
    Returns:
        1 to K.
    """
    total = len(answers)
    for drawn in range(min(batch, total), total, batch):
        if is_decided(answers[:drawn], scores[:drawn], total - drawn, confidence):
            return drawn
    return total


def replay(
    answers: Sequence[Sequence[str | None]],
    scores: Sequence[Sequence[float]],
    correct: Sequence[Sequence[bool]],
    batch: int,
    confidence: float,
) -> dict[str, float]:
    """What stopping early would have saved and cost, on samples that were all drawn.

    Args:
        answers: [M][K], equivalent ones already made one string.
        scores: [M][K].
        correct: [M][K], the verifier's verdicts.
        batch: samples between two looks.
        confidence: as for `is_decided`.
    Returns:
        samples_per_problem (mean drawn), saved_fraction, weighted (accuracy of the weighted vote
        where it stopped), weighted_fixed (of all K samples).
    """
    drawn, early, full = [], [], []
    for names, weights, verdicts in zip(answers, scores, correct, strict=True):
        right = {a for a, c in zip(names, verdicts, strict=True) if c and a is not None}
        stop = stopping_point(names, weights, batch, confidence)
        drawn.append(stop)
        early.append(majority_vote(names[:stop], weights[:stop]) in right)
        full.append(majority_vote(names, weights) in right)
    total = sum(len(names) for names in answers)
    return {
        "samples_per_problem": math.fsum(drawn) / len(drawn),
        "saved_fraction": 1 - sum(drawn) / total,
        "weighted": sum(early) / len(early),
        "weighted_fixed": sum(full) / len(full),
    }
