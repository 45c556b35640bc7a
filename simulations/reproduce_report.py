"""Tables and plots of an experiment: this project's numbers, the paper's beside them."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .experiment import RunResult
from .laboratory import Cell, Line, finished_before, line_of
from .report import counted
from .reproduce import Experiment, rounds_per_epoch

Runs = dict[tuple[str, str], list[RunResult]]


def write_report(
    experiment: Experiment, cells: Sequence[Cell], folder: Path, output: Path
) -> list[Path]:
    """Write the table and the plots of the cells that ``folder`` holds; return the paths.

    Files in ``output`` are ``table.md``, ``cells.jsonl`` and PNG plots.
    """
    runs: Runs = {}
    lines: list[Line] = []
    for cell in cells:
        if cell.name in finished_before([cell], folder):
            result = RunResult.read(folder / cell.name)
            runs.setdefault((cell.strategy, cell.attack), []).append(result)
            lines.append(line_of(cell, result))
    output.mkdir(parents=True, exist_ok=True)
    table, record = output / "table.md", output / "cells.jsonl"
    text = table_of(experiment, runs, missing=len(cells) - len(lines))
    table.write_text(text, encoding="utf-8")
    record.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    plots = [plot(experiment, runs, "accuracy", axis, output) for axis in ("rounds", "seconds")]
    plots += [plot(experiment, runs, metric, "rounds", output) for metric in experiment.curves]
    return [table, record, *plots]


def table_of(experiment: Experiment, runs: Runs, *, missing: int = 0) -> str:
    """Return the experiment's table in Markdown, as the paper has it: a line for each column.

    Final test accuracy in percent, mean and standard deviation over the seeds, in italics what the
    paper prints.
    """
    printed = {row for entries in experiment.published.values() for row in entries}
    heads: list[str] = []
    for row in experiment.rows:
        heads += [row, f"*{row}, paper*"] if row in printed else [row]
    text = ["| | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
    for column in experiment.columns:
        entries = [column]
        for row in experiment.rows:
            entries.append(_entry(runs.get((row, column), [])))
            if row in printed:
                theirs = experiment.published.get(column, {}).get(row, "")
                entries.append(f"*{theirs}*" if theirs else "")
        text.append("| " + " | ".join(entries) + " |")
    return "\n".join([_heading(experiment, runs, missing), "", *text, ""])


def _heading(experiment: Experiment, runs: Runs, missing: int) -> str:
    configs = [result.config for results in runs.values() for result in results]
    epochs = {f"{int(c['num-server-rounds']) / rounds_per_epoch(c):.3g}" for c in configs}
    counts = sorted({len(results) for results in runs.values()})
    shown = counted(", ".join(sorted(epochs)), "epoch")
    seeds = counted(" or ".join(map(str, counts)), "seed")
    text = (
        f"**{experiment.title}** ({experiment.source}). Test accuracy in % after "
        f"{shown}, mean ± standard deviation of {seeds}"
    )
    if missing:
        text += f"; {missing} runs are missing"
    full = counted(f"{experiment.epochs:g}", "epoch"), counted(experiment.seeds, "seed")
    text += f". The full protocol is {full[0]} and {full[1]}"
    if experiment.published:
        text += "; *in italics what the paper prints for it*, - where training diverged"
    return text + "."


def _entry(results: Sequence[RunResult]) -> str:
    if not results:
        return "not run"
    values = [100 * result.final_accuracy for result in results]
    text = f"{statistics.mean(values):.2f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.2f}"
    diverged = sum(result.status == "diverged" for result in results)
    if diverged:
        text += " (diverged)" if diverged == len(results) else f" ({diverged} diverged)"
    return text


def plot(experiment: Experiment, runs: Runs, metric: str, axis: str, folder: Path) -> Path:
    """Draw a per-round metric, one panel for each column, to ``METRIC-AXIS.png``.

    ``axis`` is ``rounds`` or ``seconds``: of wall clock, evaluation included. Means over the seeds
    with their standard deviations as bands.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    columns = [c for c in experiment.columns if any((row, c) in runs for row in experiment.rows)]
    wide = min(4, max(1, len(columns)))
    high = max(1, -(-len(columns) // wide))
    figure, panels = plt.subplots(
        high,
        wide,
        figsize=(3.6 * wide + 0.6, 2.9 * high),
        layout="constrained",
        squeeze=False,
        sharey=True,
    )
    for panel, column in zip(panels.flat, columns, strict=False):
        for number, row in enumerate(experiment.rows):
            if results := runs.get((row, column)):
                x, values = _curves(results, metric, axis)
                if not len(x):
                    continue
                middle, spread = values.mean(0), values.std(0)
                panel.plot(x, middle, label=row, lw=1.6, color=f"C{number}")
                panel.fill_between(
                    x, middle - spread, middle + spread, alpha=0.2, color=f"C{number}", lw=0
                )
        panel.set_title(column, fontsize=9)
        panel.grid(alpha=0.3)
        panel.set_xlabel("round" if axis == "rounds" else "seconds")
    for panel in panels.flat[len(columns) :]:
        panel.set_axis_off()
    panels[0, 0].set_ylabel("test accuracy (%)" if metric == "accuracy" else metric)
    panels[0, 0].legend(fontsize=7)
    figure.suptitle(experiment.title, fontsize=10)
    path = folder / f"{metric}-{axis}.png"
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _curves(
    results: Sequence[RunResult], metric: str, axis: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the common axis (t,) and the metric of each run (runs, t), cut to the shortest."""
    scale = 100.0 if metric == "accuracy" else 1.0
    found = []
    for result in results:
        seconds = np.cumsum([float(entry.get("seconds", 0.0)) for entry in result.rounds])
        found.append(
            [
                (seconds[i] if axis == "seconds" else int(entry["round"]), scale * entry[metric])
                for i, entry in enumerate(result.rounds)
                if metric in entry
            ]
        )
    length = min(map(len, found))
    table = np.array([points[:length] for points in found], dtype=np.float64)
    table = table.reshape(len(found), length, 2)
    return table[:, :, 0].mean(0), table[:, :, 1]
