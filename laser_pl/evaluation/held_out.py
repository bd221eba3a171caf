"""An evaluation: K responses to each held-out prompt, judged by the verifier and by the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from laser_pl.data.problem import Prompt
from laser_pl.distributed import (
    derive_seed,
    gather_over_ranks,
    on_all_ranks,
    rank,
    share_of_rank,
)
from laser_pl.evaluation.report import EvaluationSamples
from laser_pl.logs.samples import Sample
from laser_pl.rollout.batch import RolloutBatch
from laser_pl.rollout.collect import Collected, Collector

# Sequences that are sampled between two updates of the progress bar.
GROUP_SEQUENCES = 512


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found, the same on every rank.

    Attributes:
        samples: the numbers, M problems x K responses.
        lines: every response as a line of samples.jsonl.
    """

    samples: EvaluationSamples
    lines: list[Sample]


def evaluate_prompts(
    collector: Collector,
    prompts: Sequence[Prompt],
    samples_per_problem: int,
    add_scores: Callable[[RolloutBatch], None],
    seed: int,
    step: int,
    track: Callable[[list[list[Prompt]]], Iterable[list[Prompt]]] = iter,
) -> Evaluation:
    """Sample and judge K responses to each prompt; every rank does its share of the prompts.

    Args:
        collector: generates and verifies.
        prompts: M prompts, the same on every rank.
        samples_per_problem: K.
        add_scores: fills in the self-reward scores of a batch.
        seed: of the run; the same step and seed give the same responses.
        step: after which the evaluation is made, 0 before the first.
        track: goes through the groups of prompts, to show a progress bar.
    Raises:
        UserError: the verifier failed, and the configuration says to stop then.
    """

    def share() -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        groups = _groups(share_of_rank(list(prompts)), samples_per_problem)
        for number, group in enumerate(track(groups)):
            group_seed = derive_seed(seed, "evaluate", step, rank(), number)
            collected = collector.collect(group, samples_per_problem, group_seed)
            add_scores(collected.batch)
            rows += _rows(collected, samples_per_problem, collector, step)
        return rows

    rows = gather_over_ranks(on_all_ranks(share))
    return Evaluation(
        samples=to_samples([row["lines"] for row in rows], [row["answers"] for row in rows]),
        lines=[line for row in rows for line in row["lines"]],
    )


def to_samples(
    lines: Sequence[Sequence[Sample]], answers: Sequence[Sequence[str | None]]
) -> EvaluationSamples:
    """The numbers of an evaluation from its lines.

    Args:
        lines: [M][K] of samples.jsonl.
        answers: [M][K], equivalent ones already made one string.
    """

    def table(name: str) -> torch.Tensor:
        return torch.tensor([[getattr(line, name) for line in row] for row in lines])

    return EvaluationSamples(
        rewards=table("reward"),
        scores=table("score"),
        finished=table("finished").bool(),
        num_tokens=table("num_tokens").long(),
        answers=[list(row) for row in answers],
    )


def _groups(prompts: list[Prompt], samples_per_problem: int) -> list[list[Prompt]]:
    """Prompts in groups, so that progress shows and a long evaluation's memory stays bounded."""
    size = max(1, GROUP_SEQUENCES // samples_per_problem)
    return [prompts[start : start + size] for start in range(0, len(prompts), size)]


def _rows(
    collected: Collected, samples_per_problem: int, collector: Collector, step: int
) -> list[dict[str, Any]]:
    """A plain mapping a problem, which can be gathered over ranks."""
    lines = problem_lines(collected, samples_per_problem, collector, step)
    votes = collector.verifier.canonical_answers([[line.answer for line in row] for row in lines])
    return [{"lines": row, "answers": names} for row, names in zip(lines, votes, strict=True)]


def problem_lines(
    collected: Collected, samples_per_problem: int, collector: Collector, step: int
) -> list[list[Sample]]:
    """The responses to each problem as lines of samples.jsonl: [M][K]."""
    lines = []
    for start in range(0, len(collected.batch), samples_per_problem):
        text = str(collector.tokenizer.decode(list(collected.prompt_of(start).token_ids)))
        rows = range(start, start + samples_per_problem)
        lines.append([_line(collected, row, text, step) for row in rows])
    return lines


def _line(collected: Collected, row: int, prompt_text: str, step: int) -> Sample:
    batch, problem = collected.batch, collected.prompt_of(row).problem
    return Sample(
        step=step,
        split="held_out",
        problem=problem.index,
        prompt=prompt_text,
        response=collected.responses[row],
        answer=collected.verdicts[row].answer,
        reference_answer=problem.answer,
        reward=float(batch.rewards[row]),
        score=float(batch.scores[row]),
        advantage=None,
        finished=bool(batch.finished[row]),
        num_tokens=int(batch.num_tokens[row]),
    )
