"""The few collectives that the project needs; without a process group each is the identity."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from laser_pl.errors import UserError

T = TypeVar("T")


def rank() -> int:
    """Global rank of this process; 0 without a process group."""
    return dist.get_rank() if _initialized() else 0


def world_size() -> int:
    """Number of processes; 1 without a process group."""
    return dist.get_world_size() if _initialized() else 1


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The element-wise sum of a tensor over all ranks, with the tensor's own dtype and device."""
    if world_size() == 1:
        return tensor
    total = tensor.clone().to(_device())
    dist.all_reduce(total)
    return total.to(tensor.device)


def gather_over_ranks(value: list[T]) -> list[T]:
    """The lists of all ranks, joined in the order of the ranks."""
    if world_size() == 1:
        return value
    parts: list[list[T]] = [[] for _ in range(world_size())]
    dist.all_gather_object(parts, value)
    return [item for part in parts for item in part]


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank."""
    if world_size() == 1:
        return flag
    return bool(sum_over_ranks(torch.tensor(int(flag))).item())


def on_all_ranks(work: Callable[[], T]) -> T:
    """Do each rank's own work; a mistake on one ends all, none of which then waits for it.

    Raises:
        UserError: on every rank, with the message of the first that has one.
    """
    mistakes: list[str] = []
    try:
        result = work()
    except UserError as error:
        mistakes.append(str(error))
    if everyones := gather_over_ranks(mistakes):
        raise UserError(everyones[0])
    return result


def share_of_rank(items: list[T]) -> list[T]:
    """This rank's contiguous share of a list that all ranks hold; shares differ by at most one."""
    number, index = world_size(), rank()
    start, stop = len(items) * index // number, len(items) * (index + 1) // number
    return items[start:stop]


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from a run's seed and what it is for, the same on every machine.

    Every random choice of a step follows from (seed, purpose, step, rank), so that a resumed run
    needs no stored generator state.
    """
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _device() -> torch.device:
    """Where the process group's tensors have to be: NCCL knows no CPU tensors."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


def _initialized() -> bool:
    return dist.is_available() and dist.is_initialized()
