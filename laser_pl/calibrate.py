"""`task=calibrate`: which token suits the score, and its constant, measured on the model itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from laser_pl.algorithm import partition_excess
from laser_pl.config import Config, validate
from laser_pl.data.datamodule import PromptDataModule
from laser_pl.data.problem import Prompt
from laser_pl.distributed import derive_seed
from laser_pl.errors import UserError
from laser_pl.evaluation.plots import plot_tokens
from laser_pl.launch import is_rank_zero
from laser_pl.logs.files import write_json_atomically
from laser_pl.rollout.batch import RolloutBatch
from laser_pl.rollout.callback import WARN_PARTITION_EXCESS
from laser_pl.setup import Inputs, check_output_dir, prepare_inputs, prepare_output_dir
from laser_pl.train import (
    build_collector,
    build_hf_engine,
    build_module,
    quieten_libraries,
    wait_for,
)

# Responses that are sampled at once.
GENERATED_SEQUENCES = 64
# Sequences of a forward pass that reads the distribution after EOS.
FORWARD_SEQUENCES = 16
# Words in the names of tokens that a tokenizer keeps for later.
_UNUSED_NAMES = ("reserved", "unused", "placeholder", "extra_id", "empty")


@dataclass(frozen=True)
class TokenFacts:
    """What a token would be as the score token.

    Attributes:
        token_id: its id.
        text: its text.
        c_ref: mean of log pi_ref(token | x, y) after EOS, in nats.
        c_ref_std: its standard deviation over responses, in nats.
        partition_excess: Z - 1 at the configured beta; small where the score can reach 1.
        occurs_in_data: a problem or an answer contains it.
        problem: why it cannot be taken; None if it can.
        reason: what speaks for it or against it, in a few words.
    """

    token_id: int
    text: str
    c_ref: float
    c_ref_std: float
    partition_excess: float
    occurs_in_data: bool
    problem: str | None
    reason: str


def calibrate(config: Config) -> int:
    """Rank the special and unused tokens of a model, and print the overrides for the best.

    Writes calibration.json and figures/tokens.png to output_dir.

    Returns:
        The exit code, 0.
    Raises:
        UserError: whatever of the input will not do, or no token fits.
    """
    quieten_libraries()
    console = Console()
    check_output_dir(config)
    inputs = prepare_inputs(config, console)
    folder = prepare_output_dir(config)
    try:
        ranked, num_responses = rank_tokens(config, inputs)
    finally:
        inputs.verifier.close()
    best = ranked[0] if ranked[0].problem is None else None
    overrides = (
        f"self_reward.token={best.token_id} self_reward.c_ref={best.c_ref:.3f}" if best else None
    )
    write_json_atomically(
        folder / "calibration.json",
        {
            "model": config.model.path,
            "beta": config.self_reward.beta,
            "num_responses": num_responses,
            "overrides": overrides,
            "tokens": [asdict(token) for token in ranked],
        },
    )
    plot_tokens(
        [(token.text, token.c_ref, token.c_ref_std, token.problem is None) for token in ranked],
        folder / "figures",
    )
    _show(ranked[: config.calibrate.show], num_responses, config.self_reward.beta, console)
    console.print(f"Written to {folder}: calibration.json, figures/tokens.png", highlight=False)
    if overrides is None:
        raise UserError(
            f"self_reward.beta = {config.self_reward.beta:g}: no token fits it; take a larger one"
        )
    console.print(f"\n{overrides}", highlight=False, markup=False, soft_wrap=True)
    return 0


def with_chosen_token(config: Config, inputs: Inputs, console: Console) -> tuple[Config, Inputs]:
    """The configuration with the best token in place of `self_reward.token=auto`.

    Rank 0 measures, before there is a process group; the others read its choice in the run's
    config.yaml, which it writes next.

    Raises:
        UserError: no token fits, or rank 0 does not say which within trainer.timeout_minutes.
    """
    if not is_rank_zero():
        path = Path(config.output_dir) / "config.yaml"
        if not wait_for(path, config.trainer.timeout_minutes * 60):
            raise UserError(
                f"self_reward.token = auto: {path} did not come within trainer.timeout_minutes = "
                f"{config.trainer.timeout_minutes:g}; it must be on a file system that all share"
            )
        chosen = yaml.safe_load(path.read_text())["self_reward"]["token"]
        return _with_token(config, inputs, chosen)
    best = rank_tokens(config, inputs)[0][0]
    if best.problem is not None:
        raise UserError(
            f"self_reward.token = auto: no token fits self_reward.beta = "
            f"{config.self_reward.beta:g}; take a larger one"
        )
    console.print(
        f"self_reward.token: {best.text} (id {best.token_id}), {best.reason}",
        highlight=False, markup=False,
    )  # fmt: skip
    return _with_token(config, inputs, best.token_id)


def _with_token(config: Config, inputs: Inputs, token_id: int) -> tuple[Config, Inputs]:
    raw = config.model_dump(by_alias=True)
    raw["self_reward"]["token"] = token_id
    return validate(raw), replace(inputs, score_token_id=token_id)


def rank_tokens(config: Config, inputs: Inputs) -> tuple[list[TokenFacts], int]:
    """The candidates, best first, and the number of responses that they were measured on.

    The best are those that may be taken, at which Z - 1 is at most 0.01, with the smallest
    standard deviation: the method takes log pi_ref for a constant.

    Raises:
        UserError: no response finished, or the tokenizer has no special or unused token.
    """
    candidates = candidate_tokens(inputs.tokenizer)
    if not candidates:
        raise UserError(f"model.path = {config.model.path}: its tokenizer has no special token")
    module = build_module(config, inputs)
    module.setup("predict")
    if config.trainer.accelerator != "cpu" and torch.cuda.is_available():
        module.to("cuda")
    number = max(1, config.calibrate.num_responses // config.rollouts_per_prompt)
    prompts = PromptDataModule(inputs.train, [], number, 1, config.seed).prompts_of_step(1)
    # Not the rollouts' engine: vLLM would be started for these alone.
    engine = build_hf_engine(config, inputs, GENERATED_SEQUENCES)
    collector = build_collector(config, inputs, engine)
    with collector.engine.weights_of(module.policy):
        seed = derive_seed(config.seed, "calibrate", 0)
        batch = collector.generate(prompts, config.rollouts_per_prompt, seed)
    if not bool(batch.finished.any()):
        raise UserError(
            f"rollout.max_response_tokens = {config.rollout.max_response_tokens}: none of "
            f"{len(batch)} responses ended with EOS within it, so that nothing can be measured; "
            "give a larger one"
        )
    logprobs = logprobs_after_eos(module.policy, batch, candidates)
    mean, std = logprobs.mean(dim=0), logprobs.std(dim=0, unbiased=len(logprobs) > 1)
    data = _Data.of([*inputs.train, *inputs.held_out])
    tokens = [
        _facts(config, inputs, data, token_id, float(m), float(s))
        for token_id, m, s in zip(candidates, mean, std, strict=True)
    ]
    tokens.sort(key=lambda t: (t.problem is not None, t.c_ref_std, t.token_id))
    return tokens, len(logprobs)


def candidate_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of the special tokens, and of those whose name says that nothing uses them."""
    ids = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
    for text, token_id in tokenizer.get_vocab().items():
        if any(word in text.lower() for word in _UNUSED_NAMES) and text[:1] + text[-1:] in (
            "<>",
            "[]",
        ):
            ids.add(token_id)
    return sorted(int(token_id) for token_id in ids)


@torch.no_grad()
def logprobs_after_eos(
    model: PreTrainedModel, batch: RolloutBatch, token_ids: Sequence[int]
) -> Tensor:
    """log pi(token | x, y) of many tokens, from the logits row at each EOS.

    Args:
        model: the policy.
        batch: N sequences, of which those that are finished count.
        token_ids: C tokens.
    Returns:
        [F, C] float32 nats for the F finished sequences.
    """
    model.eval()
    wanted = torch.tensor(token_ids, device=model.device)
    found = []
    for rows in batch.finished.nonzero().squeeze(1).split(FORWARD_SEQUENCES):
        part = batch.select(rows).to(model.device)
        positions = (torch.cumsum(part.attention_mask, dim=1) - 1).clamp(min=0)
        hidden = model.base_model(
            input_ids=part.input_ids, attention_mask=part.attention_mask, position_ids=positions,
            use_cache=False,
        ).last_hidden_state  # fmt: skip
        last = part.prompt_length + part.num_tokens - 1
        at_eos = hidden[torch.arange(len(part), device=model.device), last]
        logits = model.get_output_embeddings()(at_eos).float()
        found.append(logits.log_softmax(dim=-1)[:, wanted].cpu())
    return torch.cat(found)


class _Data(NamedTuple):
    """What occurs in the problems and their answers: token ids of the prompts, and the texts."""

    token_ids: frozenset[int]
    text: str

    @classmethod
    def of(cls, prompts: Sequence[Prompt]) -> _Data:
        ids = frozenset(token_id for prompt in prompts for token_id in prompt.token_ids)
        texts = (text for p in prompts for text in (p.problem.text, p.problem.answer))
        return cls(ids, "\n".join(texts))


def _facts(
    config: Config, inputs: Inputs, data: _Data, token_id: int, c_ref: float, std: float
) -> TokenFacts:
    text = str(inputs.tokenizer.convert_ids_to_tokens(token_id))
    settings = config.self_reward
    excess = partition_excess(c_ref, settings.beta)
    occurs = token_id in data.token_ids or text in data.text
    problem = _problem(inputs, token_id) or ("occurs in the data" if occurs else None)
    if problem is None and settings.has_constant and excess > WARN_PARTITION_EXCESS:
        problem = f"too likely for beta {settings.beta:g}: Z - 1 = {excess:.2g}"
    reason = problem or f"never occurs, Z - 1 = {excess:.2g}, varies by {std:.2f} nats"
    return TokenFacts(token_id, text, c_ref, std, excess, occurs, problem, reason)


def _problem(inputs: Inputs, token_id: int) -> str | None:
    """Why a token cannot be the score token, whatever the data and its probability."""
    if token_id in inputs.eos_ids:
        return "ends a response"
    if token_id == inputs.tokenizer.pad_token_id:
        return "is the pad token"
    if token_id == inputs.incorrect_token_id:
        return "is self_reward.incorrect_token"
    return None


def _show(tokens: list[TokenFacts], num_responses: int, beta: float, console: Console) -> None:
    table = Table(
        title=f"log pi(token) after EOS, {num_responses} responses, beta {beta:g}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    for heading, side in (("token", "left"), ("id", "right"), ("mean", "right"), ("std", "right")):
        table.add_column(heading, justify=side, no_wrap=True)  # type: ignore[arg-type]
    table.add_column("")
    for token in tokens:
        style = "dim" if token.problem else ""
        cells: list[Any] = [
            Text(token.text), str(token.token_id), f"{token.c_ref:.2f}", f"{token.c_ref_std:.2f}",
            Text(token.reason),
        ]  # fmt: skip
        table.add_row(*cells, style=style)
    console.print()
    console.print(table)
