"""Figures: curves that can be told apart, named at their ends, in vectors too."""

import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text

from simulations.experiment import RunResult
from simulations.report.drawing import MOST_LABELS, band, name_ends, panels, save, spread_out
from simulations.report.plots import draw_curves, draw_ranks

X = np.arange(11)


def panel_of(count: int) -> object:
    """Return a panel of curves that lie on each other, of three runs each."""
    _, [[panel]] = panels(1, 1, 5.0, 3.0)
    for number in range(count):
        band(panel, X, np.sqrt(X) + np.array([[-1.0], [0.0], [1.0]]), f"rule {number}")
    return panel


def boxes(panel: object) -> list[tuple[float, float]]:
    """Return from where to where the names beside a panel reach, from below."""
    panel.figure.draw_without_rendering()
    found = [Text.get_window_extent(text) for text in panel.texts]  # without their lines
    return sorted((box.y0, box.y1) for box in found)


def test_curves_on_each_other_differ_in_more_than_color() -> None:
    lines = panel_of(MOST_LABELS).lines
    shapes = {(line.get_linestyle(), str(line._dash_pattern), line.get_marker()) for line in lines}
    assert len(shapes) == len(lines)
    assert len({line.get_color() for line in lines[:7]}) == 7
    starts = [line.get_markevery()[0] for line in lines[:2]]
    assert starts[0] != starts[1]


def test_the_band_spans_a_standard_deviation_over_the_seeds() -> None:
    [area] = panel_of(1).collections
    heights = area.get_paths()[0].vertices[:, 1]
    assert heights.max() == pytest.approx(np.sqrt(10) + np.sqrt(2 / 3))
    assert heights.min() == pytest.approx(-np.sqrt(2 / 3))


@pytest.mark.parametrize("count", [2, MOST_LABELS])
def test_names_stand_beside_the_ends_and_not_on_each_other(count: int) -> None:
    panel = panel_of(count)
    name_ends([panel])
    assert sorted(t.get_text() for t in panel.texts) == sorted(f"rule {n}" for n in range(count))
    found = boxes(panel)
    for (_, top), (bottom, _) in itertools.pairwise(found):
        assert bottom >= top - 0.5  # of a pixel
    assert panel.get_legend() is None


def test_more_names_than_fit_are_a_legend() -> None:
    panel = panel_of(MOST_LABELS + 1)
    name_ends([panel])
    assert len(panel.get_legend().get_texts()) == MOST_LABELS + 1
    assert not panel.texts


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ([0.1, 0.5], [0.1, 0.5]),
        ([0.5, 0.5], [0.4, 0.6]),
        ([0.2, 0.5, 0.5, 0.9], [0.2, 0.4, 0.6, 0.9]),
        ([0.95, 1.0], [0.8, 1.0]),
        ([0.0, 0.0], [0.0, 0.2]),
    ],
)
def test_places_are_spread_as_little_as_needed(wanted: list[float], expected: list[float]) -> None:
    np.testing.assert_allclose(spread_out(wanted, 0.2), expected, atol=1e-12)


def test_a_figure_is_a_png_and_the_same_pdf_each_time(tmp_path: Path) -> None:
    files = []
    for name in ("a", "b"):
        path = save(panel_of(2).figure, tmp_path / name / "figure.png")
        assert path.read_bytes().startswith(b"\x89PNG")
        files.append(path.with_suffix(".pdf").read_bytes())
    assert files[0].startswith(b"%PDF")
    assert b"/Type3" not in files[0]
    assert files[0] == files[1]


def test_a_rule_looks_the_same_in_each_column() -> None:
    def run(final: float) -> list[RunResult]:
        return [RunResult({}, [{"round": n, "accuracy": n * final} for n in range(3)])]

    # The first rule has not run in the second column.
    runs = {("mean", "a"): run(0.1), ("gmd", "a"): run(0.2), ("gmd", "b"): run(0.3)}
    first, second = draw_curves(runs, "accuracy", "rounds", "").axes
    looks = [
        {line.get_label(): (line.get_color(), line.get_marker()) for line in panel.lines}
        for panel in (first, second)
    ]
    assert looks[0]["gmd"] == looks[1]["gmd"] != looks[0]["mean"]
    assert second.lines[0].get_ydata().tolist() == [0.0, 30.0, 60.0]


def test_a_curve_that_ends_early_says_so() -> None:
    panel = panel_of(2)
    band(panel, X[:5], np.zeros((1, 5)), "diverged")
    name_ends([panel])
    [end] = panel.lines[3:]
    assert (end.get_xdata(), end.get_ydata(), end.get_marker()) == ([4], [0.0], "x")
    styles = {text.get_text(): text.arrow_patch.get_linestyle() for text in panel.texts}
    assert styles["diverged"] != styles["rule 0"] == styles["rule 1"]


def test_a_curve_is_named_where_its_last_number_is() -> None:
    panel = panel_of(1)
    band(panel, 0.5 * X, np.where(X < 9, 2.0, np.inf)[None], "loss")  # done in half the seconds
    band(panel, X, np.full((1, len(X)), np.nan), "nothing")
    name_ends([panel])
    assert {text.get_text(): text.xy for text in panel.texts} == {
        "rule 0": (10.0, pytest.approx(np.sqrt(10))),
        "loss": (4.0, 2.0),
    }
    assert len(panel.lines) == 3


def test_the_row_with_the_best_mean_place_is_on_top() -> None:
    means = pd.DataFrame(
        {
            "none": [0.9, 0.8, 0.7],
            "ipm": [0.1, 0.6, 0.6],
            "unfinished": [np.nan, 0.1, 0.2],
            "alie": [0.1, 0.3, 0.2],
            "worst": [np.nan, 0.1, 0.2],
        },
        index=["mean", "gmd", "cmd"],
    )
    [axes] = draw_ranks(means, "").axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["gmd", "cmd", "mean"]
    [middles] = [line for line in axes.lines if line.get_label() == "mean"]
    np.testing.assert_allclose(middles.get_xdata(), [4.5 / 3, 6.5 / 3, 7 / 3])
    assert axes.yaxis_inverted()
    assert "among 3 in each of 3 columns" in axes.get_xlabel()
