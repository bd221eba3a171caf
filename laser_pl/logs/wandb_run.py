"""Weights & Biases: the run, what it shows beside the metrics, and what it keeps at its end."""

from __future__ import annotations

import json
import math
import netrc
import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import wandb
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console

from laser_pl.config import Config, WandbConfig, flatten
from laser_pl.errors import UserError, one_line
from laser_pl.evaluation.callback import EvaluationCallback
from laser_pl.logs.files import write_json_atomically
from laser_pl.logs.samples import Sample
from laser_pl.rollout.callback import RolloutCallback

WANDB_FILE = "wandb_run.json"
# What a table of responses shows of a sample, in this order.
COLUMNS = (
    "step", "split", "prompt", "response", "answer", "reference_answer", "reward", "score",
    "advantage",
)  # fmt: skip
PACKAGES = ("laser-pl", "torch", "transformers", "lightning", "deepspeed")
# Whose best value over the run is kept beside the last one; less is better for ece alone.
BEST = ("held_out/accuracy", "held_out/f1", "held_out/auroc", "held_out/weighted", "held_out/ece")


def start_wandb(config: Config, settings: WandbConfig, folder: Path) -> Any:
    """Begin the wandb run, or go on with that of the run that is resumed.

    Raises:
        UserError: wandb refuses the key or the settings, or its server does not answer.
    """
    try:
        run = wandb.init(
            project=settings.project,
            entity=settings.entity,
            name=settings.name,
            group=settings.group,
            tags=settings.tags,
            dir=folder,
            id=_known_id(config, folder),
            resume="allow",
            mode="online" if has_wandb_key() else "offline",
            settings=wandb.Settings(silent=True),
        )
    except wandb.Error as error:
        raise UserError(
            f"logger.wandb: {one_line(error)}; WANDB_MODE=offline or logger=csv does without it"
        ) from None
    # Lightning does so for the runs that it begins itself.
    run.define_metric("trainer/global_step")
    run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
    write_json_atomically(folder / WANDB_FILE, {"id": run.id})
    _keep_swept_groups(run, config)
    versions = {name: version(name) for name in PACKAGES} | {"python": platform.python_version()}
    run.config.update({"versions": versions}, allow_val_change=True)
    return run


def finish_wandb(exit_code: int, mistake: str | None, console: Console) -> None:
    """End the wandb run; where it is offline, say so once, with the line that uploads it.

    Args:
        exit_code: of the training run.
        mistake: of the input, that ended it; it goes into the wandb run's summary.
        console: where to say so.
    """
    run = wandb.run
    if run is None:
        return
    if mistake is not None:
        run.summary["error"] = mistake
    folder = Path(run.dir).parent  # of its files
    is_offline = bool(run.offline)
    wandb.finish(exit_code)
    if is_offline and folder.is_dir():
        console.print(
            f"wandb: the run is offline; where there is a key, upload it: wandb sync {folder}",
            highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip


def log_results(metrics: list[dict[str, float]], folder: Path, settings: WandbConfig) -> None:
    """Put the best values, the figures and, if asked for, the model into the run.

    Args:
        metrics: the rows of metrics.csv.
        folder: output_dir.
        settings: whether to upload the model.
    """
    run = wandb.run
    if run is None:
        return
    for name in BEST:
        values = [row[name] for row in metrics if not math.isnan(row.get(name, math.nan))]
        if values:
            run.summary[f"best/{name}"] = min(values) if name.endswith("ece") else max(values)
    figures = {
        f"figures/{path.stem}": wandb.Image(str(path))
        for path in sorted((folder / "figures").glob("*.png"))
    }
    run.log(figures)
    model = folder / "model"
    if settings.log_model and model.is_dir():
        artifact = wandb.Artifact(f"model-{run.id}", type="model")
        artifact.add_dir(str(model))
        run.log_artifact(artifact)


def has_wandb_key() -> bool:
    """Whether wandb may go online: there is a key, and WANDB_MODE does not say otherwise."""
    if os.environ.get("WANDB_MODE", "online") != "online":
        return False
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


class WandbCallback(Callback):
    """Logs a growing table of responses, and histograms of the score by verdict, each step.

    Args:
        rollout: holds the step's samples and scores.
        evaluation: holds those of the latest full evaluation.
    """

    def __init__(self, rollout: RolloutCallback, evaluation: EvaluationCallback) -> None:
        self.rollout = rollout
        self.evaluation = evaluation
        self.table = wandb.Table(columns=list(COLUMNS), log_mode="INCREMENTAL")
        self._shown: list[Sample] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the step's samples and scores."""
        for sample in self.rollout.samples_of_step:
            self.table.add_data(*(getattr(sample, name) for name in COLUMNS))
        self._log(trainer, {"samples": self.table} | histograms(self.rollout.scores_of_step))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the responses of the last evaluation, two a problem at most."""
        number: dict[int, int] = {}
        for sample in self.evaluation.lines:
            number[sample.problem] = number.get(sample.problem, 0) + 1
            if number[sample.problem] <= 2:
                self.table.add_data(*(getattr(sample, name) for name in COLUMNS))
        self._log(trainer, {"samples": self.table})

    def _log(self, trainer: Trainer, values: Mapping[str, Any]) -> None:
        if wandb.run is not None:
            step = trainer.current_epoch + 1
            wandb.run.log({**values, "trainer/global_step": step})


def histograms(scores: Mapping[str, list[float]]) -> dict[str, Any]:
    """Histograms of the scores by verdict, for the log; of a class that is absent there is none."""
    return {
        f"self_reward/scores_{verdict}": wandb.Histogram(values)
        for verdict, values in scores.items()
        if values
    }


def _keep_swept_groups(run: Any, config: Config) -> None:
    """Log a group's settings one by one where a sweep holds its name, which W&B then locks."""
    resolved = config.model_dump(mode="json", by_alias=True)
    swept = {
        name: group
        for name, group in resolved.items()
        if isinstance(group, dict) and isinstance(run.config.get(name), str)
    }
    run.config.update(flatten(swept))


def _known_id(config: Config, folder: Path) -> str | None:
    """The id of the wandb run that a resumed run goes on with; None starts a new one."""
    path = folder / WANDB_FILE
    if config.resume is None or not path.is_file():
        return None
    return str(json.loads(path.read_text())["id"])
