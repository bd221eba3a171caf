"""`task=train`: from a configuration to a trained model and a report."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import transformers
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.strategies import Strategy
from rich.console import Console
from transformers import PreTrainedModel

from laser_pl.config import Config, HFRollout, VllmRollout, validate
from laser_pl.data.datamodule import PromptDataModule
from laser_pl.distributed import any_rank, derive_seed, gather_over_ranks
from laser_pl.errors import EXIT_USER_ERROR, UserError, one_line
from laser_pl.evaluation.callback import EvaluationCallback
from laser_pl.export import describe_run
from laser_pl.launch import is_rank_zero
from laser_pl.logs.callback import MetricsCallback
from laser_pl.logs.metrics_file import MetricsFile, read_metrics
from laser_pl.logs.progress import StepProgress
from laser_pl.logs.samples import SamplesFile
from laser_pl.logs.wandb_run import WandbCallback, finish_wandb, log_results, start_wandb
from laser_pl.models.loading import load_policy, resolve_path
from laser_pl.preflight import longest_prompt, run_preflight
from laser_pl.report import score_facts, write_report
from laser_pl.rollout.callback import RolloutCallback
from laser_pl.rollout.collect import Collector
from laser_pl.rollout.engine import RolloutEngine, Sampling
from laser_pl.rollout.hf_engine import HFEngine
from laser_pl.setup import (
    Inputs,
    check_disk,
    check_output_dir,
    prepare_inputs,
    prepare_output_dir,
)
from laser_pl.training.checkpoint import (
    FOLDER,
    CheckpointCallback,
    CheckpointFolder,
    find_checkpoint,
    list_checkpoints,
    step_of,
)
from laser_pl.training.module import LaserModule
from laser_pl.training.strategy import DeepSpeedStrategy, build_strategy, zero3_config

EXIT_FAILED = 1
# SLURM sends SIGUSR1 some time before it takes the nodes back.
_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def train(config: Config) -> int:
    """Train the policy, and write model, metrics, samples, figures and summary to output_dir.

    Returns:
        The exit code: 0, 1 if too many steps were skipped, 130 after Ctrl-C, 143 after SIGTERM,
        138 after SIGUSR1.
    Raises:
        UserError: whatever of the input will not do; before any weight is loaded where possible.
    """
    start = time.perf_counter()
    quieten_libraries()
    console = Console(quiet=not is_rank_zero())
    run_preflight(config, console, always_show=False)
    checkpoint = find_checkpoint(
        config.resume,
        Path(config.output_dir),
        tell=lambda line: console.print(f"warning: {line}", highlight=False, soft_wrap=True),
    )
    folder = Path(config.output_dir)
    config = with_known_token(config, checkpoint or folder)
    if is_rank_zero():
        check_output_dir(config, checkpoint, console)
    console.print(f"batch: {config.batch_equation()}", highlight=False)
    inputs = prepare_inputs(config, console)
    check_disk(config)
    if config.self_reward.token == "auto":
        from laser_pl.calibrate import with_chosen_token  # which builds a module as well

        config, inputs = with_chosen_token(config, inputs, console)
    # Only now, so that after a mistake so far the corrected command can use the same folder.
    if is_rank_zero():
        prepare_output_dir(config)
    exit_code, mistake = EXIT_FAILED, None
    try:
        exit_code = _Run(config, inputs, folder, console, checkpoint).fit(start)
    except UserError as error:
        exit_code, mistake = EXIT_USER_ERROR, str(error)
        raise
    finally:
        inputs.verifier.close()
        if config.logger.wandb is not None:
            finish_wandb(exit_code, mistake, console)  # the next run of a multirun is another one
    return exit_code


def with_known_token(config: Config, before: Path) -> Config:
    """The configuration of a run that goes on, with the token that `auto` has chosen before."""
    path = before / "config.yaml"
    if config.self_reward.token != "auto" or config.resume is None or not path.is_file():
        return config
    raw = config.model_dump(by_alias=True)
    raw["self_reward"]["token"] = yaml.safe_load(path.read_text())["self_reward"]["token"]
    return validate(raw)


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
        strategy = build_strategy(config)
        self.module = build_module(config, inputs, strategy)
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
            strategy=strategy,
            precision=config.trainer.precision,
            plugins=plugins(strategy),
            max_epochs=config.max_steps,
            accumulate_grad_batches=config.num_micro_batches,
            gradient_clip_val=config.trainer.gradient_clip,
            callbacks=self.callbacks,
            logger=build_loggers(config, folder),
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
            self._tell(f"resume: going on from {self.checkpoint}")
        weights_are_finite = True
        with self.stop.graceful_interrupt():
            try:
                self.trainer.fit(
                    self.module, self.data, ckpt_path=self.checkpoint, weights_only=True
                )
            except SystemExit:  # Lightning's answer to a KeyboardInterrupt
                self.stop.interrupted = self.stop.interrupted or signal.SIGINT
            except RuntimeError as error:
                if not is_lost_peer(error):
                    raise
                return self._tell_lost_peer(error)
            except FloatingPointError:
                # A finite gradient can still make weights that are not; no later step mends them.
                self.stop.diverged, weights_are_finite = True, False
        if self.trainer.is_global_zero:
            self._report(time.perf_counter() - start, weights_are_finite)
            if self.config.logger.wandb is not None:
                rows = read_metrics(self.folder / "metrics.csv")
                log_results(rows, self.folder, self.config.logger.wandb)
        if self.stop.interrupted:
            # A launcher ends all ranks when one ends with an error: rank 0 has to be done first.
            gather_over_ranks([0])
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

    def _tell_lost_peer(self, error: RuntimeError) -> int:
        saved = list_checkpoints(self.folder / FOLDER)
        newest = f"; the newest checkpoint is {saved[-1]}" if saved else ""
        tell_lost_peer(error, self.trainer.global_rank, self.folder, newest)
        return EXIT_FAILED

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
        collector = build_collector(config, inputs)
        self.rollout = RolloutCallback(collector, config, samples, self._tell)
        self.evaluation = EvaluationCallback(
            collector, config, samples, self.console if main else None
        )
        uses_wandb = main and config.logger.wandb is not None
        of_wandb = [WandbCallback(self.rollout, self.evaluation)] if uses_wandb else []
        # In the order of a step: the bar reads the metrics, the metrics callback writes them out.
        return [
            self.rollout,
            self.evaluation,
            StepProgress(self.console, every_n_steps=max(1, config.max_steps // 50)),
            MetricsCallback(metrics),
            *of_wandb,
            self.stop,
            CheckpointCallback(
                self.folder / FOLDER,
                config.checkpoint.every_n_steps,
                config.checkpoint.keep_last,
                config.checkpoint.keep_best,
                self.evaluation.accuracy_after,
                self._describe,
            ),
        ]

    def _tell(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _describe(self, folder: Path) -> None:
        facts = score_facts(self.config, self.module, self.inputs)
        tokenizer, policy = self.inputs.tokenizer, self.module.policy
        measures = self.evaluation.latest_measures()
        describe_run(folder, self.config, tokenizer, policy, facts, measures)

    def _last_checkpoint(self) -> Path | None:
        path = self.folder / FOLDER / f"step-{self.trainer.current_epoch:06d}"
        return path if path.is_dir() else None

    def _report(self, total_s: float, weights_are_finite: bool) -> None:
        write_report(
            self.config,
            self.module,
            self.inputs,
            before=self.evaluation.before,
            after=self.evaluation.after,
            after_step=self.evaluation.after_step,
            lines=self.evaluation.lines,
            checkpoint=self._last_checkpoint() if weights_are_finite else None,
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


def tell_lost_peer(error: RuntimeError, rank: int, folder: Path, newest: str = "") -> None:
    """Say so on every rank that is left: rank 0 may be the one that died."""
    print(
        f"error: rank {rank}: another process of the run has died or hangs "
        f"({one_line(error)}){newest}; go on with output_dir={folder} resume=auto",
        file=sys.stderr,
    )


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether a collective failed because another process is gone, or did not answer in time."""
    signs = ("connection closed by peer", "connection reset", "timed out", "broken pipe", "gloo")
    is_collective = isinstance(error, torch.distributed.DistError)
    return is_collective or any(sign in str(error).lower() for sign in signs)


class StopCallback(Callback):
    """Ends the run after a step: on Ctrl-C, SIGTERM or SIGUSR1, or after too many bad steps.

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

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make sure that all nodes see the run's folder, now that they have met."""
        is_seen = wait_for(Path(trainer.default_root_dir) / "config.yaml")
        if any_rank(not is_seen):
            raise UserError(
                f"output_dir = {trainer.default_root_dir}: not every node sees it; give a folder "
                "on a file system that they share"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals back: Lightning's own SIGTERM handler ends the run without saving."""
        for number in _STOPPING:
            signal.signal(number, self._handle)

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

        previous = {number: signal.signal(number, self._handle) for number in _STOPPING}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.interrupted or not self._in_steps:
            self.interrupted = signum
            raise KeyboardInterrupt
        self.interrupted = signum
        print("\ninterrupted: finishing this step, then saving; again to stop at once")


def plugins(strategy: Strategy | str) -> list[Any]:
    """The checkpoint folders, and SLURM without Lightning's own signal handling."""
    wanted: list[Any] = []
    if not isinstance(strategy, DeepSpeedStrategy):  # which writes its checkpoints itself
        wanted.append(CheckpointFolder())
    if SLURMEnvironment.detect():
        wanted.append(SLURMEnvironment(auto_requeue=False))
    return wanted


def wait_for(path: Path, timeout_s: float = 10.0) -> bool:
    """Whether a file is there, or comes soon: network file systems take their time."""
    deadline = time.monotonic() + timeout_s
    while not path.is_file() and time.monotonic() < deadline:
        time.sleep(0.2)
    return path.is_file()


def build_module(config: Config, inputs: Inputs, strategy: Strategy | str = "auto") -> LaserModule:
    """The module, which loads the policy's weights when it is set up.

    Args:
        config: of the run.
        inputs: for the score token.
        strategy: shards the weights while they are read, if it is DeepSpeed's ZeRO-3.
    """

    def load() -> PreTrainedModel:
        torch.manual_seed(derive_seed(config.seed, "adapter"))  # the same on every rank
        return load_policy(config.model, zero3_config(strategy))

    return LaserModule(
        load,
        inputs.score_token_id,
        config.algorithm,
        config.self_reward,
        config.optimizer,
        config.rollout.temperature,
        config.max_steps,
        config.rollout.importance_cap,
        inputs.incorrect_token_id,
    )


def build_collector(
    config: Config, inputs: Inputs, engine: RolloutEngine | None = None
) -> Collector:
    """The engine, by default the configured one, and the verifier behind it."""
    settings = config.rollout
    sampling = Sampling(
        max_response_tokens=settings.max_response_tokens,
        min_response_tokens=settings.min_response_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        min_p=settings.min_p,
        stop=tuple(settings.stop),
    )
    return Collector(
        engine or build_engine(config, inputs), inputs.verifier, inputs.tokenizer, sampling
    )


def build_engine(config: Config, inputs: Inputs) -> RolloutEngine:
    """The engine that `rollout` names; vLLM starts when it is first used."""
    match config.rollout:
        case HFRollout() as settings:
            keep = settings.gathered_weights == "keep"
            return build_hf_engine(config, inputs, settings.max_sequences, keep)
        case VllmRollout() as settings:
            return _build_vllm(config, settings, inputs)


def build_hf_engine(
    config: Config, inputs: Inputs, max_sequences: int, keep_gathered: bool = False
) -> HFEngine:
    """The engine that samples with transformers, whatever `rollout` names."""
    return HFEngine(
        inputs.eos_ids,
        int(inputs.tokenizer.pad_token_id),
        inputs.score_token_id,
        max_sequences,
        decode=lambda ids: str(inputs.tokenizer.decode(ids)),
        keep_gathered=keep_gathered,
        autocast=config.trainer.precision == "bf16-mixed",
        incorrect_token_id=inputs.incorrect_token_id,
    )


def _build_vllm(config: Config, settings: VllmRollout, inputs: Inputs) -> RolloutEngine:
    # Imported here, since vLLM is an extra and takes seconds.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from laser_pl.rollout.vllm_engine import VllmEngine, VllmServer
    from laser_pl.serving import SelfReward

    judge = SelfReward(inputs.score_token_id, inputs.eos_ids, config.self_reward.beta, c_ref=0.0)
    if settings.server_url is not None:
        folder = Path(config.output_dir) / "server_weights"
        return VllmServer(judge, settings.server_url, folder, config.trainer.timeout_minutes * 60)
    return VllmEngine(
        judge,
        resolve_path(config.model.path),
        longest_prompt(config) + settings.max_response_tokens,
        settings.gpu_memory_utilization,
        settings.kv_cache_gb,
        revision=config.model.revision,
        trust_remote_code=config.model.trust_remote_code,
        dtype="bfloat16" if "bf16" in config.trainer.precision else config.model.dtype,
        seed=config.seed,
    )


def build_loggers(config: Config, folder: Path) -> list[Logger]:
    """The configured loggers, on rank 0; wandb is offline where there is no key."""
    settings = config.logger
    loggers: list[Logger] = []
    if not is_rank_zero():
        return loggers
    if settings.tensorboard is not None:
        loggers.append(TensorBoardLogger(folder, settings.tensorboard.subfolder, version=""))
    if settings.wandb is not None:
        loggers.append(WandbLogger(experiment=start_wandb(config, settings.wandb, folder)))
    return loggers


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
    # DeepSpeed and vLLM call collectives by names that torch is about to change.
    for module in ("torch.distributed", "vllm"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=module)
