"""From the samples of an evaluation to the numbers that are reported."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from random import Random
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor

from laser_pl.evaluation.adaptive import replay
from laser_pl.evaluation.metrics import (
    best_of,
    expected_calibration_error,
    majority_vote,
    pass_at_k,
    reliability_curve,
    verification_metrics,
)


# Not compared field by field: tensors have no single truth value.
@dataclass(frozen=True, eq=False)
class EvaluationSamples:
    """K responses to each of M problems, in order.

    One problem with three responses, the last cut at the limit:

        rewards=[[1, 0, 0]]  scores=[[0.9, 0.2, 0]]  finished=[[True, True, False]]
        num_tokens=[[40, 52, 64]]  answers=[["7", "8", None]]

    Attributes:
        rewards: [M, K] float, the verifier's verdicts, 0 or 1.
        scores: [M, K] float self-reward scores, not clipped; whatever stands at a truncated
            response counts as 0.
        finished: [M, K] bool, ended with EOS.
        num_tokens: [M, K] int response tokens, EOS included.
        answers: [M][K] extracted answers, equivalent ones already made one string; None where
            there is none.
    Raises:
        ValueError: there are no samples, or the shapes differ.
    """

    rewards: Tensor
    scores: Tensor
    finished: Tensor
    num_tokens: Tensor
    answers: list[list[str | None]]

    def __post_init__(self) -> None:
        shape = self.rewards.shape
        if len(shape) != 2 or self.rewards.numel() == 0:
            raise ValueError(f"rewards must be [M, K], both at least 1, found {list(shape)}")
        for name in ("scores", "finished", "num_tokens"):
            if (found := getattr(self, name).shape) != shape:
                raise ValueError(f"{name} must be {list(shape)} as rewards, found {list(found)}")
        num_problems, num_samples = shape
        lengths = {len(row) for row in self.answers}
        if len(self.answers) != num_problems or lengths != {num_samples}:
            found = [len(self.answers), *sorted(lengths)]
            raise ValueError(f"answers must be {list(shape)} as rewards, found {found}")

    @cached_property
    def judgements(self) -> Tensor:
        """[M, K] float scores, 0 where truncated."""
        return torch.where(self.finished.bool(), self.scores, torch.zeros_like(self.scores))

    @cached_property
    def correct(self) -> Tensor:
        """[M, K] bool, what the verifier said."""
        return self.rewards > 0.5


def evaluation_summary(samples: EvaluationSamples, threshold: float = 0.5) -> dict[str, Any]:
    """The numbers of an evaluation, in the form of summary.json.

    Args:
        samples: the evaluation.
        threshold: a response is judged correct if its score is above this.
    Returns:
        accuracy (pass@1), accuracy_interval (95 %), self_verification {f1, accuracy,
        accuracy_on_correct, accuracy_on_incorrect, auroc, ece}, voting {k, majority, weighted,
        best_of, pass_at_k}, truncated_fraction, unparsed_fraction, response_tokens_mean,
        num_problems, num_samples. A measure that is not defined is NaN (null once in JSON).
    """
    num_problems, num_samples = samples.rewards.shape
    missing = sum(answer is None for row in samples.answers for answer in row)
    return {
        "accuracy": float(samples.rewards.double().mean()),
        "accuracy_interval": accuracy_interval(samples.rewards),
        "self_verification": _self_verification(samples, threshold),
        "voting": _votes_at(samples, num_samples, [tuple(range(num_samples))]),
        "truncated_fraction": 1.0 - float(samples.finished.double().mean()),
        "unparsed_fraction": missing / samples.rewards.numel(),
        "response_tokens_mean": float(samples.num_tokens.double().mean()),
        "num_problems": num_problems,
        "num_samples": num_problems * num_samples,
    }


def detailed_summary(
    samples: EvaluationSamples, batch: int, confidence: float, threshold: float = 0.5
) -> dict[str, Any]:
    """`evaluation_summary`, with what an evaluation of its own reports beside it.

    Args:
        samples: the evaluation, K samples a problem.
        batch: samples between two looks of the adaptive sampling that is replayed.
        confidence: at which it stops.
        threshold: a response is judged correct if its score is above this.
    Returns:
        Also self_verification.f1_binary and .score_length_spearman (of finished responses), NaN
        where not defined; reliability (mean_score, accuracy and num_responses of each tenth of the
        scores' range), voting_curves, adaptive (what stopping early would have saved, also against
        equal_fixed_k, the smallest k of the curves whose weighted vote is as accurate),
        response_tokens.
    """
    summary = _with_details(evaluation_summary(samples, threshold), samples, threshold)
    scores, correct = samples.judgements.tolist(), samples.correct.tolist()
    summary["voting_curves"] = voting_curves(samples)
    adaptive = replay(samples.answers, scores, correct, batch, confidence)
    curves = summary["voting_curves"]
    points = zip(curves["k"], curves["weighted"], strict=True)
    enough = [k for k, accuracy in points if accuracy >= adaptive["weighted"]]
    equal_k = enough[0] if enough else curves["k"][-1]
    adaptive["equal_fixed_k"] = equal_k
    adaptive["saved_at_equal_accuracy"] = 1 - adaptive["samples_per_problem"] / equal_k
    summary["adaptive"] = adaptive
    return summary


def adaptive_summary(
    problems: Sequence[EvaluationSamples], most: int, threshold: float = 0.5
) -> dict[str, Any]:
    """The same of problems with different numbers of samples, as adaptive sampling leaves them.

    Args:
        problems: one problem each, [1, K_i].
        most: K, samples that a problem may have.
        threshold: a response is judged correct if its score is above this.
    Returns:
        As `detailed_summary`, without voting_curves and what needs samples that were not drawn.
        Accuracy and votes are means over problems, the rest over responses. voting.k is K; the
        votes are those at which sampling stopped.
    """
    joined = join_samples(problems)
    summary = _with_details(evaluation_summary(joined, threshold), joined, threshold)
    means = torch.stack([problem.rewards.double().mean() for problem in problems])
    votes = [evaluation_summary(problem)["voting"] for problem in problems]
    num_samples = joined.rewards.numel()
    names = ("majority", "weighted", "best_of")
    summary |= {
        "accuracy": float(means.mean()),
        "accuracy_interval": accuracy_interval(means.unsqueeze(1)),
        "voting": {"k": most}
        | {name: math.fsum(vote[name] for vote in votes) / len(votes) for name in names}
        | {"pass_at_k": math.nan},
        "num_problems": len(problems),
    }
    summary["adaptive"] = {
        "samples_per_problem": num_samples / len(problems),
        "saved_fraction": 1 - num_samples / (most * len(problems)),
        "weighted": summary["voting"]["weighted"],
    }
    return summary


def join_samples(problems: Sequence[EvaluationSamples]) -> EvaluationSamples:
    """Samples of several problems as those of one: for measures that look at responses alone."""
    names = ("rewards", "scores", "finished", "num_tokens")
    return EvaluationSamples(
        **{
            name: torch.cat([getattr(problem, name).flatten() for problem in problems]).unsqueeze(0)
            for name in names
        },
        answers=[[answer for problem in problems for row in problem.answers for answer in row]],
    )


def _with_details(
    summary: dict[str, Any], samples: EvaluationSamples, threshold: float
) -> dict[str, Any]:
    scores, correct = samples.judgements.flatten(), samples.correct.flatten()
    # A truncated response has no score; its length is the limit's.
    ended = samples.finished.flatten().bool()
    judged, lengths = scores[ended].tolist(), samples.num_tokens.flatten()[ended].tolist()
    varies = len(set(lengths)) > 1 and len(set(judged)) > 1
    details = {
        "f1_binary": verification_metrics(scores, correct, threshold)["f1_binary"],
        "score_length_spearman": (
            float(spearmanr(judged, lengths).statistic) if varies else math.nan
        ),
    }
    summary["self_verification"] |= details
    curve = reliability_curve(scores, correct)
    summary["reliability"] = {name: part.tolist() for name, part in curve._asdict().items()}
    summary["response_tokens"] = int(samples.num_tokens.sum())
    return summary


def held_out_metrics(summary: dict[str, Any]) -> dict[str, float]:
    """The numbers of an evaluation under their metric names, for the log.

    Args:
        summary: what `evaluation_summary` gave.
    Returns:
        held_out/... -> value, without those that are not defined.
    """
    top = ("accuracy", "truncated_fraction", "unparsed_fraction", "response_tokens_mean")
    judge = ("f1", "auroc", "accuracy_on_correct", "accuracy_on_incorrect", "ece")
    voting = ("majority", "weighted", "best_of", "pass_at_k")
    values = {name: summary[name] for name in top}
    values |= {name: summary["self_verification"][name] for name in judge}
    values |= {name: summary["voting"][name] for name in voting}
    return {f"held_out/{k}": v for k, v in values.items() if not math.isnan(v)}


def accuracy_interval(rewards: Tensor, num_draws: int = 2000, seed: int = 0) -> list[float]:
    """95 % bootstrap interval of the accuracy, over problems.

    Problems are drawn, not samples: the samples of one problem are not independent.

    Args:
        rewards: [M, K] verdicts, 0 or 1.
        num_draws: bootstrap draws.
        seed: of the draws; the same seed gives the same interval.
    Returns:
        [low, high]: the 2.5 % and 97.5 % quantiles of the mean.
    """
    means = rewards.double().mean(dim=1).cpu()
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(len(means), (num_draws, len(means)), generator=generator)
    quantiles = torch.tensor([0.025, 0.975], dtype=torch.float64)
    return [float(q) for q in torch.quantile(means[draws].mean(dim=1), quantiles)]


def voting_curves(
    samples: EvaluationSamples, num_subsets: int = 32, seed: int = 0
) -> dict[str, list[float]]:
    """What voting over fewer samples gives: each measure against k = 1, 2, 4, ... up to K.

    Args:
        samples: the evaluation, K samples a problem.
        num_subsets: random subsets of size k that are averaged over; all of them where there are
            no more. k = K is the whole, and pass@k is exact.
        seed: of the subsets, which are the same for every problem and measure.
    Returns:
        k, majority, weighted, best_of, pass_at_k: lists of one length, ks as int.
    """
    num_samples = samples.rewards.shape[1]
    ks = [2**i for i in range(num_samples.bit_length()) if 2**i < num_samples] + [num_samples]
    random = Random(seed)
    points = [_votes_at(samples, k, _subsets(num_samples, k, num_subsets, random)) for k in ks]
    return {name: [point[name] for point in points] for name in points[0]}


def _self_verification(samples: EvaluationSamples, threshold: float) -> dict[str, float]:
    scores, correct = samples.judgements.flatten(), samples.correct.flatten()
    measures = verification_metrics(scores, correct, threshold)
    names = ("f1", "accuracy", "accuracy_on_correct", "accuracy_on_incorrect", "auroc")
    return {name: measures[name] for name in names} | {
        "ece": expected_calibration_error(scores, correct)
    }


def _votes_at(
    samples: EvaluationSamples, k: int, subsets: Sequence[tuple[int, ...]]
) -> dict[str, float]:
    """The measures over k samples, averaged over problems and over the subsets of size k."""
    num_problems, num_samples = samples.rewards.shape
    correct, scores = samples.correct.tolist(), samples.judgements.tolist()
    majority = weighted = best = 0
    for problem, answers in enumerate(samples.answers):
        # An answer is as right as the verifier found it in any of the problem's samples.
        right = {a for a, c in zip(answers, correct[problem], strict=True) if c and a is not None}
        for subset in subsets:
            votes = [answers[i] for i in subset]
            weights = [scores[problem][i] for i in subset]
            majority += majority_vote(votes) in right
            weighted += majority_vote(votes, weights) in right
            best += correct[problem][subset[best_of(weights)]]
    num_votes = num_problems * len(subsets)
    passes = (pass_at_k(num_samples, sum(row), k) for row in correct)
    return {
        "k": k,
        "majority": majority / num_votes,
        "weighted": weighted / num_votes,
        "best_of": best / num_votes,
        "pass_at_k": math.fsum(passes) / num_problems,
    }


def _subsets(n: int, k: int, num_subsets: int, random: Random) -> list[tuple[int, ...]]:
    """Subsets of size k of range(n), each sorted, since ties go to the earlier sample."""
    # Never fewer than n, so that k = 1 is the accuracy itself.
    if math.comb(n, k) <= max(num_subsets, n):
        return list(combinations(range(n), k))
    return [tuple(sorted(random.sample(range(n), k))) for _ in range(num_subsets)]
