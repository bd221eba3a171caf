"""What training and evaluation both need before any weight is loaded, with its checks."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from laser_pl.config import Config, FileData, HubData, ReasoningGymData, TableData, flatten
from laser_pl.data.datasets import Columns, Splits, load_file, load_hub, load_reasoning_gym
from laser_pl.data.problem import Problem, Prompt
from laser_pl.data.template import PromptTemplate, encode_prompts
from laser_pl.errors import UserError
from laser_pl.logs.files import write_text_atomically
from laser_pl.models.loading import (
    eos_token_ids,
    load_settings,
    load_tokenizer,
    resolve_token,
)
from laser_pl.preflight import longest_prompt, model_settings, model_shape
from laser_pl.reward.verifier import VerifierPool, resolve_verifier

# Those that look at training problems.
TRAINING_TASKS = ("train", "calibrate")


@dataclass(frozen=True)
class Inputs:
    """Everything of a run but the model's weights, checked.

    Attributes:
        tokenizer: the model's.
        eos_ids: the tokens that end a response.
        score_token_id: z_c.
        incorrect_token_id: z_i, the token that says incorrect, where the score uses two.
        train: training prompts; empty for an evaluation.
        held_out: held-out prompts.
        verifier: ready to verify; close it at the end.
    """

    tokenizer: PreTrainedTokenizerBase
    eos_ids: tuple[int, ...]
    score_token_id: int
    incorrect_token_id: int | None
    train: list[Prompt]
    held_out: list[Prompt]
    verifier: VerifierPool


def prepare_inputs(config: Config, console: Console) -> Inputs:
    """Load tokenizer and problems, resolve token and verifier.

    Raises:
        UserError: whatever of the input will not do.
    """
    if config.trainer.accelerator == "gpu" and not torch.cuda.is_available():
        raise UserError("trainer.accelerator = gpu: no GPU is there; use auto, or cpu")
    verifier = resolve_verifier(config.verifier.target, config.verifier.arguments)
    tokenizer = load_tokenizer(config.model)
    eos_ids = eos_token_ids(tokenizer, config.model)
    token = config.self_reward.token
    # EOS stands in for one that is yet to be chosen, which takes the model's weights.
    token_id = eos_ids[0] if token == "auto" else resolve_token(token, tokenizer, eos_ids)
    incorrect = config.self_reward.incorrect_token
    incorrect_id = None
    if incorrect is not None:
        key = "self_reward.incorrect_token"
        incorrect_id = resolve_token(incorrect, tokenizer, eos_ids, key)
        if incorrect_id == token_id:
            raise UserError(f"{key} = {incorrect}: is self_reward.token as well; give another")
    _check_vocabulary(tokenizer, config)
    splits = load_problems(config)
    data = config.data
    template = PromptTemplate(tokenizer, data.template, data.instruction, data.system_prompt)
    if config.task in TRAINING_TASKS and not splits.train:
        raise UserError(
            f"data.num_held_out = {data.num_held_out or 'null'}: all {len(splits.held_out)} "
            "problems are held out, none is left to train on; hold out fewer, or take other data"
        )
    train = _encode(splits.train, template, config, "training", console)
    held_out = _encode(splits.held_out, template, config, "held-out", console)
    if token != "auto":
        _check_token_is_unused(token_id, [*train, *held_out], f"self_reward.token = {token}")
    if incorrect_id is not None:
        _check_token_is_unused(incorrect_id, [*train, *held_out], f"{key} = {incorrect}")
    pool = VerifierPool(
        verifier, config.verifier.timeout, config.verifier.num_workers, config.verifier.on_error
    )
    return Inputs(tokenizer, eos_ids, token_id, incorrect_id, train, held_out, pool)


def load_problems(config: Config) -> Splits:
    """The problems that `data` names, in two parts that do not overlap.

    Raises:
        UserError: the source is not there, is broken, or has too few problems.
    """
    data = config.data
    num_train = data.num_train if config.task in TRAINING_TASKS else 0
    match data:
        case ReasoningGymData():
            return load_reasoning_gym(
                data.name, data.params, num_train or 0, data.num_held_out, config.seed
            )
        case FileData():
            return load_file(
                data.path,
                _columns(data),
                num_train,
                data.num_held_out,
                data.held_out_path,
                config.seed,
            )
        case HubData():
            return load_hub(
                data.name,
                data.subset,
                data.split,
                data.held_out_split,
                _columns(data),
                num_train,
                data.num_held_out,
                config.seed,
            )


def _columns(data: TableData) -> Columns:
    return Columns(
        data.problem_column,
        data.answer_column,
        data.answer_separator,
        data.choices_column,
        data.wrong_answer_columns,
    )


def _encode(
    problems: list[Problem],
    template: PromptTemplate,
    config: Config,
    which: str,
    console: Console,
) -> list[Prompt]:
    limit = longest_prompt(config)
    prompts, num_dropped = encode_prompts(problems, template, limit)
    if num_dropped:
        what = f"data.max_prompt_tokens = {limit}"
        if limit < config.data.max_prompt_tokens:
            what = f"the {limit} positions that rollout.max_response_tokens leaves in the model"
        console.print(
            f"data: dropped {num_dropped} of {len(problems)} {which} problems: their prompts are "
            f"longer than {what}"
        )
    return prompts


def _check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: Config) -> None:
    size = load_settings(config.model).get_text_config().vocab_size
    if len(tokenizer) > size:
        raise UserError(
            f"model.path = {config.model.path}: its tokenizer has {len(tokenizer)} tokens, the "
            f"model {size}; resize the model's embeddings"
        )


def _check_token_is_unused(token_id: int, prompts: list[Prompt], which: str) -> None:
    for prompt in prompts:
        if token_id in prompt.token_ids:
            raise UserError(
                f"{which}: occurs in the prompt of problem {prompt.problem.index}; use "
                "a token that never occurs, such as a reserved one"
            )


def check_output_dir(
    config: Config, checkpoint: Path | None = None, console: Console | None = None
) -> None:
    """Refuse a folder that holds another run, or anything else, and a checkpoint of another run.

    Args:
        config: of the run.
        checkpoint: the one to go on from, None to start anew.
        console: where differences are told that `resume_force` allows.
    Raises:
        UserError: the folder is not empty and is not the run to resume, or is of another task, or
            the configuration that the checkpoint was made with differs in something that matters.
    """
    folder = Path(config.output_dir)
    is_used = folder.is_dir() and any(folder.iterdir())
    can_go_on = config.task in RESUMED_TASKS
    is_own = can_go_on and config.resume == "auto" and (folder / "config.yaml").is_file()
    if is_used and not is_own:
        raise UserError(
            f"output_dir = {folder}: already holds files, which are not overwritten; give a new "
            f"folder{', or resume=auto to go on with the run in it' * can_go_on}"
        )
    before = folder if is_used else checkpoint
    if before is not None:
        _check_same_run(config, before / "config.yaml", console)


RESUMED_TASKS = ("train", "evaluate")
# What may change when a run goes on: how long it is, where it logs, what it runs on.
_FREE_KEYS = (
    "max_steps", "resume", "output_dir", "logger", "checkpoint", "export",
    "trainer.devices", "trainer.num_nodes", "trainer.num_threads", "trainer.accelerator",
    "trainer.timeout_minutes",
    "strategy", "micro_batch_size", "training", "model.gradient_checkpointing",
    "rollout.max_sequences", "rollout.gathered_weights", "rollout.server_url",
    "rollout.gpu_memory_utilization", "rollout.kv_cache_gb", "verifier.num_workers",
)  # fmt: skip


def _check_same_run(config: Config, path: Path, console: Console | None) -> None:
    before = yaml.safe_load(path.read_text())
    if before["task"] != config.task:
        raise UserError(
            f"output_dir = {path.parent}: is of task={before['task']}, which task={config.task} "
            "would overwrite; give a new folder"
        )
    old, new = flatten(before), flatten(config.model_dump(mode="json", by_alias=True))
    changed = [
        key
        for key in sorted(old.keys() | new.keys())
        if not key.startswith(_FREE_KEYS) and old.get(key) != new.get(key)
    ]
    if not changed:
        return
    details = ", ".join(f"{key} = {old.get(key)} there, {new.get(key)} here" for key in changed)
    if not config.resume_force:
        raise UserError(
            f"resume = {config.resume}: {path.parent} is of a run with another configuration "
            f"({details}); give the same, or a new output_dir, or resume_force=true to go on anyhow"
        )
    if console is not None:
        console.print(f"resume: going on with another configuration: {details}", highlight=False)


def prepare_output_dir(config: Config) -> Path:
    """Make the run's folder and put its config.yaml there.

    Raises:
        UserError: it cannot be written.
    """
    folder = Path(config.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(config.model_dump(mode="json", by_alias=True), sort_keys=False)
        write_text_atomically(folder / "config.yaml", text)
    except OSError as error:
        raise UserError(f"output_dir = {folder}: cannot be written ({error.strerror})") from None
    return folder


def check_disk(config: Config) -> None:
    """Refuse to start if the checkpoints and the trained model do not fit on the disk.

    A checkpoint is the weights and AdamW's two moments; one more than are kept is there for a
    moment.

    Raises:
        UserError: too little space is free.
    """
    shape = model_shape(config, model_settings(config))
    weights = shape.num_trained * (4 if config.model.dtype == "float32" else 2)
    number = config.checkpoint.keep_last + config.checkpoint.keep_best
    needed = weights * 3 * (number + 1) + weights
    folder = Path(config.output_dir).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.is_dir())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise UserError(
            f"output_dir = {config.output_dir}: {free / 1e9:.1f} GB are free, and "
            f"{number} checkpoints with the trained model take "
            f"{needed / 1e9:.1f} GB; give another disk, or a smaller checkpoint.keep_last"
        )
