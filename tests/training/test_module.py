"""The module's loss is the step's, whatever the micro-batches; bad gradients change nothing."""

import copy
import math
import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from torch import Tensor

from laser_pl.algorithm import clipped_policy_loss, self_reward_loss
from laser_pl.config import Config
from laser_pl.rollout.batch import RolloutBatch, pad_rollouts
from laser_pl.rollout.engine import Rollout
from laser_pl.rollout.micro_batches import deal_groups
from laser_pl.rollout.scoring import (
    add_advantages,
    add_class_weights,
    is_trained,
    step_totals,
)
from laser_pl.training.module import LaserModule, lr_factor

SCORE_TOKEN = 2


def make_batch(num_groups: int = 4, seed: int = 0) -> RolloutBatch:
    """Rollouts of 4 a group with random lengths; about a quarter truncated."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, count: int) -> list[int]:
        return torch.randint(low, high, (count,), generator=generator).tolist()

    prompts = [tuple(draw(5, 100, length)) for length in draw(2, 7, num_groups)]
    rollouts = []
    for row, length in enumerate(draw(1, 9, 4 * num_groups)):
        ids = draw(5, 100, length)
        if row % 4:
            ids[-1] = 1
        logprobs = (0.0,) * length
        reason = "eos" if ids[-1] == 1 else "length"
        rollouts.append(Rollout(row // 4, tuple(ids), logprobs, reason, -11.0))
    batch = pad_rollouts(rollouts, prompts, pad_token_id=0)
    batch.rewards = torch.tensor(draw(0, 2, len(batch)), dtype=torch.float32)
    batch.c_ref = torch.full((len(batch),), -10.0)
    return batch


def make_module(model, config: Config, max_steps: int = 10) -> LaserModule:
    models = iter([model, copy.deepcopy(model)])
    module = LaserModule(
        lambda: next(models), SCORE_TOKEN, config.algorithm, config.self_reward, config.optimizer,
        temperature=1.0, max_steps=max_steps,
    )  # fmt: skip
    module.setup("fit")
    return module


def prepared(config: Config) -> RolloutBatch:
    batch = make_batch()
    add_advantages(batch, config, step=1)
    add_class_weights(batch)
    return batch


def cut(batch: RolloutBatch, size: int) -> list[RolloutBatch]:
    return [batch.select(rows) for rows in torch.arange(len(batch)).split(size)]


def step_gradient(module: LaserModule, parts: list[RolloutBatch], batch: RolloutBatch) -> Tensor:
    """The gradient as Lightning accumulates it: the mean over micro-batches."""
    module.zero_grad()
    module.begin_step(step_totals(batch, batch, len(parts)))
    for index, part in enumerate(parts):
        (module.training_step(part, index) / len(parts)).backward()
    return torch.cat([p.grad.flatten() for p in module.policy.parameters()])


@pytest.mark.parametrize("algorithm", ["grpo", "dr_grpo", "rloo", "dapo", "gspo", "cispo"])
@pytest.mark.parametrize("size", [1, 2, 4, 8, 16])
def test_the_gradient_does_not_depend_on_the_micro_batch_size(
    make_model, compose_config, algorithm, size
):
    config = compose_config(
        f"algorithm={algorithm}", "self_reward.alpha=0.5", "self_reward.reasoning_warmup_steps=0"
    )
    module = make_module(make_model(), config)
    batch = prepared(config)
    whole = step_gradient(module, [batch], batch)
    parts = step_gradient(module, cut(batch, size), batch)
    assert torch.allclose(whole, parts, rtol=1e-4, atol=1e-6 * float(whole.abs().max()))


def test_the_gradient_does_not_depend_on_the_order_of_the_sequences(make_model, compose_config):
    config = compose_config("self_reward.alpha=0.5", "self_reward.reasoning_warmup_steps=0")
    module = make_module(make_model().double(), config)
    batch = prepared(config)
    shuffled = batch.select(torch.randperm(len(batch), generator=torch.Generator().manual_seed(1)))
    first = step_gradient(module, [batch], batch)
    second = step_gradient(module, cut(shuffled, 4), shuffled)
    assert torch.allclose(first, second, rtol=1e-6, atol=1e-9)


def gradient_of_rank(rank: int, port: int, config: Config, model, folder: Path) -> None:
    """One of two ranks: its half of the groups, and the mean of the gradients as DDP takes it."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    whole = make_batch()
    mine = whole.select(((whole.groups // 2) == rank).nonzero().squeeze(1))
    add_advantages(mine, config, step=1)
    add_class_weights(mine)
    gradient = step_gradient(make_module(model, config), cut(mine, 2), mine)
    dist.all_reduce(gradient)
    torch.save(gradient / 2, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_the_gradient_does_not_depend_on_the_number_of_ranks(make_model, compose_config, tmp_path):
    config = compose_config("self_reward.alpha=0.5", "self_reward.reasoning_warmup_steps=0")
    model = make_model()
    batch = prepared(config)
    one = step_gradient(make_module(model, config), [batch], batch)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    model.zero_grad()
    torch.multiprocessing.spawn(
        gradient_of_rank, (port, config, model, tmp_path), nprocs=2, join=True
    )
    for rank in (0, 1):
        two = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert torch.allclose(one, two, rtol=1e-4, atol=1e-6 * float(one.abs().max()))


def test_the_loss_is_policy_loss_plus_alpha_times_self_reward_loss(make_model, compose_config):
    config = compose_config(
        "self_reward.alpha=0.3", "self_reward.beta=0.4", "self_reward.reasoning_warmup_steps=0"
    )
    module = make_module(make_model().double(), config)
    batch = prepared(config)
    module.begin_step(step_totals(batch, batch, 1))
    loss = module.training_step(batch, 0)
    output = module(batch)
    policy = clipped_policy_loss(
        output.logprobs, output.logprobs.detach(), batch.advantages, batch.response_mask
    ).loss
    scores = 0.4 * (output.token_logprob - batch.c_ref)
    judge = self_reward_loss(scores, batch.rewards, batch.finished, batch.class_weights)
    assert float(loss) == pytest.approx(float(policy + 0.3 * judge), rel=1e-9)
    assert float(judge) > 0


def test_the_self_reward_loss_waits_for_its_warm_up(make_model, compose_config):
    model = make_model().double()
    waiting = compose_config("self_reward.reasoning_warmup_steps=1")
    off = compose_config("self_reward=off")
    batch = prepared(off)
    gradients = [
        step_gradient(make_module(model, config), [batch], batch) for config in (waiting, off)
    ]
    assert torch.equal(*gradients)


def test_the_kl_term_pulls_with_the_gradient_of_k3(make_model, compose_config):
    config = compose_config("self_reward=off", "algorithm.kl_coef=0.7")
    module = make_module(make_model().double(), config)
    batch = prepared(config)
    batch.advantages = torch.zeros(len(batch))
    batch.reference_logprobs = torch.where(batch.response_mask, -3.0, 0.0).double()
    gradient = step_gradient(module, [batch], batch)
    module.zero_grad()
    difference = batch.reference_logprobs - module(batch).logprobs
    kl = (difference.exp() - difference - 1)[batch.response_mask].clamp(-10, 10)
    (0.7 * kl.mean()).backward()
    expected = torch.cat([p.grad.flatten() for p in module.policy.parameters()])
    assert torch.allclose(gradient, expected, rtol=1e-6, atol=1e-9)


def test_a_gradient_that_is_not_finite_changes_neither_weights_nor_moments(
    make_model, compose_config
):
    module = make_module(make_model(), compose_config())
    optimizer = module.configure_optimizers()["optimizer"]
    parameters = list(module.policy.parameters())
    for value in (1.0, math.nan, math.inf):
        before = [p.clone() for p in parameters]
        moments = {p: optimizer.state[p]["exp_avg"].clone() for p in parameters if value != 1.0}
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        parameters[0].grad.view(-1)[0] = value
        module.configure_gradient_clipping(optimizer, 1.0)
        optimizer.step()
        same = all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))
        assert same == (value != 1.0)
        for parameter, moment in moments.items():
            assert torch.equal(optimizer.state[parameter]["exp_avg"], moment)
    assert module.num_bad_steps == 2


def test_the_gradient_norm_is_clipped_and_logged_as_it_was(make_model, compose_config):
    module = make_module(make_model(), compose_config())
    optimizer = module.configure_optimizers()["optimizer"]
    for parameter in module.policy.parameters():
        parameter.grad = torch.ones_like(parameter)
    number = sum(p.numel() for p in module.policy.parameters())
    module.configure_gradient_clipping(optimizer, 1.0)
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in module.policy.parameters()))
    assert norm == pytest.approx(1.0, rel=1e-3)
    assert module.step_metrics["train/grad_norm"] == pytest.approx(math.sqrt(number), rel=1e-4)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1 / 3, 2 / 3, 1, 1, 1, 1]),
        ("linear", [1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25]),
        ("cosine", [1 / 3, 2 / 3, 1, 0.853553, 0.5, 0.146447]),
    ],
)
def test_learning_rate_schedules(compose_config, schedule, expected):
    settings = compose_config(
        f"optimizer.schedule={schedule}", "optimizer.warmup_steps=2"
    ).optimizer
    assert [lr_factor(settings, step, 6) for step in range(6)] == pytest.approx(expected, abs=1e-6)


def test_micro_batches_reach_the_module_in_float32_under_bf16(make_model, compose_config):
    trainer = Trainer(
        accelerator="cpu", precision="bf16-true", logger=False, enable_checkpointing=False
    )
    module = make_module(make_model(), compose_config())
    trainer.strategy.connect(module)
    moved = trainer.strategy.precision_plugin.convert_input(make_batch())
    assert moved.rewards.dtype == torch.float32


def test_importance_weights_scale_each_tokens_gradient(make_model, compose_config):
    """Against the plain loss with [B, T] advantages that have the weights in them."""
    config = compose_config("self_reward=off")
    batch = prepared(config)
    model = make_model()
    plain = make_module(copy.deepcopy(model), config)
    logprobs = plain(batch).logprobs.detach()
    noise = torch.randn(logprobs.shape, generator=torch.Generator().manual_seed(3))
    batch.rollout_logprobs = logprobs - noise
    corrected = make_module(copy.deepcopy(model), config)
    corrected.importance_cap = 1.5
    gradient = step_gradient(corrected, [batch], batch)
    batch.advantages = batch.advantages.unsqueeze(1) * noise.exp().clamp(max=1.5)
    assert torch.allclose(gradient, step_gradient(plain, [batch], batch), rtol=1e-4, atol=1e-7)
    capped = (noise.exp() >= 1.5) & batch.response_mask
    corrected.finish_step()
    share = float(capped.sum() / batch.response_mask.sum())
    assert corrected.step_metrics["rollout/importance_capped_fraction"] == pytest.approx(share)


def test_groups_without_signal_are_left_out_only_where_nothing_trains_on_them(
    make_model, compose_config
):
    config = compose_config("self_reward=off")
    module = make_module(make_model(), config)
    batch = make_batch()
    batch.rewards = torch.tensor([1.0] * 4 + [1.0, 0.0] * 2 + [0.0] * 4 + [0.0, 0.0, 1.0, 0.0])
    add_advantages(batch, config, step=1)
    add_class_weights(batch)
    wanted = is_trained(batch, config, module)
    assert wanted.view(4, 4).tolist() == [[False] * 4, [True] * 4, [False] * 4, [True] * 4]
    kept = deal_groups(batch, wanted)
    whole = step_gradient(module, [batch], batch)
    module.zero_grad()
    module.begin_step(step_totals(batch, kept, 1))
    module.training_step(kept, 0).backward()
    part = torch.cat([p.grad.flatten() for p in module.policy.parameters()])
    assert len(kept) == 8 and float(whole.abs().max()) > 0
    assert torch.allclose(part, whole, rtol=1e-4, atol=1e-6 * float(whole.abs().max()))
    for overrides in (
        ["training.skip_zero_advantage=false", "self_reward=off"],
        ["algorithm.kl_coef=0.1", "self_reward=off"],
        ["self_reward.reasoning_warmup_steps=0"],
    ):
        config = compose_config(*overrides)
        assert bool(is_trained(batch, config, make_module(make_model(), config)).all())


@pytest.mark.parametrize("kind", ["two_token", "sft"])
def test_two_tokens_are_trained_by_their_own_formula(make_model, compose_config, kind):
    config = compose_config(
        f"self_reward={kind}", "self_reward.incorrect_token=tiny-reserved-1",
        "self_reward.alpha=1.0", "self_reward.reasoning_warmup_steps=0",
    )  # fmt: skip
    model = make_model().double()
    models = iter([model])
    module = LaserModule(
        lambda: next(models), SCORE_TOKEN, config.algorithm, config.self_reward, config.optimizer,
        temperature=1.0, max_steps=10, incorrect_token_id=3,
    )  # fmt: skip
    module.setup("fit")
    batch = prepared(config)
    batch.advantages = torch.zeros(len(batch))
    found = step_gradient(module, cut(batch, 4), batch)
    module.zero_grad()
    loss = torch.zeros((), dtype=torch.float64)
    for row in range(len(batch)):
        if not batch.finished[row]:
            continue
        ids = batch.input_ids[row][batch.attention_mask[row]].unsqueeze(0)
        last = torch.log_softmax(model(input_ids=ids).logits[0, -1], dim=-1)
        is_correct, weight = bool(batch.rewards[row] > 0.5), batch.class_weights[row]
        if kind == "sft":
            loss = loss - weight * last[SCORE_TOKEN if is_correct else 3]
        else:
            score = torch.sigmoid(last[SCORE_TOKEN] - last[3])
            loss = loss + weight * (score - float(is_correct)).square()
    (loss / len(batch)).backward()
    expected = torch.cat([p.grad.flatten() for p in module.policy.parameters()])
    assert float(expected.abs().max()) > 0
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))


def test_the_scores_of_two_tokens_need_no_constant(make_model, compose_config):
    logprobs = torch.tensor([-3.0, -1.0]), torch.tensor([-2.0, -5.0])
    expected = {
        "two_token": [1 / (1 + math.exp(1.0)), 1 / (1 + math.exp(-4.0))],
        "sft": [math.exp(-3.0), math.exp(-1.0)],
    }
    for kind, values in expected.items():
        config = compose_config(f"self_reward={kind}", "self_reward.incorrect_token=3")
        module = make_module(make_model(), config)
        assert module.scores(*logprobs, torch.tensor(math.nan)).tolist() == pytest.approx(values)
