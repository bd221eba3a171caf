"""Padding and cutting a step's rollouts loses nothing and mixes nothing up."""

import torch

from laser_pl.rollout.batch import RolloutBatch, pad_rollouts
from laser_pl.rollout.engine import Rollout

PROMPTS = [(5, 6), (7, 8, 9)]
ROLLOUTS = [
    Rollout(0, (10, 1), (-0.1, -0.2), True, -9.0),
    Rollout(0, (11, 12, 13), (-0.3, -0.4, -0.5), False, float("nan")),
    Rollout(1, (1,), (-0.6,), True, -8.0),
    Rollout(1, (14, 15, 16, 1), (-0.7, -0.8, -0.9, -1.0), True, -7.0),
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


def test_micro_batches_hold_every_sequence_once_without_needless_padding():
    batch = pad_rollouts(ROLLOUTS, PROMPTS, pad_token_id=0)
    batch.rewards = torch.arange(4.0)
    parts = batch.micro_batches(2)
    rows = [row for part in parts for row in sequences(part)]
    rewards = [int(r) for part in parts for r in part.rewards]
    assert sorted(rewards) == [0, 1, 2, 3]
    assert rows == [expected()[index] for index in rewards]
    for part in parts:
        assert part.attention_mask.any(dim=0).all()
        assert part.response_mask.any(dim=0).all()


def test_to_leaves_the_dtypes_and_the_batch_alone():
    batch = pad_rollouts(ROLLOUTS, PROMPTS, pad_token_id=0)
    moved = batch.to("cpu")
    assert moved is not batch
    assert moved.rollout_logprobs.dtype == torch.float32
    assert moved.input_ids.dtype == torch.int64
