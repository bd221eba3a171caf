"""The figures of a run, as PNG and SVG files."""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter
from torch import Tensor

from laser_pl.evaluation.metrics import expected_calibration_error, reliability_curve
from laser_pl.evaluation.report import EvaluationSamples
from laser_pl.logs.files import write_bytes_atomically

# The colours of Okabe and Ito, which colour-blind readers can tell apart.
BLUE, VERMILLION, GREEN, ORANGE, SKY, PURPLE, GREY = (
    "#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9", "#CC79A7", "#6E6E6E",
)  # fmt: skip

# More tokens than these make a figure that nobody reads.
MAX_TOKENS = 30

T = TypeVar("T")
Rows = Sequence[Mapping[str, float]]


class _Series(NamedTuple):
    """A metric in a panel: a smooth line if every step has it, points if only evaluations do."""

    metric: str
    label: str
    colour: str
    points: bool = False


class _Panel(NamedTuple):
    title: str
    series: tuple[_Series, ...]
    fractions: bool = False
    whole_range: bool = False


_PANELS = (
    _Panel(
        "Accuracy",
        (
            _Series("rollout/reward_mean", "training rollouts", SKY),
            # Not the votes: evaluations during the run may have fewer samples to vote.
            _Series("held_out/accuracy", "held out", BLUE, points=True),
        ),
        fractions=True,
        whole_range=True,
    ),
    _Panel(
        "Judging its own answers",
        (
            _Series("self_reward/f1", "F1, training rollouts", ORANGE),
            _Series("held_out/f1", "F1, held out", VERMILLION, points=True),
            _Series("held_out/auroc", "AUROC, held out", PURPLE, points=True),
        ),
        fractions=True,
        whole_range=True,
    ),
    _Panel(
        "Mean self-reward score",
        (
            _Series("self_reward/score_mean_correct", "correct responses", BLUE),
            _Series("self_reward/score_mean_incorrect", "incorrect responses", VERMILLION),
        ),
    ),
    _Panel(
        "Losses",
        (
            _Series("train/self_reward_loss", "self-reward", ORANGE),
            _Series("train/policy_loss", "policy", BLUE),
        ),
    ),
    _Panel(
        "Response length (tokens)",
        (
            _Series("rollout/response_tokens_mean", "training rollouts", SKY),
            _Series("held_out/response_tokens_mean", "held out", BLUE, points=True),
        ),
    ),
    _Panel(
        "Rollouts that teach little",
        (
            _Series("rollout/zero_signal_groups_fraction", "prompts with equal rewards", GREY),
            _Series("rollout/truncated_fraction", "responses truncated", VERMILLION),
            _Series("verifier/unparsed_fraction", "responses without answer", PURPLE),
        ),
        fractions=True,
    ),
)


def plot_training_curves(rows: Rows, folder: Path | str) -> Path:
    """Draw training_curves.png: accuracy, self-verification, scores, losses, length, waste.

    Args:
        rows: of metrics.csv; metrics and steps may be missing.
        folder: where the file goes.
    Returns:
        the path of the PNG file; an SVG file lies beside it.
    """
    figure = Figure(figsize=(13, 7), layout="constrained")
    axes = figure.subplots(2, 3)
    for ax, panel in zip(axes.flat, _PANELS, strict=True):
        _draw_panel(ax, panel, rows)
    if starts := _phase_starts(rows):
        words = ", ".join(f"{what} from step {step:.0f}" for what, step in starts.items())
        figure.supxlabel(f"Dotted lines: {words}", fontsize=10, color=GREY)
    return _save(figure, Path(folder) / "training_curves.png")


def plot_score_histograms(
    after: EvaluationSamples,
    folder: Path | str,
    before: EvaluationSamples | None = None,
    threshold: float = 0.5,
) -> Path:
    """Draw score_histograms.png: scores of correct and of incorrect responses.

    Args:
        after: the evaluation after training; truncated responses, which have no score, are left
            out.
        folder: where the file goes.
        before: the evaluation before training, drawn beside it.
        threshold: a response is judged correct if its score is above this.
    Returns:
        the path of the PNG file; an SVG file lies beside it.
    """
    return _save_side_by_side(
        before,
        after,
        lambda ax, samples, when: _draw_histogram(ax, samples, when, threshold),
        Path(folder) / "score_histograms.png",
        # A narrow peak before training would flatten what came of it.
        share_y=False,
    )


def plot_reliability(
    after: EvaluationSamples,
    folder: Path | str,
    before: EvaluationSamples | None = None,
    num_bins: int = 10,
) -> Path:
    """Draw reliability.png: how often responses are right, by the score they gave themselves.

    Args:
        after: the evaluation after training; truncated responses count with score 0.
        folder: where the file goes.
        before: the evaluation before training, drawn beside it.
        num_bins: bins of equal width over [0, 1].
    Returns:
        the path of the PNG file; an SVG file lies beside it.
    """
    return _save_side_by_side(
        before,
        after,
        lambda ax, samples, when: _draw_reliability(ax, samples, when, num_bins),
        Path(folder) / "reliability.png",
    )


def plot_voting(
    curves: Mapping[str, Sequence[float]],
    folder: Path | str,
    before: Mapping[str, Sequence[float]] | None = None,
) -> Path:
    """Draw voting.png: accuracy of votes, of the best-scoring sample, and pass@k, against k.

    Args:
        curves: what `voting_curves` gave after training.
        folder: where the file goes.
        before: the same before training, drawn beside it.
    Returns:
        the path of the PNG file; an SVG file lies beside it.
    """
    return _save_side_by_side(before, curves, _draw_voting, Path(folder) / "voting.png")


def plot_tokens(tokens: Sequence[tuple[str, float, float, bool]], folder: Path | str) -> Path:
    """Draw tokens.png: log-probability after EOS of candidates for the score token.

    Args:
        tokens: text, mean and standard deviation in nats, and whether it may be taken; best first.
        folder: where the file goes.
    Returns:
        the path of the PNG file; an SVG file lies beside it.
    """
    shown = tokens[:MAX_TOKENS]
    figure = Figure(figsize=(8, 1.5 + 0.28 * len(shown)), layout="constrained")
    ax = figure.subplots()
    for usable, colour, label in ((True, BLUE, "may be taken"), (False, GREY, "may not")):
        rows = [(row, mean, std) for row, (_, mean, std, ok) in enumerate(shown) if ok == usable]
        if rows:
            y, x, spread = zip(*rows, strict=True)
            ax.errorbar(x, y, xerr=spread, fmt="o", color=colour, markersize=5, label=label)
    _style(ax, "Candidates for the score token", "log-probability after EOS (nats)", "")
    # A dollar sign would begin a formula.
    ax.set_yticks(range(len(shown)), [text.replace("$", r"\$") for text, *_ in shown])
    ax.invert_yaxis()
    ax.grid(axis="x", color="#E4E4E4", linewidth=0.8)
    _legend(ax, "mean and standard deviation")
    return _save(figure, Path(folder) / "tokens.png")


class Interval(NamedTuple):
    """A mean over seeds, as `plot_axis` and `plot_steps` draw it.

    Attributes:
        mean: of the runs that have the measure; NaN if none has.
        half_width: of its 95 % interval; NaN for a single run.
        number: runs.
    """

    mean: float
    half_width: float
    number: int


def plot_axis(
    axis: str,
    points: Sequence[tuple[object, Interval, Interval]],
    note: str,
    name: str,
    folder: Path | str,
) -> Path:
    """Draw NAME.png: accuracy and F1 against the values of one key.

    Args:
        axis: the key.
        points: a value with accuracy and F1 over seeds; values in the order in which they stand.
        note: the other settings, for the title; may be empty.
        name: of the file.
        folder: where the file goes.
    Returns:
        the path of the PNG file; an SVG file lies beside it.
    """
    figure = Figure(figsize=(6.5, 4.5), layout="constrained")
    ax = figure.subplots()
    places = range(len(points))
    _, accuracies, f1s = zip(*points, strict=True)
    lines = (("accuracy", BLUE, accuracies), ("self-verification F1", VERMILLION, f1s))
    are_numbers = all(type(value) in (int, float) for value, *_ in points)
    for label, colour, intervals in lines:
        means = [interval.mean for interval in intervals]
        errors = [0.0 if math.isnan(i.half_width) else i.half_width for i in intervals]
        ax.errorbar(
            places, means, yerr=errors, fmt="o-" if are_numbers else "o", color=colour, label=label,
            capsize=3, linewidth=2, markersize=5.5,
        )  # fmt: skip
    _style(ax, note or "Held out, mean and 95 % interval over seeds", axis, "")
    # Evenly apart: alphas of 0, 0.03 and 1 would crowd on a linear axis and 0 has no logarithm.
    ax.set_xticks(places, [str(value).replace("$", r"\$") for value, *_ in points])
    ax.set_ylim(0, 1.02)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    _legend(ax, place="lower right")
    return _save(figure, Path(folder) / f"{name}.png")


def plot_steps(
    curves: Mapping[str, Mapping[str, Sequence[tuple[float, Interval]]]], folder: Path | str
) -> Path:
    """Draw steps.png: held-out accuracy and F1 against steps, a curve a setting.

    Args:
        curves: setting -> metric (held_out/accuracy, held_out/f1) -> (step, mean over seeds).
        folder: where the file goes.
    Returns:
        the path of the PNG file; an SVG file lies beside it.
    """
    figure = Figure(figsize=(13, 4.8), layout="constrained")
    panels = (("held_out/accuracy", "Accuracy"), ("held_out/f1", "Self-verification F1"))
    for ax, (metric, title) in zip(figure.subplots(1, 2), panels, strict=True):
        for number, (label, of_setting) in enumerate(curves.items()):
            colour = _CURVES[number % len(_CURVES)]
            steps = [step for step, _ in of_setting[metric]]
            means = [interval.mean for _, interval in of_setting[metric]]
            widths = [interval.half_width for _, interval in of_setting[metric]]
            low = [mean - width for mean, width in zip(means, widths, strict=True)]
            high = [mean + width for mean, width in zip(means, widths, strict=True)]
            dashes = "-" if number < len(_CURVES) else "--"
            ax.plot(steps, means, dashes, color=colour, label=label, linewidth=2, marker="o", ms=4)
            ax.fill_between(steps, low, high, color=colour, alpha=0.12, linewidth=0)
        _style(ax, title, "step", "")
        ax.set_ylim(0, 1.02)
        ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    _legend(figure.axes[0], "mean and 95 % interval over seeds")
    return _save(figure, Path(folder) / "steps.png")


_CURVES = (BLUE, VERMILLION, GREEN, ORANGE, SKY, PURPLE, GREY)


def _draw_panel(ax: Axes, panel: _Panel, rows: Rows) -> None:
    drawn = [_draw_series(ax, series, rows) for series in panel.series]
    _style(ax, panel.title, "step", "")
    if panel.whole_range:
        ax.set_ylim(-0.02, 1.02)
    elif panel.fractions:
        _leave_room_for_legend(ax)
    if panel.fractions:
        ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    if any(drawn):
        steps = [row["step"] for row in rows]
        margin = max(0.02 * (max(steps) - min(steps)), 0.5)
        ax.set_xlim(min(steps) - margin, max(steps) + margin)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, min_n_ticks=1))
        for step in _phase_starts(rows).values():
            ax.axvline(step, color=GREY, linewidth=1, linestyle=":", zorder=1)
        _legend(ax)
    else:
        _say_nothing_here(ax)


def _draw_series(ax: Axes, series: _Series, rows: Rows) -> bool:
    pairs = [(row["step"], row[series.metric]) for row in rows if series.metric in row]
    pairs = [(step, value) for step, value in pairs if math.isfinite(value)]
    if not pairs:
        return False
    steps, values = zip(*pairs, strict=True)
    if series.points:
        ax.plot(
            steps, values, "o-", color=series.colour, label=series.label, markersize=5,
            linewidth=1.5, zorder=4,
        )  # fmt: skip
    else:
        ax.plot(steps, values, color=series.colour, alpha=0.3, linewidth=1)
        # A line through one point would not be seen.
        style = ".-" if len(steps) == 1 else "-"
        ax.plot(
            steps, _smooth(values), style, color=series.colour, label=series.label, linewidth=2,
            markersize=10,
        )  # fmt: skip
    return True


def _smooth(values: Sequence[float]) -> list[float]:
    """Centred mean over about a tenth of the run; at the ends over what there is of it."""
    reach = len(values) // 20
    windows = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return [math.fsum(window) / len(window) for window in windows]


def _phase_starts(rows: Rows) -> dict[str, float]:
    """The steps at which something set in during the run, by the words that tell it."""
    starts = {}
    for metric, words in (
        ("self_reward/loss_active", "judging is trained"),
        ("self_reward/integration_active", "scores count in the advantages"),
    ):
        steps = [row["step"] for row in rows if metric in row]
        active = [row["step"] for row in rows if row.get(metric) == 1]
        # From the first step on there is no change to mark.
        if active and active[0] != steps[0]:
            starts[words] = active[0]
    return starts


def _draw_histogram(ax: Axes, samples: EvaluationSamples, when: str, threshold: float) -> None:
    finished = samples.finished.bool()
    scores, correct = samples.scores[finished].float(), samples.correct[finished]
    edges = torch.linspace(-0.5, 1.5, 51)
    for name, mask, colour in (
        ("correct", correct, BLUE),
        ("incorrect", ~correct, VERMILLION),
    ):
        if mask.any():
            # Scores beyond the axis are shown in its first and last bin.
            shares = torch.histc(scores[mask].cpu().clamp(-0.5, 1.5), 50, -0.5, 1.5) / mask.sum()
            ax.stairs(
                shares.tolist(), edges.tolist(), fill=True, color=colour, alpha=0.55,
                label=f"{name} ({int(mask.sum()):,})",
            )  # fmt: skip
    ax.axvline(threshold, color="black", linewidth=1, linestyle="--")
    ax.annotate(
        "judged correct →", (threshold, 0.985), xycoords=("data", "axes fraction"),
        xytext=(4, 0), textcoords="offset points", va="top", fontsize=9,
    )  # fmt: skip
    _style(
        ax, f"Scores the model gave its answers{when}", "self-reward score", "share of the class"
    )
    ax.set_xlim(-0.5, 1.5)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    if len(scores):
        _leave_room_for_legend(ax)
        _legend(ax, "verifier says", "upper left")
    else:
        _say_nothing_here(ax)


def _draw_reliability(ax: Axes, samples: EvaluationSamples, when: str, num_bins: int) -> None:
    scores, correct = samples.judgements.flatten().float(), samples.correct.flatten()
    curve = reliability_curve(scores, correct, num_bins)
    filled = curve.num_responses > 0
    x, y = curve.mean_score[filled].tolist(), curve.accuracy[filled].tolist()
    counts = curve.num_responses[filled]
    low, high = _wilson_interval(curve.accuracy[filled], counts)
    ax.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle="--", label="calibrated")
    ax.vlines(x, low.tolist(), high.tolist(), color=BLUE, linewidth=1.5, alpha=0.6)
    ax.plot(x, y, "o-", color=BLUE, markersize=4, linewidth=2, label="measured, 95 % interval")
    areas = (700 * counts / counts.sum()).tolist()
    ax.scatter(x, y, areas, color=SKY, alpha=0.5)
    ax.scatter([], [], 120, color=SKY, alpha=0.5, label="area: share of responses")
    error = expected_calibration_error(scores, correct, num_bins)
    _style(
        ax, f"Score and chance of being right{when}", "self-reward score, clipped to 0 to 1",
        "fraction correct",
    )  # fmt: skip
    ax.set_xlim(-0.06, 1.06)
    ax.set_ylim(-0.06, 1.06)
    _legend(ax, f"calibration error {error:.3f}", "lower right")


def _wilson_interval(share: Tensor, count: Tensor, z: float = 1.96) -> tuple[Tensor, Tensor]:
    """95 % interval of a share of `count` draws, as if independent; stays within 0 and 1."""
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    spread = (share * (1 - share) / count + z * z / (4 * count * count)).sqrt()
    reach = z / (1 + z * z / count) * spread
    return middle - reach, middle + reach


def _draw_voting(ax: Axes, curves: Mapping[str, Sequence[float]], when: str) -> None:
    for name, label, colour, style in (
        ("pass_at_k", "any sample right (pass@k)", GREY, "s--"),
        ("best_of", "sample with the highest score", ORANGE, "^-"),
        ("weighted", "vote weighted by score", GREEN, "o-"),
        ("majority", "majority vote", BLUE, "D-"),
    ):
        if curves.get(name):
            ax.plot(
                curves["k"], curves[name], style, color=colour, label=label, linewidth=2,
                markersize=5.5,
            )  # fmt: skip
    _style(ax, f"Accuracy from k samples{when}", "k, samples per problem", "accuracy")
    ax.set_xscale("log", base=2)
    ax.set_xticks(list(curves["k"]))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda k, _: f"{k:g}"))
    ax.minorticks_off()
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    _legend(ax)


def _save_side_by_side(
    before: T | None,
    after: T,
    draw: Callable[[Axes, T, str], None],
    path: Path,
    share_y: bool = True,
) -> Path:
    """One axes or two side by side, each drawn with the words that say when it was."""
    if before is None:
        figure = Figure(figsize=(6.5, 4.5), layout="constrained")
        draw(figure.subplots(), after, "")
        return _save(figure, path)
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=share_y)
    draw(left, before, ", before training")
    draw(right, after, ", after training")
    right.set_ylabel("")
    return _save(figure, path)


def _style(ax: Axes, title: str, x_label: str, y_label: str) -> None:
    ax.set_title(title, fontsize=12, fontweight="bold", loc="left")
    ax.set_xlabel(x_label, fontsize=10)
    ax.set_ylabel(y_label, fontsize=10)
    ax.tick_params(labelsize=9)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="#E4E4E4", linewidth=0.8)
    ax.set_axisbelow(True)


def _legend(
    ax: Axes,
    title: str | None = None,
    place: Literal["best", "upper left", "lower right"] = "best",
) -> None:
    ax.legend(
        fontsize=9.5, title=title, loc=place, facecolor="white", edgecolor="none", framealpha=0.8,
        alignment="left",
    )  # fmt: skip


def _leave_room_for_legend(ax: Axes) -> None:
    """Raise the top of an axis of fractions, without ticks above 100 %."""
    ax.set_ylim(0, 1.4 * ax.get_ylim()[1])
    ax.set_yticks([tick for tick in ax.get_yticks() if tick <= min(1.0, ax.get_ylim()[1])])


def _say_nothing_here(ax: Axes) -> None:
    ax.set_xticks([])
    ax.set_yticks([])
    ax.text(0.5, 0.5, "not measured", transform=ax.transAxes, ha="center", color=GREY)


def _save(figure: Figure, path: Path) -> Path:
    """Write PATH.png, and PATH.svg for papers and slides."""
    # No version, date or random names in the files: the same numbers give the same bytes.
    for kind, metadata in (("svg", {"Date": None, "Creator": None}), ("png", {"Software": None})):
        content = io.BytesIO()
        with rc_context({"svg.hashsalt": path.stem}):
            figure.savefig(content, format=kind, dpi=150, metadata=metadata)
        write_bytes_atomically(path.with_suffix(f".{kind}"), content.getvalue())
    return path
