"""Held-out evaluations: before the first step, every few steps, and after the last."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console

from laser_pl.config import Config
from laser_pl.data.datamodule import PromptDataModule
from laser_pl.evaluation.held_out import Evaluation, evaluate_prompts
from laser_pl.evaluation.report import EvaluationSamples, evaluation_summary, held_out_metrics
from laser_pl.logs.progress import set_phase
from laser_pl.logs.samples import Sample, SamplesFile
from laser_pl.logs.terminal import print_evaluation
from laser_pl.rollout.batch import RolloutBatch
from laser_pl.rollout.collect import Collector
from laser_pl.rollout.micro_batches import Plan, make_plan
from laser_pl.rollout.scoring import add_scores
from laser_pl.training.module import LaserModule

_VOTES = ("held_out/majority", "held_out/weighted", "held_out/best_of", "held_out/pass_at_k")
_FIELDS = ("rewards", "scores", "finished", "num_tokens", "answers")


class EvaluationCallback(Callback):
    """Evaluates the policy on held-out prompts and keeps the first and the latest evaluation.

    Args:
        collector: generates and verifies.
        config: numbers of problems and samples, seed.
        samples: where the responses of the first and the last evaluation go; None on other ranks.
        console: where a line an evaluation is printed; None on other ranks.
    """

    def __init__(
        self,
        collector: Collector,
        config: Config,
        samples: SamplesFile | None,
        console: Console | None,
    ) -> None:
        self.collector = collector
        self.config = config
        self.samples = samples
        self.console = console
        self.before: EvaluationSamples | None = None
        self.after: EvaluationSamples | None = None
        self.after_step: int | None = None
        self.lines: list[Sample] = []  # of the latest full evaluation
        self.evaluate_s = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate before the first step; a resumed run has that from its checkpoint."""
        if self.before is None:
            self.before = self._evaluate(trainer, pl_module, step=0)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate every few steps, with fewer samples; after the last step comes the full one."""
        step, every = trainer.current_epoch + 1, self.config.evaluation.every_n_steps
        if every and step % every == 0 and step < self.config.max_steps:
            self._evaluate_after(trainer, pl_module, step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate the trained policy, unless the run was stopped before its last step."""
        if trainer.current_epoch >= self.config.max_steps:
            self._evaluate_after(trainer, pl_module, self.config.max_steps)

    def accuracy_after(self, step: int) -> float | None:
        """The held-out accuracy measured after a step; None if it was not measured then."""
        if self.after is None or self.after_step != step:
            return None
        return float(self.after.rewards.mean())

    def latest_measures(self) -> dict[str, float]:
        """The held-out metrics of the latest evaluation, with the step after which it was made."""
        if self.after is None or self.after_step is None:
            return {}
        return {"step": self.after_step, **held_out_metrics(evaluation_summary(self.after))}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run has to know of the evaluations before it."""
        packed = {name: _pack(getattr(self, name)) for name in ("before", "after")}
        return {"samples": packed, "after_step": self.after_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the evaluations of the interrupted run up again."""
        for name, packed in state_dict["samples"].items():
            setattr(self, name, _unpack(packed))
        self.after_step = state_dict["after_step"]

    def _evaluate_after(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        self.after = self._evaluate(trainer, pl_module, step)
        self.after_step = step

    def _evaluate(
        self, trainer: Trainer, pl_module: LightningModule, step: int
    ) -> EvaluationSamples:
        set_phase(trainer, "evaluate")
        start = time.perf_counter()
        full = step in (0, self.config.max_steps)
        evaluation = self._sample(trainer, pl_module, step, full)
        summary = evaluation_summary(evaluation.samples)
        elapsed = time.perf_counter() - start
        self.evaluate_s += elapsed
        if isinstance(pl_module, LaserModule):
            measured = held_out_metrics(summary)
            if not full:  # votes of fewer samples would not compare
                measured = {k: v for k, v in measured.items() if k not in _VOTES}
            pl_module.step_metrics.update(measured)
            pl_module.step_metrics["time/evaluate_s"] = elapsed
        if full:
            self.lines = evaluation.lines
        if self.samples is not None and full:
            self.samples.write(evaluation.lines)
        if self.console is not None:
            print_evaluation(step, summary, self.console)
        return evaluation.samples

    def _sample(
        self, trainer: Trainer, pl_module: LightningModule, step: int, full: bool
    ) -> Evaluation:
        data, settings = trainer.datamodule, self.config.evaluation  # type: ignore[attr-defined]
        if not isinstance(pl_module, LaserModule) or not isinstance(data, PromptDataModule):
            raise TypeError("EvaluationCallback works with LaserModule and PromptDataModule")
        with self.collector.engine.weights_of(pl_module.policy):
            return evaluate_prompts(
                self.collector,
                data.held_out[: settings.num_problems],
                settings.samples_per_problem if full else settings.interim_samples_per_problem,
                lambda batch: add_scores(batch, pl_module, lambda: self._plan(batch, pl_module)),
                self.config.seed,
                step,
            )

    def _plan(self, batch: RolloutBatch, module: LaserModule) -> Plan:
        """Ranks with other numbers of problems do not wait for each other here."""
        return make_plan(batch, self.config, module.policy.config, same_number=False)


def _pack(samples: EvaluationSamples | None) -> dict[str, Any] | None:
    """Tensors and lists only, so that a checkpoint loads with weights_only."""
    return None if samples is None else {name: getattr(samples, name) for name in _FIELDS}


def _unpack(packed: dict[str, Any] | None) -> EvaluationSamples | None:
    return None if packed is None else EvaluationSamples(**packed)
