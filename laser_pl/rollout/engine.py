"""What an engine that samples responses has to do."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, Protocol

from transformers import PreTrainedModel


@dataclass(frozen=True)
class Sampling:
    """How responses are sampled, the same in every engine.

    The filters apply to softmax(logits / temperature), in the order min_p, top_k, top_p.

    Attributes:
        max_response_tokens: length limit T; a response without EOS by then is truncated.
        min_response_tokens: tokens before EOS may be sampled.
        temperature: divides the logits, greater than 0.
        top_p: smallest probability mass that is sampled from, in (0, 1]; 1 takes the whole.
        top_k: most likely tokens that are sampled from; 0 takes all.
        min_p: smallest probability that is sampled, as a share of the likeliest token's.
        stop: texts that end a response where they appear; such a response has no EOS.
    """

    max_response_tokens: int
    min_response_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rollout:
    """One sampled response and what the engine knows of it.

    For the prompt "2+3=" it may be: response_ids = (5's id, EOS), logprobs = (-0.1, -0.01),
    finish_reason = "eos", token_logprob = -11.9.

    Attributes:
        prompt_index: which of the engine's prompts it answers.
        response_ids: its tokens, the EOS included if there is one.
        logprobs: log-probability (nats) of each token under softmax(logits / temperature), before
            the filters; NaN where the engine does not know it.
        finish_reason: eos, length (cut at the limit) or stop (one of the stop texts came).
        token_logprob: log pi(z_c | x, y) in nats at temperature 1, read right after the EOS; NaN
            for a response without EOS.
        incorrect_logprob: the same of z_i, the token that says incorrect; NaN without one.
    """

    prompt_index: int
    response_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: Literal["eos", "length", "stop"]
    token_logprob: float
    incorrect_logprob: float = math.nan

    @property
    def finished(self) -> bool:
        """Whether it ends with EOS, so that it has a score."""
        return self.finish_reason == "eos"


class RolloutEngine(Protocol):
    """Samples responses from the current policy and reads the score token on the way."""

    def weights_of(self, policy: PreTrainedModel) -> AbstractContextManager[None]:
        """Generate with a policy's current weights inside this context; entered once a step."""
        ...

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        rollouts_per_prompt: int,
        sampling: Sampling,
        seed: int,
        on_finished: Callable[[list[Rollout]], None] | None = None,
    ) -> list[Rollout]:
        """Sample `rollouts_per_prompt` responses to each prompt, in the order of the prompts.

        `on_finished` gets every rollout once, soon after it is finished, while others still run.
        """
        ...
