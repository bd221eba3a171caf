"""What a run leaves behind: summary.json, figures, the model's folder, and the table at the end."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rich.console import Console

from laser_pl.algorithm import partition_excess
from laser_pl.config import Config
from laser_pl.evaluation.plots import (
    plot_reliability,
    plot_score_histograms,
    plot_training_curves,
    plot_voting,
)
from laser_pl.evaluation.report import EvaluationSamples, evaluation_summary, voting_curves
from laser_pl.export import MODEL_FOLDER, export_checkpoint
from laser_pl.logs.files import write_json_atomically
from laser_pl.logs.metrics_file import read_metrics
from laser_pl.logs.samples import Sample, render_samples, telling_samples
from laser_pl.logs.terminal import print_summary
from laser_pl.setup import Inputs
from laser_pl.training.module import LaserModule

THRESHOLD = 0.5


def write_report(
    config: Config,
    module: LaserModule,
    inputs: Inputs,
    before: EvaluationSamples | None,
    after: EvaluationSamples | None,
    after_step: int | None,
    lines: list[Sample],
    checkpoint: Path | None,
    folder: Path,
    console: Console,
    steps: int,
    interrupted: bool,
    time_s: dict[str, float],
) -> None:
    """Write the trained model, summary.json and the figures, and print what came out.

    Args:
        config: of the run.
        module: with the trained policy.
        inputs: tokenizer and score token.
        before: evaluation before the first step, None if the run did not get that far.
        after: the latest evaluation since, None if there is none.
        after_step: the step after which it was made.
        lines: responses of a full evaluation, of which two are shown.
        checkpoint: the last one, from which the model is written; None if its weights will not do.
        folder: output_dir.
        console: where the table is printed.
        steps: steps that were made.
        interrupted: the run was stopped before its end.
        time_s: seconds by phase; those of the steps are added from metrics.csv.
    """
    rows = read_metrics(folder / "metrics.csv")
    if checkpoint is not None:
        export_checkpoint(checkpoint, folder / MODEL_FOLDER, config.export.merge)
    (folder / "figures").mkdir(exist_ok=True)
    plot_training_curves(rows, folder / "figures")
    shown = after or before
    if shown is not None:
        draw_evaluations(before if after else None, shown, folder / "figures")
    summary = {
        **_measures(before, after),
        **score_facts(config, module, inputs),
        "c_ref_std": module.c_ref_std,
        "partition_excess": partition_excess(module.c_ref, config.self_reward.beta),
        "steps": steps,
        "evaluated_at_step": after_step,
        "seed": config.seed,
        "num_tokens": module.num_tokens,
        "num_bad_steps": module.num_bad_steps,
        "interrupted": interrupted,
        "time": _times(rows, time_s),
    }
    write_json_atomically(folder / "summary.json", summary)
    if shown is not None:
        console.print(render_samples(telling_samples(lines)))
        first = evaluation_summary(_first(before, after)) if before and after else None
        print_summary(first, evaluation_summary(shown), list_files(folder), console)


def score_facts(config: Config, module: LaserModule, inputs: Inputs) -> dict[str, Any]:
    """What one has to know to read the score off the model: the content of self_reward.json."""
    return {
        "special_token": inputs.tokenizer.convert_ids_to_tokens(inputs.score_token_id),
        "token_id": inputs.score_token_id,
        "incorrect_token_id": inputs.incorrect_token_id,
        "score": config.self_reward.score,
        "loss": config.self_reward.loss,
        "eos_token_ids": list(inputs.eos_ids),
        "beta": config.self_reward.beta,
        "c_ref": module.c_ref,
        "threshold": THRESHOLD,
    }


def draw_evaluations(
    before: EvaluationSamples | None,
    after: EvaluationSamples,
    folder: Path,
    with_votes: bool = True,
) -> None:
    """Draw the figures of an evaluation, beside those before training if there are any."""
    plot_score_histograms(after, folder, before)
    plot_reliability(after, folder, before)
    if with_votes:
        plot_voting(voting_curves(after), folder, voting_curves(before) if before else None)


def list_files(folder: Path) -> dict[str, str]:
    """The files of a run with a few words each, those that are there."""
    words = {
        "config.yaml": "the resolved configuration",
        "metrics.csv": "every metric of every step",
        "summary.json": "the numbers above, and more",
        "samples.jsonl": "responses with verdict and score",
        "figures": "training curves, score histograms, reliability, voting",
        "checkpoints": "to go on from: resume=auto",
        "model": "the trained model, a Hugging Face folder with self_reward.json and model card",
        "wandb": "the wandb run; `wandb sync` uploads an offline one",
        "tensorboard": "tensorboard --logdir",
    }
    return {str(folder / name): text for name, text in words.items() if (folder / name).exists()}


def _first(before: EvaluationSamples, after: EvaluationSamples) -> EvaluationSamples:
    """As many samples a problem as there are after training: votes of more would not compare."""
    number = min(after.rewards.shape[1], before.rewards.shape[1])
    return EvaluationSamples(
        rewards=before.rewards[:, :number],
        scores=before.scores[:, :number],
        finished=before.finished[:, :number],
        num_tokens=before.num_tokens[:, :number],
        answers=[row[:number] for row in before.answers],
    )


def _measures(before: EvaluationSamples | None, after: EvaluationSamples | None) -> dict[str, Any]:
    """The evaluation's part of summary.json; before training under names that end in _before."""
    first = evaluation_summary(before) if before else {}
    last = evaluation_summary(after) if after else {}
    return {
        "accuracy_before": first.get("accuracy"),
        **last,
        "self_verification_before": first.get("self_verification"),
        "voting_before": first.get("voting"),
    }


def _times(rows: list[dict[str, float]], time_s: dict[str, float]) -> dict[str, float]:
    """Seconds by phase, of all steps together."""
    phases = ("rollout", "verify", "update")
    sums = {p: math.fsum(row.get(f"time/{p}_s", 0.0) for row in rows) for p in phases}
    return {**sums, **time_s}
