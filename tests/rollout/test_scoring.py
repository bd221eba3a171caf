"""Scores, advantages and weights are those of the whole step."""

import pytest
import torch

from laser_pl.algorithm import class_weights, grpo_advantage, integrate_advantages, rloo_advantage
from laser_pl.rollout.batch import RolloutBatch, pad_rollouts
from laser_pl.rollout.engine import Rollout
from laser_pl.rollout.micro_batches import Plan
from laser_pl.rollout.scoring import add_advantages, add_class_weights, add_scores
from laser_pl.training.module import LaserModule

SCORE_TOKEN = 2
PROMPTS = [(7, 8, 9), (10, 11)]


@pytest.fixture
def batch() -> RolloutBatch:
    responses = [(40, 1), (50, 51, 1), (60, 61), (70, 1), (80, 1), (90, 91, 92, 1)]
    rollouts = [
        Rollout(
            prompt_index=i // 3,
            response_ids=ids,
            logprobs=(0.0,) * len(ids),
            finish_reason="eos" if ids[-1] == 1 else "length",
            token_logprob=-9.0 - i if ids[-1] == 1 else torch.nan,
        )
        for i, ids in enumerate(responses)
    ]
    made = pad_rollouts(rollouts, PROMPTS, pad_token_id=0)
    made.rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0])
    return made


def make_module(make_model, config) -> LaserModule:
    # The policy is loaded first, then the reference, here another model than the policy.
    models = iter([make_model(), make_model(seed=7)])
    module = LaserModule(
        lambda: next(models), SCORE_TOKEN, config.algorithm, config.self_reward,
        config.optimizer, temperature=1.0, max_steps=1,
    )  # fmt: skip
    module.setup("fit")
    module.c_ref = -10.0
    return module


def test_scores_follow_the_constant_and_truncated_responses_have_none(
    batch, make_model, compose_config
):
    module = make_module(make_model, compose_config("self_reward.beta=0.5"))
    add_scores(batch, module, lambda: Plan("padded", list(torch.arange(6).split(2))))
    # 0.5 * (-9 - i + 10), and 0 for the truncated third
    assert batch.scores.tolist() == pytest.approx([0.5, 0.0, 0.0, -1.0, -1.5, -2.0])


@pytest.mark.parametrize("layout", ["padded", "shared"])
def test_the_references_own_log_prob_takes_the_constants_place(
    batch, make_model, compose_config, layout
):
    config = compose_config("self_reward.c_ref=model", "algorithm.kl_coef=0.1")
    module = make_module(make_model, config)
    parts = [torch.tensor([4, 0, 3, 1]), torch.tensor([5, 2])]
    add_scores(batch, module, lambda: Plan(layout, parts))
    assert module.reference is not None
    for row in range(len(batch)):
        ids = batch.input_ids[row][batch.attention_mask[row]].unsqueeze(0)
        with torch.no_grad():
            logprobs = torch.log_softmax(module.reference(input_ids=ids).logits[0], dim=-1)
        number = int(batch.num_tokens[row])
        chosen = logprobs[:-1].gather(1, ids[0, 1:].unsqueeze(1)).squeeze(1)[-number:]
        assert torch.allclose(batch.reference_logprobs[row, :number], chosen, atol=1e-5)
        if batch.finished[row]:
            assert float(batch.c_ref[row]) == pytest.approx(
                float(logprobs[-1, SCORE_TOKEN]), abs=1e-5
            )


@pytest.mark.parametrize(
    ("algorithm", "function"), [("grpo", grpo_advantage), ("rloo", rloo_advantage)]
)
def test_advantages_are_the_verifiers_until_both_warm_ups_are_over(
    batch, compose_config, algorithm, function
):
    config = compose_config(
        f"algorithm={algorithm}", "self_reward.reasoning_warmup_steps=2",
        "self_reward.warmup_steps=3", "self_reward.tau=0.5", "self_reward.min_std=0.01",
    )  # fmt: skip
    batch.scores = torch.tensor([0.9, 0.1, 0.0, 0.8, 0.2, 0.3])
    expected = function(batch.rewards, batch.groups)
    add_advantages(batch, config, step=5)
    assert torch.equal(batch.advantages, expected)
    add_advantages(batch, config, step=6)
    mixed = integrate_advantages(expected, batch.scores, batch.finished, batch.groups, 0.5, 0.01)
    assert torch.equal(batch.advantages, mixed)
    assert not torch.equal(mixed, expected)


@pytest.mark.parametrize("off", ["self_reward=off", "self_reward.alpha=0"])
def test_a_score_that_is_not_trained_is_not_mixed_in(batch, compose_config, off):
    config = compose_config(
        off, "self_reward.reasoning_warmup_steps=0", "self_reward.warmup_steps=0"
    )
    batch.scores = torch.tensor([0.9, 0.1, 0.0, 0.8, 0.2, 0.3])
    add_advantages(batch, config, step=9)
    assert torch.equal(batch.advantages, grpo_advantage(batch.rewards, batch.groups))


def test_class_weights_are_those_of_the_step(batch):
    add_class_weights(batch)
    assert torch.equal(batch.class_weights, class_weights(batch.rewards, batch.finished))
    # five finished, three of them correct
    assert batch.class_weights.tolist() == pytest.approx([5 / 6, 5 / 4, 0, 5 / 6, 5 / 6, 5 / 4])


def test_the_reward_falls_near_the_length_limit_in_the_advantages_alone(batch, compose_config):
    config = compose_config(
        "algorithm.overlong_fraction=0.5", "rollout.max_response_tokens=4", "self_reward=off"
    )
    add_advantages(batch, config, step=1)
    # Of 4 tokens the last 2 are punished: lengths 2, 3, 2, 2, 2, 4.
    punished = batch.rewards + torch.tensor([0.0, -0.5, 0.0, 0.0, 0.0, -1.0])
    assert torch.equal(batch.advantages, grpo_advantage(punished, batch.groups))
    assert batch.rewards.tolist() == [1.0, 0.0, 0.0, 1.0, 1.0, 0.0]
