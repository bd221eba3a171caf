"""The prompts of each step, from (seed, step) alone, and the loader of the step's micro-batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from lightning.pytorch import LightningDataModule, Trainer

from laser_pl.data.problem import Prompt
from laser_pl.distributed import derive_seed, share_of_rank
from laser_pl.rollout.batch import RolloutBatch


class MicroBatchLoader:
    """Hands out the micro-batches that the rollout callback has put here.

    It has a length, so that Lightning does not fetch ahead: a batch fetched ahead would be of the
    step before.

    Args:
        num_micro_batches: micro-batches of the first step on this rank, as Lightning is told.
    """

    def __init__(self, num_micro_batches: int) -> None:
        self.num_micro_batches = num_micro_batches
        self.micro_batches: list[RolloutBatch] = []

    def put(self, micro_batches: list[RolloutBatch], trainer: Trainer) -> None:
        """Hand out these in the epoch that begins, and make one update of them all.

        Args:
            micro_batches: as many on every rank.
            trainer: Lightning counts a step's batches once, which is too early for ours.
        """
        self.micro_batches = micro_batches
        trainer.accumulate_grad_batches = len(micro_batches)
        if len(micro_batches) != self.num_micro_batches:
            self.num_micro_batches = len(micro_batches)
            trainer.fit_loop._combined_loader = None
            trainer.fit_loop.setup_data()

    def __len__(self) -> int:
        return self.num_micro_batches

    def __iter__(self) -> Iterator[RolloutBatch]:
        # One by one, when asked for: Lightning makes the iterator before the rollouts are there.
        for index in range(self.num_micro_batches):
            yield self.micro_batches[index]


class PromptDataModule(LightningDataModule):
    """Training and held-out prompts, and the loader of a step's micro-batches.

    Args:
        train: prompts to draw from.
        held_out: prompts to evaluate on; none of their problems is in train.
        prompts_per_step: P, over all ranks.
        num_micro_batches: of a rank in a step.
        seed: of the order of the prompts.
    """

    def __init__(
        self,
        train: Sequence[Prompt],
        held_out: Sequence[Prompt],
        prompts_per_step: int,
        num_micro_batches: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.train = train
        self.held_out = held_out
        self.prompts_per_step = prompts_per_step
        self.seed = seed
        self.loader = MicroBatchLoader(num_micro_batches)

    def prompts_of_step(self, step: int) -> list[Prompt]:
        """This rank's share of the P prompts of a step, which is counted from 1.

        Passes over the training prompts follow one another, each in an order of its own. The order
        is a function of (seed, pass), so that nothing has to be stored to resume.
        """
        first = (step - 1) * self.prompts_per_step
        places = [
            divmod(place, len(self.train)) for place in range(first, first + self.prompts_per_step)
        ]
        orders = {number: self._order(number) for number, _ in places}
        mine = share_of_rank(places)
        return [self.train[int(orders[number][offset])] for number, offset in mine]

    def train_dataloader(self) -> MicroBatchLoader:
        """The loader that Lightning trains from."""
        return self.loader

    def _order(self, number: int) -> np.ndarray:
        generator = np.random.default_rng(derive_seed(self.seed, "prompts", number))
        return generator.permutation(len(self.train))
