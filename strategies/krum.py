"""Krum and Multi-Krum."""

from typing import Any

from fl_bgmd.aggregators import Aggregate, multi_krum

from .checks import require
from .intake import Round
from .robust import RobustStrategy


class MultiKrum(RobustStrategy):
    """Average the updates with the closest neighbors: Multi-Krum of Blanchard et al.

    Parameters
    ----------
    num_selected : int, optional
        How many are averaged (all, if fewer replied); all but the hostile share by
        default.
    **options
        Those of :class:`RobustStrategy`.
    """

    def __init__(self, *, num_selected: int | None = None, **options: Any) -> None:
        super().__init__(**options)
        require(
            "num_selected", num_selected, num_selected is None or num_selected >= 1, "1 or more"
        )
        self.num_selected = num_selected

    def aggregate(self, current: Round) -> Aggregate:
        """Return the mean of the selected rows."""
        n, hostile = len(current.updates), self.hostile(current)
        selected = n - hostile if self.num_selected is None else min(self.num_selected, n)
        if selected > n - hostile:
            self.say_once(
                "num_selected",
                "num_selected is %s of %s updates, of which %s may be hostile",
                *(self.num_selected, n, hostile),
            )
        return multi_krum(
            current.updates, byzantine_fraction=self.tolerated(current), num_selected=selected
        )


class Krum(RobustStrategy):
    """Follow the one update with the closest neighbors: Krum of Blanchard et al.

    See :class:`RobustStrategy` for the parameters.
    """

    num_selected = 1

    def aggregate(self, current: Round) -> Aggregate:
        """Return the selected row."""
        return multi_krum(
            current.updates,
            byzantine_fraction=self.tolerated(current),
            num_selected=self.num_selected,
        )
