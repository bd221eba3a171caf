"""The figures: drawn from whatever there is, whole or not at all."""

import math
import struct
from pathlib import Path

import matplotlib
import pytest
import torch
from matplotlib.figure import Figure

from laser_pl.evaluation import plots
from laser_pl.evaluation.plots import (
    plot_reliability,
    plot_score_histograms,
    plot_training_curves,
    plot_voting,
)
from laser_pl.evaluation.report import EvaluationSamples, voting_curves
from laser_pl.logs.names import METRICS

ROWS = [
    {"step": 0.0, "held_out/accuracy": 0.5},
    {"step": 1.0, "rollout/reward_mean": 0.25, "self_reward/loss_active": 0.0},
    {"step": 2.0, "rollout/reward_mean": 0.75, "self_reward/loss_active": 1.0},
]


def make_samples(correct: bool | None = None, finished: bool = True) -> EvaluationSamples:
    """Correct ones score 0.9 and more, incorrect ones 0.2 and less; both, or one of them."""
    rewards = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    if correct is not None:
        rewards = torch.full((2, 2), float(correct))
    return EvaluationSamples(
        rewards=rewards,
        scores=torch.where(rewards > 0, 0.9, 0.2) * torch.tensor([[1.0, 2.0], [3.0, -4.0]]),
        finished=torch.full((2, 2), finished),
        num_tokens=torch.full((2, 2), 8),
        answers=[["1", "2"], ["2", None]],
    )


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were drawn, for a look inside."""
    drawn: list[Figure] = []

    def save(figure: Figure, path: Path, original: object = plots._save) -> Path:
        drawn.append(figure)
        assert callable(original)
        return original(figure, path)

    monkeypatch.setattr(plots, "_save", save)
    return drawn


def size_of_png(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data[-8:-4] == b"IEND"
    return struct.unpack(">II", data[16:24])


def lines_of(figure: Figure, panel: int) -> dict[str, tuple[list[float], list[float]]]:
    return {
        str(line.get_label()): (list(line.get_xdata()), list(line.get_ydata()))  # type: ignore[arg-type]
        for line in figure.axes[panel].lines
    }


def test_every_figure_is_written_under_its_name_and_nothing_else_is(tmp_path: Path) -> None:
    folder, samples = tmp_path / "figures", make_samples()
    paths = [
        plot_training_curves(ROWS, folder),
        plot_score_histograms(samples, folder, samples),
        plot_reliability(samples, folder, samples),
        plot_voting(voting_curves(samples), folder, voting_curves(samples)),
    ]
    names = ["training_curves.png", "score_histograms.png", "reliability.png", "voting.png"]
    assert paths == [folder / name for name in names]
    assert sorted(entry.name for entry in folder.iterdir()) == sorted(
        [*names, *(name.replace(".png", ".svg") for name in names)]
    )
    assert all(min(size_of_png(path)) > 500 for path in paths)


def test_the_same_numbers_give_the_same_bytes(tmp_path: Path) -> None:
    first = plot_training_curves(ROWS, tmp_path / "a").read_bytes()
    assert plot_training_curves(ROWS, tmp_path / "b").read_bytes() == first


def test_drawing_leaves_the_global_state_of_matplotlib_alone(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    plot_voting(voting_curves(make_samples()), tmp_path)
    assert dict(matplotlib.rcParams) == before


def test_every_metric_of_the_curves_is_one_that_is_logged() -> None:
    assert {series.metric for panel in plots._PANELS for series in panel.series} <= METRICS.keys()


def test_the_curves_show_the_rows(tmp_path: Path, figures: list[Figure]) -> None:
    plot_training_curves(ROWS, tmp_path)
    lines = lines_of(figures[0], 0)
    # Three rows are too few to smooth.
    assert lines["training rollouts"] == ([1.0, 2.0], [0.25, 0.75])
    assert lines["held out"] == ([0.0], [0.5])


def test_the_start_of_a_phase_is_marked_unless_it_is_the_first_step() -> None:
    starts = plots._phase_starts(ROWS)
    assert starts == {"judging is trained": 2.0}
    assert plots._phase_starts(ROWS[2:]) == {}


def test_smoothing_is_a_centred_mean() -> None:
    # 40 values: two on each side.
    values = [float(i * i) for i in range(40)]
    smooth = plots._smooth(values)
    assert smooth[0] == pytest.approx((0 + 1 + 4) / 3)
    assert smooth[10] == pytest.approx((64 + 81 + 100 + 121 + 144) / 5)
    assert smooth[39] == pytest.approx((37**2 + 38**2 + 39**2) / 3)


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"step": 0.0}],
        [{"step": 1.0, "train/loss": 0.5}],
        [{"step": 1.0, "self_reward/f1": math.nan, "self_reward/score_mean_correct": math.inf}],
        [{"step": 7.0, "rollout/zero_signal_groups_fraction": 1.0}],
    ],
)
@pytest.mark.filterwarnings("error")
def test_curves_are_drawn_from_missing_columns_and_few_rows(
    tmp_path: Path, rows: list[dict[str, float]]
) -> None:
    size_of_png(plot_training_curves(rows, tmp_path))


@pytest.mark.parametrize("correct", [None, False, True])
@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.filterwarnings("error")
def test_score_figures_are_drawn_with_one_class_or_nothing_finished(
    tmp_path: Path, correct: bool | None, finished: bool
) -> None:
    samples = make_samples(correct, finished)
    size_of_png(plot_score_histograms(samples, tmp_path))
    size_of_png(plot_reliability(samples, tmp_path))


def test_histograms_are_shares_of_each_class_with_outliers_in_the_end_bins(
    tmp_path: Path, figures: list[Figure]
) -> None:
    plot_score_histograms(make_samples(), tmp_path)
    by_label = {patch.get_label(): patch.get_data() for patch in figures[0].axes[0].patches}  # type: ignore[attr-defined]
    correct, incorrect = by_label["correct (2)"], by_label["incorrect (2)"]
    # Scores 1.8 and 2.7 of correct ones, 0.2 and -0.8 of incorrect ones, on an axis of -0.5 to 1.5.
    assert correct.values[-1] == 1.0
    assert incorrect.values[0] == 0.5
    assert sum(incorrect.values) == pytest.approx(1.0)
    (index,) = (i for i in range(1, 50) if incorrect.values[i] > 0)
    assert incorrect.edges[index] <= 0.2 + 1e-6 <= incorrect.edges[index + 1] + 1e-5


def test_before_and_after_are_side_by_side_in_this_order(
    tmp_path: Path, figures: list[Figure]
) -> None:
    plot_score_histograms(make_samples(), tmp_path, before=make_samples(correct=False))
    left, right = figures[0].axes
    assert "before" in left.get_title(loc="left")
    assert "after" in right.get_title(loc="left")
    assert [patch.get_label() for patch in left.patches] == ["incorrect (4)"]
    assert len(right.patches) == 2


def test_the_interval_of_a_share_is_wilsons() -> None:
    # 1 of 10: (0.0179, 0.4042), a worked example that is easily found.
    low, high = plots._wilson_interval(torch.tensor([0.1]), torch.tensor([10]))
    assert float(low) == pytest.approx(0.0179, abs=1e-4)
    assert float(high) == pytest.approx(0.4042, abs=1e-4)


def test_the_voting_axis_is_logarithmic_and_marks_every_k(
    tmp_path: Path, figures: list[Figure]
) -> None:
    curves = {"k": [1, 2, 3], "majority": [0.5, 0.6, 0.7], "weighted": [0.5, 0.7, 0.9]}
    plot_voting(curves, tmp_path)
    ax = figures[0].axes[0]
    assert ax.get_xscale() == "log"
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1", "2", "3"]
    assert lines_of(figures[0], 0)["vote weighted by score"] == ([1, 2, 3], [0.5, 0.7, 0.9])
