"""Tables and plots of finished runs."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.table import Table

from simulations.experiment import RunResult

COLUMNS = (
    "strategy",
    "status",
    "final",
    "best",
    "s / round",
    "accepted",
    "rejected",
)


def rows(results: Mapping[str, RunResult]) -> list[tuple[str, ...]]:
    """Return the cells of the table of results, one row for each run."""
    return [
        (
            name,
            result.status,
            _percent(result.final_accuracy),
            _percent(result.best_accuracy),
            "-" if math.isnan(result.seconds_per_round) else f"{result.seconds_per_round:.2f}",
            str(result.total("accepted")),
            str(result.total("rejected")),
        )
        for name, result in results.items()
    ]


def results_table(results: Mapping[str, RunResult]) -> Table:
    """Return the table of results for the terminal."""
    table = Table(title="Test accuracy, all test examples")
    for column in COLUMNS:
        is_text = column in COLUMNS[:2]
        table.add_column(column, justify="left" if is_text else "right", no_wrap=is_text)
    for row in rows(results):
        table.add_row(*row)
    return table


def write_markdown(results: Mapping[str, RunResult], folder: Path) -> Path:
    """Write the table of results to ``folder/table.md``; return the path."""
    return _write_table([COLUMNS, tuple("---" for _ in COLUMNS), *rows(results)], folder)


def plot_accuracy(results: Mapping[str, RunResult], folder: Path) -> Path:
    """Plot test accuracy against rounds to ``folder/accuracy.png``; return the path."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name, result in results.items():
        points = result.accuracies
        label = name if result.status == "finished" else f"{name} ({result.status})"
        axes.plot(list(points), [100 * value for value in points.values()], label=label, lw=1.8)
    config = next(iter(results.values())).config
    axes.axhline(10, color="grey", lw=0.8, ls=":", label="chance")
    attack = str(config["attack"])
    if attack != "none":
        attack += f", {float(config['byzantine-fraction']):.0%} {config['byzantine-selection']}"
    axes.set(
        title=f"{config['dataset']}, {config['model']}, {config['num-clients']} clients "
        f"({config['partition']}), attack: {attack}",
        xlabel="round",
        ylabel="test accuracy (%)",
        ylim=(0, None),
    )
    axes.title.set_fontsize(10)
    axes.grid(alpha=0.3)
    axes.legend()
    path = folder / "accuracy.png"
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def grid_table(attacks: Sequence[str], rows: Mapping[str, Sequence[float]]) -> Table:
    """Return the strategy x attack table of final accuracies, in percent, for the terminal."""
    table = Table(title="Final test accuracy (%), all test examples: the worst of the strengths")
    table.add_column("strategy", no_wrap=True)
    for attack in attacks:
        table.add_column(attack, justify="right", no_wrap=True)
    for name, values in rows.items():
        table.add_row(name, *(_short(value) for value in values))
    return table


def write_grid(attacks: Sequence[str], rows: Mapping[str, Sequence[float]], folder: Path) -> Path:
    """Write the strategy x attack table to ``folder/table.md``; return the path."""
    lines: list[Sequence[str]] = [
        ("strategy", *attacks),
        ("---", *("---:" for _ in attacks)),
        *((name, *(_short(value) for value in values)) for name, values in rows.items()),
    ]
    return _write_table(lines, folder)


def plot_grid(
    attacks: Sequence[str], rows: Mapping[str, Sequence[float]], title: str, folder: Path
) -> Path:
    """Draw the strategy x attack table as a heat map to ``folder/heatmap.png``."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    values = np.array([list(row) for row in rows.values()]) * 100
    size = (2.5 + 0.55 * len(attacks), 1.8 + 0.34 * len(rows))
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    image = axes.imshow(values, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
    axes.set_xticks(range(len(attacks)), attacks, rotation=45, ha="right")
    axes.set_yticks(range(len(rows)), list(rows))
    axes.axvline(len(attacks) - 1.5, color="black", lw=1.5)
    for i, j in np.ndindex(values.shape):
        axes.text(j, i, _short(float(values[i, j]) / 100), ha="center", va="center", fontsize=7)
    axes.set_title(title, fontsize=10)
    figure.colorbar(image, label="final test accuracy (%)")
    path = folder / "heatmap.png"
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def _write_table(lines: Sequence[Sequence[str]], folder: Path) -> Path:
    path = folder / "table.md"
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def _short(value: float) -> str:
    return "failed" if math.isnan(value) else f"{100 * value:.1f}"


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2%}"
