"""One forward gives the log-probs of a softmax over the whole vocabulary, and their gradient."""

import subprocess
import sys

import pytest
import torch

from laser_pl.rollout.batch import RolloutBatch, pad_rollouts
from laser_pl.rollout.engine import Rollout
from laser_pl.training import forward as forward_module
from laser_pl.training.forward import ResponseHead, response_forward

SCORE_TOKEN = 2
PROMPTS = [(7, 8, 9), (10, 11, 12, 13, 14), (20, 21)]
RESPONSES = [(40, 41, 1), (50, 1), (60, 61, 62, 63), (70, 71, 72, 73, 1), (80, 81), (1,)]


def make_batch() -> RolloutBatch:
    rollouts = [
        Rollout(i // 2, ids, (0.0,) * len(ids), "eos" if ids[-1] == 1 else "length", -5.0)
        for i, ids in enumerate(RESPONSES)
    ]
    return pad_rollouts(rollouts, PROMPTS, pad_token_id=0)


def run_forward(model, batch: RolloutBatch, score_token_id: int, temperature: float):
    return response_forward(model, ResponseHead(model), batch, score_token_id, temperature)


def plain_forward(model, row: int, temperature: float):
    """The same numbers for one sequence, without padding, from all logits at once."""
    prompt, response = PROMPTS[row // 2], RESPONSES[row]
    logits = model(input_ids=torch.tensor([[*prompt, *response]])).logits[0]
    positions = torch.arange(len(prompt) - 1, len(prompt) + len(response) - 1)
    tempered = torch.log_softmax(logits / temperature, dim=-1)
    logprobs = tempered[positions, torch.tensor(response)]
    entropy = -(tempered[positions].exp() * tempered[positions]).sum(dim=-1)
    return logprobs, torch.log_softmax(logits[-1], dim=-1)[SCORE_TOKEN], entropy


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt_neox"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_equal_those_of_the_unpadded_sequence(make_model, architecture, temperature):
    model = make_model(architecture).double()
    batch = make_batch()
    output = run_forward(model, batch, SCORE_TOKEN, temperature)
    for row, response in enumerate(RESPONSES):
        logprobs, token_logprob, entropy = plain_forward(model, row, temperature)
        assert torch.allclose(output.logprobs[row, : len(response)], logprobs, atol=1e-9)
        assert torch.allclose(output.entropy[row, : len(response)], entropy, atol=1e-9)
        assert (output.logprobs[row, len(response) :] == 0).all()
        expected = token_logprob if batch.finished[row] else torch.zeros(())
        assert output.token_logprob[row].item() == pytest.approx(expected.item(), abs=1e-9)


def test_the_gradient_equals_that_of_the_plain_forward(make_model):
    model = make_model().double()
    output = run_forward(model, make_batch(), SCORE_TOKEN, 1.0)
    (output.logprobs.sum() + 3 * output.token_logprob.sum()).backward()
    chunked = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for row, response in enumerate(RESPONSES):
        logprobs, token_logprob, _ = plain_forward(model, row, 1.0)
        (logprobs.sum() + (3 * token_logprob if response[-1] == 1 else 0)).backward()
    for ours, parameter in zip(chunked, model.parameters(), strict=True):
        assert torch.allclose(ours, parameter.grad, atol=1e-8)


def test_the_chunk_size_changes_nothing(make_model, monkeypatch):
    model = make_model().double()
    whole = run_forward(model, make_batch(), SCORE_TOKEN, 1.0)
    monkeypatch.setattr(forward_module, "CHUNK_TOKENS", 3)
    parts = run_forward(model, make_batch(), SCORE_TOKEN, 1.0)
    assert torch.allclose(whole.logprobs, parts.logprobs, atol=1e-12)
    assert torch.allclose(whole.token_logprob, parts.token_logprob, atol=1e-12)


def test_a_batch_without_a_finished_response_has_no_score(make_model):
    batch = make_batch().select(torch.tensor([2, 4]))
    output = run_forward(make_model(), batch, SCORE_TOKEN, 1.0)
    assert output.token_logprob.tolist() == [0.0, 0.0]
    output.logprobs.sum().backward()


def test_bfloat16_weights_give_float32_log_probs(make_model):
    output = run_forward(make_model().bfloat16(), make_batch(), SCORE_TOKEN, 1.0)
    assert output.logprobs.dtype == output.token_logprob.dtype == torch.float32


def test_no_tensor_of_all_logits_is_kept(make_model, monkeypatch):
    vocab_size, kept = 5003, []
    model = make_model(vocab_size=vocab_size)
    monkeypatch.setattr(forward_module, "CHUNK_TOKENS", 4)

    def note(tensor: torch.Tensor) -> torch.Tensor:
        # The output embedding itself has a side of V too, but is no activation.
        if vocab_size in tensor.shape and tensor.numel() != 32 * vocab_size:
            kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        run_forward(model, make_batch(), SCORE_TOKEN, 1.0)
    assert kept == []


PEAK = """
import re, sys, torch
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
from laser_pl.rollout.batch import pad_rollouts
from laser_pl.rollout.engine import Rollout
from laser_pl.training import forward

length, forward.CHUNK_TOKENS = int(sys.argv[1]), 128
torch.set_num_threads(1)
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=128_000, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
    num_attention_heads=2, max_position_embeddings=2048, tie_word_embeddings=True,
))
rollout = Rollout(0, (7,) * (length - 1) + (2,), (0.0,) * length, "eos", -9.0)
batch = pad_rollouts([rollout, rollout], [(5, 6)], pad_token_id=0)

def memory(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew
before = memory("VmRSS")
output = forward.response_forward(model, forward.ResponseHead(model), batch, 3, temperature=0.9)
(output.logprobs.sum() + output.token_logprob.sum()).backward()
print(memory("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_memory_does_not_grow_with_the_logits_of_a_large_vocabulary():
    """At V = 128,000 the logits of a chunk of 128 tokens are 66 MB, those of all up to 1 GB."""
    peaks = []
    for length in (256, 1024):
        command = [sys.executable, "-c", PEAK, str(length)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        peaks.append(int(done.stdout))
    chunk = 128 * 128_000 * 4
    assert chunk < peaks[1] < 6 * chunk  # all of them would be 16, forward alone
    assert peaks[1] - peaks[0] < chunk


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_a_second_score_token_is_read_from_the_same_rows(make_model, layout):
    model = make_model().double()
    output = response_forward(
        model, ResponseHead(model), make_batch(), SCORE_TOKEN, 0.7, layout, incorrect_token_id=3
    )
    for row, response in enumerate(RESPONSES):
        ids = torch.tensor([[*PROMPTS[row // 2], *response]])
        last = torch.log_softmax(make_model().double()(input_ids=ids).logits[0, -1], dim=-1)
        expected = last[[SCORE_TOKEN, 3]] if response[-1] == 1 else torch.zeros(2)
        found = torch.stack([output.token_logprob[row], output.incorrect_logprob[row]])
        assert torch.allclose(found, expected.double(), atol=1e-9)
