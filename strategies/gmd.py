"""Geometric median descent."""

from typing import Any

from fl_bgmd.aggregators import Aggregate, geometric_median
from fl_bgmd.aggregators.geometric_median import SOLVERS

from .checks import require
from .intake import Round
from .robust import RobustStrategy


class GMD(RobustStrategy):
    """Geometric median descent (GmD): Equation 3 of Acharya et al. (BGMD).

    Tolerates up to half of the clients.

    Parameters
    ----------
    tol : float
        Certified relative accuracy of the median. Above 0.
    solver : {"gram", "newton", "weiszfeld"}
        See :func:`fl_bgmd.aggregators.geometric_median`.
    **options
        Those of :class:`RobustStrategy`.
    """

    weightable = True
    weights_tell = True

    def __init__(self, *, tol: float = 1e-6, solver: str = "gram", **options: Any) -> None:
        require("tol", tol, tol > 0, "above 0")
        require("solver", solver, solver in SOLVERS, ", ".join(SOLVERS))
        super().__init__(**options)
        self.tol = tol
        self.solver = solver

    def aggregate(self, current: Round) -> Aggregate:
        """Return the geometric median."""
        return geometric_median(
            current.updates, weights=current.weights, tol=self.tol, solver=self.solver
        )
