"""The hf engine samples from exactly the model's distribution and reads the score on the way."""

import math
from collections import Counter

import pytest
import torch

from laser_pl.rollout import hf_engine
from laser_pl.rollout.engine import Rollout, Sampling
from laser_pl.rollout.hf_engine import HFEngine, sample

EOS, SCORE_TOKEN = 1, 2
PROMPTS = [(7, 8, 9), (10, 11, 12, 13, 14, 15), (20,), (30, 31)]


def make_engine(model, eos=(EOS,), max_sequences=64):
    engine = HFEngine(eos, 0, SCORE_TOKEN, max_sequences)
    engine.model = model
    return engine


def one_sequence_at_a_time(model, rollout: Rollout) -> tuple[list[float], float]:
    """Log-probs of the response, and of the score token after it, by a plain forward."""
    prompt = PROMPTS[rollout.prompt_index]
    ids = torch.tensor([[*prompt, *rollout.response_ids]])
    with torch.no_grad():
        rows = torch.log_softmax(model(input_ids=ids).logits[0], dim=-1)
    first = len(prompt) - 1
    logprobs = [float(rows[first + i, t]) for i, t in enumerate(rollout.response_ids)]
    return logprobs, float(rows[-1, SCORE_TOKEN])


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt_neox"])
def test_logprobs_and_score_equal_a_separate_forward(make_model, architecture):
    model = make_model(architecture)
    rollouts = make_engine(model, eos=range(60, 75)).generate(PROMPTS, 8, Sampling(12), seed=3)
    assert {r.finished for r in rollouts} == {True, False}
    for rollout in rollouts:
        logprobs, token_logprob = one_sequence_at_a_time(model, rollout)
        assert rollout.logprobs == pytest.approx(logprobs, abs=1e-4)
        if rollout.finished:
            assert rollout.token_logprob == pytest.approx(token_logprob, abs=1e-4)
        else:
            assert math.isnan(rollout.token_logprob)
            assert len(rollout.response_ids) == 12


def test_the_score_is_read_at_temperature_one(make_model):
    model = make_model()
    sampling = Sampling(12, temperature=0.7)
    finished = [
        r for r in make_engine(model, eos=range(60, 80)).generate(PROMPTS, 8, sampling, seed=1)
        if r.finished
    ]  # fmt: skip
    assert finished
    for rollout in finished:
        expected = one_sequence_at_a_time(model, rollout)[1]
        assert rollout.token_logprob == pytest.approx(expected, abs=1e-4)


def test_dropping_finished_rows_changes_no_response(make_model, monkeypatch):
    model = make_model()
    engine = make_engine(model, eos=range(40, 80))
    sampling = Sampling(20, temperature=1e-4)
    dropped_at_once = engine.generate(PROMPTS, 2, sampling, seed=0)
    monkeypatch.setattr(hf_engine, "COMPACTION_SHARE", 0)
    never_dropped = engine.generate(PROMPTS, 2, sampling, seed=0)
    assert [r.response_ids for r in dropped_at_once] == [r.response_ids for r in never_dropped]


def test_greedy_output_equals_generate(make_model):
    model = make_model()
    engine = make_engine(model)
    for prompt, rollout in zip(
        PROMPTS, engine.generate(PROMPTS, 1, Sampling(16, temperature=1e-5), seed=0), strict=True
    ):
        output = model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=16, eos_token_id=EOS,
            pad_token_id=0,
        )  # fmt: skip
        assert list(rollout.response_ids) == output[0, len(prompt) :].tolist()


def test_sampled_frequencies_are_the_models_probabilities():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, 0.5]])
    number = 40_000
    generator = torch.Generator().manual_seed(0)
    tokens, logprobs = sample(logits.expand(number, -1), Sampling(1, temperature=0.8), generator)
    probabilities = torch.softmax(logits[0] / 0.8, dim=-1)
    counts = torch.bincount(tokens, minlength=5)
    chi_square = float(((counts - number * probabilities) ** 2 / (number * probabilities)).sum())
    assert chi_square < 18.5  # 0.1 % quantile of 4 degrees of freedom
    assert torch.allclose(logprobs.exp(), probabilities[tokens])


def test_top_p_samples_the_nucleus_alone():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).expand(2000, -1)
    generator = torch.Generator().manual_seed(0)
    tokens, logprobs = sample(logits, Sampling(1, top_p=0.7), generator)
    counts = Counter(tokens.tolist())
    # 0.5 alone does not reach 0.7, 0.5 + 0.3 does.
    assert set(counts) == {0, 1}
    assert counts[0] / 2000 == pytest.approx(0.5 / 0.8, abs=0.05)
    assert float(logprobs[tokens == 0][0].exp()) == pytest.approx(0.5)


def test_the_same_seed_gives_the_same_rollouts_and_another_does_not(make_model):
    engine = make_engine(make_model(), eos=range(60, 75))
    first, again, other = (engine.generate(PROMPTS, 4, Sampling(10), seed=s) for s in (5, 5, 6))
    assert repr(first) == repr(again)
    assert repr(first) != repr(other)


def test_each_of_several_eos_tokens_ends_a_response(make_model):
    eos = set(range(60, 75))
    rollouts = make_engine(make_model(), eos=eos).generate(PROMPTS, 16, Sampling(12), seed=0)
    for rollout in rollouts:
        assert (rollout.response_ids[-1] in eos) == rollout.finished
        assert not eos & set(rollout.response_ids[:-1])
    assert len({r.response_ids[-1] for r in rollouts if r.finished}) > 1


def test_rollouts_come_prompt_by_prompt_however_they_are_batched(make_model):
    rollouts = make_engine(make_model(), max_sequences=4).generate(PROMPTS, 3, Sampling(4), seed=0)
    assert [r.prompt_index for r in rollouts] == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3


def test_the_model_is_left_in_its_mode(make_model):
    model = make_model().train()
    make_engine(model).generate(PROMPTS, 1, Sampling(2), seed=0)
    assert model.training


@pytest.mark.parametrize("max_sequences", [4, 64])
def test_every_rollout_is_handed_over_once_and_early_ones_early(make_model, max_sequences):
    engine = make_engine(make_model(), eos=range(60, 75), max_sequences=max_sequences)
    handed: list[list[Rollout]] = []
    rollouts = engine.generate(PROMPTS, 4, Sampling(12), seed=3, on_finished=handed.append)
    assert len(handed) > 4
    assert sorted(map(repr, rollouts)) == sorted(repr(r) for some in handed for r in some)
    # Short ones do not wait for those that are cut at the limit.
    assert all(len(r.response_ids) < 12 for r in handed[0])


def test_a_token_of_probability_0_never_comes():
    logits = torch.full((20_000, 6), -math.inf)
    logits[:, 2], logits[:, 4] = 0.0, 3.0
    tokens, _ = sample(logits, Sampling(1), torch.Generator().manual_seed(0))
    counts = Counter(tokens.tolist())
    assert set(counts) == {2, 4}
    assert counts[2] / 20_000 == pytest.approx(1 / (1 + math.exp(3)), abs=0.006)


def test_both_tokens_of_a_two_token_score_are_read_in_the_same_generation(make_model):
    model = make_model()
    engine = HFEngine(range(60, 80), 0, SCORE_TOKEN, 64, incorrect_token_id=3)
    engine.model = model
    rollouts = engine.generate(PROMPTS, 8, Sampling(12), seed=3)
    assert {r.finished for r in rollouts} == {True, False}
    for rollout in rollouts:
        if not rollout.finished:
            assert math.isnan(rollout.incorrect_logprob)
            continue
        ids = torch.tensor([[*PROMPTS[rollout.prompt_index], *rollout.response_ids]])
        with torch.no_grad():
            last = torch.log_softmax(model(input_ids=ids).logits[0, -1], dim=-1)
        found = [rollout.token_logprob, rollout.incorrect_logprob]
        assert found == pytest.approx(last[[SCORE_TOKEN, 3]].tolist(), abs=1e-4)
