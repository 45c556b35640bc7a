"""Theorems 3 and 4 of Acharya et al.'s slides, FedBGMD, beside measurements on a quadratic.

Algorithm 3: clients go H steps of their own before they send how far they came, quantized; the
server takes the geometric median of a block, with its memory. The problem is that of
:class:`.quadratic.Quadratic`; the bounds in :mod:`.theory` are those of H = 1 without quantization.

Two lines of the printed algorithm are taken for misprints. Line 24 has ``P = gamma_t G + M``, but
what clients send contains the step size: here ``P = G + M``. Line 25 aggregates ``C_k(G)``, which
would leave the memory without any use: here ``C_k(P)``, as in Algorithm 1. The slides' memory M^s
has a row for each client (``per-client``); ``mean`` is that of Algorithm 1.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fl_bgmd.aggregators import block_geometric_median
from fl_bgmd.compression import QSGD

from .quadratic import TOLERANCE, Quadratic, spread


@dataclass(frozen=True)
class LocalSteps(Quadratic):
    """A quadratic on which clients go steps of their own.

    Attributes
    ----------
    local_steps : int
        H: T is a multiple of it.
    levels : int
        s of QSGD, with one norm for all values.
    """

    local_steps: int = 5
    levels: int = 15

    @property
    def xi(self) -> float:
        """``(1 - beta_{k,s}) k / d`` with the variance of QSGD for beta (Lemma 4)."""
        beta = QSGD(self.levels, bucket=0).variance(self.block)
        return (1 - beta) * self.block / self.dimensions


@dataclass(frozen=True)
class Outcome:
    """What a run measured, means over the honest clients.

    Attributes
    ----------
    moment : float
        The largest mean squared norm of the honest gradients: sigma^2.
    gradient : float
        Mean squared gradient at the clients' own models, over all T (Theorem 3).
    distance : float
        Squared distance of the weighted mean of a client's models from the optimum (Theorem 4).
    """

    moment: float
    gradient: float
    distance: float


def run(problem: LocalSteps, seed: int) -> Outcome:
    """Run Algorithm 3; the module says where it is not to the letter."""
    generator = torch.Generator().manual_seed(seed)
    n, d, good = problem.good + problem.corrupt, problem.dimensions, problem.good
    quantizer = QSGD(problem.levels, bucket=0)
    x, memory = problem.start, None
    own = x.repeat(n, 1)
    weight, total, mean_own = 1.0, 0.0, torch.zeros(good, d, dtype=torch.float64)
    moments, gradients = [], []
    for iteration in range(1, problem.iterations + 1):
        exact = problem.curvature * own
        rows = problem.noisy(exact, generator)
        moments.append(float(rows[:good].square().sum(1).mean()))
        gradients.append(float(exact[:good].square().sum(1).mean()))
        weight /= 1 - problem.mu * problem.step / 2
        total, mean_own = total + weight, mean_own + weight * own[:good]
        own = own - problem.step * rows
        if iteration % problem.local_steps:
            continue
        sent = x - own
        sent[good:] *= -5
        result = block_geometric_median(
            torch.stack([_quantized(row, quantizer, generator) for row in sent]),
            memory,
            memory_rule=problem.memory,
            score="norm",
            block_fraction=problem.block / d,
            min_block_size=1,
            generator=generator,
        )
        memory = result.memory
        x = x - result.vector
        own = x.repeat(n, 1)
    distance = float((mean_own / total).square().sum(1).mean())
    return Outcome(max(moments), float(np.mean(gradients)), distance)


def _quantized(row: Tensor, quantizer: QSGD, generator: torch.Generator) -> Tensor:
    sent = quantizer.decode(quantizer.encode(row, generator), len(row))
    return sent.to(row.dtype)


def bound_of_gradient(problem: LocalSteps, sigma: float) -> float:
    """Return Theorem 3's, Equation 17 of the slides."""
    gamma, smooth, h = problem.step, problem.smooth, problem.local_steps
    apart, wide = (1 - problem.alpha) ** 2, spread(problem.xi)
    return (
        8 * problem.initial_gap / (gamma * problem.iterations)
        + 8 * smooth * gamma * sigma**2
        + 24 * smooth**2 * gamma**2 * h**2 * sigma**2 * wide
        + 2304 / h * h**2 * sigma**2 / apart * wide
        + 48 / h * TOLERANCE**2 / (gamma**2 * problem.good**2 * apart)
    )


def bound_of_distance(problem: LocalSteps, sigma: float) -> float:
    """Return Theorem 4's, Equation 18 of the slides."""
    gamma, smooth, h, mu = problem.step, problem.smooth, problem.local_steps, problem.mu
    apart, wide = (1 - problem.alpha) ** 2, spread(problem.xi)
    rest = 16 * problem.initial_gap / gamma * (1 - mu * gamma / 2) ** problem.iterations
    noise = 16 * smooth * gamma * sigma**2
    noise += 40 * smooth**2 * gamma**2 * h**2 * sigma**2 * wide
    noise += 3072 * h**2 * sigma**2 / apart * wide
    noise += 64 * TOLERANCE**2 / (gamma**2 * problem.good**2 * apart)
    return (rest + noise) / mu**2


CASES = {
    "mean, nobody lies": LocalSteps(),
    "mean, 4 of 19 lie": LocalSteps(corrupt=4),
    "per client, nobody lies": LocalSteps(memory="per-client"),
    "per client, 4 of 19 lie": LocalSteps(corrupt=4, memory="per-client"),
    "guarded, 4 of 19 lie": LocalSteps(corrupt=4, memory="robust"),
}
STEPS = (1, 5, 20)


def fed_bgmd(seeds: int) -> Iterator[dict[str, str]]:
    """Yield the rows of a table: measured / bound, means of the seeds."""
    for label, case in CASES.items():
        for steps in STEPS:
            problem = replace(case, local_steps=steps)
            longer = replace(problem, share_of_step=0.5)  # Theorem 3's
            short, steep = ([run(p, seed) for seed in range(seeds)] for p in (problem, longer))
            gradient = float(np.mean([outcome.gradient for outcome in steep]))
            distance = float(np.mean([outcome.distance for outcome in short]))
            sigmas = [math.sqrt(max(o.moment for o in each)) for each in (steep, short)]
            bounds = bound_of_gradient(longer, sigmas[0]), bound_of_distance(problem, sigmas[1])
            yield {
                "": label,
                "H": str(steps),
                "Theorem 3: gradient": f"{gradient:.3g} / {bounds[0]:.3g}",
                "Theorem 4: distance": f"{distance:.3g} / {bounds[1]:.3g}",
            }
