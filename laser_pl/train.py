"""`task=train`: from a configuration to a trained model and a report."""

from __future__ import annotations

import copy
import logging
import netrc
import os
import signal
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from urllib.parse import urlparse

import torch
import transformers
import wandb
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from rich.console import Console

from laser_pl.config import Config
from laser_pl.data.datamodule import PromptDataModule
from laser_pl.distributed import any_rank
from laser_pl.evaluation.callback import EvaluationCallback
from laser_pl.logs.callback import MetricsCallback
from laser_pl.logs.metrics_file import MetricsFile
from laser_pl.logs.progress import StepProgress
from laser_pl.logs.samples import SamplesFile
from laser_pl.models.loading import load_policy
from laser_pl.report import write_report
from laser_pl.rollout.callback import RolloutCallback
from laser_pl.rollout.collect import Collector
from laser_pl.rollout.engine import Sampling
from laser_pl.rollout.hf_engine import HFEngine
from laser_pl.setup import (
    Inputs,
    check_disk,
    check_output_dir,
    prepare_inputs,
    prepare_output_dir,
)
from laser_pl.training.checkpoint import FOLDER, CheckpointCallback, find_checkpoint, step_of
from laser_pl.training.module import LaserModule

EXIT_FAILED = 1
_STOPPING = (signal.SIGINT, signal.SIGTERM)


def train(config: Config) -> int:
    """Train the policy, and write model, metrics, samples, figures and summary to output_dir.

    Returns:
        The exit code: 0, 1 if too many steps were skipped, 130 after Ctrl-C, 143 after SIGTERM.
    Raises:
        UserError: whatever of the input will not do; before any weight is loaded where possible.
    """
    start = time.perf_counter()
    quieten_libraries()
    console = Console(quiet=not is_rank_zero(config))
    checkpoint = find_checkpoint(config.resume, Path(config.output_dir))
    folder = Path(config.output_dir)
    if is_rank_zero(config):
        check_output_dir(config)
    console.print(f"batch: {config.batch_equation()}", highlight=False)
    inputs = prepare_inputs(config, console)
    check_disk(config)
    # Only now, so that after a mistake so far the corrected command can use the same folder.
    if is_rank_zero(config):
        prepare_output_dir(config)
    exit_code = EXIT_FAILED
    try:
        exit_code = _Run(config, inputs, folder, console, checkpoint).fit(start)
    finally:
        inputs.verifier.close()
        if wandb.run is not None:
            wandb.finish(exit_code)  # the next run of a multirun is another one
    return exit_code


class _Run:
    """The parts of a training run, put together."""

    def __init__(
        self,
        config: Config,
        inputs: Inputs,
        folder: Path,
        console: Console,
        checkpoint: Path | None,
    ) -> None:
        seed_everything(config.seed, verbose=False)
        if config.trainer.num_threads:
            torch.set_num_threads(config.trainer.num_threads)
        self.config, self.inputs, self.folder, self.console = config, inputs, folder, console
        self.checkpoint = checkpoint
        self.module = build_module(config, inputs)
        self.data = PromptDataModule(
            inputs.train,
            inputs.held_out,
            config.prompts_per_step,
            config.num_micro_batches,
            config.seed,
        )
        self.stop = StopCallback(config.trainer.max_bad_steps)
        self.callbacks = self._callbacks()
        self.trainer = Trainer(
            accelerator=config.trainer.accelerator,
            devices=config.trainer.devices,
            num_nodes=config.trainer.num_nodes,
            strategy=config.strategy.name,
            precision=config.trainer.precision,
            max_epochs=config.max_steps,
            accumulate_grad_batches=config.num_micro_batches,
            gradient_clip_val=config.trainer.gradient_clip,
            callbacks=self.callbacks,
            logger=build_logger(config, folder),
            default_root_dir=folder,
            enable_checkpointing=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            log_every_n_steps=1,
            num_sanity_val_steps=0,
        )

    def fit(self, start: float) -> int:
        """Train to the end, or until something stops the run, and write the report."""
        for logger in self.trainer.loggers:
            logger.log_hyperparams(self.config.model_dump(mode="json", by_alias=True))
        if self.checkpoint is not None:
            self.console.print(f"resume: going on from {self.checkpoint}", highlight=False)
        weights_are_finite = True
        with self.stop.graceful_interrupt():
            try:
                self.trainer.fit(
                    self.module, self.data, ckpt_path=self.checkpoint, weights_only=True
                )
            except SystemExit:  # Lightning's answer to a KeyboardInterrupt
                self.stop.interrupted = self.stop.interrupted or signal.SIGINT
            except FloatingPointError:
                # A finite gradient can still make weights that are not; no later step mends them.
                self.stop.diverged, weights_are_finite = True, False
        if self.trainer.is_global_zero:
            self._report(time.perf_counter() - start, weights_are_finite)
        if self.stop.diverged:
            found = (
                f"{self.module.num_bad_steps} steps whose gradient was not finite, more than "
                f"trainer.max_bad_steps = {self.config.trainer.max_bad_steps}"
                if weights_are_finite
                else f"weights that are not finite after step {self.trainer.current_epoch}; the "
                "checkpoints are of earlier steps"
            )
            self.console.print(f"error: stopped: {found}; try a lower optimizer.lr", style="red")
            return EXIT_FAILED
        return 128 + self.stop.interrupted if self.stop.interrupted else 0

    def _callbacks(self) -> list[Callback]:
        config, inputs = self.config, self.inputs
        main = not self.console.quiet
        samples = SamplesFile(self.folder / "samples.jsonl") if main else None
        metrics = MetricsFile(self.folder / "metrics.csv") if main else None
        # What an interrupted run wrote after its checkpoint is about to be made again.
        last_step = step_of(self.checkpoint) if self.checkpoint else -1
        for file in (samples, metrics):
            if file is not None:
                file.truncate_after(last_step)
        collector = build_collector(config, inputs, self.module)
        self.rollout = RolloutCallback(collector, config, samples)
        self.evaluation = EvaluationCallback(
            collector, config, samples, self.console if main else None
        )
        # In the order of a step: the bar reads the metrics, the metrics callback writes them out.
        return [
            self.rollout,
            self.evaluation,
            StepProgress(self.console, every_n_steps=max(1, config.max_steps // 50)),
            MetricsCallback(metrics),
            self.stop,
            CheckpointCallback(
                self.folder / FOLDER, config.checkpoint.every_n_steps, config.checkpoint.keep_last
            ),
        ]

    def _report(self, total_s: float, weights_are_finite: bool) -> None:
        write_report(
            self.config,
            self.module,
            self.inputs,
            before=self.evaluation.before,
            after=self.evaluation.after,
            after_step=self.evaluation.after_step,
            lines=self.evaluation.lines,
            export=weights_are_finite,
            folder=self.folder,
            console=self.console,
            steps=self.trainer.current_epoch,
            interrupted=bool(self.stop.interrupted),
            time_s={
                "calibrate": self.rollout.calibrate_s,
                "evaluate": self.evaluation.evaluate_s,
                "total": total_s,
            },
        )


class StopCallback(Callback):
    """Ends the run after a step: on Ctrl-C or SIGTERM, or when too many steps were skipped.

    Args:
        max_bad_steps: steps with a loss or gradient that is not finite that a run may have.
    Attributes:
        interrupted: the signal that stopped the run, 0 if none did.
        diverged: too many steps were skipped.
    """

    def __init__(self, max_bad_steps: int) -> None:
        self.max_bad_steps = max_bad_steps
        self.interrupted = 0
        self.diverged = False
        self._in_steps = False

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on an interrupt waits for the end of the step."""
        self._in_steps = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop if it was asked for; the checkpoint callback comes after this one and saves."""
        if isinstance(pl_module, LaserModule):
            self.diverged = pl_module.num_bad_steps > self.max_bad_steps
        if any_rank(bool(self.interrupted)):
            self.interrupted = self.interrupted or signal.SIGINT
        if self.interrupted or self.diverged:
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on an interrupt ends the run at once."""
        self._in_steps = False

    @contextmanager
    def graceful_interrupt(self) -> Iterator[None]:
        """Let Ctrl-C finish the step and save; a second one, or one outside steps, ends at once."""

        def handle(signum: int, frame: FrameType | None) -> None:
            if self.interrupted or not self._in_steps:
                self.interrupted = signum
                raise KeyboardInterrupt
            self.interrupted = signum
            print("\ninterrupted: finishing this step, then saving; again to stop at once")

        previous = {number: signal.signal(number, handle) for number in _STOPPING}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def build_module(config: Config, inputs: Inputs) -> LaserModule:
    """The module with the policy's weights, and the reference's only if something uses them."""
    policy = load_policy(config.model)
    needs_reference = config.algorithm.kl_coef > 0 or config.self_reward.c_ref == "model"
    return LaserModule(
        policy,
        copy.deepcopy(policy) if needs_reference else None,
        inputs.score_token_id,
        config.algorithm,
        config.self_reward,
        config.optimizer,
        config.rollout.temperature,
        config.max_steps,
    )


def build_collector(config: Config, inputs: Inputs, module: LaserModule) -> Collector:
    """The engine on the module's policy, and the verifier behind it."""
    engine = HFEngine(
        module.policy,
        inputs.eos_ids,
        int(inputs.tokenizer.pad_token_id),
        inputs.score_token_id,
        config.rollout.max_sequences,
    )
    settings = config.rollout
    sampling = Sampling(settings.max_response_tokens, settings.temperature, settings.top_p)
    return Collector(engine, inputs.verifier, inputs.tokenizer, sampling)


def build_logger(config: Config, folder: Path) -> Logger | bool:
    """The configured logger, on rank 0; wandb is offline where there is no key."""
    settings = config.logger
    if not is_rank_zero(config) or settings.kind == "csv":
        return False
    if settings.kind == "tensorboard":
        return TensorBoardLogger(folder, name="tensorboard", version="")
    run = wandb.init(
        project=settings.project,
        entity=settings.entity,
        name=settings.name,
        group=settings.group,
        tags=settings.tags,
        dir=folder,
        mode="online" if has_wandb_key() else "offline",
        settings=wandb.Settings(silent=True),
    )
    return WandbLogger(experiment=run)


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


def is_rank_zero(config: Config) -> bool:
    """Whether this process is the one that writes and prints, before a process group exists."""
    ranks = ("RANK", "SLURM_PROCID", "LOCAL_RANK")
    return all(os.environ.get(name, "0") == "0" for name in ranks) or config.num_ranks == 1


def quieten_libraries() -> None:
    """Keep the libraries' chatter off the terminal; their errors stay."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("WANDB_SILENT", "true")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed then has nothing to warn of
    for name in ("lightning.pytorch", "lightning.fabric", "transformers", "deepspeed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="lightning")
