"""One forward pass: hidden states to response log-probs and the score token's log-prob at EOS."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from laser_pl.rollout.batch import RolloutBatch
from laser_pl.training.packing import ATTENTION, Packed, pack

# How the sequences of a micro-batch lie in the model's input.
Layout = Literal["padded", "packed", "shared"]
# Response tokens whose logits exist at one time: 1024 x 128k x 4 bytes = 0.5 GB.
CHUNK_TOKENS = 1024


class ForwardOutput(NamedTuple):
    """What a step needs of the policy's forward, all in float32.

    Attributes:
        logprobs: [B, T] log-probs (nats) of the response tokens under softmax(logits /
            temperature), 0 under the padding.
        token_logprob: [B] log pi(z_c | x, y) at temperature 1, from the logits row at the EOS; 0
            where truncated.
        incorrect_logprob: [B] the same of z_i, the token that says incorrect; 0 without one.
        entropy: [B, T] entropy (nats) of the sampled distribution, without gradient.
    """

    logprobs: Tensor
    token_logprob: Tensor
    incorrect_logprob: Tensor
    entropy: Tensor


class ResponseHead(nn.Module):
    """The output layer over response positions, chunk by chunk: no [B, T, V] tensor exists.

    A module of its own, so that ZeRO-3 gathers the layer's weight once a forward and once a
    backward on every rank, whatever the number of chunks: ranks whose numbers of gathers differ
    wait for each other for ever.

    Args:
        model: the policy or the reference; its output layer's parameters are shared, not copied.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        layer = model.get_output_embeddings()
        self.weight = layer.weight
        self.bias = getattr(layer, "bias", None)

    def forward(self, hidden: Tensor, tokens: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probs of tokens under softmax(logits / temperature), and entropies of the latter.

        Args:
            hidden: [M, D] last hidden states.
            tokens: [M] the token whose log-prob is wanted at each.
            temperature: [M].
        Returns:
            [M] log-probs in nats, and [M] entropies in nats without gradient; at least float32.
        """
        weight, bias, kind = self.weight, self.bias, hidden.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        found: tuple[Tensor, Tensor] = _TokenLogprobs.apply(
            hidden, weight, bias, tokens, temperature
        )
        return found


class _TokenLogprobs(torch.autograd.Function):
    """Log-probs of given tokens, whose logits exist a chunk at a time, in the backward pass again.

    The gradient of a chunk's logits, (1[token] - softmax) / temperature, is made in the logits' own
    memory, so that two buffers of a chunk's size are all there is.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tokens: Tensor,
        temperature: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """[M] log-probs and [M] entropies of the rows."""
        parts = []
        for rows in _chunks(len(hidden)):
            logits = _tempered_logits(hidden[rows], weight, bias, temperature[rows])
            log_sum = logits.logsumexp(dim=-1)
            chosen = logits.gather(1, tokens[rows].unsqueeze(1)).squeeze(1)
            probabilities = (logits - log_sum.unsqueeze(1)).exp_()
            entropy = log_sum - probabilities.mul_(logits).sum(dim=-1)
            parts.append((chosen - log_sum, entropy, log_sum))
        logprobs, entropies, log_sums = (torch.cat(part) for part in zip(*parts, strict=True))
        ctx.save_for_backward(hidden, weight, bias, tokens, temperature, log_sums)
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of hidden, weight and bias."""
        hidden, weight, bias, tokens, temperature, log_sums = ctx.saved_tensors
        to_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        to_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        to_bias = torch.zeros_like(bias) if bias is not None and ctx.needs_input_grad[2] else None
        for rows in _chunks(len(hidden)):
            logits = _tempered_logits(hidden[rows], weight, bias, temperature[rows])
            scale = (gradients[0][rows] / temperature[rows]).to(logits.dtype).unsqueeze(1)
            to_logits = logits.sub_(log_sums[rows].unsqueeze(1)).exp_().mul_(-scale)
            to_logits.scatter_add_(1, tokens[rows].unsqueeze(1), scale)
            to_logits = to_logits.to(hidden.dtype)
            if to_hidden is not None:
                to_hidden[rows] = to_logits @ weight
            if to_weight is not None:
                to_weight.addmm_(to_logits.t(), hidden[rows])
            if to_bias is not None:
                to_bias += to_logits.sum(dim=0)
        return to_hidden, to_weight, to_bias, None, None


def _chunks(number: int) -> list[slice]:
    """Spans of at most CHUNK_TOKENS rows; one that is empty if there are none."""
    starts = range(0, max(1, number), CHUNK_TOKENS)
    return [slice(start, start + CHUNK_TOKENS) for start in starts]


def _tempered_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: Tensor
) -> Tensor:
    """[rows, V] in float32 or better, in memory of their own."""
    logits = nn.functional.linear(hidden, weight, bias)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits.div_(temperature.unsqueeze(1))


def response_forward(
    model: PreTrainedModel,
    head: ResponseHead,
    batch: RolloutBatch,
    score_token_id: int,
    temperature: float,
    layout: Layout = "padded",
    incorrect_token_id: int | None = None,
) -> ForwardOutput:
    """Log-probs of the responses and of the score token, from one pass over the sequences.

    Args:
        model: the policy or the reference.
        head: its output layer; applied to the response positions alone, and its logits are made
            again in the backward pass.
        batch: B sequences.
        score_token_id: z_c.
        temperature: of the rollouts.
        layout: one sequence a row and padding; or one row without padding; or that with one copy
            of a prompt for all its responses. The results are the same.
        incorrect_token_id: z_i, where two tokens are used.
    Returns:
        The log-probs with gradient to the model's parameters.
    Source: LaSeR, arXiv 2510.14943: the score is read off the ordinary training forward. One copy
        of the prompts: arXiv 2506.05433.
    """
    if layout == "padded":
        before, at_eos = _padded_states(model, batch)
    else:
        before, at_eos = _packed_states(model, pack(batch, share_prompts=layout == "shared"))
    responses = batch.response_ids[batch.response_mask]
    rows = batch.finished.nonzero().squeeze(1)
    token_ids = [score_token_id, *([] if incorrect_token_id is None else [incorrect_token_id])]
    # One call for all: each score token after each EOS, at temperature 1, is one row more.
    judged = [at_eos.new_ones(rows.shape, dtype=torch.float32) for _ in token_ids]
    logprobs, entropy = head(
        torch.cat([before, *(at_eos for _ in token_ids)]),
        torch.cat([responses, *(torch.full_like(rows, token_id) for token_id in token_ids)]),
        torch.cat([before.new_full(responses.shape, temperature, dtype=torch.float32), *judged]),
    )
    logprobs, *scores = logprobs.split([len(responses), *(len(rows) for _ in token_ids)])
    blank = logprobs.new_zeros(batch.response_mask.shape)
    of_tokens = [blank.new_zeros(len(batch)).index_put((rows,), values) for values in scores]
    return ForwardOutput(
        logprobs=blank.masked_scatter(batch.response_mask, logprobs),
        token_logprob=of_tokens[0],
        incorrect_logprob=of_tokens[1] if len(of_tokens) > 1 else blank.new_zeros(len(batch)),
        entropy=blank.masked_scatter(batch.response_mask, entropy[: len(responses)]),
    )


def _padded_states(model: PreTrainedModel, batch: RolloutBatch) -> tuple[Tensor, Tensor]:
    """[M, D] states that predict the response tokens, and [F, D] those at the EOS."""
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
    rows = batch.finished.nonzero().squeeze(1)
    return hidden[:, :-1][batch.response_mask], hidden[rows, batch.num_tokens[rows]]


def _packed_states(model: PreTrainedModel, packed: Packed) -> tuple[Tensor, Tensor]:
    """The same from a packed row."""
    # Stays so, since checkpointed layers run again in the backward pass; it serves sdpa as well.
    model.config._attn_implementation = ATTENTION
    # transformers leaves a mask of four dimensions as it is; `blocks` says what sees what.
    no_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=packed.input_ids.device)
    hidden = model.base_model(
        input_ids=packed.input_ids,
        attention_mask=no_mask,
        position_ids=packed.position_ids,
        use_cache=False,
        blocks=packed.blocks,
    ).last_hidden_state[0]  # [S, D]
    return hidden[packed.before], hidden[packed.at_eos]
