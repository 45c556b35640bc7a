"""A rule and an attack of one's own."""

from torch import Tensor

from fl_bgmd.aggregators import Aggregate, rule
from fl_bgmd.attacks import attack
from fl_bgmd.options import NonNegative, Share
from fl_bgmd.shares import floor_share
from fl_bgmd.strategies import RobustStrategy


@rule("mean-around-median")
def mean_around_median(updates: Tensor, *, byzantine_fraction: Share = 0.25) -> Aggregate:
    """In every coordinate, the mean of the n - f values nearest the median (Xie et al., 2018).

    Parameters
    ----------
    updates : Tensor
        (n, d).
    byzantine_fraction : float
        The hostile share of the rows.
    """
    keep = len(updates) - floor_share(byzantine_fraction, len(updates))
    distances = (updates - updates.median(dim=0).values).abs()
    nearest = updates.gather(0, distances.argsort(dim=0)[:keep])
    return Aggregate(nearest.mean(dim=0), weights=None)


class MeanAroundMedian(RobustStrategy):
    """The rule as a Flower strategy with a name of its own."""

    spec = "my_lab:mean_around_median"


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
