"""Plain averaging behind the same screening: the baseline."""

from fl_bgmd.aggregators import Aggregate, mean

from .intake import Round
from .robust import RobustStrategy


class Mean(RobustStrategy):
    """Average the clients' updates: FedAvg with screened replies. Tolerates no hostile client.

    See :class:`RobustStrategy` for the parameters.
    """

    weightable = True
    robust = False

    def aggregate(self, current: Round) -> Aggregate:
        """Return the (weighted) mean."""
        return mean(current.updates, weights=current.weights)
