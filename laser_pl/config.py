"""The contract of a run's configuration: one frozen pydantic model a Hydra group.

Hydra composes the files of `conf/`, where the values, their comments and their units live; this
file says which keys there are, their types and ranges. There are no defaults here, so that a value
has one home.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from laser_pl.errors import UserError, suggestion

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
# strict mode takes an integer for a float: sweeps hand over 0 for 0.0.
Fraction = Annotated[float, Field(ge=0, le=1)]

MAX_PARTITION_EXCESS = 0.05


class Section(BaseModel):
    """A group of keys: unknown keys, wrong types and later changes are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class LoraConfig(Section):
    enabled: bool
    rank: Positive
    alpha: float = Field(gt=0)
    dropout: float = Field(ge=0, lt=1)
    target_modules: str | list[str]


class ModelConfig(Section):
    path: str
    revision: str | None
    dtype: Literal["float32", "bfloat16"]
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"]
    gradient_checkpointing: bool
    trust_remote_code: bool
    architecture: dict[str, Any] | None
    lora: LoraConfig


class DataSection(Section):
    num_train: Count | None
    num_held_out: Positive | None
    samples_per_problem: Positive
    template: Literal["auto", "chat", "plain"]
    instruction: str
    system_prompt: str | None
    max_prompt_tokens: Positive


class ReasoningGymData(DataSection):
    source: Literal["reasoning_gym"]
    name: str
    params: dict[str, Any]
    num_train: Positive
    num_held_out: Positive


class TableData(DataSection):
    problem_column: str
    answer_column: str
    answer_separator: str | None
    choices_column: str | None
    wrong_answer_columns: list[str]


class FileData(TableData):
    source: Literal["file"]
    path: str
    held_out_path: str | None


class HubData(TableData):
    source: Literal["hub"]
    name: str
    subset: str | None
    split: str
    held_out_split: str | None


DataConfig = Annotated[ReasoningGymData | FileData | HubData, Field(discriminator="source")]


class VerifierConfig(Section):
    target: str = Field(alias="_target_")
    arguments: dict[str, Any]
    timeout: float = Field(gt=0)
    num_workers: Count
    on_error: Literal["stop", "zero"]


class RolloutSection(Section):
    max_response_tokens: Positive
    min_response_tokens: Count
    temperature: float = Field(gt=0)
    top_p: float = Field(gt=0, le=1)
    top_k: Count
    min_p: Fraction
    stop: list[str]
    importance_cap: Annotated[float, Field(ge=1)] | None


class HFRollout(RolloutSection):
    engine: Literal["hf"]
    max_sequences: Positive
    gathered_weights: Literal["keep", "release"]


class VllmRollout(RolloutSection):
    engine: Literal["vllm"]
    mode: Literal["colocated", "server"]
    server_url: str | None
    kv_cache_gb: Annotated[float, Field(gt=0)] | None
    gpu_memory_utilization: float = Field(gt=0, lt=1)


RolloutConfig = Annotated[HFRollout | VllmRollout, Field(discriminator="engine")]


class AlgorithmConfig(Section):
    advantage: Literal["grpo", "rloo"]
    loss: Literal["clipped", "gspo", "cispo"]
    normalize_std: bool
    clip_low: float = Field(gt=0, le=1)
    clip_high: float = Field(gt=0)
    dual_clip: Annotated[float, Field(gt=1)] | None
    aggregation: Literal["token_mean", "sequence_mean_token_sum", "sequence_mean_token_mean"]
    kl_coef: float = Field(ge=0)
    kl_kind: Literal["k1", "abs", "k2", "k3"]
    overlong_fraction: Fraction
    dynamic_sampling: Count


class TrainingConfig(Section):
    max_tokens_per_micro_batch: Positive | None
    share_prompts: Literal["auto"] | bool
    skip_zero_advantage: bool


class SelfRewardConfig(Section):
    enabled: bool
    alpha: float = Field(ge=0)
    beta: float = Field(gt=0)
    tau: Fraction
    min_std: float = Field(ge=0)
    token: int | str
    incorrect_token: int | str | None
    score: Literal["log_ratio", "two_token"]
    loss: Literal["mse", "sft"]
    c_ref: Annotated[float, Field(lt=0)] | Literal["calibrated", "model"]
    balanced: bool
    reasoning_warmup_steps: Count
    warmup_steps: Count

    @property
    def is_trained(self) -> bool:
        """Whether the score is trained at all; if it is not, it is not mixed in either."""
        return self.enabled and self.alpha > 0

    @property
    def has_constant(self) -> bool:
        """Whether the score is the log-ratio to c_ref, so that beta and c_ref matter."""
        return self.score == "log_ratio" and self.loss == "mse"

    @model_validator(mode="after")
    def _two_tokens_where_two_are_used(self) -> SelfRewardConfig:
        if self.score == "two_token" and self.loss == "sft":
            raise ValueError(
                "self_reward.loss = sft: has a score of its own; use self_reward.score=log_ratio"
            )
        if self.has_constant != (self.incorrect_token is None):
            kind = "log_ratio with mse uses one token" if self.has_constant else "two are used"
            raise ValueError(
                f"self_reward.incorrect_token = {self.incorrect_token}: {kind}; "
                f"{'use null' if self.has_constant else 'give the one that says incorrect'}"
            )
        return self


class OptimizerSection(Section):
    lr: float = Field(gt=0)
    weight_decay: float = Field(ge=0)
    schedule: Literal["constant", "linear", "cosine"]
    warmup_steps: Count


class AdamWConfig(OptimizerSection):
    name: Literal["adamw", "deepspeed_cpu_adam"]
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        strict=False
    )
    eps: float = Field(gt=0)


class SGDConfig(OptimizerSection):
    name: Literal["sgd"]
    momentum: float = Field(ge=0, lt=1)


OptimizerConfig = Annotated[AdamWConfig | SGDConfig, Field(discriminator="name")]


class StrategyConfig(Section):
    """`auto`, or a Lightning strategy class with any of its own arguments."""

    model_config = ConfigDict(extra="allow", frozen=True)

    target: str = Field(alias="_target_")


class TrainerConfig(Section):
    accelerator: Literal["auto", "cpu", "gpu"]
    devices: Positive
    num_nodes: Positive
    precision: Literal["32-true", "bf16-true", "bf16-mixed"]
    gradient_clip: float = Field(gt=0)
    max_bad_steps: Count
    num_threads: Positive | None
    timeout_minutes: float = Field(gt=0)


class EvaluationConfig(Section):
    every_n_steps: Count
    num_problems: Positive | None
    samples_per_problem: Positive
    interim_samples_per_problem: Positive
    adaptive: bool
    adaptive_confidence: float = Field(gt=0.5, lt=1)
    adaptive_batch: Positive


class CheckpointConfig(Section):
    every_n_steps: Count
    keep_last: Positive
    keep_best: bool


class ExportConfig(Section):
    checkpoint: str | None
    output: str | None
    merge: bool


class ScoreConfig(Section):
    input: str | None
    output: str | None
    prompt_column: str
    response_column: str
    max_tokens: Positive


class CalibrateConfig(Section):
    num_responses: Positive
    show: Positive


class CompareConfig(Section):
    runs: str | None


class WandbConfig(Section):
    project: str
    entity: str | None
    name: str | None
    group: str | None
    tags: list[str]
    log_model: bool


class TensorBoardConfig(Section):
    subfolder: str


class LoggerConfig(Section):
    """Those that are not named are not used."""

    wandb: WandbConfig | None = None
    tensorboard: TensorBoardConfig | None = None


class Config(Section):
    """Everything a run is made of; `conf/config.yaml` is its shape on disk."""

    task: Literal["train", "evaluate", "score", "calibrate", "compare", "export", "preflight"]
    # numpy takes no larger one.
    seed: int = Field(ge=0, lt=2**32)
    prompts_per_step: Positive
    rollouts_per_prompt: Positive
    micro_batch_size: Positive
    max_steps: Positive
    output_dir: str
    resume: str | None
    resume_force: bool
    model: ModelConfig
    data: DataConfig
    verifier: VerifierConfig
    rollout: RolloutConfig
    algorithm: AlgorithmConfig
    self_reward: SelfRewardConfig
    training: TrainingConfig
    optimizer: OptimizerConfig
    strategy: StrategyConfig
    trainer: TrainerConfig
    evaluation: EvaluationConfig
    checkpoint: CheckpointConfig
    export: ExportConfig
    score: ScoreConfig
    calibrate: CalibrateConfig
    compare: CompareConfig
    logger: LoggerConfig

    @property
    def num_ranks(self) -> int:
        """Processes of the run, over all nodes."""
        return self.trainer.devices * self.trainer.num_nodes

    @property
    def num_sequences(self) -> int:
        """N = P * G, the sequences of a step over all ranks."""
        return self.prompts_per_step * self.rollouts_per_prompt

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches a rank works through in a step; a first guess where tokens cut them."""
        if self.training.max_tokens_per_micro_batch is not None:
            return 2  # DeepSpeed makes room for accumulated gradients if there is more than one
        return self.num_sequences // (self.micro_batch_size * self.num_ranks)

    @model_validator(mode="after")
    def _batch_sizes_divide(self) -> Config:
        if self.prompts_per_step % self.num_ranks:
            raise ValueError(
                f"prompts_per_step = {self.prompts_per_step}: must be a multiple of the "
                f"{self.num_ranks} ranks (trainer.devices x trainer.num_nodes)"
            )
        per_rank = self.num_sequences // self.num_ranks
        by_count = self.training.max_tokens_per_micro_batch is None
        if by_count and per_rank % self.micro_batch_size:
            fitting = _nearest_divisor(per_rank, self.micro_batch_size)
            raise ValueError(
                f"micro_batch_size = {self.micro_batch_size}: must divide the {per_rank} sequences "
                f"of a rank ({self.prompts_per_step} prompts x {self.rollouts_per_prompt} rollouts "
                f"/ {_count(self.num_ranks, 'rank')}); {fitting} would"
            )
        return self

    @model_validator(mode="after")
    def _rollouts_can_be_made(self) -> Config:
        rollout = self.rollout
        if rollout.min_response_tokens > rollout.max_response_tokens:
            raise ValueError(
                f"rollout.min_response_tokens = {rollout.min_response_tokens}: must be at most "
                f"rollout.max_response_tokens = {rollout.max_response_tokens}"
            )
        if "" in rollout.stop:
            raise ValueError("rollout.stop: an empty text would stop every response")
        if isinstance(rollout, VllmRollout) and (rollout.mode == "server") != bool(
            rollout.server_url
        ):
            raise ValueError(
                f"rollout.server_url = {rollout.server_url}: rollout.mode=server needs the address "
                "of `vllm serve`, and rollout.mode=colocated takes none"
            )
        return self

    @model_validator(mode="after")
    def _engine_reads_the_tokens(self) -> Config:
        if isinstance(self.rollout, VllmRollout) and not self.self_reward.has_constant:
            raise ValueError(
                "rollout.engine = vllm: reads one score token; use rollout=hf with "
                "self_reward.score=two_token or self_reward.loss=sft"
            )
        return self

    @model_validator(mode="after")
    def _a_sequence_fits_a_micro_batch(self) -> Config:
        limit = self.training.max_tokens_per_micro_batch
        longest = self.data.max_prompt_tokens + self.rollout.max_response_tokens
        if limit is not None and limit < longest:
            raise ValueError(
                f"training.max_tokens_per_micro_batch = {limit}: must hold the longest sequence, "
                f"data.max_prompt_tokens + rollout.max_response_tokens = {longest}"
            )
        return self

    @property
    def beta_has_to_fit(self) -> bool:
        """Whether the score's optimum is trained for, so that Z - 1 has to be small."""
        trains = self.task not in ("evaluate", "score")
        return trains and self.self_reward.is_trained and self.self_reward.has_constant

    @model_validator(mode="after")
    def _beta_fits_a_constant_c_ref(self) -> Config:
        c_ref = self.self_reward.c_ref
        if self.beta_has_to_fit and not isinstance(c_ref, str):
            check_partition_excess(c_ref, self.self_reward.beta)
        return self

    @model_validator(mode="after")
    def _evaluation_has_problems(self) -> Config:
        wanted, there = self.evaluation.num_problems, self.data.num_held_out
        if wanted is not None and there is not None and wanted > there:
            raise ValueError(
                f"evaluation.num_problems = {wanted}: must be at most data.num_held_out = {there}"
            )
        return self

    @model_validator(mode="after")
    def _verifier_knows_the_problems(self) -> Config:
        if self.verifier.target.endswith("ReasoningGymVerifier") and (
            self.data.source != "reasoning_gym"
        ):
            raise ValueError(
                f"verifier = reasoning_gym: knows no problems of data.source = {self.data.source}; "
                "use verifier=math, exact, multiple_choice, or your own"
            )
        return self

    @model_validator(mode="after")
    def _evaluation_is_of_one_model(self) -> Config:
        if self.task == "evaluate" and self.self_reward.c_ref == "model":
            raise ValueError(
                "self_reward.c_ref = model: an evaluation has no reference beside the model; use "
                "calibrated, or a number"
            )
        return self

    @model_validator(mode="after")
    def _self_reward_needs_groups(self) -> Config:
        if self.algorithm.advantage == "rloo" and self.rollouts_per_prompt < 2:
            raise ValueError(
                "rollouts_per_prompt = 1: algorithm=rloo compares the rollouts of a prompt; "
                "use at least 2"
            )
        return self

    def batch_equation(self) -> str:
        """One line: prompts x rollouts = sequences = micro-batches x size x ranks."""
        limit = self.training.max_tokens_per_micro_batch
        micro_batches = (
            f"{_count(self.num_micro_batches, 'micro-batch', 'micro-batches')} x "
            f"{self.micro_batch_size} x {_count(self.num_ranks, 'rank')}"
            if limit is None
            else f"micro-batches of at most {limit:,} tokens x {_count(self.num_ranks, 'rank')}"
        )
        return (
            f"{_count(self.prompts_per_step, 'prompt')} x "
            f"{_count(self.rollouts_per_prompt, 'rollout')} = "
            f"{_count(self.num_sequences, 'sequence')} = {micro_batches}"
        )


def validate(raw: Mapping[str, Any]) -> Config:
    """Check a composed configuration against the contract.

    Args:
        raw: plain nested mappings, as `OmegaConf.to_container(..., resolve=True)` gives them.
    Raises:
        UserError: all mistakes, a line each, with the dotted key and what was found.
    """
    texts = [
        key
        for key, value in flatten(raw).items()
        if value == "None" or (isinstance(value, list) and "None" in value)
    ]
    if texts:
        raise UserError(
            "\n".join(
                f'{key} = None: is a text to Hydra; write null, or "null" in a sweep\'s file'
                for key in texts
            )
        )
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        lines: dict[str, str] = {}
        for item in error.errors(include_url=False):
            key, problem = _explain(dict(item), raw)
            if key in lines:  # a union reports each of its members; they make one line
                problem = f"{lines[key]}, or {problem.removeprefix('must be ')}"
            lines[key] = problem
        raise UserError("\n".join(f"{k}{': ' if k else ''}{p}" for k, p in lines.items())) from None


def check_partition_excess(c_ref: float, beta: float) -> None:
    """Refuse a beta for which the optimum asks too much probability of the score token.

    Args:
        c_ref: log-probability (nats) of the score token under the reference.
        beta: scale of the self-reward score.
    Raises:
        ValueError: Z - 1 at reward 1 exceeds `MAX_PARTITION_EXCESS`.
    Source: LaSeR, arXiv 2510.14943: Z = 1 + pi_ref(z_c) * (exp(r_v / beta) - 1).
    """
    # torch takes seconds to import, which --help and a mistake need not wait for.
    from laser_pl.algorithm.self_reward import partition_excess

    excess = partition_excess(c_ref, beta)
    if excess > MAX_PARTITION_EXCESS:
        raise ValueError(
            f"self_reward.beta = {beta:g} does not fit a token with c_ref = {c_ref:.2f}: Z - 1 = "
            f"{excess:.3g} exceeds {MAX_PARTITION_EXCESS}; {_what_would_fit(c_ref, beta)}"
        )


def _what_would_fit(c_ref: float, beta: float) -> str:
    rarer = math.log(MAX_PARTITION_EXCESS) - 1 / beta
    token = f"a rarer token (c_ref below {rarer:.1f})"
    # The smallest beta solves pi_ref * (exp(1 / beta) - 1) = limit.
    exponent = math.log1p(MAX_PARTITION_EXCESS * math.exp(min(-c_ref, 700)))
    if exponent <= 0:
        return token + " would fit"
    smallest = math.ceil(1 / exponent * 100) / 100
    return f"self_reward.beta={smallest:g} or {token} would fit"


def _explain(item: dict[str, Any], raw: Mapping[str, Any]) -> tuple[str, str]:
    """One pydantic error as `key` or `key = value`, and what is wrong with it."""
    location = [str(part) for part in item["loc"]]
    if len(location) > 1 and location[0] in ("data", "rollout", "optimizer"):
        del location[1]  # pydantic puts the name of the union's member here
    while location[1:] and (
        location[-1] in ("int", "str", "float", "bool") or location[-1].startswith(_UNION_MEMBERS)
    ):
        location.pop()
    key = ".".join(location)
    if item["type"] == "extra_forbidden":
        valid = {known for known in known_keys(raw) if not (known + ".").startswith(key + ".")}
        return key, "unknown key" + suggestion(key, valid)
    if item["type"] == "missing":
        return key, "missing; give it a value"
    if item["type"] == "value_error":
        return "", str(item["ctx"]["error"])
    message = item["msg"].replace("Input should be", "must be", 1)
    return f"{key} = {item['input']!r}", message


# What pydantic appends to a key, beside the plain types, to say which member of a union it tried.
_UNION_MEMBERS = ("literal[", "constrained-", "nullable[")


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        inner = isinstance(value, Mapping)
        flat |= flatten(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}": value}
    return flat


def known_keys(tree: Mapping[str, Any], prefix: str = "") -> set[str]:
    """All dotted keys of nested mappings, groups included."""
    keys: set[str] = set()
    for name, value in tree.items():
        dotted = f"{prefix}{name}"
        keys.add(dotted)
        if isinstance(value, Mapping):
            keys |= known_keys(value, dotted + ".")
    return keys


def _count(number: int, singular: str, plural: str | None = None) -> str:
    return f"{number} {singular if number == 1 else plural or singular + 's'}"


def _nearest_divisor(number: int, wanted: int) -> int:
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return min(divisors, key=lambda d: abs(d - wanted))
