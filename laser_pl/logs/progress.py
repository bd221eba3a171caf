"""The progress bar over RL steps."""

import math
import time
from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
)
from rich.text import Text

# Steps over which the time of a step is averaged: long enough to hold an evaluation now and then.
_WINDOW = 20


class StepProgress(ProgressBar):
    """Shows RL steps (here a Lightning epoch is one), with reward, F1, tokens/s and time left.

    On a terminal a live bar; elsewhere (a file, a pipe) plain lines. Only global rank zero shows
    anything. It reads the metrics at the end of a step, so it belongs after the callbacks that make
    them.

    Args:
        console: where to show it; the same one must be used to print while it is live. None for
            standard output.
        every_n_steps: without a terminal, a line after each step that this divides, and the last.
    """

    def __init__(self, console: Console | None = None, every_n_steps: int = 1) -> None:
        super().__init__()
        self._console = console or Console()
        self._every_n_steps = every_n_steps
        self._enabled = True
        self._live: Progress | None = None
        self._task = TaskID(0)
        self._clock = _StepClock()

    def enable(self) -> None:
        """Show progress again after `disable`, from the next fit on."""
        self._enabled = True

    def disable(self) -> None:
        """Show nothing from now on."""
        self._enabled = False
        self._stop()

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the bar.

        Args:
            *args: as for `rich.console.Console.print`.
            **kwargs: likewise.
        """
        if self._enabled:
            self._console.print(*args, **kwargs)

    def set_phase(self, text: str) -> None:
        """Say what is going on inside the step.

        Args:
            text: one word, as "rollout", "update" or "evaluate".
        """
        if self._live is not None:
            self._live.update(self._task, description=text, refresh=True)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the bar, since measuring before the first step takes its time too.

        Args:
            trainer: says how many steps there are.
            pl_module: not used.
        """
        self._clock = _StepClock()
        if self._enabled and self._console.is_interactive:
            self._live = _live_progress(self._console)
            self._task = self._live.add_task(
                "start", total=_num_steps(trainer), facts="", done_at=None
            )
            self._live.start()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go to the current step, which is not 0 in a resumed run.

        Args:
            trainer: gives the current step, which is known only now.
            pl_module: not used.
        """
        self._clock.tick()
        if self._live is not None:
            self._live.update(self._task, completed=trainer.current_epoch)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the step and show its metrics.

        Args:
            trainer: gives the step and `callback_metrics`.
            pl_module: may have `step_metrics`, which come before those of the trainer.
        """
        self._clock.tick()
        step, total = trainer.current_epoch + 1, _num_steps(trainer)
        facts = _facts({**trainer.callback_metrics, **getattr(pl_module, "step_metrics", {})})
        left_s = self._clock.left_s(total - step) if total is not None else None
        if self._live is not None:
            done_at = None if left_s is None else self._live.get_time() + left_s
            self._live.update(self._task, completed=step, facts=facts, done_at=done_at)
        elif self._enabled and (step % self._every_n_steps == 0 or step == total):
            self._print_line(step, total, facts, left_s)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the finished bar on the terminal.

        Args:
            trainer: not used.
            pl_module: not used.
        """
        self.set_phase("done")
        self._stop()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Give the terminal back before the error is shown; Ctrl-C comes here too.

        Args:
            trainer: not used.
            pl_module: not used.
            exception: what happened.
        """
        self.set_phase("stopped")
        self._stop()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the terminal back, whatever happened.

        Args:
            trainer: not used.
            pl_module: not used.
            stage: not used.
        """
        self._stop()

    def _print_line(self, step: int, total: int | None, facts: str, left_s: float | None) -> None:
        line = f"step {step}/{total or '?'}  {facts}  {_duration(self._clock.elapsed_s)}"
        if left_s is not None:
            line += f", {_duration(left_s)} left"
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _stop(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            live.stop()


def set_phase(trainer: Trainer, text: str) -> None:
    """Say in the progress bar what is going on inside the step, if the trainer has such a bar.

    Args:
        trainer: its progress bar is asked.
        text: one word, as "rollout", "update" or "evaluate".
    """
    if isinstance(trainer.progress_bar_callback, StepProgress):
        trainer.progress_bar_callback.set_phase(text)


class _StepClock:
    """Wall time since the start, and how long the steps to come will take."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._ticks: deque[float] = deque(maxlen=_WINDOW + 1)

    def tick(self) -> None:
        self._ticks.append(time.monotonic())

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._start

    def left_s(self, num_steps: int) -> float:
        return num_steps * (self._ticks[-1] - self._ticks[0]) / max(len(self._ticks) - 1, 1)


class _TimesColumn(ProgressColumn):
    """Time since the start, and time left once a step is done."""

    def render(self, task: Task) -> Text:
        times = _duration(task.elapsed or 0.0)
        if (done_at := task.fields["done_at"]) is not None:
            times += f", {_duration(max(0.0, done_at - task.get_time()))} left"
        return Text(times, style="progress.remaining")


class _Fact(NamedTuple):
    name: str
    label: str
    pattern: str


_FACTS = (
    _Fact("rollout/reward_mean", "reward", "{label} {value:.3f}"),
    _Fact("self_reward/f1", "F1", "{label} {value:.3f}"),
    _Fact("rollout/tokens_per_s", "tokens/s", "{value:,.0f} {label}"),
)


def _facts(metrics: Mapping[str, Any]) -> str:
    return "  ".join(
        fact.pattern.format(label=fact.label, value=float(metrics[fact.name]))
        for fact in _FACTS
        if math.isfinite(float(metrics.get(fact.name, math.nan)))
    )


def _live_progress(console: Console) -> Progress:
    # The other columns take up to 74 characters, so that a line fits a terminal of 80.
    bar_width = min(max(console.width - 75, 5), 30)
    return Progress(
        TextColumn("{task.description:<8}", markup=False),
        BarColumn(bar_width),
        TextColumn("{task.completed}/{task.total}"),
        TextColumn("{task.fields[facts]}", markup=False),
        _TimesColumn(),
        console=console,
        refresh_per_second=4,
    )


def _num_steps(trainer: Trainer) -> int | None:
    steps = trainer.max_epochs
    return steps if steps is not None and steps > 0 else None


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
