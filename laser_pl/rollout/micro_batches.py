"""How a step's sequences are dealt out: to the ranks, to micro-batches, and in which layout.

Nothing here changes the step's gradient, whose divisors are of the whole step; it only decides what
is computed, and where.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PretrainedConfig

from laser_pl.config import Config, TrainingConfig
from laser_pl.distributed import gather_over_ranks, rank, world_size
from laser_pl.rollout.batch import RolloutBatch, join
from laser_pl.training.forward import Layout
from laser_pl.training.packing import can_pack, shared_tokens_saved

# Below this share of a step's tokens a prompt's one copy is not worth its mask.
MIN_SAVED = 0.15


@dataclass(frozen=True)
class Plan:
    """The micro-batches of a rank.

    Attributes:
        layout: how a micro-batch's sequences lie in the model's input.
        parts: the sequences [B] of each micro-batch.
    """

    layout: Layout
    parts: list[Tensor]


def make_plan(
    batch: RolloutBatch, config: Config, model: PretrainedConfig, same_number: bool = True
) -> Plan:
    """Cut a rank's sequences into micro-batches.

    Args:
        batch: N sequences, as many on every rank if same_number.
        config: micro_batch_size, and what `training` says.
        model: settings of the model that they go through.
        same_number: every rank gets the same number of micro-batches; called by all of them then.
    """
    layout = choose_layout(batch, config.training, model)
    units = _units(batch, layout)
    limit = config.training.max_tokens_per_micro_batch
    if limit is None:
        return Plan(layout, by_count(units, config.micro_batch_size))
    units = [part for unit in units for part in _split_to_fit(batch, unit, limit)]
    costs = [_num_tokens(batch, unit) for unit in units]
    number = fewest_bins(costs, limit)
    if same_number:
        number = max(gather_over_ranks([number]))
    while len(units) < number:  # another rank's sequences are longer
        units = _split_one(units)
    bins = fill_bins([_num_tokens(batch, unit) for unit in units], number)
    return Plan(layout, [torch.cat([units[place] for place in bin_]) for bin_ in bins])


def choose_layout(batch: RolloutBatch, training: TrainingConfig, model: PretrainedConfig) -> Layout:
    """One copy of each prompt where that pays, rows without padding where the model can."""
    if not can_pack(model, model._attn_implementation):
        return "padded"
    share = training.share_prompts
    if share is True or (share == "auto" and shared_tokens_saved(batch) > MIN_SAVED):
        return "shared"
    return "packed"


def deal_groups(batch: RolloutBatch, is_trained: Tensor) -> RolloutBatch:
    """Drop the groups that nothing trains on, and deal the rest out to the ranks by their tokens.

    Every rank gets as many groups; where that does not come out even, groups of the rest fill up.
    Called by all ranks.

    Args:
        batch: N sequences, P groups of one size, as many groups on every rank.
        is_trained: [N] bool, the same for all sequences of a group.
    Returns:
        This rank's groups, in an order of their own.
    """
    rows = [(batch.groups == group).nonzero().squeeze(1) for group in batch.groups.unique()]
    facts = [(int(batch.attention_mask[r].sum()), bool(is_trained[r[0]])) for r in rows]
    everywhere = gather_over_ranks(facts)
    mine = _deal(everywhere, world_size())[rank()]
    if world_size() == 1:
        return batch.select(torch.cat([rows[group] for group in mine]))
    pieces = gather_over_ranks([batch.select(r) for r in rows])
    return join([pieces[group] for group in mine])


def _deal(groups: list[tuple[int, bool]], num_ranks: int) -> list[list[int]]:
    """Groups of (tokens, is trained) to ranks: the longest first, there and back again."""
    by_length = sorted(range(len(groups)), key=lambda group: -groups[group][0])
    trained = [group for group in by_length if groups[group][1]]
    rest = [group for group in by_length if not groups[group][1]]
    num_missing = max(-len(trained) % num_ranks, 0 if trained else num_ranks)
    chosen = trained + rest[len(rest) - num_missing :] if num_missing else trained
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    for place, group in enumerate(chosen):
        round_, index = divmod(place, num_ranks)
        shares[index if round_ % 2 == 0 else num_ranks - 1 - index].append(group)
    return shares


def by_count(units: list[Tensor], size: int) -> list[Tensor]:
    """Micro-batches of `size` sequences, from units of like length that stay together if they can.

    Args:
        units: sequences [B] of like length, or of one prompt, from the shortest on.
        size: sequences of a micro-batch; the last one may have fewer.
    """
    return list(torch.cat(units).split(size))


def fewest_bins(costs: list[int], limit: int) -> int:
    """The smallest number of bins into which `fill_bins` puts no more than `limit` each."""
    number = max(1, -(-sum(costs) // limit))
    while max(sum(costs[i] for i in bin_) for bin_ in fill_bins(costs, number)) > limit:
        number += 1
    return number


def fill_bins(costs: list[int], number: int) -> list[list[int]]:
    """Items to bins of about the same sum: the largest first, each to the bin with the least."""
    bins: list[list[int]] = [[] for _ in range(number)]
    loads = [(0, index) for index in range(number)]
    for item in sorted(range(len(costs)), key=lambda item: -costs[item]):
        load, index = heapq.heappop(loads)
        bins[index].append(item)
        heapq.heappush(loads, (load + costs[item], index))
    return bins


def _units(batch: RolloutBatch, layout: Layout) -> list[Tensor]:
    """What had better stay together, from the shortest on: a prompt's responses, or sequences."""
    if layout != "shared":
        return list(batch.attention_mask.sum(dim=1).argsort(stable=True).split(1))
    units = [(batch.groups == group).nonzero().squeeze(1) for group in batch.groups.unique()]
    return sorted(units, key=lambda unit: _num_tokens(batch, unit))


def _num_tokens(batch: RolloutBatch, unit: Tensor) -> int:
    """Of the responses, and of one copy of their prompt."""
    prompt = int(batch.attention_mask[unit[0], : batch.prompt_length].sum())
    return prompt + int(batch.num_tokens[unit].sum())


def _split_to_fit(batch: RolloutBatch, unit: Tensor, limit: int) -> list[Tensor]:
    if len(unit) == 1 or _num_tokens(batch, unit) <= limit:
        return [unit]
    halves = unit.tensor_split(2)
    return [part for half in halves for part in _split_to_fit(batch, half, limit)]


def _split_one(units: list[Tensor]) -> list[Tensor]:
    most = max(range(len(units)), key=lambda place: len(units[place]))
    return [*units[:most], *units[most].tensor_split(2), *units[most + 1 :]]
