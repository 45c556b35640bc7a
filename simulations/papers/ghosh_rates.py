"""Ghosh et al., Equations 2 to 9: the statistical error that is left, against n, m and alpha.

Least squares of noisy labels on normal data, of which the common gradient is ``w - w*``: what is
left of its square is what Theorem 1 bounds by ``d^2 (alpha^2 / n + (1 - delta) / n + 1 / (m n))``
(Equation 5), and Theorem 3 with error feedback by ``alpha^2 d^2 / n + alpha^2 (1 - delta) sigma^2 /
delta + d^2 / (m n)``. Problem, sizes and lie are this project's; the paper measures none.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..report.drawing import Done, panels, save
from .diggavi import slope
from .ghosh import l1_sign, thresholded


@dataclass(frozen=True)
class Sample:
    """One run of Algorithm 1 or 2.

    Attributes
    ----------
    workers, examples, dimensions : int
        m, n of each worker, and d.
    share : float
        alpha. The hostile workers all send one row: a fixed direction, as long as the median
        honest gradient, so that no threshold sees it. As many are dropped and two more.
    compressed : bool
        Whether gradients are sent as l1-sign.
    feedback : bool
        Whether workers add what was not sent to what follows (Algorithm 2).
    step : float
        The step size; the objective's L is 1.
    iterations : int
        T; the error is that of the mean of the last quarter.
    """

    workers: int = 40
    examples: int = 100
    dimensions: int = 20
    share: float = 0.1
    compressed: bool = False
    feedback: bool = False
    step: float = 0.3
    iterations: int = 200

    @property
    def hostile(self) -> int:
        """How many workers lie."""
        return round(self.share * self.workers)


def left(sample: Sample, seed: int) -> float:
    """Return the squared distance from the optimum that is left."""
    generator = torch.Generator().manual_seed(seed)
    m, n, d = sample.workers, sample.examples, sample.dimensions
    target = torch.randn(d, generator=generator)
    features = torch.randn(m, n, d, generator=generator)
    labels = features @ target + torch.randn(m, n, generator=generator)
    squares = torch.einsum("mni,mnj->mij", features, features) / n
    products = torch.einsum("mni,mn->mi", features, labels) / n
    weights, unsent, sum_of_last = torch.zeros(d), torch.zeros(m, d), torch.zeros(d)
    last = range(sample.iterations - sample.iterations // 4, sample.iterations)
    for iteration in range(sample.iterations):
        wanted = sample.step * (squares @ weights - products)
        length = wanted[sample.hostile :].norm(dim=1).median()
        wanted[: sample.hostile] = -length / d**0.5
        if sample.feedback:
            wanted += unsent
        sent = l1_sign(wanted) if sample.compressed else wanted
        unsent = wanted - sent
        weights = weights - thresholded(sent, sample.hostile and sample.hostile + 2)
        if iteration in last:
            sum_of_last += weights
    return float((sum_of_last / len(last) - target).square().sum())


SWEEPS: dict[str, tuple[str, Sequence[float], Sample]] = {
    "n": ("examples", (25, 100, 400, 1600), Sample()),
    "m, nobody lies": ("workers", (10, 40, 160, 640), Sample(share=0.0)),
    "m": ("workers", (10, 40, 160, 640), Sample()),
    "alpha": ("share", (0.05, 0.1, 0.15, 0.2), Sample(workers=400)),
}
"""What is varied: its name, its values, and all else."""

SENDERS: dict[str, dict[str, Any]] = {
    "whole gradients": {},
    "l1-sign": {"compressed": True},
    "l1-sign, error feedback": {"compressed": True, "feedback": True},
}


def _measured(seeds: int) -> Iterator[tuple[str, str, float, float]]:
    """Yield sweep, sender, value and the mean error."""
    for sweep, (name, values, base) in SWEEPS.items():
        for sender, how in SENDERS.items():
            for value in values:
                given: dict[str, Any] = {name: value, **how}
                sample = replace(base, **given)
                yield sweep, sender, value, float(np.mean([left(sample, s) for s in range(seeds)]))


def statistical_errors(folder: Path, *, seeds: int, done: Done) -> list[dict[str, str]]:
    """Measure the sweeps and draw them to ``rates.png``; return the rows of a table."""
    found: dict[tuple[str, str], dict[float, float]] = {}
    for sweep, sender, value, error in _measured(seeds):
        found.setdefault((sweep, sender), {})[value] = error
    done("the statistical errors")
    figure, grid = panels(1, len(SWEEPS), 3.2, 3.1, sharey=True)
    for panel, sweep in zip(grid[0], SWEEPS, strict=True):
        for sender in SENDERS:
            panel.plot(*zip(*found[sweep, sender].items(), strict=True), "o-", label=sender, ms=4)
        panel.set(xscale="log", yscale="log", xlabel=sweep)
        panel.grid(alpha=0.3, which="both")
    grid[0, 0].set_ylabel("squared distance left")
    grid[0, 0].legend(fontsize=7)
    figure.suptitle("Ghosh et al., Equation 5: the error that is left", fontsize=10)
    save(figure, folder / "rates.png")
    lines = []
    for (sweep, sender), errors in found.items():
        line = {"against": sweep, "sent": sender}
        line["error left"] = "; ".join(f"{error:.2g} at {at:g}" for at, error in errors.items())
        lines.append(line | {"slope": f"{slope(list(errors), list(errors.values())):.2f}"})
    return lines
