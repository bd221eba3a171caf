"""The LightningModule: the policy, the frozen reference, and the loss of a micro-batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from transformers import PreTrainedModel

from laser_pl.algorithm import (
    PolicyLoss,
    aggregate,
    cispo_policy_loss,
    clipped_policy_loss,
    gspo_policy_loss,
    importance_weights,
    kl_estimate,
    score_of_kind,
    self_reward_loss,
    self_reward_loss_active,
    sft_loss,
)
from laser_pl.config import (
    AdamWConfig,
    AlgorithmConfig,
    OptimizerConfig,
    SelfRewardConfig,
    SGDConfig,
)
from laser_pl.distributed import sum_over_ranks
from laser_pl.models.lora import has_adapter, without_adapter
from laser_pl.rollout.batch import RolloutBatch
from laser_pl.training.forward import ForwardOutput, Layout, ResponseHead, response_forward

_MEASURED = ("c_ref", "c_ref_std", "num_bad_steps", "num_tokens")


@dataclass(frozen=True)
class StepTotals:
    """Counts of the whole step over all ranks: what every mean of the loss is divided by.

    Attributes:
        num_tokens: response tokens.
        num_sequences: N, truncated sequences included.
        num_trained_tokens: response tokens of the sequences that are not left out of the update.
        num_micro_batches: of one rank.
        num_ranks: processes.
    """

    num_tokens: int
    num_sequences: int
    num_trained_tokens: int
    num_micro_batches: int
    num_ranks: int


class LaserModule(LightningModule):
    """Policy, frozen reference and loss; Lightning accumulates, clips and updates.

    The models are loaded in `setup`, when the ranks know each other, so that ZeRO-3 can shard the
    weights while they are read.

    Args:
        load: loads the policy's model with its weights; called once more for the frozen reference
            where the KL term or c_ref = model needs one. With a LoRA adapter the reference is the
            policy without it.
        score_token_id: z_c.
        algorithm: clipping, aggregation, KL.
        self_reward: alpha, beta, c_ref and the warm-ups.
        optimizer: AdamW and its schedule.
        temperature: of the rollouts; the log-probs are of the distribution sampled from.
        max_steps: steps of the run, for the schedule.
        importance_cap: of the weights that correct for the engine's log-probs; None corrects not.
        incorrect_token_id: z_i, where the score uses two tokens.
    """

    def __init__(
        self,
        load: Callable[[], PreTrainedModel],
        score_token_id: int,
        algorithm: AlgorithmConfig,
        self_reward: SelfRewardConfig,
        optimizer: OptimizerConfig,
        temperature: float,
        max_steps: int,
        importance_cap: float | None = None,
        incorrect_token_id: int | None = None,
    ) -> None:
        super().__init__()
        self.strict_loading = False  # the reference is not in checkpoints
        self.load = load
        self.policy: PreTrainedModel
        self.head: ResponseHead
        self.reference: PreTrainedModel | None = None
        self.reference_head: ResponseHead | None = None
        self.score_token_id = score_token_id
        self.algorithm = algorithm
        self.self_reward = self_reward
        self.optimizer_config = optimizer
        self.temperature = temperature
        self.max_steps = max_steps
        self.importance_cap = importance_cap
        self.incorrect_token_id = incorrect_token_id
        # Measured before the first update; a constant in the configuration takes c_ref's place.
        self.c_ref = math.nan
        self.c_ref_std = math.nan
        self.strategy_clips = False  # DeepSpeed's sets it: it clips, and skips bad steps
        self.num_bad_steps = 0
        self.num_tokens = 0  # response tokens trained on, over all ranks
        self.totals: StepTotals | None = None
        self.layout: Layout = "padded"
        self.step_metrics: dict[str, float] = {}
        self._sums: dict[str, Tensor] = {}

    @property
    def step(self) -> int:
        """The current step, from 1: one Lightning epoch is one step."""
        return self.current_epoch + 1

    @property
    def needs_reference(self) -> bool:
        """Whether every step makes a pass of the frozen reference."""
        return self.algorithm.kl_coef > 0 or self.self_reward.c_ref == "model"

    def setup(self, stage: str) -> None:
        """Load the policy, and the reference where something uses it."""
        self.policy = self.load()
        self.head = ResponseHead(self.policy)
        if self.needs_reference and not has_adapter(self.policy):
            self.reference = self.load().requires_grad_(False).eval()
            self.reference_head = ResponseHead(self.reference)

    def trainable_parameters(self) -> dict[str, Parameter]:
        """The policy's parameters that are trained, by name, in the optimizer's order."""
        return {
            name: parameter
            for name, parameter in self.policy.named_parameters()
            if parameter.requires_grad
        }

    def forward(self, batch: RolloutBatch, layout: Layout = "padded") -> ForwardOutput:
        """Response log-probs and the score token's log-prob under the policy."""
        return response_forward(
            self.policy, self.head, batch, self.score_token_id, self.temperature, layout,
            self.incorrect_token_id,
        )  # fmt: skip

    @torch.no_grad()
    def reference_forward(self, batch: RolloutBatch, layout: Layout = "padded") -> ForwardOutput:
        """The same under the frozen reference, without gradient."""
        if has_adapter(self.policy):
            with without_adapter(self.policy):
                return self(batch, layout)
        if self.reference is None or self.reference_head is None:
            raise RuntimeError("the configuration keeps no reference")
        return response_forward(
            self.reference, self.reference_head, batch, self.score_token_id, self.temperature,
            layout, self.incorrect_token_id,
        )  # fmt: skip

    def scores(self, token_logprob: Tensor, incorrect_logprob: Tensor, c_ref: Tensor) -> Tensor:
        """[B] self-reward scores of log-probs [B] after EOS, by the configured kind."""
        settings = self.self_reward
        return score_of_kind(
            token_logprob, incorrect_logprob, c_ref, settings.beta, settings.score, settings.loss
        )

    def begin_step(self, totals: StepTotals, layout: Layout = "padded") -> None:
        """Take the step's counts and its layout, before its first micro-batch."""
        self.totals = totals
        self.layout = layout
        self.num_tokens += totals.num_tokens
        self._sums = {}

    def training_step(self, batch: RolloutBatch, batch_idx: int) -> Tensor:
        """The loss of a micro-batch, scaled so that the gradients add up to the step's."""
        if self.totals is None:
            raise RuntimeError("training_step before begin_step")
        totals = self.totals
        output = self(batch, self.layout)
        policy_loss = self._policy_loss(output, batch, totals)
        judge_loss = self._self_reward_loss(output, batch, totals)
        loss = policy_loss.loss
        if self.self_reward_active:
            loss = loss + self.self_reward.alpha * judge_loss
        if self.algorithm.kl_coef > 0:
            kl_loss = self._kl_loss(output, batch, totals)
            loss = loss + self.algorithm.kl_coef * kl_loss
            self._add("train/kl_loss", kl_loss)
        self._add("train/loss", loss)
        self._add("train/policy_loss", policy_loss.loss)
        self._add("train/self_reward_loss", judge_loss)
        share = batch.response_mask.sum() / totals.num_trained_tokens
        self._add("train/clip_fraction", policy_loss.clip_fraction * share)
        self._add("train/dual_clip_fraction", policy_loss.dual_clip_fraction * share)
        self._add("train/approx_kl", policy_loss.approx_kl * share)
        self._add("train/entropy", output.entropy.sum() / totals.num_trained_tokens)
        gap = (output.logprobs.detach() - batch.rollout_logprobs).abs()
        # NaN where the engine could not say, as vLLM at another temperature.
        mean_gap = gap.sum() / totals.num_trained_tokens
        self._add("rollout/logprob_gap_mean", mean_gap)
        # Lightning takes the mean over micro-batches, DDP and DeepSpeed over ranks; the normalizers
        # are of the whole step already.
        return loss * totals.num_micro_batches * totals.num_ranks

    def finish_step(self) -> None:
        """Add the ranks' sums to the step's metrics, after its update."""
        names = sorted(self._sums)
        sums = sum_over_ranks(torch.stack([self._sums[name] for name in names]))
        self.step_metrics.update(zip(names, sums.tolist(), strict=True))
        self.step_metrics["train/bad_steps"] = self.num_bad_steps
        self.step_metrics["train/num_tokens"] = self.num_tokens

    def configure_optimizers(self) -> Any:
        """The configured optimizer over the trained parameters, and its schedule a step."""
        settings = self.optimizer_config
        optimizer = build_optimizer(settings, list(self.trainable_parameters().values()))
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: lr_factor(settings, step, self.max_steps)
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradient norm; a gradient that is not finite makes the update skip the step.

        Not where the strategy does both, and calls `record_update` itself.
        """
        if self.strategy_clips:
            return
        parameters = [p for p in self.policy.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, gradient_clip_val or math.inf))
        if not math.isfinite(norm):
            # The optimizers leave a parameter without a gradient as it is, its moments included.
            optimizer.zero_grad(set_to_none=True)
        self.record_update(norm)

    def record_update(self, grad_norm: float) -> None:
        """Note the gradient norm of an update; one that is not finite was skipped, and counts."""
        self.step_metrics["train/grad_norm"] = grad_norm
        self.num_bad_steps += not math.isfinite(grad_norm)

    def transfer_batch_to_device(
        self, batch: RolloutBatch, device: torch.device, dataloader_idx: int
    ) -> RolloutBatch:
        """Move a micro-batch without a cast: advantages and log-probs stay float32."""
        return batch.to(device)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what is trained and what the run has measured; the rest is loaded again."""
        checkpoint["state_dict"] = {
            f"policy.{name}": parameter for name, parameter in self.trainable_parameters().items()
        }
        checkpoint["laser"] = {name: getattr(self, name) for name in _MEASURED}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up c_ref and the count of bad steps again."""
        for name in _MEASURED:
            setattr(self, name, checkpoint["laser"][name])

    @property
    def self_reward_active(self) -> bool:
        """Whether the self-reward loss counts at the current step."""
        warmup = self.self_reward.reasoning_warmup_steps
        return self.self_reward.is_trained and self_reward_loss_active(self.step, warmup)

    def _policy_loss(
        self, output: ForwardOutput, batch: RolloutBatch, totals: StepTotals
    ) -> PolicyLoss:
        settings = self.algorithm
        # One update a rollout batch: the policy that sampled is the current one.
        inputs = (
            output.logprobs,
            output.logprobs.detach(),
            self._corrected_advantages(output, batch, totals),
            batch.response_mask,
        )
        low, high = settings.clip_low, settings.clip_high
        if settings.loss == "gspo":
            return gspo_policy_loss(*inputs, low, high, totals.num_sequences)
        normalizer = self._normalizer(totals)
        if settings.loss == "cispo":
            return cispo_policy_loss(*inputs, low, high, settings.aggregation, normalizer)
        return clipped_policy_loss(
            *inputs, low, high, settings.dual_clip, settings.aggregation, normalizer
        )

    def _corrected_advantages(
        self, output: ForwardOutput, batch: RolloutBatch, totals: StepTotals
    ) -> Tensor:
        """[B], or [B, T] with each token's weight for the engine's log-probs being others."""
        if self.importance_cap is None:
            return batch.advantages
        weights = importance_weights(output.logprobs, batch.rollout_logprobs, self.importance_cap)
        capped = (weights >= self.importance_cap) & batch.response_mask
        self._add("rollout/importance_capped_fraction", capped.sum() / totals.num_trained_tokens)
        return batch.advantages.unsqueeze(1) * weights

    def _self_reward_loss(
        self, output: ForwardOutput, batch: RolloutBatch, totals: StepTotals
    ) -> Tensor:
        weights = batch.class_weights if self.self_reward.balanced else None
        correct, incorrect = output.token_logprob, output.incorrect_logprob
        number = totals.num_sequences
        if self.self_reward.loss == "sft":
            return sft_loss(correct, incorrect, batch.rewards, batch.finished, weights, number)
        scores = self.scores(correct, incorrect, batch.c_ref)
        return self_reward_loss(scores, batch.rewards, batch.finished, weights, number)

    def _kl_loss(self, output: ForwardOutput, batch: RolloutBatch, totals: StepTotals) -> Tensor:
        kl = kl_estimate(output.logprobs, batch.reference_logprobs, self.algorithm.kl_kind)
        return aggregate(
            kl, batch.response_mask, self.algorithm.aggregation, self._normalizer(totals)
        )

    def _normalizer(self, totals: StepTotals) -> int:
        by_token = self.algorithm.aggregation == "token_mean"
        return totals.num_tokens if by_token else totals.num_sequences

    def _add(self, name: str, value: Tensor) -> None:
        value = value.detach().float()
        self._sums[name] = self._sums[name] + value if name in self._sums else value


def build_optimizer(settings: OptimizerConfig, parameters: list[Parameter]) -> Optimizer:
    """The optimizer that the configuration names, over the parameters."""
    match settings:
        case SGDConfig():
            return torch.optim.SGD(
                parameters,
                lr=settings.lr,
                momentum=settings.momentum,
                weight_decay=settings.weight_decay,
            )
        case AdamWConfig(name="deepspeed_cpu_adam"):
            # Imported here: it compiles its C++ code.
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            kind: Any = DeepSpeedCPUAdam
        case AdamWConfig():
            kind = torch.optim.AdamW
    optimizer: Optimizer = kind(
        parameters,
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
    )
    return optimizer


def lr_factor(settings: OptimizerConfig, step: int, max_steps: int) -> float:
    """The learning rate's factor at an update, `step` counted from 0.

    Rises linearly over warmup_steps (the first update already moves), then is constant or falls to
    0 at max_steps, linearly or as a half cosine.
    """
    if step < settings.warmup_steps:
        return (step + 1) / (settings.warmup_steps + 1)
    if settings.schedule == "constant":
        return 1.0
    done = (step - settings.warmup_steps) / max(1, max_steps - settings.warmup_steps)
    if settings.schedule == "linear":
        return max(0.0, 1.0 - done)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
