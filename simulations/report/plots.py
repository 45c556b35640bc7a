"""Figures of studies: curves over rounds, seconds and bytes, and the heat map."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fl_bgmd.attacks import ATTACKS
from fl_bgmd.data import Dataset

from ..experiment import RunResult
from ..listings import plain
from .drawing import COLORS, band, name_ends, panels, save
from .tables import percent

if TYPE_CHECKING:
    from .figure import Drawing

Runs = Mapping[tuple[str, str], Sequence[RunResult]]
"""The runs of a study, one for each seed, by row and column."""

FEWEST_RANKED = 3
"""Rows, and columns without a gap, from which on places say more than the table."""

MOST_PANELS = 12
"""Columns that still fit one figure of curves."""

AXES: Mapping[str, tuple[str, Callable[[RunResult], Sequence[float]]]] = {
    "rounds": ("round", lambda run: [int(entry["round"]) for entry in run.rounds]),
    "seconds": (
        "seconds",
        lambda run: _until("seconds", run),
    ),
    "cpu-seconds": (
        "CPU seconds without evaluation",
        lambda run: _until("cpu-seconds", run),
    ),
    "bytes": (
        "MB sent to the server",
        lambda run: [run.bytes_up_to(int(entry["round"])) / 1e6 for entry in run.rounds],
    ),
}
"""What curves are drawn against: its label, and its value at each entry of a run's rounds."""


def _until(key: str, run: RunResult) -> list[float]:
    """Return the sums of a number of the rounds up to each."""
    return list(np.cumsum([float(entry.get(key, 0.0)) for entry in run.rounds]))


def axes_of(runs: Runs) -> list[str]:
    """Return the axes that all runs can be drawn against."""
    lists = [run.rounds for of in runs.values() for run in of]
    timed = all(any("cpu-seconds" in entry for entry in rounds) for rounds in lists)
    return [axis for axis in AXES if timed or axis != "cpu-seconds"]


def plot_curves(runs: Runs, metric: str, axis: str, title: str, folder: Path) -> Path:
    """Draw a figure of the rounds, one panel for each column, to ``METRIC-AXIS.png`` and ``.pdf``.

    ``axis`` is one of :data:`AXES`; seconds are of wall clock, evaluation included. Means over the
    seeds with their standard deviations as bands.
    """
    figure = draw_curves(runs, metric, axis, title)
    return save(figure, folder / f"{metric}-{axis}.png")


def draw_curves(runs: Runs, metric: str, axis: str, title: str) -> "Drawing":
    """Return the figure of :func:`plot_curves`."""
    from matplotlib.ticker import MaxNLocator

    columns = list(dict.fromkeys(column for _, column in runs))
    numbers = {row: number for number, row in enumerate(dict.fromkeys(row for row, _ in runs))}
    wide = min(3, len(columns))
    letters = max(map(len, numbers))
    width = 3.2 + 2.0 / wide + 0.055 * letters
    figure, grid = panels(-(-len(columns) // wide), wide, width, 3.1, sharey=True)
    for panel, column in zip(grid.flat, columns, strict=False):
        for (row, of), results in runs.items():
            x, values = _curves(results, metric, axis)
            if of == column and len(x):
                states = {result.status for result in results} - {"finished"}
                label = f"{row} ({', '.join(sorted(states))})" if states else row
                band(panel, x, values, label, number=numbers[row])
        panel.set_title(column, fontsize=9)
        panel.grid(alpha=0.3)
        panel.set_xlabel(AXES[axis][0])
        panel.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    for panel in grid.flat[len(columns) :]:
        panel.set_axis_off()
    grid[0, 0].set_ylabel("test accuracy (%)" if metric == "accuracy" else metric)
    figure.suptitle(title, fontsize=10)
    name_ends(grid.flat[: len(columns)])
    return figure


def _curves(
    results: Sequence[RunResult], metric: str, axis: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the common axis (t,) and the metric of each run (runs, t), cut to the shortest."""
    scale = 100.0 if metric == "accuracy" else 1.0
    found = [
        [
            (place, scale * entry[metric])
            for place, entry in zip(AXES[axis][1](result), result.rounds, strict=True)
            if metric in entry
        ]
        for result in results
    ]
    length = min(map(len, found), default=0)
    table = np.array([points[:length] for points in found], dtype=np.float64)
    table = table.reshape(len(found), length, 2)
    return table[:, :, 0].mean(0), table[:, :, 1]


def plot_heat_map(means: pd.DataFrame, title: str, folder: Path) -> Path:
    """Draw mean accuracies, rows x columns of which the last is the worst, to ``heatmap.png``."""
    return save(draw_heat_map(means, title), folder / "heatmap.png")


def draw_heat_map(means: pd.DataFrame, title: str) -> "Drawing":
    """Return the figure of :func:`plot_heat_map`."""
    values = means.to_numpy() * 100
    high, wide = values.shape
    figure, [[axes]] = panels(1, 1, 2.5 + 0.55 * wide, 1.8 + 0.34 * high)
    image = axes.imshow(values, vmin=0, vmax=100, cmap="cividis", aspect="auto")
    axes.set_xticks(range(wide), means.columns, rotation=45, ha="right")
    axes.set_yticks(range(high), means.index)
    axes.axvline(wide - 1.5, color="white", lw=3)
    for i, j in np.ndindex(high, wide):
        color = "white" if values[i, j] < 50 else "black"  # also of NaN, which is drawn white
        text = percent(values[i, j] / 100)
        axes.text(j, i, text, ha="center", va="center", fontsize=7, color=color)
    axes.set_title(title, fontsize=10)
    figure.colorbar(image, label="final test accuracy (%)")
    return figure


def plot_ranks(means: pd.DataFrame, title: str, folder: Path) -> Path:
    """Draw which place each row takes in each column to ``ranks.png``; ``means`` as above.

    Best on top is the row whose mean place is the best. Equal accuracies share their mean place. A
    column where a row has no accuracy is left out.
    """
    return save(draw_ranks(means, title), folder / "ranks.png")


def places_of(means: pd.DataFrame) -> pd.DataFrame:
    """Return the place of each row in each column, 1 for the highest; the last column is none."""
    places = means.iloc[:, :-1].dropna(axis="columns").rank(ascending=False)
    return places.loc[places.mean(axis=1).sort_values().index]


def draw_ranks(means: pd.DataFrame, title: str) -> "Drawing":
    """Return the figure of :func:`plot_ranks`."""
    places = places_of(means)
    high, wide = places.shape
    letters = max(map(len, places.index))
    figure, [[axes]] = panels(1, 1, 4.4 + 0.08 * letters, 1.5 + 0.3 * high)
    heights = np.arange(high)
    axes.hlines(heights, places.min(axis=1), places.max(axis=1), color="0.8", lw=1.2, zorder=1)
    # Columns lie a little apart, so that equal places show.
    apart = np.linspace(-0.22, 0.22, wide) if wide > 1 else np.zeros(1)
    axes.scatter(places, heights[:, None] + apart, s=9, color=COLORS[0], zorder=2, label="a column")
    axes.plot(places.mean(axis=1), heights, "D", color=COLORS[1], ms=6, zorder=3, label="mean")
    axes.set_yticks(heights, places.index)
    axes.invert_yaxis()
    axes.set_xlim(0.5, high + 0.5)
    axes.set_xlabel(f"place among {high} in each of {wide} columns (1 is the best)")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=7, loc="upper right")  # the best are above and to the left
    figure.suptitle(title, fontsize=10)
    return figure


def plot_data_attacks(dataset: Dataset, folder: Path, examples: int = 5, seed: int = 0) -> Path:
    """Draw what each data attack makes of training images to ``folder/data-attacks.png``.

    As Figure 4 of the BGMD paper: one column for each attack, with its default options, the label
    it trains on above each image.
    """
    chosen = np.random.default_rng(seed).choice(len(dataset.train_labels), examples, replace=False)
    images, labels = dataset.train_images[chosen], dataset.train_labels[chosen]
    columns = {"original": (images, labels)}
    for name, attack in ATTACKS.items():
        if attack.place == "data":
            rng = np.random.default_rng(seed)
            knob = next(iter(attack.options.values()), None)
            columns[name if knob is None else f"{name} {plain(knob.default)}"] = (
                attack.bound().corrupt(images, labels, dataset.num_classes, rng)
            )
    figure, grid = panels(examples, len(columns), 1.35, 1.45)
    for j, (name, (shown, trained_on)) in enumerate(columns.items()):
        for i in range(examples):
            panel = grid[i, j]
            panel.imshow(shown[i], cmap="gray", vmin=0, vmax=255)
            panel.set_axis_off()
            changed = trained_on[i] != labels[i]
            panel.set_title(
                f"{name}\n{trained_on[i]}" if i == 0 else str(trained_on[i]),
                fontsize=9,
                color="firebrick" if changed else "black",
            )
    return save(figure, folder / "data-attacks.png")
