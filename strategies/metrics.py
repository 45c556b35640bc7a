"""What clients measured, combined so that none of them can bend it or speak for the server."""

import logging
from collections.abc import Callable

from flwr.app import MetricRecord, RecordDict

from fl_bgmd.replies import median_metrics

from .figures import own_names
from .intake import Intake

Combine = Callable[[list[RecordDict], str], MetricRecord]

LOG = logging.getLogger("flwr.fl_bgmd")


COMBINERS = {"train": "train_metrics_aggr_fn", "evaluate": "evaluate_metrics_aggr_fn"}
"""The options with the user's functions, by phase."""


def combined(intake: Intake, phase: str, given: Combine | None, examples_key: str) -> MetricRecord:
    """Combine the clients' metrics: by the user's function if one is given, else by medians.

    ``examples_key`` is the metric with the number of examples.
    """
    option = COMBINERS[phase]
    if given is not None and intake.accepted and not intake.contents:
        LOG.warning("%s: no reply has only finite metrics; medians", option)
    if given is not None and intake.contents:
        try:
            found: MetricRecord | None = given(intake.contents, examples_key)
            return MetricRecord() if found is None else found
        except Exception as error:  # it reads what clients sent: it must not end the run
            LOG.warning("%s failed (%s): medians are used", option, error)
    return median_metrics(screened.metrics for screened in intake.accepted)


def drop_own(metrics: MetricRecord) -> list[str]:
    """Drop metrics that have names of the server's own figures; return which."""
    own = own_names()
    dropped = [key for key in metrics if key in own or key.startswith("rejected-")]
    for key in dropped:
        del metrics[key]
    return dropped
