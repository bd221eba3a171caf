"""Packed rows give the log-probs and the gradient of separate sequences, with fewer tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from laser_pl.rollout.batch import RolloutBatch, pad_rollouts
from laser_pl.rollout.engine import Rollout
from laser_pl.training.forward import ResponseHead, response_forward
from laser_pl.training.packing import can_pack, pack, shared_tokens_saved

EOS, SCORE_TOKEN = 1, 2


def make_batch(seed: int, num_groups: int = 3, group_size: int = 4) -> RolloutBatch:
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, count: int) -> list[int]:
        return torch.randint(low, high, (count,), generator=generator).tolist()

    prompts = [tuple(draw(5, 90, length)) for length in draw(1, 9, num_groups)]
    rollouts = []
    for row, length in enumerate(draw(1, 8, num_groups * group_size)):
        ids = draw(5, 90, length)
        ended = row % 3 > 0
        ids[-1] = EOS if ended else ids[-1]
        reason = "eos" if ended else "length"
        rollouts.append(Rollout(row // group_size, tuple(ids), (0.0,) * length, reason, -9.0))
    return pad_rollouts(rollouts, prompts, pad_token_id=0)


def outputs_and_gradient(model, batch, layout):
    model.zero_grad()
    output = response_forward(model, ResponseHead(model), batch, SCORE_TOKEN, 0.8, layout)
    weights = torch.linspace(-1, 1, output.logprobs.numel()).view_as(output.logprobs)
    loss = (output.logprobs * weights).sum() + (output.token_logprob**2).sum()
    loss.backward()
    return output, torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("layout", ["packed", "shared"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_packed_rows_give_the_numbers_of_padded_ones(make_model, architecture, layout):
    model = make_model(architecture)
    for seed in range(3):
        batch = make_batch(seed)
        expected, gradient = outputs_and_gradient(model, batch, "padded")
        found, packed_gradient = outputs_and_gradient(model, batch, layout)
        for name in ("logprobs", "token_logprob", "entropy"):
            assert torch.allclose(getattr(found, name), getattr(expected, name), atol=1e-5)
        difference = (packed_gradient - gradient).norm() / gradient.norm()
        assert difference < 1e-5


def test_packing_works_with_gradient_checkpointing(make_model):
    model = make_model("llama")
    batch = make_batch(5)
    _, gradient = outputs_and_gradient(model, batch, "padded")
    model.gradient_checkpointing_enable()
    model.train()
    _, found = outputs_and_gradient(model, batch, "shared")
    assert (found - gradient).norm() < 1e-5 * gradient.norm()


@settings(deadline=None, database=None, derandomize=True, max_examples=40)
@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 5), st.booleans())
def test_every_token_sees_its_own_sequence_and_nothing_else(seed, num_groups, size, share):
    """The tokens that a slot sees, in the order of their positions, are its sequence so far."""
    batch = make_batch(seed, num_groups, size)
    packed = pack(batch, share)
    ids, positions = packed.input_ids[0], packed.position_ids[0]
    seen = seen_by_slot(packed)
    before, at_eos = iter(packed.before.tolist()), iter(packed.at_eos.tolist())
    for row in range(len(batch)):
        sequence = batch.input_ids[row][batch.attention_mask[row]].tolist()
        first = len(sequence) - int(batch.num_tokens[row])
        slots = [next(before) for _ in range(first, len(sequence))]
        places = list(range(first, len(sequence)))
        if batch.finished[row]:
            slots.append(next(at_eos))
            places.append(len(sequence))
        for slot, place in zip(slots, places, strict=True):
            assert ids[seen[slot]].tolist() == sequence[:place]
            assert positions[seen[slot]].tolist() == list(range(place))
    assert next(before, None) is None and next(at_eos, None) is None


def seen_by_slot(packed):
    """For each slot the slots that it sees, in their order; each is a query once."""
    seen: dict[int, list[int]] = {}
    for block in packed.blocks:
        for row, place in block.is_query.nonzero().tolist():
            slot = int(block.queries[row, place])
            assert slot not in seen
            seen[slot] = block.keys[row][block.mask[row, 0, place]].tolist()
    assert sorted(seen) == list(range(packed.input_ids.shape[1]))
    return seen


def test_a_model_that_has_gone_through_packed_rows_generates_as_before(make_model):
    model = make_model("qwen2")
    settings = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0}
    prompts = torch.tensor([[0, 0, 7, 8], [5, 6, 7, 9]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    expected = model.generate(prompts, attention_mask=mask, **settings)
    outputs_and_gradient(model, make_batch(0), "shared")
    assert torch.equal(model.generate(prompts, attention_mask=mask, **settings), expected)


def test_a_shared_prompt_stands_once():
    batch = make_batch(0, num_groups=1, group_size=6)
    length = int(batch.attention_mask[0, : batch.prompt_length].sum())
    num_tokens = int(batch.num_tokens.sum())
    assert pack(batch, share_prompts=True).input_ids.numel() == length + num_tokens
    assert shared_tokens_saved(batch) == pytest.approx(5 * length / (6 * length + num_tokens))


def test_packing_is_for_models_whose_mask_may_be_given(make_model):
    assert can_pack(make_model("llama").config, "sdpa")
    assert can_pack(make_model("qwen2").config, "sdpa")
    assert not can_pack(make_model("llama").config, "eager")
    assert not can_pack(make_model("llama").config, "flash_attention_2")
    assert not can_pack(make_model("gpt_neox").config, "sdpa")
    windowed = make_model("qwen2").config
    windowed.layer_types = ["full_attention", "sliding_attention"]
    assert not can_pack(windowed, "sdpa")
