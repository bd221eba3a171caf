"""Checkpoints of a run, and the folder of the trained model."""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from laser_pl.errors import UserError
from laser_pl.logs.files import write_json_atomically

FOLDER = "checkpoints"


class CheckpointCallback(Callback):
    """Saves every few steps and at the end, also of a run that is stopped; keeps the last few.

    Lightning writes a checkpoint under a temporary name and renames it.

    Args:
        folder: where the files step-000050.ckpt go.
        every_n_steps: 0 saves only at the end.
        keep_last: checkpoints that are kept.
    """

    def __init__(self, folder: Path, every_n_steps: int, keep_last: int) -> None:
        self.folder = folder
        self.every_n_steps = every_n_steps
        self.keep_last = keep_last
        self._between_steps = False

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save when it is time."""
        step = trainer.current_epoch + 1
        self._between_steps = True
        if self.every_n_steps and step % self.every_n_steps == 0 and step != trainer.max_epochs:
            self._save(trainer, step)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here to the end of the step the weights may be half updated."""
        self._between_steps = False

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the end, with its evaluation."""
        self._save(trainer, trainer.current_epoch)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Save what an interrupt or a failing verifier between two updates would lose."""
        is_expected = isinstance(exception, KeyboardInterrupt | UserError)
        if is_expected and self._between_steps:
            self._save(trainer, trainer.current_epoch)

    def _save(self, trainer: Trainer, step: int) -> None:
        trainer.save_checkpoint(self.folder / f"step-{step:06d}.ckpt")
        if trainer.is_global_zero:
            for old in list_checkpoints(self.folder)[: -self.keep_last]:
                old.unlink()


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    return sorted(folder.glob("step-*.ckpt"))


def find_checkpoint(resume: str | None, output_dir: Path) -> Path | None:
    """The checkpoint to go on from, None to start anew.

    Args:
        resume: null, auto (the newest of output_dir, if there is one), or a path.
        output_dir: of the run.
    Raises:
        UserError: the path does not exist.
    """
    if resume is None:
        return None
    if resume == "auto":
        found = list_checkpoints(output_dir / FOLDER)
        whole = next((path for path in reversed(found) if is_whole(path)), None)
        if found and whole != found[-1]:
            warnings.warn(f"{found[-1]}: is damaged; going on from {whole}", stacklevel=2)
        return whole
    path = Path(resume)
    if not path.is_file() or not path.match("step-*.ckpt"):
        raise UserError(
            f"resume = {resume}: no such checkpoint; give a file step-NUMBER.ckpt, or auto"
        )
    if not is_whole(path):
        raise UserError(f"resume = {resume}: is damaged; give an earlier one, or auto")
    return path


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint can be read; its tensors are mapped, not loaded."""
    try:
        torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # what a damaged file raises depends on where the damage is
        return False
    return True


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was saved, from its name."""
    return int(checkpoint.stem.removeprefix("step-"))


def export_model(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    self_reward: dict[str, Any],
    folder: Path,
) -> None:
    """Write an ordinary Hugging Face folder, plus self_reward.json, whole or not at all.

    Args:
        policy: the trained model.
        tokenizer: its tokenizer.
        self_reward: token, token_id, beta, c_ref and threshold: what reads the score.
        folder: is replaced if it is there.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    policy.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    write_json_atomically(partial / "self_reward.json", self_reward)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
