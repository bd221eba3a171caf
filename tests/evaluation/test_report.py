"""From samples to numbers."""

import json
import math
import time
from itertools import combinations
from pathlib import Path

import pytest
import torch

from laser_pl.evaluation.report import (
    EvaluationSamples,
    accuracy_interval,
    evaluation_summary,
    held_out_metrics,
    voting_curves,
)
from laser_pl.logs.files import write_json_atomically
from laser_pl.logs.names import METRICS

# Two problems, four samples each. Problem 0: "7" is right and in the minority, but scores high; the
# last is truncated, and its score must count as 0. Problem 1: "3" is right; one has no answer.
SMALL = EvaluationSamples(
    rewards=torch.tensor([[0.0, 1.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]]),
    scores=torch.tensor([[0.25, 0.875, 0.125, 5.0], [0.75, 0.25, 0.625, -0.5]]),
    finished=torch.tensor([[True, True, True, False], [True, True, True, True]]),
    num_tokens=torch.tensor([[10, 20, 30, 64], [10, 10, 8, 8]]),
    answers=[["8", "7", "8", None], ["3", "3", "4", None]],
)


def random_samples(num_problems: int, num_samples: int, seed: int = 0) -> EvaluationSamples:
    generator = torch.Generator().manual_seed(seed)
    shape = (num_problems, num_samples)
    choices = torch.randint(4, shape, generator=generator)
    finished = torch.rand(shape, generator=generator) < 0.9
    return EvaluationSamples(
        rewards=((choices == 0) & finished).float(),
        scores=torch.rand(shape, generator=generator) * 1.4 - 0.2,
        finished=finished,
        num_tokens=torch.randint(1, 65, shape, generator=generator),
        answers=[
            [str(c) if f else None for c, f in zip(cs, fs, strict=True)]
            for cs, fs in zip(choices.tolist(), finished.tolist(), strict=True)
        ],
    )


def test_the_summary_of_a_small_evaluation() -> None:
    summary = evaluation_summary(SMALL)
    # Rewards: 3 of 8. Judged correct (score > 0.5): (0,1), (1,0), (1,2).
    assert summary["accuracy"] == 3 / 8
    judged = summary["self_verification"]
    assert judged["accuracy_on_correct"] == pytest.approx(2 / 3)  # (0,1), (1,0); not (1,1)
    assert judged["accuracy_on_incorrect"] == pytest.approx(4 / 5)  # not (1,2)
    assert judged["f1"] == pytest.approx(2 * (2 / 3) * (4 / 5) / (2 / 3 + 4 / 5))
    assert judged["accuracy"] == 6 / 8
    # Correct 0.875, 0.75, 0.25 against 0.25, 0.125, 0 (truncated), 0.625, -0.5: 5 + 5 + 3.5 of 15.
    assert judged["auroc"] == pytest.approx(13.5 / 15)
    # Ten bins. 0 (two: 0, -0.5): |0 - 0|; 0.125: 0.125; 0.25 (two, one correct): 0.25;
    # 0.625: 0.625; 0.75: 0.25; 0.875: 0.125. Weighted by 2, 1, 2, 1, 1, 1 of 8.
    assert judged["ece"] == pytest.approx((0.125 + 2 * 0.25 + 0.625 + 0.25 + 0.125) / 8)
    # Problem 0: "8" has two votes, but "7" has 0.875 against 0.375. Problem 1: "3" both ways.
    assert summary["voting"] == {
        "k": 4,
        "majority": 0.5,
        "weighted": 1.0,
        "best_of": 1.0,
        "pass_at_k": 1.0,
    }
    assert summary["truncated_fraction"] == 1 / 8
    assert summary["unparsed_fraction"] == 2 / 8
    assert summary["response_tokens_mean"] == 20.0
    assert (summary["num_problems"], summary["num_samples"]) == (2, 8)


def test_the_score_of_a_truncated_response_does_not_matter() -> None:
    other = EvaluationSamples(
        SMALL.rewards,
        torch.where(SMALL.finished, SMALL.scores, torch.nan),
        SMALL.finished,
        SMALL.num_tokens,
        SMALL.answers,
    )
    assert evaluation_summary(other) == evaluation_summary(SMALL)
    assert voting_curves(other) == voting_curves(SMALL)


def test_a_vote_without_any_answer_is_wrong() -> None:
    samples = EvaluationSamples(
        rewards=torch.ones(1, 2),
        scores=torch.ones(1, 2),
        finished=torch.ones(1, 2, dtype=torch.bool),
        num_tokens=torch.ones(1, 2, dtype=torch.long),
        answers=[[None, None]],
    )
    voting = evaluation_summary(samples)["voting"]
    assert (voting["majority"], voting["weighted"]) == (0.0, 0.0)


def test_an_answer_is_right_if_any_sample_with_it_was_found_right() -> None:
    # The first sample says "7" in a form that the verifier refuses.
    samples = EvaluationSamples(
        rewards=torch.tensor([[0.0, 1.0, 0.0]]),
        scores=torch.tensor([[0.9, 0.9, 0.1]]),
        finished=torch.ones(1, 3, dtype=torch.bool),
        num_tokens=torch.ones(1, 3, dtype=torch.long),
        answers=[["7", "7", "8"]],
    )
    assert evaluation_summary(samples)["voting"]["majority"] == 1.0


@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_with_one_class_auroc_is_null_in_json_and_not_logged(tmp_path: Path, reward: float) -> None:
    samples = EvaluationSamples(
        rewards=torch.full((2, 3), reward),
        scores=torch.rand(2, 3),
        finished=torch.ones(2, 3, dtype=torch.bool),
        num_tokens=torch.ones(2, 3, dtype=torch.long),
        answers=[["a"] * 3] * 2,
    )
    summary = evaluation_summary(samples)
    assert math.isnan(summary["self_verification"]["auroc"])
    write_json_atomically(tmp_path / "summary.json", summary)
    stored = json.loads((tmp_path / "summary.json").read_text())
    assert stored["self_verification"]["auroc"] is None
    assert "held_out/auroc" not in held_out_metrics(summary)


def test_held_out_metrics_are_all_the_held_out_names() -> None:
    metrics = held_out_metrics(evaluation_summary(SMALL))
    assert metrics.keys() == {name for name in METRICS if name.startswith("held_out/")}
    assert metrics["held_out/accuracy"] == 3 / 8
    assert metrics["held_out/weighted"] == 1.0


def test_the_interval_is_over_problems_and_the_same_each_time() -> None:
    # 100 problems, half always right and half always wrong, however many samples each has: the
    # standard error is sqrt(0.25 / 100) = 0.05, so that the interval is 0.5 +- 0.098.
    rewards = torch.tensor([[0.0], [1.0]]).repeat(50, 16)
    low, high = accuracy_interval(rewards)
    assert low == pytest.approx(0.402, abs=0.015)
    assert high == pytest.approx(0.598, abs=0.015)
    assert accuracy_interval(rewards) == [low, high]
    assert accuracy_interval(torch.ones(5, 2)) == [1.0, 1.0]


def test_curves_over_all_subsets_equal_a_slow_loop() -> None:
    samples = random_samples(num_problems=6, num_samples=5)
    # 10 subsets of two or of three are all there are.
    curves = voting_curves(samples, num_subsets=10)
    assert curves["k"] == [1, 2, 4, 5]
    for position, k in enumerate(curves["k"]):
        majority = best = passed = count = 0
        for m in range(6):
            scores = torch.where(samples.finished[m], samples.scores[m], 0.0)
            for subset in combinations(range(5), k):
                answers = [samples.answers[m][i] for i in subset]
                given = [a for a in answers if a is not None]
                winner = max(given, key=lambda a: (given.count(a), -given.index(a)), default=None)
                majority += winner == "0"
                top = max(subset, key=lambda i: (float(scores[i]), -i))
                best += bool(samples.rewards[m, top] == 1)
                passed += any(samples.rewards[m, i] == 1 for i in subset)
                count += 1
        assert curves["majority"][position] == pytest.approx(majority / count)
        assert curves["best_of"][position] == pytest.approx(best / count)
        assert curves["pass_at_k"][position] == pytest.approx(passed / count)


def test_the_curves_start_at_the_accuracy_and_end_at_the_summary() -> None:
    samples = random_samples(num_problems=20, num_samples=16)
    curves, summary = voting_curves(samples), evaluation_summary(samples)
    assert curves["k"] == [1, 2, 4, 8, 16]
    for name in ("majority", "weighted", "best_of", "pass_at_k"):
        assert curves[name][0] == pytest.approx(summary["accuracy"])
        assert curves[name][-1] == summary["voting"][name]


def test_scores_that_know_the_truth_make_the_weighted_vote_as_good_as_any_sample() -> None:
    samples = random_samples(num_problems=20, num_samples=8)
    knowing = EvaluationSamples(
        samples.rewards, samples.rewards, samples.finished, samples.num_tokens, samples.answers
    )
    voting = evaluation_summary(knowing)["voting"]
    assert voting["weighted"] == voting["best_of"] == voting["pass_at_k"]


def test_the_curves_are_the_same_each_time_and_depend_on_the_seed() -> None:
    samples = random_samples(num_problems=20, num_samples=16)
    assert voting_curves(samples, seed=3) == voting_curves(samples, seed=3)
    assert voting_curves(samples, seed=3) != voting_curves(samples, seed=4)


def test_one_sample_a_problem_is_enough() -> None:
    samples = random_samples(num_problems=3, num_samples=1)
    assert voting_curves(samples)["k"] == [1]
    assert evaluation_summary(samples)["voting"]["k"] == 1


def test_a_report_on_128_problems_of_16_samples_takes_under_two_seconds() -> None:
    samples = random_samples(num_problems=128, num_samples=16)
    start = time.perf_counter()
    evaluation_summary(samples)
    voting_curves(samples)
    assert time.perf_counter() - start < 2.0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rewards", torch.zeros(8)),
        ("rewards", torch.zeros(0, 4)),
        ("scores", torch.zeros(2, 3)),
        ("finished", torch.ones(4, 2, dtype=torch.bool)),
        ("num_tokens", torch.ones(2, dtype=torch.long)),
        ("answers", [["1", "2", "3", "4"]]),
        ("answers", [["1", "2", "3", "4"], ["1", "2", "3"]]),
    ],
)
def test_shapes_that_do_not_fit_are_refused_by_name(field: str, value: object) -> None:
    fields = {name: getattr(SMALL, name) for name in SMALL.__dataclass_fields__}
    with pytest.raises(ValueError, match=f"^{field} must be"):
        EvaluationSamples(**(fields | {field: value}))
