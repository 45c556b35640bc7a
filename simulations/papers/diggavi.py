"""Data and Diggavi, Theorems 1, 2 and 5: the error that is left, against kappa, b and epsilon.

R workers hold different data; a strongly convex and a non-convex objective; Algorithm 1 with this
library's spectral filter, Algorithm 2 with the server's random k coordinates. The theorems bound
the error that remains by ``Gamma = 9 sigma^2 / ((1 - eps) b R) + 9 kappa^2 + 9 Upsilon^2`` with
``Upsilon^2 = O(sigma_0^2 eps)`` and ``sigma_0^2 = 24 sigma^2 / (b eps') (1 + d / ((1 - eps) R)) +
16 kappa^2``; Theorem 5 (k coordinates) has ``d G^2 / k`` for sigma^2 and k for d, Theorem 2 (full
batches) ``6 kappa^2 + 6 kappa^2 eps``. sigma, kappa and G (Assumptions 1 and 2, Lemma 2) are
measured on the data, here and on label-sorted shards of MNIST. The paper has no experiments:
problem, sizes and attack are this project's.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from fl_bgmd.aggregators import (
    Aggregate,
    SpectralFilter,
    mean,
    project,
    spectral_filter,
    theoretical_sigma0,
)
from fl_bgmd.attacks import alie
from fl_bgmd.data import load, normalize, partition

from ..report.drawing import Done, panels, save
from ..report.tables import write_markdown

OBJECTIVES = ("strongly convex", "non-convex")
EPSILON_SLACK = 0.05
"""epsilon' of the theorems: any constant above 0 with epsilon <= 1/4 - epsilon'."""

RIDGE = 0.02
DIVERGED = 1e6
"""An error above it is no error that is left: the iterates run away."""


@dataclass(frozen=True)
class Setup:
    """One run.

    Attributes
    ----------
    objective : {"strongly convex", "non-convex"}
        Least squares, or least squares of a sigmoid of the same linear model with a ridge of
        :data:`RIDGE`: without it a model driven far away would have a gradient of zero.
    workers, examples, dimensions : int
        R, n_r and d.
    spread : float
        Each worker's objective has a linear term of its own, of this length; they sum to zero. So
        kappa grows, sigma and the common objective stay: what each theorem varies alone.
    noise : float
        Standard deviation of the labels' noise.
    batch_size : int
        b, without replacement.
    hostile : int
        The first workers collude (ALIE): they send their mean minus ``deviations`` standard
        deviations of theirs in every coordinate.
    kept : int
        k of Algorithm 2, 0 for Algorithm 1.
    rule : {"filter", "saddle", "literal", "mean"}
        RGE with the mean for a reconstruction and an estimate of sigma_0; with the paper's saddle
        point; with the sigma_0 of Equation 12; or plain averaging.
    feedback : bool
        Whether the workers of Algorithm 2 keep what they did not send and add it to what follows.
    own_step : bool
        Whether Algorithm 2 takes the step of Theorem 5; else k/d of it.
    radius : float
        C is the ball of that many distances of the optimum around the start; 0 for all of R^d.
    iterations : int
        T; the error is averaged over the last quarter.
    """

    objective: str = "strongly convex"
    workers: int = 40
    examples: int = 200
    dimensions: int = 50
    spread: float = 0.0
    noise: float = 1.0
    batch_size: int = 10
    hostile: int = 6
    deviations: float = 1.0
    kept: int = 0
    feedback: bool = False
    rule: str = "filter"
    own_step: bool = False
    radius: float = 0.0
    iterations: int = 300


@dataclass(frozen=True)
class Outcome:
    """What a run measured.

    Attributes
    ----------
    error : float
        What is left; infinite where it diverged.
    sigma, kappa, moment : float
        Those of :meth:`Problem.constants` at the end.
    caught, lost : float
        The share of the hostile and of the honest rows that the filter dropped, of all iterations.
    gamma, bound : float
        Gamma of the theorem, with 1 for the constant that its O leaves open, and what it bounds
        the error by.
    """

    error: float
    sigma: float
    kappa: float
    moment: float
    caught: float
    lost: float
    gamma: float
    bound: float


class Problem:
    """The workers' data, their gradients, and the constants of the objective."""

    def __init__(self, setup: Setup, seed: int) -> None:
        self.setup = setup
        self.generator = torch.Generator().manual_seed(seed)
        shape = (setup.workers, setup.examples, setup.dimensions)
        self.features = self._normal(*shape)
        target = self._normal(setup.dimensions) / math.sqrt(setup.dimensions)
        own = self._normal(setup.workers // 2, setup.dimensions)
        own = setup.spread * own / own.norm(dim=1, keepdim=True)
        self.shifts = torch.cat([own, -own])[
            torch.randperm(setup.workers, generator=self.generator)
        ]
        linear = self.features @ target
        noise = setup.noise * self._normal(setup.workers, setup.examples)
        self.is_convex = setup.objective == "strongly convex"
        self.labels = linear + noise if self.is_convex else torch.sigmoid(linear) + 0.1 * noise
        flat = self.features.flatten(0, 1)
        eigenvalues = torch.linalg.eigvalsh(flat.T @ flat / len(flat))
        self.strong = float(eigenvalues[0])
        # The second derivative of (sigmoid(u) - y)^2 / 2 is below 1/16 + 0.0963 |s - y|; the
        # labels lie within 0..1 but for their noise.
        self.ridge = 0.0 if self.is_convex else RIDGE
        self.smooth = float(eigenvalues[-1]) * (1.0 if self.is_convex else 0.16) + self.ridge
        self.optimum = torch.linalg.lstsq(flat, self.labels.flatten()).solution

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def gradients(self, x: Tensor, batch_size: int | None) -> Tensor:
        """Return every worker's gradient on a batch of its data, all of it for None, (R, d)."""
        features, labels = self.features, self.labels
        if batch_size is not None and batch_size < labels.shape[1]:
            keys = torch.rand(labels.shape, generator=self.generator)
            chosen = keys.topk(batch_size, dim=1).indices
            features = features.gather(1, chosen[..., None].expand(-1, -1, features.shape[2]))
            labels = labels.gather(1, chosen)
        slopes = self._slopes(features @ x, labels)
        data = torch.einsum("rn,rnd->rd", slopes, features) / labels.shape[1]
        return data + self.shifts + self.ridge * x

    def _slopes(self, scores: Tensor, labels: Tensor) -> Tensor:
        if self.is_convex:
            return scores - labels
        value = torch.sigmoid(scores)
        return (value - labels) * value * (1 - value)

    def constants(self, x: Tensor) -> tuple[float, float, float]:
        """Return the smallest sigma, kappa (Assumptions 1 and 2) and G (Lemma 2) at ``x``."""
        local = self.gradients(x, None)
        slopes = self._slopes(self.features @ x, self.labels)
        single = slopes[..., None] * self.features + self.shifts[:, None] + self.ridge * x
        sigma = (single - local[:, None]).square().sum(2).mean(1).max()
        kappa = (local - local.mean(0)).square().sum(1).max()
        moment = single.square().sum(2).mean(1).max()
        return math.sqrt(float(sigma)), math.sqrt(float(kappa)), math.sqrt(float(moment))

    def error(self, x: Tensor) -> float:
        """Return what the theorem bounds: the squared distance, or the squared gradient."""
        if self.is_convex:
            return float((x - self.optimum).square().sum())
        return float(self.gradients(x, None).mean(0).square().sum())

    @property
    def step(self) -> float:
        """The theorems' step size: mu / L^2 or 1 / (4 L)."""
        return self.strong / self.smooth**2 if self.is_convex else 1 / (4 * self.smooth)


def run_setup(setup: Setup, seed: int) -> Outcome:
    """Run Algorithm 1 or 2 and measure; ``error`` is infinite where it diverged."""
    problem = Problem(setup, seed)
    x = torch.zeros(setup.dimensions, dtype=torch.float64)
    d, k = setup.dimensions, setup.kept
    # The paper's step makes Algorithm 2 diverge where C is the whole space: a chosen coordinate
    # moves by d/k times as much.
    step = problem.step * (k / d if k and not setup.own_step else 1.0)
    sigma0 = _literal_sigma0(problem) if setup.rule == "literal" else None
    errors: list[float] = []
    dropped: list[tuple[float, float]] = []
    unsent = torch.zeros(setup.workers, d, dtype=torch.float64)
    for iteration in range(setup.iterations):
        sent = problem.gradients(x, setup.batch_size)
        chosen = torch.randperm(d, generator=problem.generator)[:k] if k else torch.arange(d)
        if setup.feedback:
            unsent += sent
            sent = unsent[:, chosen]  # not times d/k: what is left out comes later
            unsent[:, chosen] = 0.0
        else:
            sent = sent[:, chosen] * (d / k if k else 1.0)
        if setup.hostile:
            sent[: setup.hostile] = alie(sent[: setup.hostile], setup.workers, setup.deviations)
        result = _aggregate(sent, setup, sigma0)
        if isinstance(result, SpectralFilter):
            gone = (~result.kept).double()
            honest = float(gone[setup.hostile :].mean())
            dropped.append((float(gone[: setup.hostile].mean()) if setup.hostile else 0.0, honest))
        x[chosen] -= step * result.vector
        if setup.radius:
            x = project(x, setup.radius * float(problem.optimum.norm()))
        if not x.isfinite().all():
            errors = [math.inf]
            break
        if iteration >= 0.75 * setup.iterations:
            errors.append(problem.error(x))
    constants = problem.constants(x if x.isfinite().all() else problem.optimum)
    gamma = theorem_gamma(setup, *constants)
    scale = 2 * problem.smooth**2 / problem.strong**4 if problem.is_convex else 1.0
    caught, lost = np.mean(dropped, axis=0).tolist() if dropped else (0.0, 0.0)
    return Outcome(float(np.mean(errors)), *constants, caught, lost, gamma, scale * gamma)


def _literal_sigma0(problem: Problem) -> float:
    """Return Equation 12's of what is known of C: the larger constants of start and optimum."""
    at = [problem.constants(x) for x in (torch.zeros_like(problem.optimum), problem.optimum)]
    sigma, kappa, moment = (max(each) for each in zip(*at, strict=True))
    return _sigma0(problem.setup, sigma, kappa, moment)


def _aggregate(sent: Tensor, setup: Setup, sigma0: float | None) -> Aggregate:
    if setup.rule == "mean":
        return mean(sent)
    return spectral_filter(
        sent,
        byzantine_fraction=setup.hostile / setup.workers,
        sigma0=sigma0,
        method="saddle" if setup.rule == "saddle" else "mean",
        slack=EPSILON_SLACK,
    )


def _sigma0(setup: Setup, sigma: float, kappa: float, moment: float) -> float:
    """Return Equation 12's, of Algorithm 2 that of Theorem 4."""
    d, k = setup.dimensions, setup.kept
    return theoretical_sigma0(
        math.sqrt(d / k) * moment if k else sigma,
        kappa,
        batch_size=setup.batch_size,
        num_clients=setup.workers,
        dimensions=k or d,
        byzantine_fraction=setup.hostile / setup.workers,
        slack=EPSILON_SLACK,
    )


def theorem_gamma(setup: Setup, sigma: float, kappa: float, moment: float) -> float:
    """Return Gamma of Theorem 1, 2 (full batches) or 5, with 1 for the constant of its O."""
    share = setup.hostile / setup.workers
    if setup.batch_size >= setup.examples and not setup.kept:
        return 6 * kappa**2 * (1 + share)
    share += EPSILON_SLACK
    good = (1 - share) * setup.workers
    spread = setup.dimensions / setup.kept * moment**2 if setup.kept else sigma**2
    sigma0 = _sigma0(setup, sigma, kappa, moment)
    return 9 * spread / setup.batch_size / good + 9 * kappa**2 + 9 * sigma0**2 * share


SWEEPS: dict[str, tuple[str, Sequence[float], Setup]] = {
    "kappa": ("spread", (0.0, 0.25, 0.5, 1.0, 2.0, 4.0), Setup(batch_size=50)),
    "b": ("batch_size", (1, 2, 5, 10, 20, 50), Setup()),
    "epsilon": ("hostile", (0, 2, 4, 6, 8), Setup()),
}
"""What is varied; epsilon up to 1/4 - epsilon'."""

RULES: dict[str, dict[str, Any]] = {
    "Algorithm 1, 1 deviation": {},
    "Algorithm 1, 5 deviations": {"deviations": 5.0},
    "saddle point, 5 deviations": {"rule": "saddle", "deviations": 5.0, "iterations": 60},
    "sigma0 of Equation 12, 5 deviations": {"rule": "literal", "deviations": 5.0},
    "full batches, 5 deviations": {"batch_size": 200, "deviations": 5.0},
    "Algorithm 2, k = d/5, 1 deviation": {"kept": 10, "iterations": 750},
    "the same with error feedback": {"kept": 10, "iterations": 750, "feedback": True},
    "Algorithm 2, Theorem 5's step, C a ball": {"kept": 10, "own_step": True, "radius": 2.0},
    "averaging, 5 deviations": {"rule": "mean", "deviations": 5.0},
}


def reproduce_diggavi(folder: Path, *, seeds: int, done: Done) -> Path:
    """Run the sweeps; write ``runs.jsonl``, two figures and ``table.md``; return the last.

    ``done`` is called with a line after each point.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[tuple[str, str, str, float], list[Outcome]] = {}
    with (folder / "runs.jsonl").open("w", encoding="utf-8") as lines:
        for objective in OBJECTIVES:
            for sweep, (name, values, base) in SWEEPS.items():
                for rule, own in RULES.items():
                    for value in values:
                        keys: dict[str, Any] = {"objective": objective, name: value, **own}
                        setup = replace(base, **keys)
                        outcomes = [run_setup(setup, seed) for seed in range(seeds)]
                        found[objective, sweep, rule, value] = outcomes
                        for seed, outcome in enumerate(outcomes):
                            line = {"seed": seed, "sweep": sweep, **asdict(setup)}
                            lines.write(json.dumps(line | asdict(outcome)) + "\n")
                        done(f"{objective}, {sweep} {value:g}, {rule}")
    _plot(found, folder)
    _plot_bounds(found, folder)
    return _write_table(found, folder, seeds)


Found = dict[tuple[str, str, str, float], list[Outcome]]


def _middle(outcomes: Sequence[Outcome], name: str) -> float:
    return float(np.mean([getattr(outcome, name) for outcome in outcomes]))


def _axis(found: Found, objective: str, sweep: str, rule: str) -> tuple[list[float], list[float]]:
    """Return what a sweep is drawn against (kappa as measured, b, or epsilon) and the errors.

    Points that diverged are left out.
    """
    setup = SWEEPS[sweep][2]
    x, y = [], []
    for value in SWEEPS[sweep][1]:
        outcomes = found[objective, sweep, rule, value]
        place = {"kappa": _middle(outcomes, "kappa"), "epsilon": value / setup.workers}
        if _middle(outcomes, "error") < DIVERGED:
            x.append(place.get(sweep, value))
            y.append(_middle(outcomes, "error"))
    return x, y


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Return the slope of log y against log x."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def _plot(found: Found, folder: Path) -> None:
    figure, grid = panels(2, 3, 3.7, 3.1)
    for i, objective in enumerate(OBJECTIVES):
        for j, sweep in enumerate(SWEEPS):
            panel = grid[i, j]
            for rule in RULES:
                panel.plot(*_axis(found, objective, sweep, rule), "o-", label=rule, ms=4)
            panel.set(yscale="log", xlabel=f"{sweep} (measured)" if sweep == "kappa" else sweep)
            if sweep != "epsilon":
                panel.set_xscale("log")
            panel.grid(alpha=0.3, which="both")
        what = "squared distance" if i == 0 else "squared gradient"
        grid[i, 0].set_ylabel(f"{objective}: {what}")
    grid[0, 0].legend(fontsize=7)
    figure.suptitle("Error that is left under ALIE (Data and Diggavi, Theorems 1 and 5)")
    save(figure, folder / "error-floor.png")


def _plot_bounds(found: Found, folder: Path) -> None:
    figure, grid = panels(1, 2, 4.2, 3.4)
    for panel, objective in zip(grid[0], OBJECTIVES, strict=True):
        for place, (theorem, rule) in enumerate(BOUNDS.items()):
            each = [found[objective, "kappa", rule, value] for value in SWEEPS["kappa"][1]]
            kappa = [_middle(outcomes, "kappa") for outcomes in each]
            for name, style in (("error", "o-"), ("bound", "s--")):
                values = [_middle(outcomes, name) for outcomes in each]
                label = f"{theorem}: {rule}" if name == "error" else None
                panel.plot(kappa, values, style, color=f"C{place}", label=label, ms=4)
        panel.set(xscale="log", yscale="log", xlabel="kappa (measured)", title=objective)
        panel.grid(alpha=0.3, which="both")
    grid[0, 0].legend(fontsize=6)
    figure.suptitle("Data and Diggavi: the error that is left (solid) and its bound (dashed)")
    save(figure, folder / "bounds.png")


def _write_table(found: Found, folder: Path, seeds: int) -> Path:
    errors, bounds, slopes = [], [], []
    for objective in OBJECTIVES:
        for sweep, (name, values, _) in SWEEPS.items():
            for value in values:
                each = {rule: found[objective, sweep, rule, value] for rule in RULES}
                first = next(iter(each.values()))
                place = {"objective": objective, "sweep": f"{sweep} ({name})"}
                place["value"] = f"{value:g}"
                line = {key: f"{_middle(first, key):.3g}" for key in ("sigma", "kappa", "moment")}
                for theorem, rule in BOUNDS.items():
                    line[theorem] = f"{_middle(each[rule], 'bound'):.3g}"
                bounds.append(place | line)
                line = {}
                for rule, outcomes in each.items():
                    error = _middle(outcomes, "error")
                    line[rule] = f"{error:.3g}" if error < DIVERGED else "diverged"
                errors.append(place | line)
            for rule in RULES:
                x, y = _axis(found, objective, sweep, rule)
                if sweep == "kappa":  # where kappa is more than sampling makes it
                    x, y = x[-3:], y[-3:]
                elif sweep == "epsilon":
                    x, y = x[1:], y[1:]
                if len(x) > 1 and (sweep, rule) != ("b", "full batches, 5 deviations"):
                    line = {"objective": objective, "error against": sweep, "rule": rule}
                    slopes.append({**line, "slope": f"{slope(x, y):.2f}"})
    return write_markdown(
        folder,
        f"Seeds: {seeds}. The error that is left:",
        pd.DataFrame(errors),
        "Its bounds, with 1 for the constant of their O, and what they are made of:",
        pd.DataFrame(bounds),
        "Rows that the filter dropped, % of the hostile and of the honest ones:",
        pd.DataFrame(_dropped(found)),
        "Slopes in log-log scale:",
        pd.DataFrame(slopes),
        "sigma and kappa of softmax regression on MNIST, 10 clients, and the sigma0 of Equation 12 "
        "for b = 64, epsilon = 0.2 and epsilon' = 0.05, beside the largest standard deviation of "
        "the clients' gradients in any direction:",
        pd.DataFrame(on_shards()),
        "kappa and sigma of least squares on normal data at the optimum, 40 workers, n examples "
        "each, beside what they grow like in Theorems 6 and 7 where the workers' distributions "
        "differ by kappa_mean:",
        pd.DataFrame(on_samples(seeds)),
    )


BOUNDS = {
    "Theorem 1": "Algorithm 1, 1 deviation",
    "Theorem 2": "full batches, 5 deviations",
    "Theorem 5": "Algorithm 2, k = d/5, 1 deviation",
}
"""What bounds the error of which rule."""


def _dropped(found: Found) -> list[dict[str, str]]:
    """Return the rows of the table of what the filters dropped, where somebody was hostile."""
    lines = []
    for objective in OBJECTIVES:
        for rule, own in RULES.items():
            if own.get("rule") == "mean":
                continue
            all_of = [
                outcome
                for (about, sweep, which, value), outcomes in found.items()
                if (about, which) == (objective, rule) and not (sweep == "epsilon" and value == 0)
                for outcome in outcomes
            ]
            line = {"objective": objective, "rule": rule}
            for name in ("caught", "lost"):
                line[name] = f"{100 * _middle(all_of, name):.1f}"
            lines.append(line)
    return lines


def on_shards(num_clients: int = 10, steps: int = 50, batch_size: int = 64) -> list[dict[str, str]]:
    """Measure sigma and kappa of softmax regression on MNIST, at the start and after some steps."""
    dataset = load("mnist")
    images = normalize(dataset.train_images, dataset).flatten(1).double()
    images = torch.cat([images, torch.ones(len(images), 1, dtype=torch.float64)], dim=1)
    labels = torch.from_numpy(dataset.train_labels.copy())
    targets = torch.nn.functional.one_hot(labels, dataset.num_classes).double()
    weights, lines = torch.zeros(images.shape[1], dataset.num_classes, dtype=torch.float64), []
    for after in (0, steps):
        for _ in range(after):
            slopes = torch.softmax(images @ weights, 1) - targets
            weights = weights - 0.01 * images.T @ slopes / len(images)
        slopes = torch.softmax(images @ weights, 1) - targets
        single = slopes.square().sum(1) * images.square().sum(1)  # squared norms of the gradients
        for scheme in ("iid", "shards:80"):
            shares = [torch.from_numpy(s) for s in partition(labels, num_clients, scheme=scheme)]
            local = torch.stack([_gradient(images, slopes, share) for share in shares])
            seen = torch.stack([_gradient(images, slopes, share[:batch_size]) for share in shares])
            variances = [
                float(single[share].mean() - row.square().sum())
                for share, row in zip(shares, local, strict=True)
            ]
            sigma = math.sqrt(max(variances))
            kappa = float((local - local.mean(0)).norm(dim=1).max())
            sigma0 = theoretical_sigma0(
                sigma,
                kappa,
                batch_size=batch_size,
                num_clients=num_clients,
                dimensions=weights.numel(),
                byzantine_fraction=0.2,
                slack=EPSILON_SLACK,
            )
            spread = float(torch.linalg.matrix_norm(seen - seen.mean(0), 2)) / num_clients**0.5
            line = {"partition": scheme, "steps": str(after)}
            for name, value in (("sigma", sigma), ("kappa", kappa), ("sigma0", sigma0)):
                line[name] = f"{value:.3g}"
            lines.append({**line, "largest deviation": f"{spread:.3g}"})
    return lines


def on_samples(seeds: int) -> list[dict[str, str]]:
    """Measure kappa and sigma against what Theorems 6 and 7 say of samples of n in R^d."""
    base, lines = Setup(), []
    sizes = [(n, base.dimensions) for n in (50, 200, 800, 3200)]
    for mean_distance in (0.0, 1.0):
        for n, d in [*sizes, *((base.examples, d) for d in (10, 250))]:
            setup = replace(base, examples=n, dimensions=d, spread=mean_distance)
            problems = [Problem(setup, seed) for seed in range(seeds)]
            measured = [problem.constants(problem.optimum) for problem in problems]
            sigma, kappa, _ = np.mean(measured, axis=0)
            sampling = math.sqrt(d * math.log(n * d) / n)
            lines.append(
                {
                    "kappa_mean": f"{mean_distance:g}",
                    "n": str(n),
                    "d": str(d),
                    "kappa": f"{kappa:.2f}",
                    "(kappa - kappa_mean) / sqrt(d log(n d) / n)": (
                        f"{(kappa - mean_distance) / sampling:.2f}"
                    ),
                    "sigma^2 / (d log d)": f"{sigma**2 / (d * math.log(d)):.2f}",
                }
            )
    return lines


def _gradient(images: Tensor, slopes: Tensor, share: Tensor) -> Tensor:
    """Return the mean gradient of some examples, flat."""
    return (images[share].T @ slopes[share]).flatten() / len(share)
