"""Rollouts by a transformers model: prompts prefilled once a group, finished rows dropped.

The self-reward score costs one more decode step a response: the row that sampled EOS is fed its
EOS, and the next-token distribution there holds log pi(z_c | x, y). Prompt and response are cached.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from laser_pl.models.gathered import GatheredCopy, is_sharded
from laser_pl.rollout.engine import Rollout, Sampling

# Dropping rows copies the cache, so it waits until one row in this many has finished.
COMPACTION_SHARE = 8
# Tokens that the cache grows by at a time.
ROOM = 64


class HFEngine:
    """Samples from a transformers causal language model in this process.

    Args:
        eos_token_ids: the tokens that end a response.
        pad_token_id: fills prompts up on the left, and rows that wait to be dropped.
        score_token_id: z_c.
        max_sequences: sequences generated at once.
        decode: turns token ids into text, where responses end at stop texts.
        keep_gathered: keep the copy of the whole weights that sharded ones need between steps.
        autocast: compute in bfloat16 where the training forward does, under bf16-mixed.
        incorrect_token_id: z_i, the token that says incorrect, where two are used.
    """

    def __init__(
        self,
        eos_token_ids: Sequence[int],
        pad_token_id: int,
        score_token_id: int,
        max_sequences: int,
        decode: Callable[[list[int]], str] | None = None,
        keep_gathered: bool = False,
        autocast: bool = False,
        incorrect_token_id: int | None = None,
    ) -> None:
        self.model: PreTrainedModel
        self._gathered: GatheredCopy | None = None
        self.eos_token_ids = tuple(eos_token_ids)
        self.pad_token_id = pad_token_id
        self.score_token_id = score_token_id
        self.max_sequences = max_sequences
        self.decode = decode
        self.keep_gathered = keep_gathered
        self.autocast = autocast
        self.incorrect_token_id = incorrect_token_id

    @contextmanager
    def weights_of(self, policy: PreTrainedModel) -> Iterator[None]:
        """Sample from a policy: from itself, or from a whole copy where ZeRO-3 shards it."""
        if not is_sharded(policy):
            self.model = policy
            yield
            return
        self._gathered = self._gathered or GatheredCopy(policy)
        self._gathered.refresh(policy)
        self.model = self._gathered.model
        try:
            yield
        finally:
            if not self.keep_gathered:
                del self.model
                self._gathered = None

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        rollouts_per_prompt: int,
        sampling: Sampling,
        seed: int,
        on_finished: Callable[[list[Rollout]], None] | None = None,
    ) -> list[Rollout]:
        """Sample responses to each prompt.

        Args:
            prompts: P prompts as token ids.
            rollouts_per_prompt: G.
            sampling: temperature, filters, length limits and stop texts.
            seed: of the random numbers; the same seed and weights give the same responses.
            on_finished: gets every rollout once, soon after it is finished.
        Returns:
            P * G rollouts, those of the first prompt first.
        Raises:
            ValueError: there are stop texts, and the engine cannot decode.
        """
        if sampling.stop and self.decode is None:
            raise ValueError("stop texts need an engine with decode")
        generator = torch.Generator(self.model.device).manual_seed(seed)
        by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        size = max(1, self.max_sequences // rollouts_per_prompt)
        rollouts: dict[tuple[int, int], Rollout] = {}
        kind = self.model.device.type
        with (
            _inference_mode(self.model),
            torch.autocast(kind, dtype=torch.bfloat16, enabled=self.autocast),
        ):
            for start in range(0, len(by_length), size):
                chunk = by_length[start : start + size]
                owners = [index for index in chunk for _ in range(rollouts_per_prompt)]
                decoding = _Decoding(self, [prompts[i] for i in chunk], owners, sampling)
                for finished in decoding.run(generator):
                    rollouts |= {(r.prompt_index, row): r for row, r in finished.items()}
                    if on_finished is not None:
                        on_finished(list(finished.values()))
        return [rollouts[place] for place in sorted(rollouts)]


class _Decoding:
    """A batch of rows while it is generated; rows that are done leave it from time to time.

    `row_of` maps the rows still in the batch to the responses; `alive` are those without EOS.

    Args:
        prompts: as token ids.
        owners: for each response the index that its rollout gives to its prompt; the responses to
            a prompt follow one another.
    """

    def __init__(
        self,
        engine: HFEngine,
        prompts: list[Sequence[int]],
        owners: list[int],
        sampling: Sampling,
    ) -> None:
        self.engine = engine
        self.owners = owners
        self.sampling = sampling
        device = engine.model.device
        shape = (len(owners), sampling.max_response_tokens)
        self.eos = torch.tensor(engine.eos_token_ids, device=device)
        self.row_of = torch.arange(len(owners), device=device)
        self.alive = torch.ones(len(owners), dtype=torch.bool, device=device)
        self.tokens = torch.zeros(shape, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(shape, device=device)
        self.length = torch.zeros(len(owners), dtype=torch.long, device=device)
        self.token_logprob = torch.full((len(owners),), math.nan, device=device)
        self.incorrect_logprob = torch.full_like(self.token_logprob, math.nan)
        self.stopped: set[int] = set()
        self.returned = torch.zeros(len(owners), dtype=torch.bool, device=device)
        self.logits: Tensor  # [rows, V] of the next token
        self.cache = _make_cache(engine.model)
        self._prefill(prompts, len(owners) // len(prompts))

    def run(self, generator: torch.Generator) -> Iterator[dict[int, Rollout]]:
        """Decode until every row has its EOS and its score, or is cut at the limit.

        Yields:
            Rollouts by row, when their rows leave the batch.
        """
        sampling = self.sampling
        for step in range(sampling.max_response_tokens):
            too_early = self.eos if step < sampling.min_response_tokens else None
            tokens, logprobs = sample(self.logits, sampling, generator, too_early)
            tokens = torch.where(self.alive, tokens, self.engine.pad_token_id)
            self._record(step, tokens, logprobs)
            ended = self.alive & torch.isin(tokens, self.eos)
            self.alive = self.alive & ~ended
            if sampling.stop:
                self._stop_at(sampling.stop)
            if step == sampling.max_response_tokens - 1:
                tokens, ended = tokens[ended], self._keep_only(ended)
            if not (self.alive | ended).any():
                break
            self._advance(tokens)
            self._read_scores(ended)
            if not self.alive.any():
                break
            if self._compact():
                yield self._finished()
        self.alive[:] = False
        yield self._finished()

    def _finished(self) -> dict[int, Rollout]:
        """The rollouts that are done and have not been returned, by row."""
        done = ~self.returned
        done[self.row_of[self.alive]] = False
        self.returned |= done
        rows = done.nonzero().squeeze(1)
        columns = (
            self.length, self.tokens, self.logprobs, self.token_logprob, self.incorrect_logprob,
        )  # fmt: skip
        values = zip(rows.tolist(), *(column[rows].tolist() for column in columns), strict=True)
        return {
            row: Rollout(
                prompt_index=self.owners[row],
                response_ids=tuple(tokens[:length]),
                logprobs=tuple(logprobs[:length]),
                finish_reason=self._finish_reason(row, token_logprob),
                token_logprob=token_logprob,
                incorrect_logprob=incorrect_logprob,
            )
            for row, length, tokens, logprobs, token_logprob, incorrect_logprob in values
        }

    def _finish_reason(self, row: int, token_logprob: float) -> Literal["eos", "length", "stop"]:
        if not math.isnan(token_logprob):
            return "eos"
        return "stop" if row in self.stopped else "length"

    def _stop_at(self, texts: tuple[str, ...]) -> None:
        """End the rows whose newest token completes one of the texts."""
        decode = self.engine.decode
        if decode is None:
            raise ValueError("stop texts need an engine with decode")
        # A token has at least a byte of text, so that this many hold any of the texts.
        num_recent = max(len(text.encode()) for text in texts) + 1
        for place in self.alive.nonzero().squeeze(1).tolist():
            row = int(self.row_of[place])
            length = int(self.length[row])
            written = self.tokens[row, max(0, length - num_recent) : length].tolist()
            if any(text in decode(written) for text in texts):
                self.stopped.add(row)
                self.alive[place] = False

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

    def _record(self, step: int, tokens: Tensor, logprobs: Tensor) -> None:
        rows = self.row_of[self.alive]
        self.tokens[rows, step] = tokens[self.alive]
        self.logprobs[rows, step] = logprobs[self.alive]
        self.length[rows] += 1

    def _read_scores(self, ended: Tensor) -> None:
        """Keep the score tokens' log-probs of the rows that were just fed their EOS."""
        logprobs = torch.log_softmax(self.logits[ended], dim=-1)
        rows = self.row_of[ended]
        self.token_logprob[rows] = logprobs[:, self.engine.score_token_id]
        if self.engine.incorrect_token_id is not None:
            self.incorrect_logprob[rows] = logprobs[:, self.engine.incorrect_token_id]

    def _compact(self) -> bool:
        """Drop the rows that are done if they are many; returns whether it did."""
        num_done = int((~self.alive).sum())
        is_due = num_done > 0 and num_done * COMPACTION_SHARE >= len(self.alive)
        if is_due:
            self._keep_only(self.alive)
        return is_due

    def _keep_only(self, rows: Tensor) -> Tensor:
        """Drop the other rows from the batch; returns the mask of the rows that stay, all True."""
        index = rows.nonzero().squeeze(1)
        self.cache.batch_select_indices(index)
        self.row_of, self.alive = self.row_of[index], self.alive[index]
        self.mask, self.position = self.mask[index], self.position[index]
        self.logits = self.logits[index]
        return rows[index]


class _RoomyLayer(DynamicLayer):
    """A layer's keys and values in buffers with room: a new token does not copy those before it."""

    _buffers: tuple[Tensor, Tensor]
    _view: Tensor | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values [B, H, S, D], and return all of them."""
        length = self.get_seq_length()
        if length == 0:
            first: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
            return first
        past: tuple[Any, Any] = (self.keys, self.values)
        total = length + key_states.shape[-2]
        # Where rows were dropped or repeated, the keys are another tensor than the buffer's.
        if past[0] is not self._view or total > self._buffers[0].shape[-2]:
            shape = (*past[0].shape[:2], total + ROOM, past[0].shape[-1])
            self._buffers = (past[0].new_empty(shape), past[1].new_empty(shape))
            for buffer, old in zip(self._buffers, past, strict=True):
                buffer[:, :, :length] = old
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, length:total] = new
        keys, values = (buffer[:, :, :total] for buffer in self._buffers)
        self.keys, self.values, self._view = keys, values, keys
        return keys, values


def _make_cache(model: PreTrainedModel) -> Any:
    """The model's cache; layers of another kind, such as a sliding window's, stay as they are."""
    cache: Any = DynamicCache(config=model.config)
    cache.layers = [_RoomyLayer() if type(x) is DynamicLayer else x for x in cache.layers]
    return cache


def sample(
    logits: Tensor, sampling: Sampling, generator: torch.Generator, forbidden: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Sample one token a row.

    Args:
        logits: [B, V] raw logits.
        sampling: temperature and filters.
        generator: of the random numbers.
        forbidden: tokens that may not come yet.
    Returns:
        tokens [B], and their log-probabilities [B] under softmax(logits / temperature). With
        filters the tokens come from what they leave, the log-probabilities stay those of the whole
        distribution, which is what the training forward computes.
    Raises:
        FloatingPointError: a logit is NaN or +infinite, so that there is nothing to sample from.
    """
    logprobs = torch.log_softmax(logits / sampling.temperature, dim=-1)
    if logprobs.isnan().any():
        raise FloatingPointError("the policy's logits are not finite")
    probabilities = logprobs.exp()
    if forbidden is not None:
        probabilities = probabilities.index_fill(1, forbidden, 0)
    if sampling.min_p > 0:
        least = sampling.min_p * probabilities.amax(dim=-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < least, 0)
    if 0 < sampling.top_k < logits.shape[-1]:
        least = probabilities.topk(sampling.top_k, dim=-1).values[:, -1:]
        probabilities = probabilities.masked_fill(probabilities < least, 0)
    if sampling.top_p < 1:
        probabilities = _nucleus(probabilities, sampling.top_p)
    tokens = _draw(probabilities, generator)
    return tokens.squeeze(1), logprobs.gather(1, tokens).squeeze(1)


def _draw(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """[B, 1] a token a row, with a chance proportional to its probability [B, V].

    One random number a row instead of torch.multinomial's one a token, which took a fifth of a
    decode step at V = 49152 on a CPU. It is in (0, total], so that no token of probability 0 comes.
    """
    cumulative = probabilities.cumsum(dim=-1, dtype=torch.float64)
    shape = (len(probabilities), 1)
    uniform = 1 - torch.rand(
        shape, generator=generator, dtype=torch.float64, device=probabilities.device
    )
    return torch.searchsorted(cumulative, uniform * cumulative[:, -1:])


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Zero the tokens beyond the smallest set whose share of the probability reaches top_p."""
    ordered, index = probabilities.sort(dim=-1, descending=True)
    whole = ordered.sum(dim=-1, keepdim=True)
    outside = ordered.cumsum(dim=-1) - ordered >= top_p * whole
    return torch.zeros_like(probabilities).scatter(1, index, ordered.masked_fill(outside, 0))


@contextmanager
def _inference_mode(model: PreTrainedModel) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
