"""`task=score`: self-reward scores for prompts and responses that exist, from a file."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from laser_pl.config import Config, ScoreConfig
from laser_pl.data.files import Row, read_rows
from laser_pl.errors import UserError, suggestion
from laser_pl.evaluate import with_exported_score
from laser_pl.logs.files import finite_or_none, write_text_atomically
from laser_pl.models.loading import eos_token_ids, load_policy, load_tokenizer, resolve_token
from laser_pl.report import THRESHOLD
from laser_pl.scorer import SelfRewardScorer
from laser_pl.train import quieten_libraries


def score(config: Config) -> int:
    """Write the lines of `score.input` with a `self_reward` each to `score.output`.

    Rows whose `finished` is false, as in a samples.jsonl, have no score: null.

    Returns:
        The exit code, 0.
    Raises:
        UserError: a file or a column is missing, the output is there already, or the model has no
            token or constant to score with.
    """
    quieten_libraries()
    console = Console()
    settings = config.score
    rows, output = _check(settings)
    config = with_exported_score(config, console)
    self_reward = config.self_reward
    c_ref = self_reward.c_ref
    if not self_reward.has_constant:
        c_ref = 0.0  # is not used
    elif isinstance(c_ref, str):
        raise UserError(
            f"model.path = {config.model.path}: has no self_reward.json, and self_reward.c_ref = "
            f"{c_ref} is no number; give one, which task=calibrate measures"
        )
    pairs = [
        (
            _text(row, settings.prompt_column, "prompt"),
            _text(row, settings.response_column, "response"),
        )
        for row in rows
    ]
    tokenizer = load_tokenizer(config.model)
    eos_ids = eos_token_ids(tokenizer, config.model)
    token_id = resolve_token(self_reward.token, tokenizer, eos_ids)
    incorrect_id = None
    if self_reward.incorrect_token is not None:
        incorrect_id = resolve_token(
            self_reward.incorrect_token, tokenizer, eos_ids, "self_reward.incorrect_token"
        )
    model = load_policy(config.model)
    if config.trainer.accelerator != "cpu" and torch.cuda.is_available():
        model.to("cuda")  # type: ignore[arg-type]
    scorer = SelfRewardScorer(
        model, tokenizer, token_id, eos_ids, self_reward.beta, c_ref, THRESHOLD, incorrect_id,
        self_reward.score, self_reward.loss,
    )  # fmt: skip
    finished = [i for i, row in enumerate(rows) if _is_finished(row)]
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("score", total=len(finished))
        found = scorer.score_encoded(
            [_encode(scorer, rows[i], *pairs[i]) for i in finished],
            settings.max_tokens,
            advance=lambda number: progress.advance(task, number),
        )
    scores: dict[int, float] = dict(zip(finished, found.tolist(), strict=True))
    lines = [{**row.columns, "self_reward": scores.get(i)} for i, row in enumerate(rows)]
    text = "".join(
        json.dumps(finite_or_none(line), ensure_ascii=False, default=str) + "\n" for line in lines
    )
    write_text_atomically(output, text)
    judged = sum(value > THRESHOLD for value in scores.values())
    console.print(
        f"{len(scores):,} of {len(rows):,} responses scored, {judged:,} judged correct: {output}",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip
    return 0


def _check(settings: ScoreConfig) -> tuple[list[Row], Path]:
    if settings.input is None:
        raise UserError("score.input: missing; give input=FILE with prompts and responses")
    if settings.output is None:
        raise UserError("score.output: missing; give output=FILE, a new .jsonl file")
    output = Path(settings.output)
    if output.exists():
        raise UserError(f"score.output = {output}: is there already; give a new file")
    if output.suffix != ".jsonl":
        raise UserError(f"score.output = {output}: must end in .jsonl")
    rows = read_rows(settings.input, "score.input")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output.parent):
            pass
    except OSError as error:
        raise UserError(
            f"score.output = {output}: cannot be written ({error.strerror}); give another file"
        ) from None
    return rows, output


def _is_finished(row: Row) -> bool:
    """Whether the response ended; a CSV has the word alone, and a file may not say."""
    value = row.columns.get("finished", True)
    words = {"true": True, "false": False}
    known = value if isinstance(value, bool) else words.get(str(value).strip().lower())
    if known is None:
        raise UserError(f"{row.where}: finished = {value!r}; must be true or false")
    return known


def _encode(scorer: SelfRewardScorer, row: Row, prompt: Any, response: str) -> Tensor:
    try:
        return scorer.encode(prompt, response)
    except ValueError as error:
        raise UserError(f"{row.where}: {error}") from None


def _text(row: Row, column: str, which: str) -> Any:
    if column not in row.columns:
        raise UserError(
            f"{row.where}: no column {column!r} (score.{which}_column)"
            f"{suggestion(column, row.columns)}; the columns are {', '.join(row.columns)}"
        )
    value = row.columns[column]
    is_chat = which == "prompt" and isinstance(value, list)
    if not isinstance(value, str) and not is_chat:
        raise UserError(f"{row.where}: {column} is a {type(value).__name__}; must be a text")
    return value
