"""What the solvers of the geometric median know about a point, and the proof of its accuracy."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class HullPoint:
    """A point ``y = sum_i hull_weights[i] x_i`` with all that its Gram matrix tells about it.

    Attributes
    ----------
    hull_weights : (n,)
        Convex coefficients.
    pulls : (n,)
        ``row_weights[i] / ||x_i - y||``, 0 for rows that coincide with y.
    distances : (n,)
        ``||x_i - y||``, no smaller than what float64 can tell from zero.
    objective : float
        ``g(y) = sum_i row_weights[i] ||x_i - y||``.
    pull : float
        ``R``, the norm of the smallest subgradient that is known at y.
    slack : float
        ``2 * sum of row_weights[i] ||x_i - y||`` over the rows that coincide with y.
    row_weights : (n,)
        The weights of the objective.
    """

    hull_weights: Array
    pulls: Array
    distances: Array
    objective: float
    pull: float
    slack: float
    row_weights: Array

    @property
    def gap(self) -> float:
        """Bound on ``(g(y) - g*) / g*``."""
        if self.objective == 0.0:
            return 0.0
        # n ||y - y*|| <= g(y) + g* <= 2 g(y); a row at distance r that is treated as coincident
        # offers every unit vector as a 2r-subgradient.
        excess = 2 * self.pull / self.row_weights.sum() + self.slack / self.objective
        return float(excess / (1 - excess)) if excess < 1 else float("inf")

    def gap_after_moving(self, distance: float) -> float:
        """Bound on the gap of any point within ``distance`` of y (the rounded vector)."""
        if self.objective == 0.0 or distance == 0.0 or not np.isfinite(self.gap):
            return self.gap
        # ||a + e|| <= ||a|| + <a, e> / ||a|| + ||e||^2 / (2 ||a||), and <= ||a|| + ||e||.
        far = np.maximum(np.maximum(self.distances, distance / 2), 1e-300)
        second_order = (distance * (distance / (2 * far))) @ self.row_weights
        total_pull = self.pull + self.row_weights[self.pulls == 0].sum()
        growth = (total_pull * distance + second_order) / self.objective
        return float((1 + self.gap) * (1 + growth) - 1)


def better(point: HullPoint, other: HullPoint) -> bool:
    """Whether ``point`` has the smaller gap; where neither has a finite one, the smaller pull."""
    if np.isfinite(point.gap) or np.isfinite(other.gap):
        return point.gap < other.gap
    return point.pull < other.pull


def weiszfeld_weights(point: HullPoint) -> Array:
    """Weiszfeld's map, with Vardi and Zhang's correction when y coincides with rows."""
    total = point.pulls.sum()
    if total == 0.0:
        return point.hull_weights
    target: Array = point.pulls / total
    held = float(point.row_weights[point.pulls == 0].sum())
    if held == 0.0:
        return target
    keep = held / (held + point.pull)  # pull = R - held, so this is min(1, held / R)
    mixed: Array = (1 - keep) * target + keep * point.hull_weights
    return mixed
