"""The robust outlier filter of Data and Diggavi."""

import warnings
from typing import Any

from flwr.app import MetricRecord

from fl_bgmd.aggregators import Aggregate, SpectralFilter, spectral_filter
from fl_bgmd.aggregators.spectral import METHODS, PROVEN_FRACTION

from .checks import require
from .intake import LOG, Round
from .robust import RobustStrategy


class RobustFilter(RobustStrategy):
    """Spectral filtering of the updates: Algorithms 1 and 3 (RGE) of Data and Diggavi.

    The paper's guarantee holds for ``byzantine_fraction`` up to 1/4.

    Parameters
    ----------
    sigma0 : float, optional
        Bound on the honest updates' standard deviation in every direction; estimated by default.
    method : str
        See :func:`fl_bgmd.aggregators.spectral_filter`.
    **options
        Those of :class:`RobustStrategy`.
    """

    def __init__(
        self, *, sigma0: float | None = None, method: str = "mean", **options: Any
    ) -> None:
        super().__init__(**options)
        require("sigma0", sigma0, sigma0 is None or sigma0 > 0, "above 0")
        require("method", method, method in METHODS, ", ".join(METHODS))
        if self.byzantine_fraction > PROVEN_FRACTION:
            LOG.warning(
                "byzantine_fraction is %s: the guarantee of the robust filter ends at %s",
                self.byzantine_fraction,
                PROVEN_FRACTION,
            )
        self.sigma0 = sigma0
        self.method = method

    def aggregate(self, current: Round) -> Aggregate:
        """Return the mean of the rows that survive the filter."""
        share = self.tolerated(current)
        if share > PROVEN_FRACTION >= self.byzantine_fraction:
            self.say_once(
                "proven",
                "a hostile one of %s is a share of %.2f: the guarantee of the robust filter ends "
                "at %s",
                *(len(current.updates), share, PROVEN_FRACTION),
            )
        with warnings.catch_warnings():
            # Said once, when the strategy was made.
            warnings.filterwarnings("ignore", message="byzantine_fraction")
            return spectral_filter(
                current.updates,
                byzantine_fraction=share,
                sigma0=self.sigma0,
                method=self.method,
            )

    def describe(self, result: Aggregate, metrics: MetricRecord) -> None:
        """Report how many rows were dropped and the deviation that was allowed."""
        assert isinstance(result, SpectralFilter)
        metrics["dropped"] = int((~result.kept).sum())
        metrics["iterations"] = result.iterations
        metrics["sigma0"] = result.sigma0
