"""Norm thresholding."""

from typing import Any

from flwr.app import MetricRecord

from fl_bgmd.aggregators import Aggregate, FilteredAggregate, norm_threshold
from fl_bgmd.shares import ceil_share

from .checks import require
from .intake import Round
from .robust import RobustStrategy

NORMS = ("computed", "reported")


class NormThreshold(RobustStrategy):
    """Drop the updates of largest norm, average the rest: Algorithms 1 and 2 of Ghosh et al.

    With ``compressor=`` and ``error_feedback=False`` it is their Algorithm 1, with error feedback
    their Algorithm 2.

    Parameters
    ----------
    drop_fraction : float, optional
        The paper's beta; the hostile share by default. 0 to below 1.
    order : float
        Order of the norm, 1 or more.
    norms : {"computed", "reported"}
        Option II computes the norms of the updates as received. Option I takes the norms of the
        uncompressed updates that clients with :class:`fl_bgmd.mods.CompressionMod` report; where
        a reply without one is accepted, or rows were mixed, they are computed.
    **options
        Those of :class:`RobustStrategy`.
    """

    def __init__(
        self,
        *,
        drop_fraction: float | None = None,
        order: float = 2,
        norms: str = "computed",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        share = 0.0 if drop_fraction is None else drop_fraction
        require("drop_fraction", drop_fraction, 0 <= share < 1, "0 to below 1")
        require("order", order, order >= 1, "1 or more")
        require("norms", norms, norms in NORMS, ", ".join(NORMS))
        if norms == "reported" and self.mixing != "none":
            raise ValueError(
                f"mixing is {self.mixing!r} with norms 'reported'; allowed: none, since mixed rows "
                "have other norms"
            )
        if norms == "reported" and order != 2:
            raise ValueError(f"order is {order!r} with norms 'reported'; allowed: 2")
        self.drop_fraction = drop_fraction
        self.order = order
        self.norms = norms

    def aggregate(self, current: Round) -> Aggregate:
        """Return the mean of the rows that are kept."""
        drop = self.tolerated(current) if self.drop_fraction is None else self.drop_fraction
        n, hostile = len(current.updates), self.hostile(current)
        if ceil_share(drop, n) < hostile:
            self.say_once(
                "drop_fraction",
                "drop_fraction is %s: %s of %s updates are dropped and %s may be hostile",
                *(drop, ceil_share(drop, n), n, hostile),
            )
        return norm_threshold(
            current.updates,
            drop_fraction=drop,
            order=self.order,
            norms=current.norms if self.norms == "reported" else None,
        )

    def describe(self, result: Aggregate, metrics: MetricRecord) -> None:
        """Report how many rows were dropped."""
        assert isinstance(result, FilteredAggregate)
        metrics["dropped"] = int((~result.kept).sum())
