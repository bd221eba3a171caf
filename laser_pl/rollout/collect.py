"""Generate, verify, score: from prompts to a rollout batch, without Lightning."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from laser_pl.data.problem import Prompt
from laser_pl.reward.verifier import Verdict, VerifierPool
from laser_pl.rollout.batch import RolloutBatch, pad_rollouts
from laser_pl.rollout.engine import RolloutEngine, Sampling


@dataclass
class Collected:
    """The rollouts of some prompts, with what the verifier said.

    Attributes:
        prompts: P prompts.
        batch: N = P * G sequences, prompt by prompt; rewards are filled in.
        responses: [N] texts, without special tokens.
        verdicts: [N] rewards and extracted answers.
        rollout_s: seconds of generation.
        verify_s: seconds of verification.
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
        """Sample responses and verify them.

        Raises:
            UserError: the verifier failed, and the configuration says to stop then.
        """
        start = time.perf_counter()
        batch = self.generate(prompts, rollouts_per_prompt, seed)
        generated = time.perf_counter()
        responses = self._texts(batch)
        problems = [prompts[int(group)].problem for group in batch.groups]
        verdicts = self.verifier.verify(problems, responses)
        batch.rewards = torch.tensor([verdict.reward for verdict in verdicts])
        verified = time.perf_counter()
        return Collected(
            list(prompts), batch, responses, verdicts, generated - start, verified - generated
        )

    def _texts(self, batch: RolloutBatch) -> list[str]:
        ids = [
            row[:length].tolist()
            for row, length in zip(batch.response_ids, batch.num_tokens, strict=True)
        ]
        return self.tokenizer.batch_decode(ids, skip_special_tokens=True)
