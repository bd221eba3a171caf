"""Self-reward scores out of vLLM, in the generation that writes the answers (extra `vllm`).

    judge = SelfReward.from_folder("outputs/mine/model")
    llm = LLM("outputs/mine/model", logits_processors=[ScoreProcessor])
    for output in llm.generate(prompts, judge.sampling_params(max_tokens=512, n=4)):
        for answer in judge.answers(output):
            print(answer.text, answer.score)

A request does not end at its EOS: after it the processor lets the score token be sampled and
nothing else, and that token ends the request. The log-probability that vLLM reports for it is the
model's own, before any processor: log pi(z_c | x, y). It costs one decoded token an answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm import RequestOutput, SamplingParams
from vllm.v1.sample.logits_processor import LogitsProcessor as FirstInterface
from vllm.v1.sample.logits_processor import process_dict_updates

from laser_pl.scorer import Answer, read_self_reward

try:
    # Of vLLM's second model runner, the default on GPUs in later versions.
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as SecondInterface
except ImportError:

    class SecondInterface:  # type: ignore[no-redef]
        """A vLLM with one model runner."""


# What `vllm serve --logits-processors` takes.
PROCESSOR = "laser_pl.serving:ScoreProcessor"
# Keys of a request's `extra_args`, which HTTP calls `vllm_xargs`.
TOKEN, EOS, MIN_TOKENS = "self_reward_token", "self_reward_eos", "self_reward_min_tokens"
# EOS tokens that a request may have.
MAX_EOS = 8


@dataclass(frozen=True)
class SelfReward:
    """How a trained model's score is asked for and read: the content of self_reward.json.

    Attributes:
        token_id: z_c.
        eos_token_ids: the tokens that end an answer.
        beta: scale of the score.
        c_ref: its constant, in nats.
        threshold: scores above it judge an answer correct.
    """

    token_id: int
    eos_token_ids: tuple[int, ...]
    beta: float
    c_ref: float
    threshold: float = 0.5

    @classmethod
    def from_folder(cls, folder: str | Path) -> SelfReward:
        """Read the folder of a trained model.

        Raises:
            FileNotFoundError: it has no self_reward.json.
            ValueError: that file lacks a key, or the score is not the log-ratio of one token.
        """
        facts = read_self_reward(folder)
        if (facts["score"], facts["loss"]) != ("log_ratio", "mse"):
            raise ValueError(
                f"{folder}: its score is not the log-ratio of one token, which is what vLLM is "
                "asked for; use SelfRewardScorer"
            )
        return cls(**{field.name: facts[field.name] for field in fields(cls)})

    def sampling_params(
        self, max_tokens: int, min_tokens: int = 0, **others: Any
    ) -> SamplingParams:
        """For `LLM.generate`: sample an answer, then its score token.

        Args:
            max_tokens: longest answer, EOS included.
            min_tokens: tokens before EOS may come.
            others: of vLLM's SamplingParams, such as temperature or n.
        """
        return SamplingParams(
            **self._arguments(max_tokens), extra_args=self._extra(min_tokens), **others
        )

    def http_body(self, max_tokens: int, min_tokens: int = 0, **others: Any) -> dict[str, Any]:
        """The same for `POST /v1/completions` of `vllm serve --logits-processors PROCESSOR`."""
        return {
            **self._arguments(max_tokens),
            "vllm_xargs": self._extra(min_tokens),
            "return_token_ids": True,
            **others,
        }

    def answers(self, output: RequestOutput) -> list[Answer]:
        """The answers of a request that was made with `sampling_params`, with their scores."""
        return [
            self._answer(done.text, done.token_ids, logprobs_of(done)) for done in output.outputs
        ]

    def http_answers(self, response: Mapping[str, Any]) -> list[Answer]:
        """The same from the JSON that answers `http_body`."""
        return [
            self._answer(choice["text"], choice["token_ids"], choice["logprobs"]["token_logprobs"])
            for choice in response["choices"]
        ]

    def _arguments(self, max_tokens: int) -> dict[str, Any]:
        return {
            "max_tokens": max_tokens + 1,
            "ignore_eos": True,
            "stop_token_ids": [self.token_id],
            "logprobs": 0,
        }

    def _extra(self, min_tokens: int) -> dict[str, Any]:
        return {TOKEN: self.token_id, EOS: list(self.eos_token_ids), MIN_TOKENS: min_tokens}

    def _answer(self, text: str, ids: Sequence[int], logprobs: Sequence[float]) -> Answer:
        token_logprob = read_score(ids, logprobs, self.token_id, self.eos_token_ids)
        if token_logprob is None:
            return Answer(text, tuple(ids), None, None, False)
        score = self.beta * (token_logprob - self.c_ref)
        return Answer(text, tuple(ids[:-1]), token_logprob, score, score > self.threshold)


def logprobs_of(completion: Any) -> list[float]:
    """The log-prob of each token of vLLM's `CompletionOutput`."""
    pairs = zip(completion.token_ids, completion.logprobs, strict=True)
    return [entry[token].logprob for token, entry in pairs]


def read_score(
    ids: Sequence[int], logprobs: Sequence[float], token_id: int, eos_ids: Sequence[int]
) -> float | None:
    """log pi(z_c | x, y) of generated tokens, or None if the last two are not EOS and z_c."""
    if len(ids) < 2 or ids[-1] != token_id or ids[-2] not in eos_ids:
        return None
    return float(logprobs[-1])


class ScoreProcessor(FirstInterface, SecondInterface):
    """Lets only the score token follow a sampled EOS; requests that do not ask are untouched.

    Serves both of vLLM's model runners: the first hands over the tokens that each row has written,
    the second the token that each row was fed.
    """

    def __init__(
        self, vllm_config: Any, device_or_states: Any, is_pin_memory: bool = False
    ) -> None:
        self._rows: dict[int, tuple[dict[str, Any], Sequence[int]]] = {}
        if isinstance(device_or_states, torch.device):
            return
        self._states = device_or_states
        number, device = device_or_states.max_num_reqs, device_or_states.device
        self._token = torch.full((number,), -1, device=device)
        self._min_tokens = torch.zeros(number, dtype=torch.long, device=device)
        self._eos = torch.zeros((number, MAX_EOS), dtype=torch.long, device=device)

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse a request that names a score token and does not say what ends an answer.

        Raises:
            ValueError: the extra arguments are incomplete.
        """
        extra = sampling_params.extra_args or {}
        if TOKEN not in extra:
            return
        eos = extra.get(EOS)
        if not isinstance(eos, list) or not 0 < len(eos) <= MAX_EOS:
            raise ValueError(f"{EOS}: give 1 to {MAX_EOS} token ids with {TOKEN}, found {eos}")
        if sampling_params.logprobs is None or not sampling_params.ignore_eos:
            raise ValueError(f"{TOKEN}: needs ignore_eos=true and logprobs=0")

    def is_argmax_invariant(self) -> bool:
        """No: it decides what is sampled."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """Follow the requests as they enter, leave and move (first interface)."""
        process_dict_updates(
            self._rows,
            batch_update,
            lambda params, prompt, output: (
                (params.extra_args, output) if TOKEN in (params.extra_args or {}) else None
            ),
        )

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Note what a request asks for (second interface)."""
        extra = sampling_params.extra_args or {}
        self._token[req_idx] = extra.get(TOKEN, -1)
        self._min_tokens[req_idx] = extra.get(MIN_TOKENS, 0)
        eos = extra.get(EOS, [0])
        # Filled up with the first, so that each place holds an EOS.
        self._eos[req_idx] = torch.tensor([*eos, *eos[:1] * (MAX_EOS - len(eos))])
        return TOKEN in extra

    def apply(self, logits: Tensor, ctx: Any = None) -> Tensor:
        """Mask rows [B, V] whose EOS has come, and EOS where it is too early.

        The score token's logit is set to 0 rather than kept: vLLM's own minimum length masks the
        tokens that end a request, of which it is one.
        """
        if ctx is not None:
            return self._apply_second(logits, ctx)
        ended, tokens = [], []
        for row, (extra, output) in self._rows.items():
            if output and output[-1] in extra[EOS]:
                ended.append(row)
                tokens.append(extra[TOKEN])
            elif len(output) < extra.get(MIN_TOKENS, 0):
                logits[row, extra[EOS]] = -torch.inf
        if ended:
            logits[ended] = -torch.inf
            logits[ended, tokens] = 0.0
        return logits

    def _apply_second(self, logits: Tensor, ctx: Any) -> Tensor:
        slots = ctx.expanded_idx_mapping
        asks = self._token[slots] >= 0
        num_written = ctx.pos + 1 - self._states.prompt_len.gpu[slots]
        is_eos = (ctx.input_ids.unsqueeze(1) == self._eos[slots]).any(dim=1)
        ended = asks & is_eos & (num_written > 0)
        early = asks & ~ended & (num_written < self._min_tokens[slots])
        is_eos_column = torch.zeros_like(logits, dtype=torch.bool).scatter_(
            1, self._eos[slots], True
        )
        logits.masked_fill_(is_eos_column & early.unsqueeze(1), -torch.inf)
        logits.masked_fill_(ended.unsqueeze(1), -torch.inf)
        rows = ended.nonzero().squeeze(1)
        logits[rows, self._token[slots[rows]]] = 0.0
        return logits
