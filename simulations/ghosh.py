"""The regression experiment of Ghosh et al., Section 8: Figures 1, 2, 3, 6a and 7a.

``b = A w*`` with standard normal ``A`` (N x d) and ``w*``, the rows of A shared out equally among m
workers, ``||w_t - w*||`` against t. All workers' gradients are computed together; compression,
error feedback, the workers' lies and the threshold are those of the algorithms, worker by worker,
with this library's rule. What the paper leaves open (step sizes, iterations) is in
:class:`Setup`.
"""

import json
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fl_bgmd.aggregators import mean, norm_threshold

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Setup:
    """The problem. N, d, m, the noise and the thresholds are the paper's, the rest is ours."""

    examples: int = 4000
    dimensions: int = 1000
    workers: int = 200
    noise_variance: float = 10.0
    step: float = 0.2
    sign_step: float = 0.01
    iterations: int = 250


@dataclass(frozen=True)
class Curve:
    """One line of a figure.

    Attributes
    ----------
    label : str
        In the legend.
    hostile : int
        Number of Byzantine workers, the first ones.
    dropped : int
        Number of workers that the threshold drops: the paper's beta m.
    compressor : {"l1-sign", "sign"}
        ``sign`` is signSGD with majority vote (Bernstein et al.), ``l1-sign`` the paper's.
    feedback : bool
        Algorithm 2 instead of Algorithm 1.
    attack : {"gaussian", "ascent"}
        N(0, 10 I) added to the gradient, or -0.9 times it.
    """

    label: str
    hostile: int
    dropped: int
    compressor: str = "l1-sign"
    feedback: bool = False
    attack: str = "gaussian"


FIGURES: dict[str, tuple[str, tuple[Curve, ...]]] = {
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
            Curve("10 hostile, majority vote", 10, 0, compressor="sign"),
            Curve("20 hostile, threshold 22", 20, 22),
            Curve("20 hostile, majority vote", 20, 0, compressor="sign"),
        ),
    ),
    "figure-3": (
        "error feedback",
        (
            Curve("10 hostile, Algorithm 1", 10, 12),
            Curve("10 hostile, Algorithm 2", 10, 12, feedback=True),
            Curve("20 hostile, Algorithm 1", 20, 22),
            Curve("20 hostile, Algorithm 2", 20, 22, feedback=True),
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


def run_curve(curve: Curve, seed: int, setup: Setup = Setup()) -> Array:
    """Return ``||w_t - w*||`` for t = 0 .. iterations, (iterations + 1,)."""
    draw = torch.Generator().manual_seed(seed)
    m, share = setup.workers, setup.examples // setup.workers
    data = torch.randn(m, share, setup.dimensions, generator=draw)
    target = torch.randn(setup.dimensions, generator=draw)
    labels = data @ target
    weights = torch.zeros(setup.dimensions)
    errors = torch.zeros(m, setup.dimensions)
    history = [float((weights - target).norm())]
    aggregate: Callable[[Tensor], Tensor] = partial(_thresholded, dropped=curve.dropped)
    for _ in range(setup.iterations):
        gradients = torch.bmm((data @ weights - labels)[:, None, :], data)[:, 0, :] / share
        lies = gradients[: curve.hostile]
        if curve.attack == "gaussian":
            lies += setup.noise_variance**0.5 * torch.randn(lies.shape, generator=draw)
        else:
            lies *= -0.9
        if curve.compressor == "sign":
            # Every worker a vote in every coordinate (signSGD with majority vote).
            step = setup.sign_step * torch.sign(gradients).sum(0).sign()
        elif curve.feedback:
            # Algorithm 2 with the step size once: as printed it appears in p and again in the
            # update, where Algorithm 1 and Karimireddy et al. have it once.
            wanted = setup.step * gradients + errors
            sent = l1_sign(wanted)
            errors = wanted - sent
            step = aggregate(sent)
        else:
            step = setup.step * aggregate(l1_sign(gradients))
        weights = weights - step
        history.append(float((weights - target).norm()))
    return np.array(history)


def l1_sign(rows: Tensor) -> Tensor:
    """Compress every row: what :class:`fl_bgmd.compression.Sign` decodes to, row by row."""
    scale = rows.abs().double().mean(1, keepdim=True).float()
    return torch.where(rows >= 0, scale, -scale)


def _thresholded(rows: Tensor, dropped: int) -> Tensor:
    """Average the rows but for the ``dropped`` ones of largest norm."""
    if dropped == 0:
        return mean(rows).vector
    return norm_threshold(rows, drop_fraction=dropped / len(rows)).vector


def reproduce(
    folder: Path,
    *,
    seeds: int,
    jobs: int,
    done: Callable[[], None],
    setup: Setup = Setup(),
) -> dict[str, dict[str, Array]]:
    """Run all figures' curves for ``seeds`` seeds; write ``curves.jsonl``, a PNG each, a table.

    ``done`` is called after each of the :func:`count_runs` runs. Returns the curves of each
    figure by label, (seeds, iterations + 1).
    """
    folder.mkdir(parents=True, exist_ok=True)
    curves = _distinct()
    found: dict[Curve, list[Array]] = {curve: [] for curve in curves}
    tasks = [(curve, seed) for curve in curves for seed in range(seeds)]
    with (folder / "curves.jsonl").open("w", encoding="utf-8") as lines:
        for (curve, seed), history in _run_all(tasks, jobs, setup):
            found[curve].append(history)
            line = {**curve.__dict__, "seed": seed, "distance": history.tolist()}
            lines.write(json.dumps(line) + "\n")
            done()
    results = {
        figure: {curve.label: np.stack(found[_anonymous(curve)]) for curve in wanted}
        for figure, (_, wanted) in FIGURES.items()
    }
    for figure, by_label in results.items():
        _plot(figure, by_label, folder)
    _write_table(results, folder)
    return results


def count_runs(seeds: int) -> int:
    """Return how many runs the figures take: curves that appear twice run once."""
    return len(_distinct()) * seeds


def _anonymous(curve: Curve) -> Curve:
    return Curve("", **{k: v for k, v in curve.__dict__.items() if k != "label"})


def _distinct() -> list[Curve]:
    return list(dict.fromkeys(_anonymous(c) for _, curves in FIGURES.values() for c in curves))


def _run_all(
    tasks: Sequence[tuple[Curve, int]], jobs: int, setup: Setup
) -> Iterator[tuple[tuple[Curve, int], Array]]:
    if jobs == 1:
        for task in tasks:
            yield task, run_curve(*task, setup)
        return
    with ProcessPoolExecutor(
        jobs,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(max(1, torch.get_num_threads() // jobs),),
    ) as pool:
        curves, seeds = zip(*tasks, strict=True)
        yield from zip(tasks, pool.map(run_curve, curves, seeds, [setup] * len(tasks)), strict=True)


def _plot(figure: str, by_label: dict[str, Array], folder: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    canvas, axes = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
    for label, histories in by_label.items():
        middle, spread = histories.mean(0), histories.std(0)
        [line] = axes.plot(middle, label=label, lw=1.8)
        axes.fill_between(
            range(len(middle)),
            np.maximum(middle - spread, 1e-12),
            middle + spread,
            alpha=0.2,
            color=line.get_color(),
        )
    seeds = len(next(iter(by_label.values())))
    axes.set(
        title=f"Ghosh et al., {figure.replace('-', ' ')}: {FIGURES[figure][0]} ({seeds} seeds)",
        xlabel="iteration",
        ylabel="||w - w*||",
        yscale="log",
    )
    axes.title.set_fontsize(10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    canvas.savefig(folder / f"{figure}.png", dpi=140)
    plt.close(canvas)


def _write_table(results: dict[str, dict[str, Array]], folder: Path) -> None:
    lines = ["| figure | curve | after 50 | at the end | standard deviation | seeds |"]
    lines.append("|---|---|---:|---:|---:|---:|")
    for figure, by_label in results.items():
        for label, histories in by_label.items():
            early, last = histories[:, min(50, histories.shape[1] - 1)], histories[:, -1]
            lines.append(
                f"| {figure} | {label} | {early.mean():.2g} | {last.mean():.2g} | "
                f"{last.std():.1g} | {len(last)} |"
            )
    (folder / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
