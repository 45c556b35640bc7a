"""A rule and an attack of one's own."""

from torch import Tensor

from fl_bgmd.aggregators import Aggregate
from fl_bgmd.attacks import attack
from fl_bgmd.options import NonNegative
from fl_bgmd.shares import floor_share
from fl_bgmd.strategies import RobustStrategy, Round


class MeanAroundMedian(RobustStrategy):
    """In every coordinate, the mean of the n - f values nearest the median (Xie et al., 2018)."""

    def aggregate(self, current: Round) -> Aggregate:
        """Return the vector (d,) that ``current.updates`` (n, d) come to."""
        rows = current.updates
        keep = len(rows) - floor_share(self.byzantine_fraction, len(rows))
        distances = (rows - rows.median(dim=0).values).abs()
        nearest = rows.gather(0, distances.argsort(dim=0)[:keep])
        return Aggregate(nearest.mean(dim=0), weights=None)


@attack("an example", sweep=(0.5, 1.0))
def pull_back(colluders: Tensor, scale: NonNegative = 1.0) -> Tensor:
    """Return what every colluder sends: their mean update, turned round and scaled.

    Parameters
    ----------
    colluders : Tensor
        (m, d): their true updates.
    scale : float
        Factor.
    """
    return -scale * colluders.mean(dim=0)
