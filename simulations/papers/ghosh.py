"""The experiments of Ghosh et al., Section 8: Figures 1 to 7.

Distributed gradient descent with m workers who compress their gradients by l1-sign; some of them
lie; the server drops the rows of largest norm. All workers' gradients are computed together;
compression, error feedback, the lies and the threshold are those of the algorithms, worker by
worker, with this library's rules. What the paper leaves open (step sizes, iterations) is in the two
problems, :class:`Regression` (Figures 1, 2, 3, 6a, 7a) and :class:`Network` (4, 5, 6b, 7b).
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fl_bgmd.aggregators import mean, norm_threshold, project, trimmed_mean

from ..report.drawing import Done, band, panels, save
from .ghosh_problems import Curve, Network, Problem, Regression

Array = NDArray[np.float64]


Figures = dict[str, tuple[str, tuple[Curve, ...]]]

NOISE_VARIANCE = 10.0

_REGRESSION: Figures = {
    "figure-1": (
        "thresholding against plain averaging",
        (
            Curve("10 hostile, threshold 12", 10, 12),
            Curve("10 hostile, averaging", 10, 0),
            Curve("20 hostile, threshold 22", 20, 22),
            Curve("20 hostile, averaging", 20, 0),
        ),
    ),
    "figure-2": (
        "thresholding against signSGD with majority vote",
        (
            Curve("10 hostile, threshold 12", 10, 12),
            Curve("10 hostile, majority vote", 10, 0, rule="majority"),
            Curve("20 hostile, threshold 22", 20, 22),
            Curve("20 hostile, majority vote", 20, 0, rule="majority"),
        ),
    ),
    "figure-3": (
        "error feedback",
        (
            Curve("10 hostile, Algorithm 1", 10, 12),
            Curve("10 hostile, Algorithm 2", 10, 12, feedback=True),
            Curve("20 hostile, Algorithm 1", 20, 22),
            Curve("20 hostile, Algorithm 2", 20, 22, feedback=True),
            Curve("20 hostile, Algorithm 2 as printed", 20, 22, rule="printed"),
            Curve("20 hostile, as printed, 1 / sqrt(T + 1)", 20, 22, rule="theorem-3"),
        ),
    ),
    "figure-6a": (
        "many hostile workers, N(0, 10 I)",
        tuple(Curve(f"{count / 2:.0f} % hostile", count, count + 2) for count in (20, 40, 60, 80)),
    ),
    "figure-7a": (
        "many hostile workers, -0.9 g",
        tuple(
            Curve(f"{count / 2:.0f} % hostile", count, count + 2, attack="ascent")
            for count in (20, 40, 60, 80)
        ),
    ),
}


_NETWORK: Figures = {
    "figure-4a": (
        "against the trimmed mean, uncompressed",
        (
            Curve("10 hostile, threshold 12", 10, 12),
            Curve("10 hostile, trimmed mean", 10, 12, rule="trimmed-mean"),
            Curve("20 hostile, threshold 22", 20, 22),
            Curve("20 hostile, trimmed mean", 20, 22, rule="trimmed-mean"),
        ),
    ),
    "figure-4b": (
        "against signSGD with majority vote",
        (
            Curve("10 hostile, threshold 12", 10, 12),
            Curve("10 hostile, majority vote", 10, 0, rule="majority"),
            Curve("20 hostile, threshold 22", 20, 22),
            Curve("20 hostile, majority vote", 20, 0, rule="majority"),
        ),
    ),
    "figure-5a": (
        "labels 9 - y",
        (
            Curve("no Byzantine", 0, 0),
            Curve("10 hostile, threshold 12", 10, 12, attack="label-shift"),
            Curve("20 hostile, threshold 22", 20, 22, attack="label-shift"),
        ),
    ),
    "figure-5b": (
        "random labels",
        (
            Curve("no Byzantine", 0, 0),
            Curve("10 hostile, threshold 12", 10, 12, attack="random-labels"),
            Curve("20 hostile, threshold 22", 20, 22, attack="random-labels"),
        ),
    ),
    "figure-6b": (
        "many hostile workers, labels 9 - y",
        tuple(
            Curve(f"{count / 2:.0f} % hostile", count, count + 2, attack="label-shift")
            for count in (20, 40, 60, 80)
        ),
    ),
    "figure-7b": (
        "many hostile workers, -0.9 g",
        tuple(
            Curve(f"{count / 2:.0f} % hostile", count, count + 2, attack="ascent")
            for count in (20, 40, 66)
        ),
    ),
}


@dataclass(frozen=True)
class FigureSet:
    """A problem and the figures drawn of it."""

    problem: Problem
    figures: Figures

    def runs(self, seeds: int) -> list[tuple[Curve, int]]:
        """Return what has to be run: curves that appear in two figures run once."""
        curves = [_unlabeled(c) for _, curves in self.figures.values() for c in curves]
        return [(curve, seed) for curve in dict.fromkeys(curves) for seed in range(seeds)]


GHOSH = {
    "ghosh-regression": FigureSet(Regression(), _REGRESSION),
    "ghosh-mnist": FigureSet(Network(), _NETWORK),
    "ghosh-mnist-full-batch": FigureSet(Network(batch=300), _NETWORK),
}


def run_curve(curve: Curve, seed: int, problem: Problem) -> Array:
    """Return what the figure measures for t = 0 .. iterations, (iterations + 1,)."""
    generator = torch.Generator().manual_seed(seed)
    task = problem.draw(curve, generator)
    weights, errors = task.start, torch.zeros(())
    history = [task.measure(weights)]
    for _ in range(problem.iterations):
        gradients = task.gradients(weights)
        lies = gradients[: curve.hostile]
        if curve.attack == "gaussian":
            lies += NOISE_VARIANCE**0.5 * torch.randn(lies.shape, generator=generator)
        elif curve.attack == "ascent":
            lies *= -0.9
        if curve.rule == "majority":
            step = problem.sign_step * torch.sign(gradients).sum(0).sign()
        elif curve.rule == "trimmed-mean":
            trimmed = trimmed_mean(gradients, trim_fraction=curve.dropped / len(gradients))
            step = problem.plain_step * trimmed.vector
        elif curve.rule in ("printed", "theorem-3"):
            # Algorithm 2 to the letter: the step size is in p and once more in the update.
            size = problem.step if curve.rule == "printed" else (problem.iterations + 1) ** -0.5
            wanted = size * gradients + errors
            sent = l1_sign(wanted)
            errors = wanted - sent
            step = size * thresholded(sent, curve.dropped)
        elif curve.feedback:
            # With the step size once, as Algorithm 1 and Karimireddy et al. have it.
            wanted = problem.step * gradients + errors
            sent = l1_sign(wanted)
            errors = wanted - sent
            step = thresholded(sent, curve.dropped)
        else:
            own = lies.clone() if curve.attack == "ascent-after" else lies
            sent = l1_sign(gradients, out=gradients)
            lies = sent[: curve.hostile]
            if curve.attack == "gaussian-after":
                lies += NOISE_VARIANCE**0.5 * torch.randn(lies.shape, generator=generator)
            elif curve.attack == "ascent-after":
                lengths = lies.norm(dim=1, keepdim=True) / own.norm(dim=1, keepdim=True)
                sent[: curve.hostile] = -0.9 * lengths * own
            step = problem.step * thresholded(sent, curve.dropped)
        weights = weights - step
        if isinstance(problem, Regression):
            weights = project(weights, problem.radius, task.start)
        history.append(task.measure(weights))
    return np.array(history)


def l1_sign(rows: Tensor, out: Tensor | None = None) -> Tensor:
    """Compress every row: what :class:`fl_bgmd.compression.Sign` decodes to, row by row.

    ``out``, which may be ``rows``, takes the result.
    """
    sent = torch.empty_like(rows) if out is None else out
    sizes = torch.empty_like(rows[0])  # row by row, what is in between stays in the cache
    for row, compressed in zip(rows, sent, strict=True):
        scale = torch.abs(row, out=sizes).mean(dtype=torch.float64).float()
        torch.add(row, 0.0, out=compressed)  # which leaves no -0: zeros count as positive
        torch.copysign(scale, compressed, out=compressed)
    return sent


def thresholded(rows: Tensor, dropped: int) -> Tensor:
    """Average the rows but for the ``dropped`` ones of largest norm."""
    if dropped == 0:
        return mean(rows).vector
    return norm_threshold(rows, drop_fraction=dropped / len(rows)).vector


def reproduce(
    figures: FigureSet, folder: Path, *, seeds: int, jobs: int, done: Done
) -> dict[str, dict[str, Array]]:
    """Run all figures' curves for ``seeds`` seeds; write ``curves.jsonl``, a PNG each, a table.

    Runs that ``curves.jsonl`` already holds are not run again. ``done`` is called with a line after
    each run. Returns the curves of each figure by label, (seeds, iterations + 1).
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, wanted = folder / "curves.jsonl", figures.runs(seeds)
    found = _read(path) if path.exists() else {}
    problem = figures.problem
    missing = [run for run in wanted if _key(*run, problem) not in found]
    with path.open("a", encoding="utf-8") as lines:
        lines.write("\n" if lines.tell() else "")  # after a line that was cut off
        for number, (run, history) in enumerate(_run_all(missing, jobs, problem), 1):
            found[_key(*run, problem)] = history
            line = {**_identity(*run, problem), "history": history.tolist()}
            lines.write(json.dumps(line) + "\n")
            lines.flush()
            done(f"{number} of {len(missing)} runs")
    results = {
        figure: {
            curve.label: np.stack(
                [found[_key(_unlabeled(curve), seed, problem)] for seed in range(seeds)]
            )
            for curve in curves
        }
        for figure, (_, curves) in figures.figures.items()
    }
    for figure, by_label in results.items():
        title = f"Ghosh et al., {figure.replace('-', ' ')}: {figures.figures[figure][0]}"
        _plot(folder / f"{figure}.png", title, problem.axis, by_label)
    _write_table(results, folder)
    return results


def _reproduce_named(name: str, folder: Path, *, seeds: int, jobs: int, done: Done) -> Path:
    reproduce(GHOSH[name], folder, seeds=seeds, jobs=jobs, done=done)
    return folder / "table.md"


reproduce_regression = partial(_reproduce_named, "ghosh-regression")
"""Draw Figures 1, 2, 3, 6a and 7a; return the table."""

reproduce_mnist = partial(_reproduce_named, "ghosh-mnist")
"""Draw Figures 4, 5, 6b and 7b; return the table."""

reproduce_full_batch = partial(_reproduce_named, "ghosh-mnist-full-batch")
"""Draw the same with each worker's gradient on all of its examples; return the table."""


def _unlabeled(curve: Curve) -> Curve:
    return replace(curve, label="")


def _identity(curve: Curve, seed: int, problem: Problem) -> dict[str, Any]:
    """Return what a run's curve depends on."""
    return {"curve": asdict(curve), "seed": seed, "problem": asdict(problem)}


def _key(curve: Curve, seed: int, problem: Problem) -> str:
    return json.dumps(_identity(curve, seed, problem), sort_keys=True)


def _read(path: Path) -> dict[str, Array]:
    """Return the curves of earlier runs; a line that was cut off is left out."""
    found = {}
    for text in filter(None, path.read_text(encoding="utf-8").splitlines()):
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        history = line.pop("history")
        found[json.dumps(line, sort_keys=True)] = np.array(history)
    return found


def _run_all(
    runs: Sequence[tuple[Curve, int]], jobs: int, problem: Problem
) -> Iterator[tuple[tuple[Curve, int], Array]]:
    if jobs == 1 or not runs:
        for run in runs:
            yield run, run_curve(*run, problem)
        return
    from ..runner import pool  # workers need none of it

    with pool(jobs) as workers:
        curves, seeds = zip(*runs, strict=True)
        yield from zip(
            runs, workers.map(run_curve, curves, seeds, [problem] * len(runs)), strict=True
        )


def _plot(path: Path, title: str, axis: str, by_label: dict[str, Array]) -> None:
    from ..report.tables import counted

    figure, [[panel]] = panels(1, 1, 6.5, 4.2)
    for label, histories in by_label.items():
        band(panel, range(histories.shape[1]), histories, label, least=1e-12)
    seeds = len(next(iter(by_label.values())))
    panel.set(
        title=f"{title} ({counted(seeds, 'seed')})",
        xlabel="iteration",
        ylabel=axis,
        yscale="log",
    )
    panel.title.set_fontsize(10)
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
    save(figure, path)


def _write_table(results: dict[str, dict[str, Array]], folder: Path) -> None:
    import pandas as pd

    from ..report.tables import write_markdown

    lines = []
    for figure, by_label in results.items():
        for label, histories in by_label.items():
            early, last = histories[:, min(50, histories.shape[1] - 1)], histories[:, -1]
            lines.append(
                {
                    "figure": figure,
                    "curve": label,
                    "after 50": f"{early.mean():.2g}",
                    "at the end": f"{last.mean():.2g}",
                    "standard deviation": f"{last.std():.1g}",
                    "seeds": str(len(last)),
                }
            )
    write_markdown(folder, pd.DataFrame(lines))
