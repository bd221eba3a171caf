"""Generate, verify, score: from prompts to a rollout batch, without Lightning."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from laser_pl.data.problem import Prompt
from laser_pl.reward.verifier import Verdict, VerifierPool
from laser_pl.rollout.batch import RolloutBatch, pad_rollouts
from laser_pl.rollout.engine import Rollout, RolloutEngine, Sampling

# Texts and verdicts.
_Verified = tuple[list[str], list[Verdict]]


@dataclass
class Collected:
    """The rollouts of some prompts, with what the verifier said.

    Attributes:
        prompts: P prompts.
        batch: N = P * G sequences, prompt by prompt; rewards are filled in.
        responses: [N] texts, without special tokens.
        verdicts: [N] rewards and extracted answers.
        rollout_s: seconds of generation.
        verify_s: seconds of verification after the last response was there.
    """

    prompts: list[Prompt]
    batch: RolloutBatch
    responses: list[str]
    verdicts: list[Verdict]
    rollout_s: float
    verify_s: float

    def prompt_of(self, row: int) -> Prompt:
        """The prompt that a sequence answers."""
        return self.prompts[int(self.batch.groups[row])]


class Collector:
    """Samples responses to prompts and has them verified.

    Args:
        engine: samples and reads the score token.
        verifier: gives each response its reward.
        tokenizer: turns responses into text.
        sampling: how responses are sampled.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        verifier: VerifierPool,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
    ) -> None:
        self.engine = engine
        self.verifier = verifier
        self.tokenizer = tokenizer
        self.sampling = sampling

    def generate(
        self, prompts: Sequence[Prompt], rollouts_per_prompt: int, seed: int
    ) -> RolloutBatch:
        """Sample responses, unverified: N = P * G sequences, prompt by prompt."""
        token_ids = [prompt.token_ids for prompt in prompts]
        rollouts = self.engine.generate(token_ids, rollouts_per_prompt, self.sampling, seed)
        return pad_rollouts(rollouts, token_ids, int(self.tokenizer.pad_token_id))

    def collect(self, prompts: Sequence[Prompt], rollouts_per_prompt: int, seed: int) -> Collected:
        """Sample responses and verify them, those that finish early while the rest are sampled.

        Raises:
            UserError: the verifier failed, and the configuration says to stop then.
        """
        start = time.perf_counter()
        token_ids = [prompt.token_ids for prompt in prompts]
        early: list[tuple[list[Rollout], Future[_Verified]]] = []
        # One thread, since the pool is asked for one thing at a time; the work is in its processes.
        background = ThreadPoolExecutor(max_workers=1)

        def verify(rollouts: list[Rollout]) -> None:
            early.append((rollouts, background.submit(self._verify, prompts, rollouts)))

        has_processes = self.verifier.num_workers > 0
        try:
            rollouts = self.engine.generate(
                token_ids,
                rollouts_per_prompt,
                self.sampling,
                seed,
                on_finished=verify if has_processes else None,
            )
            generated = time.perf_counter()
            parts = [(some, future.result()) for some, future in early]
        except BaseException:
            self.verifier.cancel()  # nobody waits for the other verdicts any more
            raise
        finally:
            background.shutdown(cancel_futures=True)
        if not has_processes:
            parts = [(rollouts, self._verify(prompts, rollouts))]
        found = {
            id(rollout): (text, verdict)
            for some, verified in parts
            for rollout, text, verdict in zip(some, *verified, strict=True)
        }
        responses, verdicts = zip(*(found[id(rollout)] for rollout in rollouts), strict=True)
        batch = pad_rollouts(rollouts, token_ids, int(self.tokenizer.pad_token_id))
        batch.rewards = torch.tensor([verdict.reward for verdict in verdicts])
        verify_s = time.perf_counter() - generated
        return Collected(
            list(prompts), batch, list(responses), list(verdicts), generated - start, verify_s
        )

    def _verify(self, prompts: Sequence[Prompt], rollouts: list[Rollout]) -> _Verified:
        """The texts of rollouts, and what the verifier says to them."""
        ids = [list(rollout.response_ids) for rollout in rollouts]
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        problems = [prompts[rollout.prompt_index].problem for rollout in rollouts]
        return texts, self.verifier.verify(problems, texts)
