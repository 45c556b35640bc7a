"""Tables and plots of finished runs."""

import math
from collections.abc import Mapping
from pathlib import Path

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
    lines = [COLUMNS, tuple("---" for _ in COLUMNS), *rows(results)]
    path = folder / "table.md"
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    path.write_text(text + "\n", encoding="utf-8")
    return path


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


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2%}"
