"""The end of a step: its metrics go to metrics.csv and to the loggers."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer

from laser_pl.logs.metrics_file import MetricsFile
from laser_pl.training.module import LaserModule


class MetricsCallback(Callback):
    """Writes the metrics that the other callbacks and the module have gathered for a step.

    Args:
        file: metrics.csv; None on other ranks.
    """

    def __init__(self, file: MetricsFile | None) -> None:
        self.file = file

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the evaluation before the first step, as the row of step 0."""
        if trainer.current_epoch == 0:
            self._write(trainer, pl_module, 0)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the row of the step."""
        self._write(trainer, pl_module, trainer.current_epoch + 1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the last evaluation to the row of the last step."""
        self._write(trainer, pl_module, trainer.current_epoch)

    def _write(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        if not isinstance(pl_module, LaserModule):
            raise TypeError("MetricsCallback works with LaserModule")
        metrics, pl_module.step_metrics = pl_module.step_metrics, {}
        if self.file is None or not metrics:
            return
        self.file.write(step, metrics)
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=step)
