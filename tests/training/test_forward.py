"""One forward gives the log-probs of a softmax over the whole vocabulary, and their gradient."""

import pytest
import torch

from laser_pl.rollout.batch import RolloutBatch, pad_rollouts
from laser_pl.rollout.engine import Rollout
from laser_pl.training import forward as forward_module
from laser_pl.training.forward import response_forward

SCORE_TOKEN = 2
PROMPTS = [(7, 8, 9), (10, 11, 12, 13, 14), (20, 21)]
RESPONSES = [(40, 41, 1), (50, 1), (60, 61, 62, 63), (70, 71, 72, 73, 1), (80, 81), (1,)]


def make_batch() -> RolloutBatch:
    rollouts = [
        Rollout(i // 2, ids, (0.0,) * len(ids), ids[-1] == 1, -5.0)
        for i, ids in enumerate(RESPONSES)
    ]
    return pad_rollouts(rollouts, PROMPTS, pad_token_id=0)


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
    output = response_forward(model, batch, SCORE_TOKEN, temperature)
    for row, response in enumerate(RESPONSES):
        logprobs, token_logprob, entropy = plain_forward(model, row, temperature)
        assert torch.allclose(output.logprobs[row, : len(response)], logprobs, atol=1e-9)
        assert torch.allclose(output.entropy[row, : len(response)], entropy, atol=1e-9)
        assert (output.logprobs[row, len(response) :] == 0).all()
        expected = token_logprob if batch.finished[row] else torch.zeros(())
        assert output.token_logprob[row].item() == pytest.approx(expected.item(), abs=1e-9)


def test_the_gradient_equals_that_of_the_plain_forward(make_model):
    model = make_model().double()
    output = response_forward(model, make_batch(), SCORE_TOKEN, 1.0)
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
    whole = response_forward(model, make_batch(), SCORE_TOKEN, 1.0)
    monkeypatch.setattr(forward_module, "CHUNK_TOKENS", 3)
    parts = response_forward(model, make_batch(), SCORE_TOKEN, 1.0)
    assert torch.allclose(whole.logprobs, parts.logprobs, atol=1e-12)
    assert torch.allclose(whole.token_logprob, parts.token_logprob, atol=1e-12)


def test_a_batch_without_a_finished_response_has_no_score(make_model):
    batch = make_batch().select(torch.tensor([2, 4]))
    output = response_forward(make_model(), batch, SCORE_TOKEN, 1.0)
    assert output.token_logprob.tolist() == [0.0, 0.0]
    output.logprobs.sum().backward()


def test_bfloat16_weights_give_float32_log_probs(make_model):
    output = response_forward(make_model().bfloat16(), make_batch(), SCORE_TOKEN, 1.0)
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
        response_forward(model, make_batch(), SCORE_TOKEN, 1.0)
    assert kept == []
