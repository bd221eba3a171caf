"""Padding and cutting a step's rollouts loses nothing and mixes nothing up."""

import torch

from laser_pl.rollout.batch import RolloutBatch, join, pad_rollouts
from laser_pl.rollout.engine import Rollout

PROMPTS = [(5, 6), (7, 8, 9)]
ROLLOUTS = [
    Rollout(0, (10, 1), (-0.1, -0.2), "eos", -9.0),
    Rollout(0, (11, 12, 13), (-0.3, -0.4, -0.5), "length", float("nan")),
    Rollout(1, (1,), (-0.6,), "eos", -8.0),
    Rollout(1, (14, 15, 16, 1), (-0.7, -0.8, -0.9, -1.0), "eos", -7.0),
]


def sequences(batch: RolloutBatch) -> list[tuple[list[int], list[int], list[float]]]:
    """Prompt, response and its log-probs of each row, without padding."""
    rows = []
    for row in range(len(batch)):
        real = batch.attention_mask[row]
        first, mask = batch.prompt_length, batch.response_mask[row]
        rows.append(
            (
                batch.input_ids[row, :first][real[:first]].tolist(),
                batch.response_ids[row][mask].tolist(),
                [round(value, 4) for value in batch.rollout_logprobs[row][mask].tolist()],
            )
        )
    return rows


def expected() -> list[tuple[list[int], list[int], list[float]]]:
    return [
        (list(PROMPTS[r.prompt_index]), list(r.response_ids), list(r.logprobs)) for r in ROLLOUTS
    ]


def test_padding_puts_prompts_left_and_responses_right():
    batch = pad_rollouts(ROLLOUTS, PROMPTS, pad_token_id=0)
    assert sequences(batch) == expected()
    assert batch.input_ids[0].tolist() == [0, 5, 6, 10, 1, 0, 0]
    assert batch.attention_mask[0].tolist() == [False, True, True, True, True, False, False]
    assert batch.finished.tolist() == [True, False, True, True]
    assert batch.groups.tolist() == [0, 0, 1, 1]
    assert batch.num_tokens.tolist() == [2, 3, 1, 4]


def test_a_pad_token_that_is_eos_leaves_the_eos_in_the_mask():
    batch = pad_rollouts(ROLLOUTS, PROMPTS, pad_token_id=1)
    assert sequences(batch) == expected()
    assert batch.num_tokens.tolist() == [2, 3, 1, 4]


def test_selected_sequences_are_those_without_needless_padding():
    batch = pad_rollouts(ROLLOUTS, PROMPTS, pad_token_id=0)
    batch.rewards = torch.arange(4.0)
    part = batch.select(torch.tensor([2, 0]))
    assert sequences(part) == [expected()[2], expected()[0]]
    assert part.rewards.tolist() == [2.0, 0.0]
    assert part.attention_mask.any(dim=0).all()
    assert part.response_mask.any(dim=0).all()


def test_groups_that_were_apart_are_joined():
    batch = pad_rollouts(ROLLOUTS, PROMPTS, pad_token_id=0)
    batch.rewards = torch.arange(4.0)
    joined = join([batch.select(torch.tensor([2, 3])), batch.select(torch.tensor([0, 1]))])
    assert sequences(joined) == [expected()[row] for row in (2, 3, 0, 1)]
    assert joined.groups.tolist() == [0, 0, 1, 1]
    assert joined.rewards.tolist() == [2.0, 3.0, 0.0, 1.0]
    assert joined.finished.tolist() == [True, True, True, False]
    assert torch.equal(joined.response_mask, joined.attention_mask[:, joined.prompt_length :])


def test_to_leaves_the_dtypes_and_the_batch_alone():
    batch = pad_rollouts(ROLLOUTS, PROMPTS, pad_token_id=0)
    moved = batch.to("cpu")
    assert moved is not batch
    assert moved.rollout_logprobs.dtype == torch.float32
    assert moved.input_ids.dtype == torch.int64
