"""Which prompts a step gets follows from (seed, step) alone."""

from collections import Counter

import pytest
import torch

from laser_pl.data import datamodule as datamodule_file
from laser_pl.data.datamodule import MicroBatchLoader, PromptDataModule
from laser_pl.data.problem import Problem, Prompt


def make(num_prompts: int = 10, prompts_per_step: int = 4, seed: int = 0) -> PromptDataModule:
    prompts = [Prompt(Problem(i, str(i), "", {}), (i,)) for i in range(num_prompts)]
    return PromptDataModule(prompts, [], prompts_per_step, 1, seed)


def indices(module: PromptDataModule, step: int) -> list[int]:
    return [prompt.problem.index for prompt in module.prompts_of_step(step)]


def test_a_step_has_the_same_prompts_whatever_came_before():
    straight, resumed = make(), make()
    history = [indices(straight, step) for step in range(1, 9)]
    assert indices(resumed, 8) == history[-1]


def test_every_pass_shows_each_prompt_once_in_an_order_of_its_own():
    module = make()
    seen = [index for step in range(1, 11) for index in indices(module, step)]
    passes = [seen[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(order) == list(range(10)) for order in passes)
    assert len({tuple(order) for order in passes}) == 4


def test_another_seed_gives_another_order():
    assert indices(make(100, 20), 1) != indices(make(100, 20, seed=1), 1)


def test_more_prompts_a_step_than_there_are_problems_come_from_several_passes():
    assert set(Counter(indices(make(3, 9), 1)).values()) == {3}


def test_the_ranks_share_a_step_without_overlap(monkeypatch):
    whole = indices(make(), 3)
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(
            datamodule_file, "share_of_rank", lambda items, r=rank: items[r * 2 : r * 2 + 2]
        )
        shares.append(indices(make(), 3))
    assert shares[0] + shares[1] == whole


def test_the_loader_hands_out_what_was_put_there_after_its_iterator_was_made():
    loader = MicroBatchLoader(2)
    iterator = iter(loader)
    loader.micro_batches = [torch.zeros(1), torch.ones(1)]  # type: ignore[list-item]
    assert [float(item) for item in iterator] == [0.0, 1.0]
    assert len(loader) == 2


@pytest.mark.parametrize("number", [1, 2, 3, 5])
def test_shares_of_ranks_are_whole_and_even(number, monkeypatch):
    from laser_pl import distributed

    monkeypatch.setattr(distributed, "world_size", lambda: number)
    shares = []
    for rank in range(number):
        monkeypatch.setattr(distributed, "rank", lambda r=rank: r)
        shares.append(distributed.share_of_rank(list(range(11))))
    assert [item for share in shares for item in share] == list(range(11))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
