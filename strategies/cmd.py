"""Coordinate-wise rules: median and trimmed mean."""

from typing import Any

from fl_bgmd.aggregators import Aggregate, coordinate_median, trimmed_mean
from fl_bgmd.shares import floor_share

from .checks import require
from .intake import Round
from .robust import RobustStrategy


class CMD(RobustStrategy):
    """Coordinate-wise median descent (CmD): Table 1 of Acharya et al. (BGMD), after Yin et al.

    See :class:`RobustStrategy` for the parameters.
    """

    def aggregate(self, current: Round) -> Aggregate:
        """Return the median of every coordinate."""
        return coordinate_median(current.updates)


class TrimmedMean(RobustStrategy):
    """Coordinate-wise trimmed mean of Yin et al.

    Parameters
    ----------
    trim_fraction : float, optional
        Dropped at each end; the hostile share by default, of three clients or more at least one.
        0 to below 1/2.
    **options
        Those of :class:`RobustStrategy`.
    """

    def __init__(self, *, trim_fraction: float | None = None, **options: Any) -> None:
        super().__init__(**options)
        share = 0.0 if trim_fraction is None else trim_fraction
        require("trim_fraction", trim_fraction, 0 <= share < 0.5, "0 to below 0.5")
        self.trim_fraction = trim_fraction

    def aggregate(self, current: Round) -> Aggregate:
        """Return the trimmed mean of every coordinate."""
        trim = self.tolerated(current) if self.trim_fraction is None else self.trim_fraction
        n, hostile = len(current.updates), self.hostile(current)
        if floor_share(trim, n) < hostile:
            self.say_once(
                "trim_fraction",
                "trim_fraction is %s: %s of %s values go at each end and %s may be hostile",
                *(trim, floor_share(trim, n), n, hostile),
            )
        return trimmed_mean(current.updates, trim_fraction=trim)
