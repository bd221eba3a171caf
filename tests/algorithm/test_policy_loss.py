import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from laser_pl.algorithm.policy_loss import (
    aggregate,
    cispo_policy_loss,
    clipped_policy_loss,
    gspo_policy_loss,
    importance_weights,
    kl_estimate,
)

PROPERTY = settings(deadline=None, database=None, derandomize=True, max_examples=40)
AGGREGATIONS = ["token_mean", "sequence_mean_token_sum", "sequence_mean_token_mean"]
KINDS = ["k1", "abs", "k2", "k3"]
GARBAGE = [math.inf, -math.inf, math.nan, 1e30]

Batch = dict[str, Any]


def random_batch(seed: int, rows: int = 5, tokens: int = 6, token_level: bool = False) -> Batch:
    """Ratios on both sides of every clip, and rows of 0 to T tokens."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    lengths = torch.randint(0, tokens + 1, (rows, 1), generator=generator)
    old_logprobs = normal(rows, tokens) - 3
    return {
        "logprobs": old_logprobs + 0.8 * normal(rows, tokens),
        "old_logprobs": old_logprobs,
        "advantages": normal(rows, tokens) if token_level else normal(rows),
        "mask": torch.arange(tokens) < lengths,
    }


def loss_and_gradient(batch: Batch, **options: Any) -> tuple[Tensor, Tensor]:
    logprobs = batch["logprobs"].clone().requires_grad_()
    loss = clipped_policy_loss(**(batch | {"logprobs": logprobs}), **options).loss
    (gradient,) = torch.autograd.grad(loss, logprobs)
    return loss.detach(), gradient


def one_token(ratio: float, advantage: float, **options: Any) -> tuple[float, float, Any]:
    """Loss, gradient by the log-prob, and all results, of a single token."""
    logprobs = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    old_logprobs, mask = torch.zeros_like(logprobs), torch.ones(1, 1, dtype=torch.bool)
    advantages = torch.tensor([advantage], dtype=torch.float64)
    result = clipped_policy_loss(logprobs, old_logprobs, advantages, mask, **options)
    (gradient,) = torch.autograd.grad(result.loss, logprobs)
    return result.loss.item(), gradient.item(), result


def slow_policy_loss(batch: Batch, aggregation: str, dual_clip: float | None) -> float:
    row_losses, row_lengths = [], []
    for row, mask in enumerate(batch["mask"].tolist()):
        losses = []
        for token, counts in enumerate(mask):
            if not counts:
                continue
            ratio = math.exp(
                batch["logprobs"][row, token].item() - batch["old_logprobs"][row, token].item()
            )
            advantage = batch["advantages"][row].reshape(-1)
            a = advantage[token if len(advantage) > 1 else 0].item()
            loss = max(-a * ratio, -a * min(max(ratio, 0.8), 1.28))
            losses.append(min(loss, -a * dual_clip) if dual_clip and a < 0 else loss)
        row_losses.append(sum(losses))
        row_lengths.append(max(len(losses), 1))
    if aggregation == "token_mean":
        return sum(row_losses) / max(int(batch["mask"].sum()), 1)
    if aggregation == "sequence_mean_token_sum":
        return sum(row_losses) / len(row_losses)
    return sum(s / n for s, n in zip(row_losses, row_lengths, strict=True)) / len(row_losses)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("dual_clip", [None, 1.5])
@PROPERTY
@given(seed=st.integers(0, 10**6), token_level=st.booleans())
def test_loss_equals_a_loop_over_tokens(
    aggregation: str, dual_clip: float | None, seed: int, token_level: bool
) -> None:
    batch = random_batch(seed, token_level=token_level)
    loss, _ = loss_and_gradient(batch, clip_high=0.28, dual_clip=dual_clip, aggregation=aggregation)
    assert loss.item() == pytest.approx(slow_policy_loss(batch, aggregation, dual_clip), abs=1e-12)


# ratio, advantage -> loss, gradient by the log-prob (a gradient of ratio is the ratio itself)
@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped", "dual_clipped"),
    [
        (1.1, 2.0, -2.2, -2.2, 0, 0),  # within the clips: -A * ratio
        (1.5, 2.0, -2.4, 0.0, 1, 0),  # better than the upper clip pays for: -A * 1.2
        (0.5, 2.0, -1.0, -1.0, 0, 0),  # a good token made unlikely: not clipped
        (1.5, -2.0, 3.0, 3.0, 0, 0),  # a bad token made likely: not clipped below c = 3
        (0.5, -2.0, 1.6, 0.0, 1, 0),  # a bad token made unlikely enough: -A * 0.8
        (4.0, -2.0, 6.0, 0.0, 0, 1),  # the dual clip: -A * 3
        (4.0, 2.0, -2.4, 0.0, 1, 0),  # the dual clip is for bad tokens only
        (1.5, 0.0, 0.0, 0.0, 0, 0),  # nothing to learn, and nothing counts as clipped
    ],
)
def test_one_token_in_every_region_of_the_clips(
    ratio: float, advantage: float, loss: float, gradient: float, clipped: int, dual_clipped: int
) -> None:
    found_loss, found_gradient, result = one_token(ratio, advantage)
    assert found_loss == pytest.approx(loss, abs=1e-12)
    assert found_gradient == pytest.approx(gradient, abs=1e-12)
    assert result.clip_fraction.item() == clipped
    assert result.dual_clip_fraction.item() == dual_clipped
    assert result.approx_kl.item() == pytest.approx(-math.log(ratio))


def test_without_dual_clip_the_loss_of_a_bad_token_is_not_bounded() -> None:
    loss, gradient, result = one_token(4.0, -2.0, dual_clip=None)
    assert (loss, gradient) == (pytest.approx(8.0), pytest.approx(8.0))
    assert result.dual_clip_fraction.item() == 0


def test_on_policy_the_gradient_is_minus_the_advantage_over_the_tokens() -> None:
    batch = random_batch(3)
    batch["old_logprobs"] = batch["logprobs"]
    _, gradient = loss_and_gradient(batch)
    expected = -batch["advantages"][:, None] * batch["mask"] / batch["mask"].sum()
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-15)


def test_old_logprobs_and_advantages_are_constants() -> None:
    batch = random_batch(3)
    logprobs = batch["logprobs"].requires_grad_()
    advantages = batch["advantages"].requires_grad_()
    inputs = batch | {"old_logprobs": logprobs}
    gradients = torch.autograd.grad(
        clipped_policy_loss(**inputs).loss, [logprobs, advantages], allow_unused=True
    )
    assert gradients[1] is None
    detached = batch | {"old_logprobs": logprobs.detach(), "logprobs": logprobs.detach()}
    assert torch.equal(gradients[0], loss_and_gradient(detached)[1])


def test_what_is_logged_has_no_gradient() -> None:
    batch = random_batch(0)
    result = clipped_policy_loss(**(batch | {"logprobs": batch["logprobs"].requires_grad_()}))
    logged = (result.clip_fraction, result.dual_clip_fraction, result.approx_kl)
    assert result.loss.requires_grad
    assert not any(measure.requires_grad for measure in logged)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@PROPERTY
@given(seed=st.integers(0, 10**6), sizes=st.lists(st.integers(1, 4), min_size=1, max_size=6))
def test_micro_batches_of_any_size_add_up_to_the_step(
    aggregation: str, seed: int, sizes: list[int]
) -> None:
    step = random_batch(seed, rows=sum(sizes))
    num_tokens, num_sequences = max(int(step["mask"].sum()), 1), sum(sizes)
    normalizer = num_tokens if aggregation == "token_mean" else num_sequences
    split = {name: values.split(sizes) for name, values in step.items()}
    parts = [
        loss_and_gradient(
            {name: values[i] for name, values in split.items()},
            aggregation=aggregation,
            normalizer=normalizer,
        )
        for i in range(len(sizes))
    ]
    loss, gradient = loss_and_gradient(step, aggregation=aggregation)
    summed = torch.stack([part[0] for part in parts]).sum()
    torch.testing.assert_close(summed, loss, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), gradient, rtol=0, atol=1e-12)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@PROPERTY
@given(seed=st.integers(0, 10**6), width=st.integers(1, 4), data=st.data())
def test_order_and_padding_do_not_change_loss_or_gradient(
    aggregation: str, seed: int, width: int, data: st.DataObject
) -> None:
    batch = random_batch(seed)
    order = torch.tensor(data.draw(st.permutations(range(len(batch["mask"])))))
    changed = {name: values[order] for name, values in batch.items()}
    for name in ("logprobs", "old_logprobs", "mask"):
        changed[name] = torch.nn.functional.pad(changed[name], (0, width))
    loss, gradient = loss_and_gradient(batch, aggregation=aggregation)
    changed_loss, changed_gradient = loss_and_gradient(changed, aggregation=aggregation)
    torch.testing.assert_close(changed_loss, loss, rtol=0, atol=1e-12)
    padded = torch.nn.functional.pad(gradient[order], (0, width))
    torch.testing.assert_close(changed_gradient, padded, rtol=0, atol=1e-12)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("where", ["logprobs", "old_logprobs", "advantages"])
def test_anything_may_stand_where_the_mask_is_false(
    aggregation: str, garbage: float, where: str
) -> None:
    clean = random_batch(5, token_level=True)
    dirty = clean | {where: clean[where].masked_fill(~clean["mask"], garbage)}
    for clean_result, dirty_result in zip(
        loss_and_gradient(clean, aggregation=aggregation),
        loss_and_gradient(dirty, aggregation=aggregation),
        strict=True,
    ):
        assert torch.equal(clean_result, dirty_result)
    measures = clipped_policy_loss(**clean)[1:]
    assert torch.equal(torch.stack(measures), torch.stack(clipped_policy_loss(**dirty)[1:]))


def test_a_row_without_tokens_may_have_any_advantage() -> None:
    batch = random_batch(5)
    batch["mask"][1] = False
    dirty = batch | {"advantages": batch["advantages"].clone()}
    dirty["advantages"][1] = math.nan
    assert torch.equal(loss_and_gradient(dirty)[1], loss_and_gradient(batch)[1])


@pytest.mark.parametrize("difference", [30.0, -30.0])
def test_log_ratios_beyond_20_are_clamped_without_gradient(difference: float) -> None:
    batch = random_batch(0, rows=1, tokens=1)
    batch |= {
        "logprobs": batch["old_logprobs"] + difference,
        "advantages": torch.tensor([-1.0], dtype=torch.float64),
        "mask": torch.ones(1, 1, dtype=torch.bool),
    }
    loss, gradient = loss_and_gradient(batch, dual_clip=None)
    assert loss.item() == pytest.approx(max(math.exp(math.copysign(20, difference)), 0.8))
    assert gradient.item() == 0


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_batch_without_tokens_is_zero_and_not_nan(aggregation: str) -> None:
    batch = random_batch(0)
    batch["mask"] = torch.zeros_like(batch["mask"])
    loss, gradient = loss_and_gradient(batch, aggregation=aggregation)
    measures = clipped_policy_loss(**batch)[1:]
    assert loss.item() == 0
    assert not gradient.any()
    assert not torch.stack(measures).any()


@pytest.mark.parametrize("mask_dtype", [torch.int64, torch.float32])
def test_a_mask_of_zeros_and_ones_is_as_good_as_bool(mask_dtype: torch.dtype) -> None:
    batch = random_batch(2)
    numbers = batch | {"mask": batch["mask"].to(mask_dtype)}
    assert torch.equal(loss_and_gradient(numbers)[1], loss_and_gradient(batch)[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_results_have_the_dtype_of_the_logprobs(dtype: torch.dtype) -> None:
    batch = random_batch(2)
    batch["logprobs"] = batch["logprobs"].to(dtype)
    batch["old_logprobs"] = batch["old_logprobs"].to(dtype)
    assert {result.dtype for result in clipped_policy_loss(**batch)} == {dtype}


def test_inputs_are_not_written_to() -> None:
    batch = random_batch(2)
    copies = {name: values.clone() for name, values in batch.items()}
    loss_and_gradient(batch)
    kl_estimate(batch["logprobs"], batch["old_logprobs"])
    assert all(torch.equal(batch[name], copies[name]) for name in batch)


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    # rows 1 + 2, 3 and nothing: 6 over 3 tokens; 6 over 3 rows; (1.5 + 3 + 0) over 3 rows
    zip(AGGREGATIONS, [2.0, 2.0, 1.5], strict=True),
)
def test_aggregations_of_a_worked_example(aggregation: str, expected: float) -> None:
    values = torch.tensor([[1.0, 2.0], [3.0, math.nan], [math.inf, 9.0]])
    mask = torch.tensor([[True, True], [True, False], [False, False]])
    assert aggregate(values, mask, aggregation).item() == expected
    # the normaliser takes the place of the 3
    assert aggregate(values, mask, aggregation, normalizer=6).item() == expected / 2


@pytest.mark.parametrize("normalizer", [0, -1.0, math.nan])
def test_a_normalizer_that_is_not_positive_is_refused(normalizer: float) -> None:
    with pytest.raises(ValueError, match="normalizer must be greater than 0, found"):
        clipped_policy_loss(**random_batch(0), normalizer=normalizer)


@pytest.mark.parametrize("dual_clip", [1.0, 0.0, -3.0])
def test_a_dual_clip_up_to_one_is_refused(dual_clip: float) -> None:
    with pytest.raises(ValueError, match="dual_clip must be greater than 1"):
        clipped_policy_loss(**random_batch(0), dual_clip=dual_clip)


def test_an_unknown_aggregation_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'mean' is none of token_mean, sequence"):
        clipped_policy_loss(**random_batch(0), aggregation="mean")


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("logprobs", (5, 7), r"logprobs \[5, 7\], old_logprobs \[5, 6\]"),
        ("old_logprobs", (5,), r"old_logprobs \[5\]"),
        ("mask", (5, 1), r"mask \[5, 1\]"),
        ("advantages", (6,), r"logprobs \[5, 6\], found advantages \[6\]"),
        ("advantages", (5, 1), r"advantages \[5, 1\]"),
        ("advantages", (), r"advantages \[\]"),
    ],
)
def test_shapes_that_do_not_fit_are_named(name: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        clipped_policy_loss(**(random_batch(0) | {name: torch.zeros(shape)}))


@pytest.mark.parametrize(
    ("kind", "expected"),
    # policy 0.2, reference 0.1: d = log(1/2)
    zip(KINDS, [math.log(2), math.log(2), math.log(2) ** 2 / 2, math.log(2) - 0.5], strict=True),
)
def test_kl_estimates_of_a_worked_example(kind: str, expected: float) -> None:
    policy, reference = torch.tensor([[0.2]]).double().log(), torch.tensor([[0.1]]).double().log()
    assert kl_estimate(policy, reference, kind).item() == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_expected_value_of_the_estimate_is_the_kl_divergence(kind: str) -> None:
    policy = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    reference = torch.tensor([0.25, 0.25, 0.5], dtype=torch.float64)
    divergence = (policy * (policy / reference).log()).sum()
    estimates = kl_estimate(policy.log()[None], reference.log()[None], kind)[0]
    torch.testing.assert_close((policy * estimates).sum(), divergence)


def test_k3_is_accurate_for_small_differences_in_float32() -> None:
    # exp(d) - d - 1 = d^2 / 2 + d^3 / 6 + ...
    policy = torch.tensor([[-1.0]])
    reference = policy + 2**-14
    expected = 2.0**-29 + 2.0**-42 / 6
    assert kl_estimate(policy, reference, "k3").item() == pytest.approx(expected, rel=1e-3)


@PROPERTY
@given(st.lists(st.floats(-100, 0), min_size=2, max_size=10))
def test_k3_is_between_zero_and_ten_and_k2_and_abs_are_symmetric(values: list[float]) -> None:
    policy = torch.tensor([values], dtype=torch.float64)
    reference = policy.flip(1)
    k3 = kl_estimate(policy, reference, "k3")
    assert ((k3 >= 0) & (k3 <= 10)).all()
    for kind in ("k2", "abs"):
        assert torch.equal(
            kl_estimate(policy, reference, kind), kl_estimate(reference, policy, kind)
        )


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_of_the_kl_loss_add_up_to_the_step(kind: str) -> None:
    batch = random_batch(9)
    kl = kl_estimate(batch["logprobs"], batch["old_logprobs"], kind)
    num_tokens = int(batch["mask"].sum())
    pairs = zip(kl.split(2), batch["mask"].split(2), strict=True)
    parts = [aggregate(*pair, normalizer=num_tokens) for pair in pairs]
    torch.testing.assert_close(torch.stack(parts).sum(), aggregate(kl, batch["mask"]))


def test_an_unknown_kind_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'k4' is none of k1, abs, k2, k3"):
        kl_estimate(torch.zeros(1, 1), torch.zeros(1, 1), "k4")


def test_kl_shapes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"logprobs \[2, 3\], reference_logprobs \[3\]"):
        kl_estimate(torch.zeros(2, 3), torch.zeros(3))


def test_importance_weights_are_capped_ratios_and_1_where_the_engine_does_not_know():
    logprobs = torch.tensor([[-1.0, -2.0, -1.0, -4.0]], requires_grad=True)
    of_engine = torch.tensor([[-1.0, -3.0, -0.5, math.nan]])
    weights = importance_weights(logprobs, of_engine, cap=2.0)
    # exp(0), exp(1) = 2.7 capped, exp(-0.5), unknown
    assert weights[0].tolist() == pytest.approx([1.0, 2.0, math.exp(-0.5), 1.0])
    assert not weights.requires_grad
    with pytest.raises(ValueError, match="cap must be at least 1"):
        importance_weights(logprobs, of_engine, cap=0.5)
    with pytest.raises(ValueError, match="shape"):
        importance_weights(logprobs, of_engine[:, :2], cap=2.0)


# GSPO and CISPO


def gradient_of(function: Any, batch: Batch, **options: Any) -> tuple[Tensor, Tensor]:
    logprobs = batch["logprobs"].clone().requires_grad_()
    loss = function(**(batch | {"logprobs": logprobs}), **options).loss
    (gradient,) = torch.autograd.grad(loss, logprobs)
    return loss.detach(), gradient


@given(st.integers(0, 10**6))
@PROPERTY
def test_gspo_equals_a_slow_loop_over_sequences(seed: int) -> None:
    batch = random_batch(seed)
    losses, clipped = [], []
    for row, advantage in enumerate(batch["advantages"].tolist()):
        mask = batch["mask"][row]
        if not bool(mask.any()):
            losses.append(0.0)
            continue
        differences = (batch["logprobs"][row] - batch["old_logprobs"][row])[mask].tolist()
        ratio = math.exp(sum(differences) / len(differences))
        bounded = min(max(ratio, 0.9), 1.3)
        losses.append(max(-advantage * ratio, -advantage * bounded))
        clipped += [-advantage * bounded > -advantage * ratio] * len(differences)
    result = gspo_policy_loss(**batch, clip_low=0.1, clip_high=0.3)
    assert result.loss.item() == pytest.approx(sum(losses) / len(losses), abs=1e-12)
    if clipped:
        assert result.clip_fraction.item() == pytest.approx(sum(clipped) / len(clipped))


def test_gspo_gives_each_token_of_a_sequence_the_same_gradient() -> None:
    # ratio exp((0.1 + 0.3) / 2); dL/dlogp = -A * ratio / (tokens * rows), equation 10 of the paper
    logprobs = torch.tensor([[0.1, 0.3]], dtype=torch.float64)
    batch = {
        "logprobs": logprobs, "old_logprobs": torch.zeros_like(logprobs),
        "advantages": torch.tensor([2.0], dtype=torch.float64),
        "mask": torch.ones(1, 2, dtype=torch.bool),
    }  # fmt: skip
    _, gradient = gradient_of(gspo_policy_loss, batch, clip_high=0.5)
    assert gradient[0].tolist() == pytest.approx([-2 * math.exp(0.2) / 2] * 2)
    _, beyond = gradient_of(gspo_policy_loss, batch)  # the paper's clip of 4e-4
    assert beyond.tolist() == [[0.0, 0.0]]


@given(st.integers(0, 10**6), st.sampled_from(AGGREGATIONS), st.booleans())
@PROPERTY
def test_the_gradient_of_cispo_is_the_clipped_ratio_times_the_advantage(
    seed: int, aggregation: str, token_level: bool
) -> None:
    batch = random_batch(seed, token_level=token_level)
    _, gradient = gradient_of(
        cispo_policy_loss, batch, clip_low=0.3, clip_high=0.5, aggregation=aggregation
    )
    ratio = (batch["logprobs"] - batch["old_logprobs"]).exp().clamp(0.7, 1.5)
    advantages = batch["advantages"] if token_level else batch["advantages"].unsqueeze(1)
    mask = batch["mask"]
    counts = {
        "token_mean": mask.sum().clamp(min=1),
        "sequence_mean_token_sum": len(mask),
        "sequence_mean_token_mean": mask.sum(dim=1, keepdim=True).clamp(min=1) * len(mask),
    }
    expected = -ratio * advantages / counts[aggregation] * mask
    assert torch.allclose(gradient, expected, atol=1e-12)


@pytest.mark.parametrize("function", [gspo_policy_loss, cispo_policy_loss])
@pytest.mark.parametrize("garbage", GARBAGE)
def test_what_stands_under_the_padding_does_not_matter_to_gspo_and_cispo(
    function: Any, garbage: float
) -> None:
    batch = random_batch(3, token_level=True)
    loss, gradient = gradient_of(function, batch)
    hidden = ~batch["mask"]
    spoiled = {
        name: value.masked_fill(hidden, garbage) if name != "mask" else value
        for name, value in batch.items()
    }
    other_loss, other_gradient = gradient_of(function, spoiled)
    assert torch.equal(loss, other_loss)
    assert torch.equal(gradient, other_gradient)
    assert not bool(gradient[hidden].any())


@pytest.mark.parametrize("function", [gspo_policy_loss, cispo_policy_loss])
def test_micro_batches_of_gspo_and_cispo_add_up(function: Any) -> None:
    batch = random_batch(5, rows=6)
    normalizer = 6.0 if function is gspo_policy_loss else float(batch["mask"].sum())
    _, whole = gradient_of(function, batch, normalizer=normalizer)
    parts = [
        gradient_of(function, {k: v[rows] for k, v in batch.items()}, normalizer=normalizer)[1]
        for rows in (slice(0, 2), slice(2, 6))
    ]
    assert torch.allclose(torch.cat(parts), whole, atol=1e-12)
