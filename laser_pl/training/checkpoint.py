"""Checkpoints: folders that are whole or not there, with weights and moments in safetensors.

    checkpoints/step-000050/
        manifest.json               size and SHA-256 of every other file; written last
        trainer.ckpt                Lightning's loops and callbacks, c_ref, schedule: no weights
        weights-00000.safetensors   trained parameters by name, a file a writing rank
        optimizer-00000.safetensors "NAME/exp_avg" and so on, likewise
        config.yaml, self_reward.json, model/   what an export needs beside the weights

Tensors are whole and go by their names, so that another number of ranks, another ZeRO stage or no
DeepSpeed at all can take them up.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from laser_pl.errors import UserError
from laser_pl.logs.files import write_json_atomically

FOLDER = "checkpoints"
_MANIFEST, _STATE = "manifest.json", "trainer.ckpt"
_POLICY = "policy."
MASTER = "master"

# Name -> (size in bytes, SHA-256).
Facts = dict[str, tuple[int, str]]


class CheckpointCallback(Callback):
    """Saves every few steps, at the best evaluation, and at the end, also of a run that is stopped.

    Args:
        folder: where the folders step-000050 go.
        every_n_steps: 0 saves only at the end, and the best.
        keep_last: checkpoints that are kept.
        keep_best: keep the one with the best held-out accuracy as well.
        accuracy_after: the held-out accuracy measured after a step, None if it was not.
        describe: writes what an export needs beside the weights into a folder.
    Attributes:
        best: step and held-out accuracy of the best evaluation after a step.
    """

    def __init__(
        self,
        folder: Path,
        every_n_steps: int,
        keep_last: int,
        keep_best: bool,
        accuracy_after: Callable[[int], float | None],
        describe: Callable[[Path], None],
    ) -> None:
        self.folder = folder
        self.every_n_steps = every_n_steps
        self.keep_last = keep_last
        self.keep_best = keep_best
        self.accuracy_after = accuracy_after
        self.describe = describe
        self.best: tuple[int, float] | None = None
        self._saved_step = -1
        self._between_steps = False

    def state_dict(self) -> dict[str, Any]:
        """The best evaluation so far."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it up again."""
        self.best = state_dict["best"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove what a killed run left half written; the checkpoint resumed from is there."""
        self._saved_step = trainer.current_epoch or -1
        if trainer.is_global_zero:
            for partial in self.folder.glob(".step-*"):
                shutil.rmtree(partial)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here to the end of the step the weights may be half updated."""
        self._between_steps = False

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save when it is time, or when no evaluation was better."""
        step = trainer.current_epoch + 1
        self._between_steps = True
        is_best = self._note_best(step)
        is_due = self.every_n_steps and step % self.every_n_steps == 0
        if (is_due or is_best) and step != trainer.max_epochs:
            self._save(trainer, step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the end, with its evaluation."""
        self._note_best(trainer.current_epoch)
        self._save(trainer, trainer.current_epoch)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Save what an interrupt or a failing verifier between two updates would lose."""
        is_expected = isinstance(exception, KeyboardInterrupt | UserError)
        if is_expected and self._between_steps:
            self._save(trainer, trainer.current_epoch)

    def _note_best(self, step: int) -> bool:
        accuracy = self.accuracy_after(step) if self.keep_best else None
        if accuracy is None or (self.best and accuracy <= self.best[1]):
            return False
        self.best = (step, accuracy)
        return True

    def _save(self, trainer: Trainer, step: int) -> None:
        if step == self._saved_step:
            return
        final = self.folder / f"step-{step:06d}"
        if trainer.is_global_zero:
            partial = partial_folder(final)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            self.describe(partial)
        trainer.strategy.barrier()
        trainer.save_checkpoint(final)
        self._saved_step = step
        if trainer.is_global_zero:
            self._prune(step)

    def _prune(self, step: int) -> None:
        """Keep the last and the best; later ones, which a resume has passed over, do not count."""
        if self.best:
            facts = {"step": self.best[0], "accuracy": self.best[1]}
            write_json_atomically(self.folder / "best.json", facts)
        made = [path for path in list_checkpoints(self.folder) if step_of(path) <= step]
        for old in made[: -self.keep_last]:
            if not self.best or step_of(old) != self.best[0]:
                shutil.rmtree(old)


class CheckpointFolder(CheckpointIO):
    """Lightning's door to the folders, for strategies in which every rank holds everything."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Write Lightning's checkpoint as a folder; called on rank 0 alone."""
        final = Path(path)
        partial = partial_folder(final)
        partial.mkdir(parents=True, exist_ok=True)
        weights = {
            name.removeprefix(_POLICY): tensor
            for name, tensor in checkpoint.pop("state_dict").items()
        }
        tensors, scalars, groups = _split_optimizer(checkpoint.pop("optimizer_states"), weights)
        optimizer = {"names": list(weights), "scalars": scalars, "param_groups": groups}
        facts = write_share(partial, 0, weights, tensors)
        write_state(partial, {**checkpoint, "optimizer": optimizer})
        seal(partial, final, facts)

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Lightning's checkpoint from a folder, whatever strategy has written it."""
        reader = CheckpointReader(Path(path))
        state = dict(reader.state)
        optimizer = state.pop("optimizer")
        names = optimizer["names"]
        moments = {
            # A step count of each one's own: the optimizer counts in place.
            index: {**_moments(reader, name), **copy.deepcopy(optimizer["scalars"])}
            for index, name in enumerate(names)
        }
        group = {**optimizer["param_groups"][0], "params": list(range(len(names)))}
        state["state_dict"] = {f"{_POLICY}{name}": reader.weight(name) for name in names}
        state["optimizer_states"] = [{"state": moments, "param_groups": [group]}]
        return state

    def remove_checkpoint(self, path: Any) -> None:
        """Delete a folder."""
        shutil.rmtree(path)


class CheckpointReader:
    """What is in a checkpoint's folder; tensors are read when they are asked for.

    Args:
        folder: a whole checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def state(self) -> dict[str, Any]:
        """Everything but tensors of weights and moments."""
        loaded: dict[str, Any] = torch.load(self.folder / _STATE, weights_only=True)
        return loaded

    @cached_property
    def weight_names(self) -> list[str]:
        """The trained parameters."""
        return list(self._files("weights"))

    def weight(self, name: str) -> Tensor:
        """A trained parameter, in the policy's dtype."""
        return self._files("weights")[name].get_tensor(name)

    def optimizer(self, name: str) -> dict[str, Tensor]:
        """The optimizer's tensors of a parameter; MASTER are float32 weights beside bfloat16."""
        files = self._files("optimizer")
        prefix = f"{name}/"
        return {
            key.removeprefix(prefix): file.get_tensor(key)
            for key, file in files.items()
            if key.startswith(prefix)
        }

    def _files(self, kind: str) -> dict[str, Any]:
        """Tensor name -> the open file that holds it."""
        if kind not in self._open:
            files = [safe_open(path, "pt") for path in sorted(self.folder.glob(f"{kind}-*"))]
            self._open[kind] = {key: file for file in files for key in file.keys()}  # noqa: SIM118
        return self._open[kind]

    @cached_property
    def _open(self) -> dict[str, dict[str, Any]]:
        return {}


def _moments(reader: CheckpointReader, name: str) -> dict[str, Tensor]:
    """Without the master weights, which only DeepSpeed keeps."""
    return {key: value for key, value in reader.optimizer(name).items() if key != MASTER}


def partial_folder(final: Path) -> Path:
    """Where a checkpoint is while it is written."""
    return final.with_name(f".{final.name}.partial")


def write_share(
    partial: Path, rank: int, weights: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]
) -> Facts:
    """Write a rank's share of the tensors.

    Returns:
        The facts of its files, for the manifest.
    """
    facts: Facts = {}
    for kind, tensors in (("weights", weights), ("optimizer", optimizer)):
        path = partial / f"{kind}-{rank:05d}.safetensors"
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
                  path)  # fmt: skip
        facts[path.name] = _facts_of(path)
    return facts


def write_state(partial: Path, state: dict[str, Any]) -> None:
    """Write what is not a tensor of weights or moments."""
    torch.save(state, partial / _STATE)


def seal(partial: Path, final: Path, facts: Facts) -> None:
    """Make a checkpoint of the files in a partial folder: manifest, then the name.

    Args:
        partial: holds every file.
        final: the checkpoint's folder; an older one is replaced.
        facts: of the ranks' shares; those of the other files are added.
    """
    for path in sorted(partial.rglob("*")):
        name = str(path.relative_to(partial))
        if path.is_file() and name not in facts:
            facts[name] = _facts_of(path)
    files = {name: {"size": size, "sha256": digest} for name, (size, digest) in facts.items()}
    manifest = {"format": 1, "step": step_of(final), "files": files}
    write_json_atomically(partial / _MANIFEST, manifest)
    old = final.with_name(f".{final.name}.old")
    if final.exists():
        os.rename(final, old)
    os.rename(partial, final)
    _sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    return sorted(folder.glob("step-[0-9]*"))


def find_checkpoint(
    resume: str | None, output_dir: Path, tell: Callable[[str], None]
) -> Path | None:
    """The checkpoint to go on from, None to start anew.

    Args:
        resume: null, auto (the newest whole one of output_dir, if there is one), or a path.
        output_dir: of the run.
        tell: shows a line about a damaged checkpoint that is passed over.
    Raises:
        UserError: the path is no checkpoint, or damaged.
    """
    if resume is None:
        return None
    if resume == "auto":
        return newest_whole(output_dir / FOLDER, tell)
    path = Path(resume)
    if not path.is_dir() or not path.match("step-*"):
        raise UserError(
            f"resume = {resume}: no such checkpoint; give a folder step-NUMBER, or auto"
        )
    if damage := damage_of(path):
        raise UserError(f"resume = {resume}: is damaged ({damage}); give an earlier one, or auto")
    return path


def newest_whole(folder: Path, tell: Callable[[str], None]) -> Path | None:
    """The newest checkpoint of a folder that is whole; damaged ones are told and passed over."""
    for path in reversed(list_checkpoints(folder)):
        damage = damage_of(path)
        if damage is None:
            return path
        tell(f"{path}: is damaged ({damage}); going on with the one before")
    return None


def damage_of(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, by its manifest's sizes and hashes; None if whole."""
    try:
        files = dict(json.loads((checkpoint / _MANIFEST).read_text())["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"{_MANIFEST} is missing or unreadable"
    if _STATE not in files:
        return f"{_MANIFEST} does not name {_STATE}"
    for name, facts in files.items():
        path = checkpoint / name
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            return f"{name} is missing"
        if size != facts["size"]:
            return f"{name} has {size} bytes of {facts['size']}"
    with ThreadPoolExecutor() as pool:  # hashing lets other threads run
        digests = pool.map(lambda name: _facts_of(checkpoint / name, flush=False)[1], files)
        changed = [n for n, d in zip(files, digests, strict=True) if d != files[n]["sha256"]]
    return f"the content of {changed[0]} has changed" if changed else None


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was saved, from its name."""
    return int(checkpoint.name.removeprefix("step-"))


def _split_optimizer(
    states: list[dict[str, Any]], weights: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Any], list[dict[str, Any]]]:
    """A torch optimizer's state as tensors by name, scalars that all share, and its groups."""
    names = list(weights)
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for index, entries in states[0]["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor) and value.dim() > 0:
                tensors[f"{names[index]}/{key}"] = value
            else:
                scalars[key] = value
    groups = [{k: v for k, v in g.items() if k != "params"} for g in states[0]["param_groups"]]
    return tensors, scalars, groups


def _facts_of(path: Path, flush: bool = True) -> tuple[int, str]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if flush:  # on disk before the manifest says so
            os.fsync(file.fileno())
    return path.stat().st_size, digest


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
