"""Norm thresholding."""

from typing import Any

from flwr.app import MetricRecord

from fl_bgmd.aggregators import Aggregate, FilteredAggregate, norm_threshold

from .robust import RobustStrategy, Round, require


class NormThreshold(RobustStrategy):
    """Drop the updates of largest norm, average the rest: Algorithm 1, Option II, of Ghosh et al.

    Parameters
    ----------
    drop_fraction : float, optional
        The paper's beta; ``byzantine_fraction`` by default. 0 to below 1.
    order : float
        Order of the norm, 1 or more.
    **options
        Those of :class:`RobustStrategy`.
    """

    def __init__(
        self, *, drop_fraction: float | None = None, order: float = 2, **options: Any
    ) -> None:
        super().__init__(**options)
        self.drop_fraction = self.byzantine_fraction if drop_fraction is None else drop_fraction
        require("drop_fraction", drop_fraction, 0 <= self.drop_fraction < 1, "0 to below 1")
        require("order", order, order >= 1, "1 or more")
        self.order = order

    def aggregate(self, current: Round) -> Aggregate:
        """Return the mean of the rows that are kept."""
        return norm_threshold(current.updates, drop_fraction=self.drop_fraction, order=self.order)

    def describe(self, result: Aggregate, metrics: MetricRecord) -> None:
        """Report how many rows were dropped."""
        assert isinstance(result, FilteredAggregate)
        metrics["dropped"] = int((~result.kept).sum())
