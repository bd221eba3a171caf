"""One forward pass: hidden states to response log-probs and the score token's log-prob at EOS."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from laser_pl.rollout.batch import RolloutBatch

# Response tokens whose logits exist at one time: 1024 x 128k x 4 bytes = 0.5 GB.
CHUNK_TOKENS = 1024


class ForwardOutput(NamedTuple):
    """What a step needs of the policy's forward, all in float32.

    Attributes:
        logprobs: [B, T] log-probs (nats) of the response tokens under softmax(logits /
            temperature), 0 under the padding.
        token_logprob: [B] log pi(z_c | x, y) at temperature 1, from the logits row at the EOS; 0
            where truncated.
        entropy: [B, T] entropy (nats) of the sampled distribution, without gradient.
    """

    logprobs: Tensor
    token_logprob: Tensor
    entropy: Tensor


def response_forward(
    model: PreTrainedModel, batch: RolloutBatch, score_token_id: int, temperature: float
) -> ForwardOutput:
    """Log-probs of the responses and of the score token, from one pass over the sequences.

    The output layer is applied to the response positions alone, chunk by chunk, and its logits are
    made again in the backward pass: no [B, T, V] tensor exists.

    Args:
        model: the policy or the reference.
        batch: B sequences.
        score_token_id: z_c.
        temperature: of the rollouts.
    Returns:
        The log-probs with gradient to the model's parameters.
    Source: LaSeR, arXiv 2510.14943: the score is read off the ordinary training forward.
    """
    positions = (torch.cumsum(batch.attention_mask, dim=1) - 1).clamp(min=0)
    hidden = model.base_model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=positions,
        use_cache=False,
    ).last_hidden_state  # [B, L, D]
    # The distribution of the token at slot s + 1 is at slot s; that after the last token is at its
    # own slot, so T + 1 slots say everything.
    hidden = hidden[:, batch.prompt_length - 1 :]
    head = model.get_output_embeddings()
    logprobs, entropy = _token_logprobs(
        head, hidden[:, :-1][batch.response_mask], batch.response_ids[batch.response_mask],
        temperature,
    )  # fmt: skip
    rows = batch.finished.nonzero().squeeze(1)
    at_eos = hidden[rows, batch.num_tokens[rows]]
    scores = _token_logprobs(head, at_eos, torch.full_like(rows, score_token_id), 1.0)[0]
    blank = logprobs.new_zeros(batch.response_mask.shape)
    return ForwardOutput(
        logprobs=blank.masked_scatter(batch.response_mask, logprobs),
        token_logprob=blank.new_zeros(len(batch)).index_put((rows,), scores),
        entropy=blank.masked_scatter(batch.response_mask, entropy),
    )


def _token_logprobs(
    head: torch.nn.Module, hidden: Tensor, tokens: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """log-probs [M] of tokens [M] after hidden [M, D], and entropies [M], in chunks over M."""
    parts = [
        checkpoint(_chunk_logprobs, head, h, t, temperature, use_reentrant=False)
        for h, t in zip(hidden.split(CHUNK_TOKENS), tokens.split(CHUNK_TOKENS), strict=True)
    ]
    if not parts:
        return (empty := hidden.new_zeros(0, dtype=torch.float32)), empty
    logprobs, entropies = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


def _chunk_logprobs(
    head: torch.nn.Module, hidden: Tensor, tokens: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    logprobs = torch.log_softmax(_at_least_float32(head(hidden)) / temperature, dim=-1)
    with torch.no_grad():
        entropy = -(logprobs.exp() * logprobs).sum(dim=-1)
    return logprobs.gather(1, tokens.unsqueeze(1)).squeeze(1), entropy


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
