"""Prompts whose responses all have the same reward are replaced by others."""

from types import SimpleNamespace

import torch

from laser_pl.data.problem import Problem, Prompt
from laser_pl.reward.verifier import Verdict
from laser_pl.rollout.batch import pad_rollouts
from laser_pl.rollout.callback import RolloutCallback, groups_without_signal, replace_groups
from laser_pl.rollout.collect import Collected
from laser_pl.rollout.engine import Rollout


def collected(name: str, rewards: list[list[float]], length: int) -> Collected:
    """Two responses a prompt, whose tokens say where they come from."""
    prompts = [
        Prompt(Problem(index, f"{name}{index}", "", {}), (index + 5,) * length)
        for index in range(len(rewards))
    ]
    flat = [reward for group in rewards for reward in group]
    rollouts = [
        Rollout(row // 2, (length, row + 10, 1), (-0.1 * row,) * 3, "eos", -9.0 - row)
        for row in range(len(flat))
    ]
    batch = pad_rollouts(rollouts, [prompt.token_ids for prompt in prompts], 0)
    batch.rewards = torch.tensor(flat)
    texts = [f"{name}{row}" for row in range(len(flat))]
    verdicts = [Verdict(reward, text) for reward, text in zip(flat, texts, strict=True)]
    return Collected(prompts, batch, texts, verdicts, 1.0, 0.5)


OLD = [[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]]


def test_the_useful_among_the_fresh_take_the_places_of_the_useless() -> None:
    old = collected("old", OLD, length=2)
    assert groups_without_signal(old.batch) == [0, 2]
    fresh = collected("new", [[0.0, 0.0], [0.0, 1.0]], length=4)
    new = replace_groups(old, [0, 2], fresh)
    assert [prompt.problem.text for prompt in new.prompts] == ["new1", "old1", "old2"]
    assert new.responses == ["new2", "new3", "old2", "old3", "old4", "old5"]
    assert [verdict.answer for verdict in new.verdicts] == new.responses
    assert new.batch.rewards.tolist() == [0.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    assert new.batch.groups.tolist() == [0, 0, 1, 1, 2, 2]
    # Prompts of other lengths stand side by side, each with its own tokens.
    rows = [
        new.batch.input_ids[row][new.batch.attention_mask[row]].tolist() for row in (0, 2)
    ]  # fmt: skip
    assert rows == [[6, 6, 6, 6, 4, 12, 1], [6, 6, 2, 12, 1]]
    assert new.batch.token_logprob.tolist() == [-11.0, -12.0, -11.0, -12.0, -13.0, -14.0]
    assert (new.rollout_s, new.verify_s) == (2.0, 1.0)


class FakeCollector:
    """Hands out batches one after the other, and notes what it was asked for."""

    def __init__(self, *batches: Collected) -> None:
        self.batches = list(batches)
        self.asked: list[int] = []

    def collect(self, prompts, number, seed):
        self.asked.append(len(prompts))
        return self.batches.pop(0)


def run(compose_config, rounds: int, *batches: Collected) -> tuple[Collected, list[int]]:
    config = compose_config(f"algorithm.dynamic_sampling={rounds}")
    collector = FakeCollector(*batches)
    callback = RolloutCallback(collector, config, None, print)
    prompts = [Prompt(Problem(0, "x", "", {}), (5,))]
    data = SimpleNamespace(train=prompts, prompts_of_step=lambda step: prompts * 3)
    return callback._collect(data, 1), collector.asked


def test_sampling_goes_on_until_all_are_useful(compose_config) -> None:
    first, second = (collected(n, [[0.0, 1.0], [1.0, 1.0]], 2) for n in ("b", "c"))
    result, asked = run(compose_config, 5, collected("a", OLD, 2), first, second)
    assert asked == [3, 2, 1]
    assert groups_without_signal(result.batch) == []
    assert [prompt.problem.text for prompt in result.prompts] == ["b0", "a1", "c0"]


def test_the_rounds_are_bounded_and_off_by_default(compose_config) -> None:
    useless = collected("b", [[0.0, 0.0]], 2)
    result, asked = run(compose_config, 1, collected("a", OLD, 2), useless)
    assert asked == [3, 2]
    assert groups_without_signal(result.batch) == [0, 2]
    _, asked = run(compose_config, 0, collected("a", OLD, 2))
    assert asked == [3]
