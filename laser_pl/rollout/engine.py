"""What an engine that samples responses has to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Sampling:
    """How responses are sampled.

    Attributes:
        max_response_tokens: length limit T; a response without EOS by then is truncated.
        temperature: divides the logits, greater than 0.
        top_p: smallest probability mass that is sampled from, in (0, 1]; 1 takes the whole.
    """

    max_response_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0


@dataclass(frozen=True)
class Rollout:
    """One sampled response and what the engine knows of it.

    For the prompt "2+3=" it may be: response_ids = (5's id, EOS), logprobs = (-0.1, -0.01),
    finished = True, token_logprob = -11.9.

    Attributes:
        prompt_index: which of the engine's prompts it answers.
        response_ids: its tokens, the EOS included if there is one.
        logprobs: log-probability (nats) of each token under softmax(logits / temperature).
        finished: it ends with EOS; otherwise it was cut at the limit.
        token_logprob: log pi(z_c | x, y) in nats at temperature 1, read right after the EOS; NaN
            for a truncated response.
    """

    prompt_index: int
    response_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finished: bool
    token_logprob: float


class RolloutEngine(Protocol):
    """Samples responses from the current policy and reads the score token on the way."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        rollouts_per_prompt: int,
        sampling: Sampling,
        seed: int,
    ) -> list[Rollout]:
        """Sample `rollouts_per_prompt` responses to each prompt, in the order of the prompts."""
        ...
