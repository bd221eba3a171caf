"""The progress bar over RL steps, in a real Lightning loop of one batch a step."""

import io
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from torch.utils.data import DataLoader

from laser_pl.logs import progress
from laser_pl.logs.progress import StepProgress, set_phase

HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"


class Module(LightningModule):
    """One parameter, trained for as many steps as there are epochs."""

    def __init__(self, error: BaseException | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.error = error
        self.step_metrics: dict[str, float] = {}

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.error is not None and self.current_epoch == 1:
            raise self.error
        self.log("rollout/reward_mean", self.current_epoch / 4, on_step=False, on_epoch=True)
        self.step_metrics = {"self_reward/f1": 0.5, "rollout/tokens_per_s": 1234.4}
        return self.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(
    bar: StepProgress,
    module: Module,
    folder: Path,
    max_epochs: int = 3,
    others: tuple[Callback, ...] = (),
    checkpoint: Path | None = None,
) -> Trainer:
    trainer = Trainer(
        accelerator="cpu", devices=1, max_epochs=max_epochs, logger=False,
        enable_checkpointing=False, enable_model_summary=False, default_root_dir=folder,
        callbacks=[*others, bar],
    )  # fmt: skip
    trainer.fit(module, DataLoader(torch.zeros(1, 1)), ckpt_path=checkpoint)
    return trainer


def plain_console() -> Console:
    return Console(file=io.StringIO(), width=200)


def live_console() -> Console:
    return Console(
        file=io.StringIO(), width=200, force_terminal=True, force_interactive=True,
        color_system=None, _environ={"TERM": "xterm"},
    )  # fmt: skip


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_without_a_terminal_each_step_is_one_plain_line(tmp_path: Path) -> None:
    console = plain_console()
    fit(StepProgress(console), Module(), tmp_path)
    lines = written(console).splitlines()
    assert len(lines) == 3
    assert re.fullmatch(
        r"step 2/3  reward 0\.250  F1 0\.500  1,234 tokens/s  0:0\d, 0:0\d left", lines[1]
    )


def test_every_n_steps_thins_the_lines_but_shows_the_last(tmp_path: Path) -> None:
    console = plain_console()
    fit(StepProgress(console, every_n_steps=2), Module(), tmp_path, max_epochs=5)
    assert [line.split()[1] for line in written(console).splitlines()] == ["2/5", "4/5", "5/5"]


def test_on_a_terminal_the_bar_counts_steps_and_ends_complete(tmp_path: Path) -> None:
    console = live_console()
    fit(StepProgress(console), Module(), tmp_path)
    text = written(console)
    assert "3/3 reward 0.500  F1 0.500  1,234 tokens/s" in text
    assert "done" in text
    assert text.rfind(SHOW_CURSOR) > text.rfind(HIDE_CURSOR) >= 0


def test_the_whole_line_fits_a_terminal_of_80_columns(tmp_path: Path) -> None:
    console = live_console()
    console.width = 80
    bar = StepProgress(console)
    fit(bar, Module(), tmp_path, max_epochs=100)
    last = re.split(r"\r|\n|\x1b\[\d*[A-Za-z]", written(console).rstrip("\n"))
    (line,) = {part for part in last if part.startswith("done")}
    assert "…" not in line
    assert re.search(r"100/100 reward .* tokens/s 0:\d\d, 0:00 left *$", line)


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()])
def test_an_error_or_ctrl_c_gives_the_terminal_back(
    tmp_path: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Lightning ignores further Ctrl-C from there on, in this process too.
    monkeypatch.setattr("signal.signal", lambda *args: None)
    console = live_console()
    with pytest.raises((RuntimeError, SystemExit)):
        fit(StepProgress(console), Module(error), tmp_path)
    text = written(console)
    assert "stopped" in text
    assert text.rfind(SHOW_CURSOR) > text.rfind(HIDE_CURSOR) >= 0
    console.print("after")
    assert written(console).endswith("after\n")


def test_an_error_before_the_first_step_gives_the_terminal_back(tmp_path: Path) -> None:
    class Fails(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            raise RuntimeError("no")

    console = live_console()
    with pytest.raises(RuntimeError, match="no"):
        fit(StepProgress(console), Module(), tmp_path, others=(Fails(),))
    text = written(console)
    assert text.rfind(SHOW_CURSOR) > text.rfind(HIDE_CURSOR) >= 0


def test_a_resumed_run_goes_on_at_its_step(tmp_path: Path) -> None:
    trainer = fit(StepProgress(plain_console()), Module(), tmp_path, max_epochs=2)
    checkpoint = tmp_path / "two.ckpt"
    trainer.save_checkpoint(checkpoint)
    seen: list[float] = []
    console = live_console()
    bar = StepProgress(console)

    class Looks(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            assert bar._live is not None
            seen.append(bar._live.tasks[0].completed)

    fit(bar, Module(), tmp_path, max_epochs=4, others=(Looks(),), checkpoint=checkpoint)
    assert seen == [2, 3]


def test_the_phase_is_shown_also_before_the_first_step(tmp_path: Path) -> None:
    class Phases(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            set_phase(trainer, "calibrate")
            bar.print("a line above")

    console = live_console()
    bar = StepProgress(console)
    fit(bar, Module(), tmp_path, others=(Phases(),))
    text = written(console)
    assert "calibrate" in text
    assert text.index("a line above") < text.rindex("3/3")


def test_setting_a_phase_without_a_bar_or_with_another_one_does_nothing() -> None:
    set_phase(SimpleNamespace(progress_bar_callback=None), "rollout")  # type: ignore[arg-type]
    StepProgress(live_console()).set_phase("rollout")


@pytest.mark.parametrize("console", [plain_console(), live_console()])
def test_ranks_other_than_zero_show_nothing(tmp_path: Path, console: Console) -> None:
    class OtherRank(Callback):
        def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
            bar.disable()  # what the base class does there

    bar = StepProgress(console)
    fit(bar, Module(), tmp_path, others=(OtherRank(),))
    bar.print("nothing")
    assert written(console) == ""


def test_the_base_class_disables_the_bar_off_rank_zero() -> None:
    bar = StepProgress(live_console())
    bar.setup(SimpleNamespace(is_global_zero=False), Module(), "fit")  # type: ignore[arg-type]
    bar.print("nothing")
    assert written(bar._console) == ""


def test_the_time_left_is_the_mean_of_the_last_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now))
    clock = progress._StepClock()
    # The first two steps take 50 s each and are forgotten after 20 of 2 s.
    for seconds in [0.0, 50.0, 50.0] + [2.0] * 20:
        now += seconds
        clock.tick()
    assert clock.left_s(7) == 14.0
    assert clock.elapsed_s == 140.0


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (61, "1:01"), (3661, "1:01:01")]
)
def test_durations_read_as_clocks_do(seconds: float, text: str) -> None:
    assert progress._duration(seconds) == text


def test_metrics_that_are_not_numbers_yet_are_left_out() -> None:
    assert progress._facts({"rollout/reward_mean": 0.5, "self_reward/f1": float("nan")}) == (
        "reward 0.500"
    )
