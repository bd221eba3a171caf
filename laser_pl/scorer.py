"""Scores out of a trained model, without a server: for answers that exist, and for its own.

scorer = SelfRewardScorer.from_pretrained("outputs/mine/model")
scores = scorer.score(prompts, responses)
answers = scorer.generate(prompts, n=4)
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jinja2 import TemplateError
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from laser_pl.algorithm import score_of_kind
from laser_pl.hub import file_of_model
from laser_pl.rollout.engine import Rollout, Sampling
from laser_pl.rollout.hf_engine import HFEngine

# A text as the model reads it, or the messages of a chat.
TextOrMessages = str | Sequence[Mapping[str, str]]

_NEEDED = ("token_id", "eos_token_ids", "beta", "c_ref", "threshold")
# Models of an earlier version do not say so: their score is the log-ratio.
_KIND = {"incorrect_token_id": None, "score": "log_ratio", "loss": "mse"}


@dataclass(frozen=True)
class Answer:
    """An answer with the model's own verdict.

    Attributes:
        text: without special tokens.
        token_ids: EOS included, the score token not.
        token_logprob: log pi(z_c | x, y) in nats; None if the answer did not end with EOS.
        score: the self-reward score, about 1 for an answer held to be correct and 0 for one that
            is not; None if the answer did not end with EOS.
        is_correct: the verdict, score > threshold; an answer that was cut is judged incorrect.
    """

    text: str
    token_ids: tuple[int, ...]
    token_logprob: float | None
    score: float | None
    is_correct: bool


def read_self_reward(folder: str | Path) -> dict[str, Any]:
    """The content of a trained model's self_reward.json: token_id, eos_token_ids, beta, c_ref, ...

    Args:
        folder: the model's, or its name on the hub.
    Raises:
        FileNotFoundError: there is no self_reward.json.
        ValueError: that file lacks a key, or is broken.
    """
    path = file_of_model(str(folder), "self_reward.json")
    if path is None:
        raise FileNotFoundError(f"{folder}: has no self_reward.json; give a model folder of a run")
    facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if missing := [name for name in _NEEDED if name not in facts]:
        raise ValueError(f"{path}: lacks {', '.join(missing)}; export the checkpoint again")
    facts["eos_token_ids"] = tuple(facts["eos_token_ids"])
    return _KIND | facts


class SelfRewardScorer:
    """A trained model that judges answers with its score token.

    Args:
        model: the policy.
        tokenizer: its tokenizer.
        token_id: z_c.
        eos_token_ids: the tokens that end an answer; the first is put after answers given as text.
        beta: scale of the score.
        c_ref: its constant, in nats.
        threshold: scores above it judge an answer correct.
        incorrect_token_id: z_i, where the score uses two tokens.
        score: the kind of the score, as `self_reward.score`.
        loss: that it was trained with, as `self_reward.loss`.
    Source: LaSeR, arXiv 2510.14943, inference with the last token's self-reward.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        token_id: int,
        eos_token_ids: Sequence[int],
        beta: float,
        c_ref: float,
        threshold: float = 0.5,
        incorrect_token_id: int | None = None,
        score: Literal["log_ratio", "two_token"] = "log_ratio",
        loss: Literal["mse", "sft"] = "mse",
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.token_id = token_id
        self.eos_token_ids = tuple(eos_token_ids)
        self.beta = beta
        self.c_ref = c_ref
        self.threshold = threshold
        self.incorrect_token_id = incorrect_token_id
        self.kind, self.loss = score, loss

    @classmethod
    def from_pretrained(cls, folder: str | Path, **model_arguments: Any) -> SelfRewardScorer:
        """Load the model folder that a run or an export has written.

        Args:
            folder: with self_reward.json, or its name on the hub.
            model_arguments: of transformers' `from_pretrained`, such as device_map or dtype.
        Raises:
            FileNotFoundError: the folder has no self_reward.json.
            ValueError: that file lacks a key.
        """
        facts = read_self_reward(folder)
        return cls(
            AutoModelForCausalLM.from_pretrained(folder, **model_arguments),
            AutoTokenizer.from_pretrained(folder),
            **{name: facts[name] for name in (*_NEEDED, *_KIND)},
        )

    def score(
        self,
        prompts: Sequence[TextOrMessages],
        responses: Sequence[str],
        max_tokens: int = 16384,
        advance: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Self-reward scores of finished answers, one forward pass each.

        Args:
            prompts: N prompts, as the model reads them, special tokens included; or the messages
                of a chat, to which the tokenizer's chat template is applied.
            responses: N answers as text, without EOS.
            max_tokens: of a forward pass, padding included.
            advance: is told how many have been scored, for a progress bar.
        Returns:
            [N] float32 scores in the order of the prompts, not clipped.
        Raises:
            ValueError: the numbers differ, or `encode` refuses one.
        """
        if len(prompts) != len(responses):
            raise ValueError(
                f"expected a response a prompt, found {len(prompts)} and {len(responses)}"
            )
        pairs = zip(prompts, responses, strict=True)
        return self.score_encoded([self.encode(*pair) for pair in pairs], max_tokens, advance)

    def encode(self, prompt: TextOrMessages, response: str) -> Tensor:
        """[L] token ids of a prompt and a finished answer to it, as `score` takes them.

        Raises:
            ValueError: the messages are no chat, the tokenizer has no template for them or its
                template refuses them, or the model cannot read as many tokens.
        """
        sequence = torch.tensor([*self.prompt_ids(prompt), *self._response_ids(response)])
        limit = getattr(self.model.config, "max_position_embeddings", None) or math.inf
        if len(sequence) > limit:
            raise ValueError(
                f"prompt and response have {len(sequence)} tokens, more than the {limit} that the "
                "model can read"
            )
        return sequence

    def score_encoded(
        self,
        sequences: Sequence[Tensor],
        max_tokens: int = 16384,
        advance: Callable[[int], None] | None = None,
    ) -> Tensor:
        """[N] scores of N sequences out of `encode`; the other arguments are those of `score`."""
        scores = torch.zeros(len(sequences))
        # Of one length as far as possible, so that little is padding.
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
        while order:
            longest = len(sequences[order[-1]])
            rows = [order.pop() for _ in range(min(len(order), max(1, max_tokens // longest)))]
            scores[rows] = self._score_rows([sequences[row] for row in rows])
            if advance is not None:
                advance(len(rows))
        return scores

    def generate(
        self,
        prompts: Sequence[TextOrMessages],
        n: int = 1,
        max_tokens: int = 1024,
        temperature: float = 1.0,
        seed: int = 0,
        max_sequences: int = 64,
    ) -> list[list[Answer]]:
        """Sample answers, each with the score that is read in the same generation.

        Args:
            prompts: P prompts, as for `score`.
            n: answers to each.
            max_tokens: longest answer, EOS included.
            temperature: divides the logits.
            seed: the same one gives the same answers.
            max_sequences: sampled at a time.
        Returns:
            [P][n] answers.
        Raises:
            ValueError: n is below 1, a prompt is empty, or `prompt_ids` refuses one.
        """
        if n < 1:
            raise ValueError(f"n must be at least 1, found {n}")
        pad_id = self.tokenizer.pad_token_id
        engine = HFEngine(
            self.eos_token_ids,
            self.eos_token_ids[0] if pad_id is None else int(pad_id),
            self.token_id,
            max_sequences,
            incorrect_token_id=self.incorrect_token_id,
        )
        ids = [self.prompt_ids(prompt) for prompt in prompts]
        if not all(ids):
            raise ValueError(f"prompt {ids.index([])} is empty")
        sampling = Sampling(max_response_tokens=max_tokens, temperature=temperature)
        with engine.weights_of(self.model):
            rollouts = engine.generate(ids, n, sampling, seed)
        answers = [self._answer(rollout) for rollout in rollouts]
        return [answers[start : start + n] for start in range(0, len(answers), n)]

    def prompt_ids(self, prompt: TextOrMessages) -> list[int]:
        """A prompt as token ids.

        Raises:
            ValueError: the messages are no chat, the tokenizer has no template for them, or its
                template refuses them.
        """
        if not isinstance(prompt, str):
            prompt = self._from_messages(prompt)
        return list(self.tokenizer(prompt, add_special_tokens=False)["input_ids"])

    def _from_messages(self, messages: Sequence[Mapping[str, str]]) -> str:
        for message in messages:
            parts = message if isinstance(message, Mapping) else {}
            if not all(isinstance(parts.get(name), str) for name in ("role", "content")):
                raise ValueError("a prompt must be a text, or messages with role and content")
        if self.tokenizer.chat_template is None:
            raise ValueError("the tokenizer has no chat template; give the prompt as a text")
        chat = [dict(message) for message in messages]
        try:
            return str(
                self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            )
        except TemplateError as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"the chat template refuses the messages: {reason}") from None

    def _response_ids(self, response: str) -> list[int]:
        ids = list(self.tokenizer(response, add_special_tokens=False)["input_ids"])
        return [*ids, self.eos_token_ids[0]]

    @torch.no_grad()
    def _score_rows(self, sequences: list[Tensor]) -> Tensor:
        """[B] scores, from the logits row at each EOS alone."""
        device = self.model.device
        # Padding on the right: positions and what a token sees are those without it.
        ids = pad_sequence(sequences, batch_first=True).to(device)
        last = torch.tensor([len(sequence) - 1 for sequence in sequences], device=device)
        mask = torch.arange(ids.shape[1], device=device) <= last.unsqueeze(1)
        hidden = self.model.base_model(
            input_ids=ids, attention_mask=mask.long(), use_cache=False
        ).last_hidden_state
        at_eos = hidden[torch.arange(len(ids), device=device), last]
        logits = self.model.get_output_embeddings()(at_eos).float()
        logprobs = logits.log_softmax(dim=-1)
        # Not read where there is none.
        incorrect = self.token_id if self.incorrect_token_id is None else self.incorrect_token_id
        return self._scores(logprobs[:, self.token_id], logprobs[:, incorrect]).cpu()

    def _scores(self, token_logprob: Tensor, incorrect_logprob: Tensor) -> Tensor:
        return score_of_kind(
            token_logprob, incorrect_logprob, self.c_ref, self.beta, self.kind, self.loss
        )

    def _answer(self, rollout: Rollout) -> Answer:
        ids = rollout.response_ids
        text = str(self.tokenizer.decode(list(ids), skip_special_tokens=True))
        if math.isnan(rollout.token_logprob):
            return Answer(text, ids, None, None, False)
        logprobs = torch.tensor([[rollout.token_logprob], [rollout.incorrect_logprob]])
        score = self._scores(*logprobs).item()
        return Answer(text, ids, rollout.token_logprob, score, score > self.threshold)
