"""The quadratic on which the statements of Acharya et al. are measured."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

TOLERANCE = 1e-6
"""epsilon of the geometric medians, certified: too small to count here."""


@dataclass(frozen=True)
class Quadratic:
    """``f(x) = x^T H x / 2`` with H diagonal, from mu to L; each row of a batch has its own noise.

    Attributes
    ----------
    dimensions, block : int
        d and k.
    good, corrupt : int
        Of the rows; the corrupt ones send -5 times their gradient.
    mu, smooth : float
        Smallest and largest curvature: mu and L.
    noise : float
        Norm of a row's noise, as a root of its mean square.
    memory : {"mean", "per-client", "robust"}
        Of Algorithm 1 as printed; a row for each client, as the slides' Algorithm 3 has it (with
        local steps only); or this project's.
    share_of_step : float
        gamma in units of 1 / L: 1/2 in Theorem 1, 1/4 in Theorem 2.
    iterations : int
        T.
    """

    dimensions: int = 100
    block: int = 20
    good: int = 15
    corrupt: int = 0
    mu: float = 0.2
    smooth: float = 1.0
    noise: float = 0.5
    memory: Literal["mean", "per-client", "robust"] = "mean"
    share_of_step: float = 0.25
    iterations: int = 300

    @property
    def step(self) -> float:
        """The step size gamma."""
        return self.share_of_step / self.smooth

    @property
    def alpha(self) -> float:
        """``|B| / |G|``."""
        return self.corrupt / self.good

    @property
    def initial_gap(self) -> float:
        """``R_0 = f(x_0) - f*``."""
        x = self.start
        return float((self.curvature * x * x).sum()) / 2

    @property
    def curvature(self) -> Tensor:
        """The diagonal of H, (d,)."""
        return torch.linspace(self.mu, self.smooth, self.dimensions, dtype=torch.float64)

    @property
    def start(self) -> Tensor:
        """The first model, (d,): a distance of 1 from the optimum."""
        return torch.full((self.dimensions,), self.dimensions**-0.5, dtype=torch.float64)

    def noisy(self, exact: Tensor, generator: torch.Generator) -> Tensor:
        """Return the gradients (n, d) of all rows, given the exact one (d,) or each its own."""
        n, d = self.good + self.corrupt, self.dimensions
        size = self.noise / math.sqrt(d)
        return exact + size * torch.randn(n, d, generator=generator, dtype=torch.float64)


def spread(xi: float) -> float:
    """Return ``1 + 4 (1 - xi^2) / xi^2``, the factor of the noise in all bounds."""
    return 1 + 4 * (1 - xi**2) / xi**2
