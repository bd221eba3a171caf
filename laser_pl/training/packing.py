"""Sequences of a micro-batch without padding, and a prompt's responses behind one copy of it.

All tokens stand in one row: a prompt, then its responses one after the other, then the next prompt.
A response's tokens see the prompt and what came before them in their own response, and nothing
else; their positions go on from the prompt's end. Forward and gradient are those of separate
sequences. Only attention looks at more than one token at a time, so only it unpacks them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from laser_pl.rollout.batch import RolloutBatch

# Those of which it has been tested: rotary positions, full attention in every layer.
ARCHITECTURES = ("llama", "qwen2", "qwen3")
# transformers' name of `attend`: sdpa, and packed rows.
ATTENTION = "laser_pl"


@dataclass(frozen=True)
class Block:
    """Queries and the keys that they may see, padded, for one call of attention.

    Attributes:
        queries: [B, T] slots of the row; 0 under the padding.
        is_query: [B, T] bool, False under the padding.
        keys: [B, K] slots; 0 under the padding.
        mask: [B, 1, T, K] bool, True where a query sees a key.
    """

    queries: Tensor
    is_query: Tensor
    keys: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Packed:
    """A packed row, and where the sequences' tokens are in it.

    Attributes:
        input_ids: [1, S] tokens.
        position_ids: [1, S] positions in the tokens' own sequences.
        blocks: the prompts, which see themselves, and the responses, which see their prompt too.
        before: [M] for each response token, in the order of the batch's response_mask, the slot
            whose hidden state predicts it.
        at_eos: [F] for each finished sequence the slot of its EOS.
    """

    input_ids: Tensor
    position_ids: Tensor
    blocks: tuple[Block, Block]
    before: Tensor
    at_eos: Tensor


def can_pack(settings: PretrainedConfig, attention: str | None) -> bool:
    """Whether a model can go through packed rows.

    Args:
        settings: of the model.
        attention: its attention implementation.
    """
    layers = getattr(settings, "layer_types", None) or ["full_attention"]
    return (
        settings.model_type in ARCHITECTURES
        and attention in ("sdpa", ATTENTION)
        and set(layers) == {"full_attention"}
    )


def shared_tokens_saved(batch: RolloutBatch) -> float:
    """The share of a step's tokens that one copy of each prompt saves."""
    lengths = batch.attention_mask[:, : batch.prompt_length].sum(dim=1)
    _, first = batch.groups.unique(return_inverse=True)
    num_groups = int(first.max()) + 1
    once = torch.zeros(num_groups, dtype=lengths.dtype).scatter(0, first, lengths).sum()
    tokens = lengths.sum() + batch.num_tokens.sum()
    return float((lengths.sum() - once) / tokens)


def pack(batch: RolloutBatch, share_prompts: bool) -> Packed:
    """Put the sequences of a micro-batch into one row.

    Args:
        batch: B sequences.
        share_prompts: put the responses to a prompt behind one copy of it.
    """
    prompts = batch.attention_mask[:, : batch.prompt_length].sum(dim=1).tolist()
    counts = batch.num_tokens.tolist()
    tokens = batch.input_ids.cpu()
    ids: list[Tensor] = []
    positions: list[Tensor] = []
    prompt_spans: list[range] = []
    owner: dict[int, int] = {}  # of a sequence, its prompt's number
    spans: dict[int, range] = {}  # of a sequence, its response's slots
    slot = 0
    for members in _trees(batch.groups.tolist(), share_prompts):
        length = prompts[members[0]]
        ids.append(tokens[members[0], batch.prompt_length - length : batch.prompt_length])
        positions.append(torch.arange(length))
        prompt_spans.append(range(slot, slot + length))
        slot += length
        for member in members:
            count = counts[member]
            ids.append(tokens[member, batch.prompt_length : batch.prompt_length + count])
            positions.append(torch.arange(length, length + count))
            owner[member] = len(prompt_spans) - 1
            spans[member] = range(slot, slot + count)
            slot += count
    sequences = range(len(batch))
    before = [(prompt_spans[owner[m]][-1], *spans[m][:-1]) for m in sequences]
    finished = batch.finished.nonzero().squeeze(1).tolist()
    device = batch.input_ids.device
    return Packed(
        torch.cat(ids).unsqueeze(0).to(device),
        torch.cat(positions).unsqueeze(0).to(device),
        (
            _block([range(0)] * len(prompt_spans), prompt_spans, device),
            _block(
                [prompt_spans[owner[m]] for m in sequences], [spans[m] for m in sequences], device
            ),
        ),
        torch.tensor([place for places in before for place in places], device=device),
        torch.tensor([spans[m][-1] for m in finished], dtype=torch.long, device=device),
    )


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    blocks: tuple[Block, Block] | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers asks for it: sdpa's, and that of a packed row if `blocks` says so.

    Args:
        query: [1, H, S, D].
        key: [1, H / n, S, D].
        value: as key.
        blocks: what sees what.
    Returns:
        [1, S, H, D]
    """
    if blocks is None:
        output: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
        return output
    queries, keys, values = (x[0].transpose(0, 1) for x in (query, key, value))  # [S, H, D]
    repeats = queries.shape[1] // keys.shape[1]
    result = torch.zeros_like(queries)
    for block in blocks:
        attended = nn.functional.scaled_dot_product_attention(
            _take(queries, block.queries),
            _take(keys, block.keys).repeat_interleave(repeats, dim=1),
            _take(values, block.keys).repeat_interleave(repeats, dim=1),
            attn_mask=block.mask,
            dropout_p=dropout,
            scale=scaling,
        )  # [B, H, T, D]
        real = block.is_query
        result = result.index_copy(
            0, block.queries[real], attended.transpose(1, 2)[real].to(result.dtype)
        )
    return result.unsqueeze(0), None


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def _take(states: Tensor, slots: Tensor) -> Tensor:
    """[B, H, T, D] of [S, H, D] states at [B, T] slots."""
    taken = states.index_select(0, slots.flatten())
    return taken.view(*slots.shape, *states.shape[1:]).transpose(1, 2)


def _trees(groups: list[int], share_prompts: bool) -> list[list[int]]:
    """The sequences that stand behind one copy of a prompt."""
    if not share_prompts:
        return [[member] for member in range(len(groups))]
    trees: dict[int, list[int]] = {}
    for member, group in enumerate(groups):
        trees.setdefault(group, []).append(member)
    return list(trees.values())


def _block(contexts: list[range], spans: list[range], device: torch.device) -> Block:
    """Spans that see all of their contexts, and themselves up to each token."""
    num_context = max(len(context) for context in contexts)
    num_queries = max(len(span) for span in spans)
    is_query, queries = _padded(spans, num_queries)
    is_context, context = _padded(contexts, num_context)
    earlier = torch.ones(num_queries, num_queries, dtype=torch.bool).tril()
    mask = torch.cat(
        [
            is_context.unsqueeze(1).expand(-1, num_queries, -1),
            earlier.expand(len(spans), -1, -1),
        ],
        dim=2,
    )
    keys = torch.cat([context, queries], dim=1)
    parts = (queries, is_query, keys, mask.unsqueeze(1))
    return Block(*(part.to(device) for part in parts))


def _padded(spans: list[range], width: int) -> tuple[Tensor, Tensor]:
    """[B, width] which slots are there, and the slots of spans, 0 where there are none."""
    lengths = torch.tensor([len(span) for span in spans])
    starts = torch.tensor([span.start for span in spans])
    places = torch.arange(width)
    there = places < lengths.unsqueeze(1)
    return there, (starts.unsqueeze(1) + places) * there
