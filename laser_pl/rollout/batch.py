"""The rollouts of a step as tensors: padded, and cut into micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from laser_pl.rollout.engine import Rollout


class RolloutBatch:
    """N sequences, each a left-padded prompt of `prompt_length` slots and a right-padded response.

    With two rollouts of the prompt (5, 6), the responses (7, EOS) and (8, 9) cut at the limit, and
    EOS = pad = 0: input_ids [[5, 6, 7, 0], [5, 6, 8, 9]], prompt_length 2, response_mask
    [[1, 1], [1, 1]], finished [1, 0], groups [0, 0].

    No dataclass: Lightning would cast its floats to bfloat16 under bf16-true. Advantages and
    weights are filled in once, from the whole step.

    Attributes:
        input_ids: [N, L] prompt and response tokens.
        attention_mask: [N, L] bool, True on real tokens.
        prompt_length: slots of the prompt; the response starts there.
        response_mask: [N, T] bool, True on the response's tokens, EOS included.
        finished: [N] bool, the response ends with EOS.
        groups: [N] int, which prompt of the step a rollout answers.
        rollout_logprobs: [N, T] as the engine reported them, 0 under the padding.
        token_logprob: [N] log pi(z_c | x, y) in nats as the engine read it, NaN where truncated.
        incorrect_logprob: [N] the same of z_i, the token that says incorrect; NaN without one.
        rewards: [N] the verifier's verdicts, 0 or 1.
        c_ref: [N] the score's constant in nats, one number repeated or the reference's own.
        reference_logprobs: [N, T] under the frozen reference; 0 without a KL term.
        scores: [N] self-reward scores, not clipped; 0 where truncated.
        verifier_advantages: [N] before mixing.
        advantages: [N] those that the loss uses.
        class_weights: [N] weights of the self-reward loss, over the step on all ranks.
    """

    def __init__(
        self,
        *,
        input_ids: Tensor,
        attention_mask: Tensor,
        prompt_length: int,
        response_mask: Tensor,
        finished: Tensor,
        groups: Tensor,
        rollout_logprobs: Tensor,
        token_logprob: Tensor,
        incorrect_logprob: Tensor,
        rewards: Tensor,
        c_ref: Tensor,
        reference_logprobs: Tensor,
        scores: Tensor,
        verifier_advantages: Tensor,
        advantages: Tensor,
        class_weights: Tensor,
    ) -> None:
        self.input_ids = input_ids
        self.attention_mask = attention_mask
        self.prompt_length = prompt_length
        self.response_mask = response_mask
        self.finished = finished
        self.groups = groups
        self.rollout_logprobs = rollout_logprobs
        self.token_logprob = token_logprob
        self.incorrect_logprob = incorrect_logprob
        self.rewards = rewards
        self.c_ref = c_ref
        self.reference_logprobs = reference_logprobs
        self.scores = scores
        self.verifier_advantages = verifier_advantages
        self.advantages = advantages
        self.class_weights = class_weights

    @property
    def response_ids(self) -> Tensor:
        """[N, T] response tokens."""
        return self.input_ids[:, self.prompt_length :]

    @property
    def num_tokens(self) -> Tensor:
        """[N] response tokens of each sequence."""
        return self.response_mask.sum(dim=1)

    def __len__(self) -> int:
        return len(self.input_ids)

    def to(self, device: torch.device | str, **_: object) -> RolloutBatch:
        """The batch on another device, its dtypes untouched."""
        return self._map(lambda tensor: tensor.to(device))

    def select(self, index: Tensor) -> RolloutBatch:
        """The sequences at `index` [B], without the columns that are padding for all of them."""
        return self._map(lambda tensor: tensor[index])._trim()

    def _map(self, function: Callable[[Tensor], Tensor]) -> RolloutBatch:
        changed: dict[str, Any] = {
            name: function(value) if isinstance(value, Tensor) else value
            for name, value in vars(self).items()
        }
        return RolloutBatch(**changed)

    def _trim(self) -> RolloutBatch:
        used = self.attention_mask.any(dim=0).nonzero()
        start = min(int(used[0]), self.prompt_length - 1)
        num_tokens = max(1, int(self.num_tokens.max()))
        stop = self.prompt_length + num_tokens
        trimmed = dict(
            input_ids=self.input_ids[:, start:stop],
            attention_mask=self.attention_mask[:, start:stop],
            prompt_length=self.prompt_length - start,
            response_mask=self.response_mask[:, :num_tokens],
            rollout_logprobs=self.rollout_logprobs[:, :num_tokens],
            reference_logprobs=self.reference_logprobs[:, :num_tokens],
        )
        return RolloutBatch(**{**vars(self), **trimmed})


def join(groups: Sequence[RolloutBatch]) -> RolloutBatch:
    """The sequences of several groups, each of one prompt, as one batch with groups 0, 1, ..."""
    prompt_length = max(group.prompt_length for group in groups)
    num_columns = max(group.response_mask.shape[1] for group in groups)
    joined: dict[str, Any] = {"prompt_length": prompt_length}
    for name, first in vars(groups[0]).items():
        if not isinstance(first, Tensor):
            continue
        parts = [getattr(group, name) for group in groups]
        if name in ("input_ids", "attention_mask"):
            parts = [
                pad(part, (prompt_length - group.prompt_length,
                           num_columns - group.response_mask.shape[1]))
                for part, group in zip(parts, groups, strict=True)
            ]  # fmt: skip
        elif first.dim() == 2:
            parts = [pad(part, (0, num_columns - part.shape[1])) for part in parts]
        joined[name] = torch.cat(parts)
    sizes = torch.tensor([len(group) for group in groups])
    joined["groups"] = torch.arange(len(groups)).repeat_interleave(sizes)
    return RolloutBatch(**joined)


def pad_rollouts(
    rollouts: Sequence[Rollout], prompts: Sequence[Sequence[int]], pad_token_id: int
) -> RolloutBatch:
    """Rollouts as padded tensors; rewards, scores, advantages and weights are still zero.

    Args:
        rollouts: N rollouts; their `prompt_index` points into prompts.
        prompts: P prompts as token ids.
    """
    num_rows = len(rollouts)
    prompt_length = max(len(prompts[r.prompt_index]) for r in rollouts)
    num_columns = max(len(r.response_ids) for r in rollouts)
    input_ids = torch.full((num_rows, prompt_length + num_columns), pad_token_id)
    attention_mask = torch.zeros(num_rows, prompt_length + num_columns, dtype=torch.bool)
    logprobs = torch.zeros(num_rows, num_columns)
    for row, rollout in enumerate(rollouts):
        prompt = prompts[rollout.prompt_index]
        span = slice(prompt_length - len(prompt), prompt_length + len(rollout.response_ids))
        input_ids[row, span] = torch.tensor([*prompt, *rollout.response_ids])
        attention_mask[row, span] = True
        logprobs[row, : len(rollout.logprobs)] = torch.tensor(rollout.logprobs)
    return RolloutBatch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        prompt_length=prompt_length,
        response_mask=attention_mask[:, prompt_length:],
        finished=torch.tensor([r.finished for r in rollouts]),
        groups=torch.tensor([r.prompt_index for r in rollouts]),
        rollout_logprobs=logprobs,
        token_logprob=torch.tensor([r.token_logprob for r in rollouts]),
        incorrect_logprob=torch.tensor([r.incorrect_logprob for r in rollouts]),
        rewards=torch.zeros(num_rows),
        c_ref=torch.zeros(num_rows),
        reference_logprobs=torch.zeros(num_rows, num_columns),
        scores=torch.zeros(num_rows),
        verifier_advantages=torch.zeros(num_rows),
        advantages=torch.zeros(num_rows),
        class_weights=torch.zeros(num_rows),
    )
