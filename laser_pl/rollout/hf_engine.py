"""Rollouts by a transformers model: prompts prefilled once a group, finished rows dropped.

The self-reward score costs one more decode step a response: the row that sampled EOS is fed its
EOS, and the next-token distribution there holds log pi(z_c | x, y). Prompt and response are cached.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from laser_pl.rollout.engine import Rollout, Sampling

# Dropping rows copies the cache, so it waits until one row in this many has finished.
COMPACTION_SHARE = 8


class HFEngine:
    """Samples from a transformers causal language model in this process.

    Args:
        model: the policy itself, so that the rollouts follow its current weights.
        eos_token_ids: the tokens that end a response.
        pad_token_id: fills prompts up on the left, and rows that wait to be dropped.
        score_token_id: z_c.
        max_sequences: sequences generated at once.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        eos_token_ids: Sequence[int],
        pad_token_id: int,
        score_token_id: int,
        max_sequences: int,
    ) -> None:
        self.model = model
        self.eos_token_ids = tuple(eos_token_ids)
        self.pad_token_id = pad_token_id
        self.score_token_id = score_token_id
        self.max_sequences = max_sequences

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        rollouts_per_prompt: int,
        sampling: Sampling,
        seed: int,
    ) -> list[Rollout]:
        """Sample responses to each prompt.

        Args:
            prompts: P prompts as token ids.
            rollouts_per_prompt: G.
            sampling: temperature, top_p and the length limit.
            seed: of the random numbers; the same seed and weights give the same responses.
        Returns:
            P * G rollouts, those of the first prompt first.
        """
        generator = torch.Generator(self.model.device).manual_seed(seed)
        by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        size = max(1, self.max_sequences // rollouts_per_prompt)
        rollouts: list[Rollout] = []
        with _inference_mode(self.model):
            for start in range(0, len(by_length), size):
                chunk = by_length[start : start + size]
                decoding = _Decoding(self, [prompts[i] for i in chunk], rollouts_per_prompt)
                decoding.run(sampling, generator)
                owners = [index for index in chunk for _ in range(rollouts_per_prompt)]
                rollouts += decoding.rollouts(owners)
        return sorted(rollouts, key=lambda r: r.prompt_index)


class _Decoding:
    """A batch of rows while it is generated; rows that are done leave it from time to time.

    `row_of` maps the rows still in the batch to the responses; `alive` are those without EOS.
    """

    def __init__(self, engine: HFEngine, prompts: list[Sequence[int]], repeats: int) -> None:
        self.engine = engine
        device = engine.model.device
        num_rows = len(prompts) * repeats
        self.eos = torch.tensor(engine.eos_token_ids, device=device)
        self.row_of = torch.arange(num_rows, device=device)
        self.alive = torch.ones(num_rows, dtype=torch.bool, device=device)
        self.tokens: list[Tensor] = []  # a column [num_rows] each step
        self.logprobs: list[Tensor] = []
        self.length = torch.zeros(num_rows, dtype=torch.long, device=device)
        self.token_logprob = torch.full((num_rows,), math.nan, device=device)
        self.logits: Tensor  # [rows, V] of the next token
        self.cache: Any = DynamicCache(config=engine.model.config)
        self._prefill(prompts, repeats)

    def run(self, sampling: Sampling, generator: torch.Generator) -> None:
        """Decode until every row has its EOS and its score, or is cut at the limit."""
        for step in range(sampling.max_response_tokens):
            tokens, logprobs = sample(self.logits, sampling, generator)
            tokens = torch.where(self.alive, tokens, self.engine.pad_token_id)
            self._record(tokens, logprobs)
            ended = self.alive & torch.isin(tokens, self.eos)
            self.alive = self.alive & ~ended
            if step == sampling.max_response_tokens - 1:
                tokens, ended = tokens[ended], self._keep_only(ended)
            if not (self.alive | ended).any():
                return
            self._advance(tokens)
            self._read_scores(ended)
            self._compact()
            if not self.alive.any():
                return

    def rollouts(self, owners: list[int]) -> list[Rollout]:
        """The finished batch as rollouts; `owners` are the prompts that the rows answer."""
        tokens = torch.stack(self.tokens, dim=1).tolist()
        logprobs = torch.stack(self.logprobs, dim=1).tolist()
        token_logprob = self.token_logprob.tolist()
        return [
            Rollout(
                prompt_index=owner,
                response_ids=tuple(tokens[row][:length]),
                logprobs=tuple(logprobs[row][:length]),
                finished=not math.isnan(token_logprob[row]),
                token_logprob=token_logprob[row],
            )
            for row, (owner, length) in enumerate(zip(owners, self.length.tolist(), strict=True))
        ]

    def _prefill(self, prompts: list[Sequence[int]], repeats: int) -> None:
        """Fill the cache with each prompt once and expand it to the prompt's rollouts."""
        width = max(len(prompt) for prompt in prompts)
        pad = self.engine.pad_token_id
        device = self.row_of.device
        ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=device)
        lengths = torch.tensor([len(p) for p in prompts], device=device)
        self.mask = torch.arange(width, device=device) >= (width - lengths).unsqueeze(1)
        self.position = lengths - 1
        positions = (torch.cumsum(self.mask, dim=1) - 1).clamp(min=0)
        self._forward(ids, positions)
        self.cache.batch_repeat_interleave(repeats)
        self.mask = self.mask.repeat_interleave(repeats, dim=0)
        self.position = self.position.repeat_interleave(repeats)
        self.logits = self.logits.repeat_interleave(repeats, dim=0)

    def _advance(self, tokens: Tensor) -> None:
        """Feed one token [rows] to each row."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=1)
        self.position = self.position + 1
        self._forward(tokens.unsqueeze(1), self.position.unsqueeze(1))

    def _forward(self, ids: Tensor, positions: Tensor) -> None:
        output = self.engine.model(
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.logits = output.logits[:, -1].float()

    def _record(self, tokens: Tensor, logprobs: Tensor) -> None:
        rows = self.row_of[self.alive]
        for columns, values in ((self.tokens, tokens), (self.logprobs, logprobs)):
            column = values.new_zeros(len(self.length))
            column[rows] = values[self.alive]
            columns.append(column)
        self.length[rows] += 1

    def _read_scores(self, ended: Tensor) -> None:
        """Keep log pi(z_c | x, y) of the rows that were just fed their EOS."""
        logprobs = torch.log_softmax(self.logits[ended], dim=-1)
        self.token_logprob[self.row_of[ended]] = logprobs[:, self.engine.score_token_id]

    def _compact(self) -> None:
        num_done = int((~self.alive).sum())
        if 0 < num_done < len(self.alive) and num_done * COMPACTION_SHARE >= len(self.alive):
            self._keep_only(self.alive)

    def _keep_only(self, rows: Tensor) -> Tensor:
        """Drop the other rows from the batch; returns the mask of the rows that stay, all True."""
        index = rows.nonzero().squeeze(1)
        self.cache.batch_select_indices(index)
        self.row_of, self.alive = self.row_of[index], self.alive[index]
        self.mask, self.position = self.mask[index], self.position[index]
        self.logits = self.logits[index]
        return rows[index]


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sample one token a row.

    Args:
        logits: [B, V] raw logits.
    Returns:
        tokens [B], and their log-probabilities [B] under softmax(logits / temperature). With
        top_p < 1 the tokens come from the nucleus, the log-probabilities stay those of the whole
        distribution, which is what the training forward computes.
    Raises:
        FloatingPointError: a logit is NaN or +infinite, so that there is nothing to sample from.
    """
    logprobs = torch.log_softmax(logits / sampling.temperature, dim=-1)
    if logprobs.isnan().any():
        raise FloatingPointError("the policy's logits are not finite")
    probabilities = logprobs.exp()
    if sampling.top_p < 1:
        probabilities = _nucleus(probabilities, sampling.top_p)
    tokens = torch.multinomial(probabilities, 1, generator=generator)
    return tokens.squeeze(1), logprobs.gather(1, tokens).squeeze(1)


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Zero the tokens beyond the smallest set whose probability reaches top_p."""
    ordered, index = probabilities.sort(dim=-1, descending=True)
    outside = ordered.cumsum(dim=-1) - ordered >= top_p
    return torch.zeros_like(probabilities).scatter(1, index, ordered.masked_fill(outside, 0))


@contextmanager
def _inference_mode(model: PreTrainedModel) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
