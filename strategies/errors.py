"""Why a run ends before its last round."""

from flwr.app import MetricRecord
from flwr.serverapp.strategy import Result


class RunEndedError(RuntimeError):
    """A run could not be continued; ``result`` holds what it had come to."""

    result: Result


class EmptyRoundsError(RunEndedError):
    """Too many rounds in a row, or all of a run, have come to nothing.

    ``metrics`` are those of the last one.
    """

    def __init__(self, message: str, metrics: MetricRecord) -> None:
        super().__init__(message)
        self.metrics = metrics


class MissingNodesError(RunEndedError):
    """Fewer nodes than needed were connected by the deadline."""


class RowsError(RunEndedError):
    """The rows of a round fit neither into memory nor into a file."""
