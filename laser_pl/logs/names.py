"""Every metric of a run: its name, unit and meaning. A name that is not here cannot be logged."""

from collections.abc import Iterable
from typing import NamedTuple


class Metric(NamedTuple):
    """What a metric says.

    Attributes:
        unit: "fraction" (0 to 1), "tokens", "s", "nats", "count", "score" (self-reward, about 0 to
            1), "loss", "flag" (0 or 1), ...
        meaning: one line.
    """

    unit: str
    meaning: str


# The order is that of the columns of metrics.csv, which start with `step`.
METRICS: dict[str, Metric] = {
    # The step's rollouts
    "rollout/reward_mean": Metric("fraction", "mean verifier reward of the step's rollouts"),
    "rollout/finished_fraction": Metric("fraction", "responses that ended with EOS"),
    "rollout/truncated_fraction": Metric("fraction", "responses cut at the length limit"),
    "rollout/response_tokens_mean": Metric("tokens", "mean response length, EOS included"),
    "rollout/response_tokens_max": Metric("tokens", "longest response"),
    "rollout/tokens_per_s": Metric("tokens/s", "response tokens generated a second, all ranks"),
    "rollout/zero_signal_groups_fraction": Metric(
        "fraction", "prompts whose rollouts all got the same reward, so that advantages are 0"
    ),
    "rollout/logprob_gap_mean": Metric(
        "nats", "mean |engine's - trainer's log-prob| of the response tokens; 0 if on policy"
    ),
    "rollout/importance_capped_fraction": Metric(
        "fraction", "tokens whose weight pi_trainer / pi_engine reached rollout.importance_cap"
    ),
    # How the policy judged those rollouts
    "self_reward/f1": Metric(
        "fraction", "harmonic mean of the accuracies on correct and on incorrect responses"
    ),
    "self_reward/auroc": Metric(
        "fraction", "chance that a correct response scores above an incorrect one"
    ),
    "self_reward/accuracy": Metric("fraction", "responses judged right (correct iff score > 0.5)"),
    "self_reward/accuracy_on_correct": Metric("fraction", "correct responses judged correct"),
    "self_reward/accuracy_on_incorrect": Metric("fraction", "incorrect responses judged incorrect"),
    "self_reward/score_mean_correct": Metric("score", "mean score of correct finished responses"),
    "self_reward/score_mean_incorrect": Metric(
        "score", "mean score of incorrect finished responses"
    ),
    "self_reward/advantages_mixed_fraction": Metric(
        "fraction", "sequences whose advantage the self-reward changed (group std above min_std)"
    ),
    "self_reward/loss_active": Metric("flag", "1 once the self-reward loss is part of the loss"),
    "self_reward/integration_active": Metric(
        "flag", "1 once self-rewards are mixed into the advantages"
    ),
    # The update
    "train/loss": Metric("loss", "policy loss + alpha * self-reward loss + kl_coef * KL"),
    "train/policy_loss": Metric("loss", "clipped policy-gradient loss"),
    "train/self_reward_loss": Metric("loss", "weighted squared error of the self-reward scores"),
    "train/kl_loss": Metric("nats", "KL from the frozen reference, before its coefficient"),
    "train/entropy": Metric("nats", "mean entropy of the policy at the response tokens"),
    "train/clip_fraction": Metric("fraction", "tokens whose ratio was clipped"),
    "train/dual_clip_fraction": Metric("fraction", "tokens held by the dual clip"),
    "train/approx_kl": Metric("nats", "estimated KL between the policy before and in the update"),
    "train/grad_norm": Metric("norm", "gradient norm before clipping"),
    "train/lr": Metric("rate", "learning rate of the update"),
    "train/bad_steps": Metric(
        "count", "steps skipped so far for a NaN or infinite loss or gradient"
    ),
    "train/num_tokens": Metric("tokens", "response tokens trained on since the run began"),
    "train/skipped_fraction": Metric(
        "fraction", "sequences left out of the update, since nothing trains on them"
    ),
    # The verifier
    "verifier/timeouts": Metric(
        "count", "verifications stopped at the time limit so far, scored 0"
    ),
    "verifier/crashes": Metric("count", "verifications whose process died so far, scored 0"),
    "verifier/errors": Metric("count", "verifications that raised an exception so far, scored 0"),
    "verifier/unparsed_fraction": Metric("fraction", "responses in which no answer was found"),
    # Wall time
    "time/rollout_s": Metric("s", "generating responses and reading their scores"),
    "time/verify_s": Metric("s", "verifying what was not verified during the rollouts"),
    "time/update_s": Metric("s", "forward, backward and optimizer"),
    "time/step_s": Metric("s", "the whole step, evaluation and checkpoint not counted"),
    "time/evaluate_s": Metric("s", "the held-out evaluation after the step"),
    # Held-out problems, only in the steps that evaluate
    "held_out/accuracy": Metric("fraction", "pass@1: mean reward over all held-out samples"),
    "held_out/f1": Metric("fraction", "self-verification F1, as self_reward/f1"),
    "held_out/auroc": Metric("fraction", "self-verification AUROC, as self_reward/auroc"),
    "held_out/accuracy_on_correct": Metric("fraction", "correct responses judged correct"),
    "held_out/accuracy_on_incorrect": Metric("fraction", "incorrect responses judged incorrect"),
    "held_out/ece": Metric("fraction", "calibration error of the clipped scores"),
    "held_out/majority": Metric(
        "fraction", "problems that the plain vote of all their samples gets right"
    ),
    "held_out/weighted": Metric("fraction", "the same with votes weighted by self-reward score"),
    "held_out/best_of": Metric("fraction", "problems whose highest-scoring sample is right"),
    "held_out/pass_at_k": Metric("fraction", "problems with at least one right sample"),
    "held_out/truncated_fraction": Metric("fraction", "responses cut at the length limit"),
    "held_out/unparsed_fraction": Metric("fraction", "responses in which no answer was found"),
    "held_out/response_tokens_mean": Metric("tokens", "mean response length, EOS included"),
}


def check_names(names: Iterable[str]) -> None:
    """Refuse metrics that METRICS does not list.

    Args:
        names: the names about to be logged.
    Raises:
        ValueError: a name is unknown.
    """
    unknown = sorted(set(names) - METRICS.keys())
    if unknown:
        raise ValueError(f"unknown metric {', '.join(unknown)}: add it to laser_pl/logs/names.py")


def metrics_as_markdown() -> str:
    """METRICS as a Markdown table for the documentation.

    Returns:
        a table of name, unit and meaning, a metric a line.
    """
    lines = ["| metric | unit | meaning |", "| --- | --- | --- |"]
    for name, metric in METRICS.items():
        meaning = metric.meaning.replace("|", "\\|")
        lines.append(f"| `{name}` | {metric.unit} | {meaning} |")
    return "\n".join(lines) + "\n"
