"""Centered clipping."""

from typing import Any

from torch import Tensor

from fl_bgmd.aggregators import Aggregate, centered_clipping

from .checks import require
from .intake import Round
from .robust import RobustStrategy


class CenteredClipping(RobustStrategy):
    """Clip the updates around the previous aggregate: Karimireddy et al. (ICML 2021).

    Parameters
    ----------
    radius : float, optional
        The paper's tau; the median distance to the centre by default.
    iterations : int
        1 or more.
    **options
        Those of :class:`RobustStrategy`.
    """

    can_share_coordinates = False

    def __init__(self, *, radius: float | None = None, iterations: int = 3, **options: Any) -> None:
        super().__init__(**options)
        require("radius", radius, radius is None or radius > 0, "above 0")
        require("iterations", iterations, iterations >= 1, "1 or more")
        self.radius = radius
        self.iterations = iterations
        self._center: Tensor | None = None

    def aggregate(self, current: Round) -> Aggregate:
        """Return the clipped mean and keep it as the next round's centre."""
        result = centered_clipping(
            current.updates, radius=self.radius, center=self._center, iterations=self.iterations
        )
        self._center = result.vector
        return result

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next round depends on."""
        return super().state_dict() | {"center": self._center}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned."""
        super().load_state_dict(state)
        self._center = self._on_device(state["center"])

    def forget(self) -> None:
        """Start again from where a first round does: the coordinates have become others."""
        self._center = None
