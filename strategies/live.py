"""A round's figures for whoever wants to follow a run: plain floats by name."""

import logging
from collections.abc import Callable

from flwr.app import MetricRecord
from flwr.serverapp.strategy import Result

LOG = logging.getLogger("flwr.fl_bgmd")

OnRound = Callable[[int, dict[str, float]], object]


def floats_of(number: int, result: Result) -> dict[str, float]:
    """Return the figures of a round: the server's, ``evaluate-...`` and ``server-...``.

    Of lists, such as the weights of the clients, there are none.
    """
    found: dict[str, float] = {}
    for prefix, history in (
        ("", result.train_metrics_clientapp),
        ("evaluate-", result.evaluate_metrics_clientapp),
        ("server-", result.evaluate_metrics_serverapp),
    ):
        for name, value in history.get(number, MetricRecord()).items():
            if isinstance(value, int | float):
                found[prefix + name] = float(value)
    return found


class Live:
    """Calls a function after each round; what it raises is logged once and ends nothing."""

    def __init__(self, on_round: OnRound | None) -> None:
        self._on_round = on_round
        self._has_failed = False

    def tell(self, number: int, result: Result) -> None:
        """Tell of a round."""
        if self._on_round is None:
            return
        try:
            self._on_round(number, floats_of(number, result))
        except Exception as error:
            if not self._has_failed:
                LOG.warning(
                    "on_round failed in round %s (%s: %s): the run continues",
                    *(number, type(error).__name__, error),
                )
            self._has_failed = True
