"""Responses are verified while others are still sampled, and get their own verdicts."""

import threading
import time
from dataclasses import dataclass, field

import pytest

from laser_pl.data.problem import Problem, Prompt
from laser_pl.errors import UserError
from laser_pl.reward.verifier import Verdict, VerifierPool
from laser_pl.rollout.collect import Collector
from laser_pl.rollout.engine import Rollout, Sampling

PROMPTS = [
    Prompt(Problem(index=index, text=text, answer=text, metadata={}), (5, 6))
    for index, text in enumerate("ABC")
]
EOS = 1


@dataclass
class SlowEngine:
    """Writes the text of its number, and takes its time between one response and the next."""

    pause_s: float = 0.0
    texts: list[str] = field(default_factory=lambda: list("ABCABC"))

    def generate(self, prompts, rollouts_per_prompt, sampling, seed, on_finished=None):
        rollouts = []
        for number, text in enumerate(self.texts):
            ids = (ord(text) - ord(" ") + 6, EOS)  # the tokenizer's token of the character
            rollouts.append(Rollout(number // 2, ids, (-1.0, -1.0), "eos", -9.0))
        for rollout in reversed(rollouts):
            time.sleep(self.pause_s)
            if on_finished is not None:
                on_finished([rollout])
        return rollouts


def check(problem: Problem, response: str) -> Verdict:
    if response == "hang":
        time.sleep(60)
    time.sleep(0.1)
    return Verdict(float(response == problem.answer), response)


def hang_on_c(problem: Problem, response: str) -> Verdict:
    if response == "C":
        time.sleep(60)
    return Verdict(1.0, response)


def fail_on_c_and_hang_on_h(problem: Problem, response: str) -> Verdict:
    if response == "H":
        time.sleep(60)
    return fail_on_c(problem, response)


def fail_on_c(problem: Problem, response: str) -> Verdict:
    if response == "C":
        raise ValueError("no idea")
    return Verdict(1.0, response)


def collect(tokenizer, verifier, engine, num_workers=2, timeout_s=10.0):
    with VerifierPool(verifier, timeout_s, num_workers, "stop") as pool:
        collector = Collector(engine, pool, tokenizer, Sampling(4))
        if num_workers:
            pool.verify([PROMPTS[0].problem], ["A"])  # the processes have started
        return collector.collect(PROMPTS, 2, seed=0), pool.counts


@pytest.mark.parametrize("num_workers", [0, 2])
def test_each_response_gets_its_own_verdict(tokenizer, num_workers):
    collected, _ = collect(tokenizer, check, SlowEngine(), num_workers)
    assert collected.responses == list("ABCABC")
    # Prompts A, A, B, B, C, C.
    assert collected.batch.rewards.tolist() == [1.0, 0.0, 0.0, 0.0, 0.0, 1.0]
    assert [verdict.answer for verdict in collected.verdicts] == list("ABCABC")


def test_verification_overlaps_the_rollouts(tokenizer):
    collected, _ = collect(tokenizer, check, SlowEngine(pause_s=0.3), num_workers=1)
    assert collected.rollout_s >= 6 * 0.3
    # All but the last response were verified before the rollouts ended; 6 take 0.6 s.
    assert collected.verify_s < 0.4


def test_a_verifier_that_hangs_is_cut_off_scored_0_and_counted(tokenizer):
    collected, counts = collect(tokenizer, hang_on_c, SlowEngine(), timeout_s=1.0)
    assert collected.batch.rewards.tolist() == [1.0, 1.0, 0.0, 1.0, 1.0, 0.0]
    assert counts["num_timeouts"] == 2


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_verifier_that_fails_stops_the_rollouts_with_its_message(tokenizer, num_workers):
    with pytest.raises(UserError, match="verifier: problem 1: ValueError: no idea"):
        collect(tokenizer, fail_on_c, SlowEngine(texts=list("AACAAA")), num_workers)


def test_nothing_waits_for_verdicts_after_a_failure(tokenizer):
    before = set(threading.enumerate())
    start = time.perf_counter()
    # The last of them is sampled first: C fails while H is being verified.
    with pytest.raises(UserError, match="ValueError: no idea"):
        collect(
            tokenizer, fail_on_c_and_hang_on_h, SlowEngine(texts=list("AAAAHC")), timeout_s=50.0
        )
    assert time.perf_counter() - start < 20
    # A thread that still waits would keep the process from ending.
    left = [t for t in set(threading.enumerate()) - before if t.is_alive() and not t.daemon]
    assert not left
