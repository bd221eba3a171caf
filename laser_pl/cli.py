"""The command line: Hydra composes, the contract validates, one line tells each mistake."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from laser_pl.config import Config, known_keys, validate
from laser_pl.errors import EXIT_USER_ERROR, UserError, one_line, suggestion
from laser_pl.launch import (
    check_launch,
    is_first_on_node,
    is_rank_zero,
    outer_launch,
    register_resolvers,
)

EXIT_INTERRUPTED = 130
# Keys that a task of the same name lets one write without its name.
_SHORT_NAMES = {
    "export": ("checkpoint", "output"),
    "score": ("input", "output"),
    "compare": ("runs",),
}


def config_dir() -> Path:
    """The folder of configuration files: beside the package in a checkout, inside it in a wheel."""
    package = Path(__file__).resolve().parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def main() -> None:
    """Compose the configuration from the command line and run its task; ends the process."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises its errors instead of printing them
    sys.argv[1:] = open_arguments(sys.argv[1:])
    register_resolvers()
    exit_codes: list[int] = []
    has_started = False

    @hydra.main(version_base="1.3", config_path=str(config_dir()), config_name="config")
    def job(composed: DictConfig) -> None:
        nonlocal has_started
        has_started = True
        # Caught here, so that a multirun's other jobs go on and Hydra prints nothing of its own.
        try:
            # Hydra's own folder: the job's in a multirun, that of rank 0 in its child processes.
            composed.output_dir = HydraConfig.get().runtime.output_dir
            config = to_config(composed)
            check_launch(config.trainer.devices, config.trainer.num_nodes)
            _check_multirun(config)
            check_resume(config, list(HydraConfig.get().overrides.task))
            exit_codes.append(run_task(config))
        except (UserError, OmegaConfBaseException) as error:
            folder = Path(HydraConfig.get().runtime.output_dir)
            has_run = (folder / "wandb_run.json").is_file()
            exit_codes.append(_tell(explain(error), tell_sweep=not has_run))
        if exit_codes[-1] >= EXIT_INTERRUPTED:
            raise KeyboardInterrupt  # no further job of a multirun

    try:
        job()
    except (HydraException, OmegaConfBaseException) as error:
        exit_codes.append(_tell(explain(error)))
    except KeyboardInterrupt:
        exit_codes.append(EXIT_INTERRUPTED)
    except OSError as error:
        if has_started:
            raise
        exit_codes.append(_tell(f"output_dir = {error.filename}: {error.strerror}; give another"))
    except (ValueError, TypeError, AttributeError) as error:
        if has_started:
            raise
        # Hydra composes `self_reward=5` and the like into an error of its own kind.
        exit_codes.append(_tell(f"config: cannot be composed ({one_line(error)}); see --help"))
    sys.exit(max(exit_codes, default=0))


def _check_multirun(config: Config) -> None:
    """Refuse what Lightning would start the further processes of as whole sweeps of their own."""
    is_multirun = HydraConfig.get().mode == RunMode.MULTIRUN
    if is_multirun and config.num_ranks > 1 and outer_launch() is None:
        raise UserError(
            f"trainer.devices = {config.trainer.devices}: a --multirun starts no further "
            "processes; use one device, wandb sweep, or torchrun in a loop"
        )


def open_arguments(arguments: list[str]) -> list[str]:
    """The command line as Hydra takes it: open mappings, and the short names of some tasks."""
    for task, names in _SHORT_NAMES.items():
        if f"task={task}" in arguments:
            pattern = rf"^({'|'.join(names)})="
            arguments = [re.sub(pattern, rf"{task}.\1=", argument) for argument in arguments]
            arguments = [_quoted(a) if a.startswith(f"{task}.") else a for a in arguments]
    return [open_mapping(argument) for argument in arguments]


def _quoted(argument: str) -> str:
    """A path with what Hydra's grammar would read otherwise, such as a date's =, in quotes."""
    key, _, value = argument.partition("=")
    is_plain = re.fullmatch(r"[\w./~+-]*", value) is not None
    if is_plain or value[:1] in ("'", '"'):
        return argument
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"{key}='{escaped}'"


def open_mapping(argument: str) -> str:
    """Let `data.params.x=1` add a key: what these mappings hold is not known to the files."""
    is_open = re.match(r"(data\.params[.=]|verifier\.arguments[.=]|strategy\.)", argument)
    return f"++{argument}" if is_open else argument


def to_config(composed: DictConfig) -> Config:
    """Resolve and validate a composed configuration.

    Raises:
        UserError: a value is missing, an interpolation leads nowhere, or the contract is broken.
    """
    register_resolvers()
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        raise UserError("\n".join(f"{key}: missing; give it with {key}=VALUE" for key in missing))
    raw = OmegaConf.to_container(composed, resolve=True)
    if not isinstance(raw, Mapping):
        raise UserError("config: must be a mapping")
    return validate({str(key): value for key, value in raw.items() if key != "experiment"})


def check_resume(config: Config, overrides: list[str]) -> None:
    """Refuse `resume=auto` without a folder: the default one is new, and has nothing to resume.

    Not under srun, where a job that is requeued comes back to the same folder.

    Raises:
        UserError: output_dir was not given.
    """
    is_given = any(override.startswith("output_dir=") for override in overrides)
    launch = outer_launch()
    is_job = launch is not None and launch.launcher == "srun"
    if config.resume == "auto" and not (is_given or is_job or "WANDB_SWEEP_ID" in os.environ):
        raise UserError(
            "resume = auto: needs output_dir=FOLDER, the folder of the run to go on with"
        )


def run_task(config: Config) -> int:
    """Run the configured task and return the process's exit code."""
    # torch, transformers and lightning take seconds to import: only once the input is known good.
    if config.task == "evaluate":
        from laser_pl.evaluate import evaluate

        return evaluate(config)
    if config.task == "preflight":
        from rich.console import Console

        from laser_pl.preflight import run_preflight

        run_preflight(config, Console(), always_show=True)
        return 0
    if config.task == "export":
        from laser_pl.export import export

        return export(config.export)
    if config.task == "score":
        from laser_pl.score import score

        return score(config)
    if config.task == "calibrate":
        from laser_pl.calibrate import calibrate

        return calibrate(config)
    if config.task == "compare":
        from laser_pl.compare import compare

        return compare(config)
    from laser_pl.train import train

    return train(config)


def explain(error: Exception) -> str:
    """An error of the input, Hydra's and OmegaConf's own included, a line a mistake."""
    text = str(error)
    if isinstance(error, UserError):
        return text
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        options = [str(option) for option in error.options or []]
        near = suggestion(choice, set(options))
        return f"{group} = {choice}: no such choice of {', '.join(options)}{near}"
    if isinstance(error, OverrideParseException):
        key, equals, value = str(error.override).partition("=")
        if value.startswith(("{'", '{"')):
            return (
                f"{error.override}: cannot be read; in a sweep's file write one parameter a key, "
                f"such as {key}.NAME, in place of nested ones"
            )
        if not equals:
            return f"{key}: is no KEY=VALUE; see --help"
        return (
            f"{error.override}: cannot be read; a value with special characters needs quotes of "
            f"its own inside the shell's: \"{key}='{value}'\""
        )
    unknown = _override_key(text)
    if isinstance(error, ConfigCompositionException) and unknown:
        return f"{unknown}: unknown key{suggestion(unknown, _default_keys())}"
    return " ".join(text.splitlines()[0].split())


def _override_key(text: str) -> str | None:
    """The key that Hydra could not override, from its message."""
    match = re.search(r"Could not (?:override|append|delete) '?([\w@./]+?)'?\.?\s", text + "\n")
    return match.group(1) if match else None


def _default_keys() -> set[str]:
    with initialize_config_dir(version_base="1.3", config_dir=str(config_dir())):
        composed = compose("config")
    plain: Any = OmegaConf.to_container(composed, resolve=False)
    return known_keys(plain)


def _tell(message: str, tell_sweep: bool = True) -> int:
    """Print a mistake, once a node: every rank finds those of the input, some only one node's.

    In a sweep W&B hears of it as well: the agent tells it nothing. Unless the run has told it
    itself, since it had begun.
    """
    if is_rank_zero() or is_first_on_node():
        prefix = "error" if is_rank_zero() else f"error on {platform.node()}"
        for line in message.splitlines():
            print(f"{prefix}: {line}", file=sys.stderr)
    if tell_sweep and is_rank_zero() and "WANDB_SWEEP_ID" in os.environ:
        from laser_pl.logs.sweep import report_failed_start

        report_failed_start(message)
    return EXIT_USER_ERROR
