"""Bounds of the papers beside measurements, on problems where both can be computed.

Acharya et al., Lemmas 1 to 4 and Theorems 1 and 2 in their full versions (Appendix D, Equations 16
and 17): a quadratic, which satisfies the Polyak-Lojasiewicz condition, and BGMD as printed and with
this project's guarded memory; with local steps in :mod:`.local_steps`. Ghosh et al., Theorems 1 to
3: which compression they allow at which share of hostile workers, beside what holds up in the
regression of their Section 8; the statistical errors (Equations 2 to 9) are in
:mod:`.ghosh_rates`. The bounds of Data and Diggavi stand in ``data-diggavi``.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from fl_bgmd.aggregators import BlockMemory, block_geometric_median, geometric_median
from fl_bgmd.aggregators.norms import is_proven, least_delta, most_hostile

from ..report.drawing import Done, panels, save
from ..report.tables import write_markdown
from .ghosh import l1_sign, run_curve
from .ghosh_problems import Curve, Regression
from .ghosh_rates import statistical_errors
from .local_steps import fed_bgmd
from .quadratic import TOLERANCE, Quadratic, spread

Array = NDArray[np.float64]

# --------------------------------------------------------------------------- Acharya et al.


@dataclass(frozen=True)
class Descent:
    """What a run of BGMD measured in each iteration, (T,) each; the means over seeds of many.

    Attributes
    ----------
    moment : ndarray
        Mean squared norm of the good rows' gradients: what sigma^2 bounds (Equation 9).
    residual : ndarray
        ``|G - C(G)|_F^2 / |G|_F^2``, at most 1 - xi in the mean (Lemma 1).
    memory : ndarray
        Squared norm of the memory (Lemma 3).
    perturbation : ndarray
        Squared distance of the step from the mean of the good rows' blocks (Lemma 4).
    gradient : ndarray
        Squared norm of the gradient (Theorem 1).
    distance : ndarray
        Squared distance of the weighted mean of the iterates from the optimum (Theorem 2).
    """

    moment: Array
    residual: Array
    memory: Array
    perturbation: Array
    gradient: Array
    distance: Array


def descend(problem: Quadratic, seed: int) -> Descent:
    """Run BGMD on a quadratic."""
    generator = torch.Generator().manual_seed(seed)
    d, gamma = problem.dimensions, problem.step
    x, memory, lines = problem.start, None, []
    total, mean_x = 0.0, torch.zeros_like(x)
    weight = 1.0
    for _ in range(problem.iterations):
        gradient = problem.curvature * x
        rows = problem.noisy(gradient, generator)
        moment = float(rows[: problem.good].square().sum(1).mean())
        rows[problem.good :] *= -5
        total, mean_x = total + weight, mean_x + weight * x
        weight /= 1 - problem.mu / (8 * problem.smooth)
        waited = torch.zeros_like(x) if memory is None else memory.at(gamma).vector
        result = block_geometric_median(
            rows,
            memory,
            memory_rule=problem.memory,
            score="norm",
            block_fraction=problem.block / d,
            min_block_size=1,
            generator=generator,
            step_size=gamma,
        )
        memory = result.memory
        assert isinstance(memory, BlockMemory)
        said = (rows[: problem.good] + waited).mean(0)[result.block]
        apart = gamma * (result.vector[result.block] - said)
        x = x - gamma * result.vector
        lines.append(
            (
                moment,
                result.residual_ratio,
                gamma**2 * float(memory.vector.square().sum()),
                float(apart.square().sum()),
                float(gradient.square().sum()),
                float((mean_x / total).square().sum()),
            )
        )
    return Descent(*np.array(lines).T)


def averaged(problem: Quadratic, seeds: int) -> Descent:
    """Return the means over seeds: the expectations that the statements are about."""
    runs = [descend(problem, seed) for seed in range(seeds)]
    return Descent(
        *(
            np.mean([getattr(run, name) for run in runs], axis=0)
            for name in Descent.__dataclass_fields__
        )
    )


def bound_of_memory(problem: Quadratic, sigma: float, xi: float) -> float:
    """Return Lemma 3's, of the squared norm."""
    return float(4 * (1 - xi**2) * problem.step**2 * sigma**2 / xi**2)


def bound_of_perturbation(problem: Quadratic, sigma: float, xi: float, accuracy: float) -> float:
    """Return Lemma 4's, of the squared norm; ``accuracy`` is that of the geometric median."""
    apart = (1 - problem.alpha) ** 2
    noise = 96 * problem.step**2 * sigma**2 / apart * spread(xi)
    return float(noise + 2 * accuracy**2 / (problem.good**2 * apart))


def bound_of_gradient(
    problem: Quadratic, sigma: float, xi: float, accuracy: float, iterations: Array
) -> Array:
    """Return Theorem 1's, Equation 16, of the mean squared gradient of that many iterations."""
    gamma, smooth = problem.step, problem.smooth
    apart = (1 - problem.alpha) ** 2
    noise = 8 * smooth * gamma * sigma**2
    noise += 48 * smooth**2 * gamma**2 * sigma**2 * (1 - xi**2) / xi**2
    noise += 2304 * sigma**2 / apart * spread(xi)
    noise += 48 * accuracy**2 / (gamma**2 * problem.good**2 * apart)
    return 8 * problem.initial_gap / (gamma * iterations) + noise


def bound_of_distance(
    problem: Quadratic, sigma: float, xi: float, accuracy: float, iterations: Array
) -> Array:
    """Return Theorem 2's, Equation 17, of the weighted mean's squared distance."""
    gamma, smooth, mu = problem.step, problem.smooth, problem.mu
    apart = (1 - problem.alpha) ** 2
    noise = 16 * smooth * gamma * sigma**2
    noise += 80 * gamma**2 * sigma**2 * smooth**2 * (1 - xi**2) / xi**2
    noise += 3072 * sigma**2 / apart * spread(xi)
    noise += 64 * accuracy**2 / (gamma**2 * problem.good**2 * apart)
    rest = 16 * problem.initial_gap / gamma * (1 - mu * gamma / 2) ** iterations
    return (rest + noise) / mu**2


CASES = {
    "printed, nobody lies": Quadratic(),
    "printed, 4 of 19 lie": Quadratic(corrupt=4),
    "guarded, 4 of 19 lie": Quadratic(corrupt=4, memory="robust"),
}


def draw_bgmd(folder: Path, *, seeds: int, done: Done) -> Path:
    """Draw the memory, the perturbation and both theorems; write ``table.md``, return it."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    figure, grid = panels(1, 4, 3.4, 3.2)
    for place, (label, problem) in enumerate(CASES.items()):
        run, xi = averaged(problem, seeds), problem.block / problem.dimensions
        line = {"": label, "residual / 1 - k/d": f"{run.residual.mean():.3f} / {1 - xi:.3f}"}
        times = np.arange(1.0, problem.iterations + 1)
        for panel, (name, (values, bound)) in zip(
            grid[0], beside(problem, run, seeds).items(), strict=True
        ):
            panel.plot(times, values, color=f"C{place}", label=label, lw=1)
            panel.plot(times, bound, color=f"C{place}", ls="--", lw=1)
            panel.set(title=name, xlabel="iteration", yscale="log")
            worst = values.max() if name.startswith("Lemma") else values[-1]
            line[name] = f"{worst:.3g} / {bound[-1]:.3g}"
        lines.append(line)
        done(label)
    for panel in grid[0]:
        panel.title.set_fontsize(9)
        panel.grid(alpha=0.3)
    grid[0, 0].legend(fontsize=7)
    figure.suptitle("Acharya et al.: measured (solid) and bound (dashed)", fontsize=10)
    save(figure, folder / "bgmd.png")
    return write_markdown(
        folder,
        f"Measured / bound, means of {seeds} seeds; the largest of all iterations, of the theorems "
        "at the end. k / d stands for xi.",
        pd.DataFrame(lines),
        "FedBGMD, H local steps (Theorems 3 and 4 of the slides), 300 iterations:",
        pd.DataFrame(list(fed_bgmd(seeds))),
        "Lemma 2: 20 rows of 2000 values by Weiszfeld's iteration, counted in multiplications:",
        pd.DataFrame(speedups()),
    )


def beside(problem: Quadratic, run: Descent, seeds: int) -> dict[str, tuple[Array, Array]]:
    """Return what a run measured, and the run at Theorem 1's step, beside their bounds, (T,)."""
    xi, times = problem.block / problem.dimensions, np.arange(1.0, problem.iterations + 1)
    sigma, level = math.sqrt(run.moment.max()), np.ones(problem.iterations)
    longer = replace(problem, share_of_step=0.5)
    steep = averaged(longer, seeds)
    steep_sigma = math.sqrt(steep.moment.max())
    return {
        "Lemma 3: memory": (run.memory, level * bound_of_memory(problem, sigma, xi)),
        "Lemma 4: perturbation": (
            run.perturbation,
            level * bound_of_perturbation(problem, sigma, xi, TOLERANCE),
        ),
        "Theorem 1: gradient": (
            np.cumsum(steep.gradient) / times,
            bound_of_gradient(longer, steep_sigma, xi, TOLERANCE, times),
        ),
        "Theorem 2: distance": (
            run.distance,
            bound_of_distance(problem, sigma, xi, TOLERANCE, times),
        ),
    }


def speedups(rows: int = 20, dimensions: int = 2000) -> list[dict[str, str]]:
    """Count what a block saves: Lemma 2 says ``k <= (1 / F - b eps^2) d`` for a factor of F."""
    generator = torch.Generator().manual_seed(0)
    updates = torch.randn(rows, dimensions, generator=generator)
    updates *= torch.logspace(-1, 1, rows)[:, None]  # of all lengths: they take some iterations
    whole = geometric_median(updates, solver="weiszfeld", tol=1e-4)
    lines = []
    for share in (0.5, 0.2, 0.1, 0.05):
        result = block_geometric_median(
            updates,
            block_fraction=share,
            min_block_size=1,
            solver="weiszfeld",
            tol=1e-4,
            generator=generator,
        )
        k = len(result.block)
        spent = result.iterations * k * rows + rows * dimensions
        factor = whole.iterations * dimensions * rows / spent
        lines.append(
            {
                "k / d": f"{share:g}",
                "iterations, all and block": f"{whole.iterations}, {result.iterations}",
                "factor F": f"{factor:.2f}",
                "1 / F": f"{1 / factor:.3f}",
            }
        )
    return lines


# --------------------------------------------------------------------------- Ghosh et al.


REGRESSION = Regression()


def measured_delta(problem: Regression, iterations: int, seed: int) -> Array:
    """Return the least delta of l1-sign of all honest workers, in each iteration."""
    task = problem.draw(Curve("", 0, 0), torch.Generator().manual_seed(seed))
    weights, found = task.start, []
    for _ in range(iterations):
        rows = task.gradients(weights)
        lost = (l1_sign(rows) - rows).square().sum(1) / rows.square().sum(1)
        found.append(float(1 - lost.max()))
        weights = weights - problem.step * l1_sign(rows).mean(0)
    return np.array(found)


def draw_ghosh(folder: Path, *, seeds: int, done: Done, problem: Regression = REGRESSION) -> Path:
    """Draw what the theorems allow beside what holds up; write ``table.md``, return it.

    The conditions of Theorems 1 to 3 are computed; their bounds are not, since they hold up to
    constants. Algorithm 1 is run with Option I's lies and with Option II's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    deltas = measured_delta(problem, 100, seed=0)
    done("the compression factor")
    lines = []
    shares = (0, 10, 20, 40, 60, 80, 90)
    attacks = ("gaussian", "ascent", "gaussian-after", "ascent-after")
    ends: dict[str, list[float]] = {attack: [] for attack in attacks}
    for count in shares:
        line = {"hostile, %": f"{count / 2:g}"}
        for option in (1, 2):
            line[f"least delta, Theorem {option}"] = (
                f"{least_delta(count / 200, count / 200, option):.2f}"
            )
        line["Theorem 3 allows l1-sign"] = (
            "yes" if is_proven(float(deltas.min()), count / 200, count / 200, 3) else "no"
        )
        for attack in attacks:
            curve = Curve("", count, count and count + 2, attack=attack)
            runs = [run_curve(curve, seed, problem) for seed in range(seeds)]
            ends[attack].append(float(np.mean([run[-1] / run[0] for run in runs])))
            line[f"left, {attack}"] = f"{ends[attack][-1]:.2g}"
        lines.append(line)
        done(f"{count} hostile workers")
    figure, grid = panels(1, 2, 4.2, 3.4)
    axis = np.linspace(0.01, 1, 100)
    for theorem in (1, 2, 3):
        most = [100 * most_hostile(delta, theorem) for delta in axis]
        grid[0, 0].plot(axis, most, label=f"Theorem {theorem}")
    grid[0, 0].axvspan(deltas.min(), deltas.max(), alpha=0.3, label="l1-sign, measured")
    grid[0, 0].set(xlabel="compression factor delta", ylabel="most hostile workers, %")
    for attack in attacks:
        grid[0, 1].plot([count / 2 for count in shares], ends[attack], "o-", label=attack, ms=4)
    grid[0, 1].set(xlabel="hostile workers, %", ylabel="distance left, of the first", yscale="log")
    for panel in grid[0]:
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    figure.suptitle("Ghosh et al.: what the theorems allow, and what holds up", fontsize=10)
    save(figure, folder / "ghosh.png")
    at = float(deltas.min())
    return write_markdown(
        folder,
        f"l1-sign has a delta of {deltas.min():.3f} to {deltas.max():.3f} over {len(deltas)} "
        "iterations (the least of 200 workers). There the theorems allow, with beta = alpha, up to "
        + ", ".join(f"{100 * most_hostile(at, t):.1f} % (Theorem {t})" for t in (1, 2, 3))
        + " of hostile workers. What is left of the distance after "
        f"{problem.iterations} iterations of Algorithm 1, means of {seeds} seeds; *after*: lies "
        "that are not compressed (Option II, Theorem 2), else Option I (Theorem 1):",
        pd.DataFrame(lines),
        "The squared distance that is left in least squares of noisy labels, and its slope in "
        "log-log scale:",
        pd.DataFrame(statistical_errors(folder, seeds=seeds, done=done)),
    )
