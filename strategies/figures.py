"""The server's own figures of a round, beside the clients' metrics."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Self

from flwr.app import MetricRecord

from fl_bgmd.aggregators.results import figure_names
from fl_bgmd.aggregators.rows import vector_norm
from fl_bgmd.replies import Rejection

from .intake import Intake
from .roster import Roster
from .sent import Sent
from .step import Outcome, State

_MAPPINGS = ("reasons", "rule")


@dataclass(kw_only=True)
class Figures:
    """What the server found; None is not reported.

    Attributes
    ----------
    accepted, rejected : int
        Replies.
    reasons : mapping of str to int
        How many replies were rejected for each reason: ``rejected-...``.
    missing : int
        Nodes that were asked and have not replied.
    late : int or None
        Replies to earlier rounds that came too late.
    dropped_metrics : int or None
        Metrics of accepted replies that were not finite.
    bytes_up, bytes_down, bytes_rejected : int
        Bytes of arrays.
    update_norm : float
        Euclidean norm of the aggregate.
    client_weights : list of float
        What the rule gave each accepted reply, in the order of the rows.
    byzantine_fraction : float or None
        The hostile share that was prepared for, where it is estimated.
    stale_updates : int or None
        Last updates of clients without a reply in this round that the rule saw as well.
    rule : mapping of str to float
        The rule's :attr:`fl_bgmd.aggregators.Aggregate.diagnostics`.
    diverged : int or None
        1 where the new model was refused.
    benched : int or None
        Nodes that sit out the next round.
    screening_seconds, rule_seconds : float
        Of looking at the replies; of mixings, rule and the server's step.
    waiting_seconds, evaluation_seconds : float
        For the clients' replies to training; of evaluation, the clients' and the server's. Of
        runs that :meth:`.robust.RobustStrategy.start` conducts.
    aggregation_seconds : float
        For screening the replies and making a model of them; the wait for them does not count.
    """

    accepted: int = 0
    rejected: int = 0
    reasons: Mapping[str, int] = field(default_factory=dict)
    missing: int | None = None
    late: int | None = None
    dropped_metrics: int | None = None
    bytes_up: int | None = None
    bytes_rejected: int | None = None
    bytes_down: int | None = None
    update_norm: float | None = None
    client_weights: list[float] | None = None
    byzantine_fraction: float | None = None
    stale_updates: int | None = None
    rule: Mapping[str, float] = field(default_factory=dict)
    diverged: int | None = None
    benched: int | None = None
    screening_seconds: float | None = None
    rule_seconds: float | None = None
    waiting_seconds: float | None = None
    evaluation_seconds: float | None = None
    aggregation_seconds: float | None = None

    @classmethod
    def of(
        cls,
        sent: Sent,
        intake: Intake,
        outcome: Outcome,
        after: State,
        roster: Roster,
        seconds: Mapping[str, float],
    ) -> Self:
        """Return what there is to say of a round that leads to the state ``after``."""
        result, replies = outcome.result, len(intake.accepted) + intake.rejected.total()
        return cls(
            accepted=len(intake.accepted),
            rejected=intake.rejected.total(),
            reasons=dict(sorted(intake.rejected.items())),
            missing=max(0, roster.num_asked - replies),
            late=roster.late or None,
            dropped_metrics=intake.dropped or None,
            bytes_up=intake.bytes_up,
            bytes_rejected=intake.bytes_rejected if intake.rejected else None,
            bytes_down=roster.num_asked * sent.num_bytes,
            update_norm=None if result is None else vector_norm(result.vector),
            client_weights=outcome.weights,
            byzantine_fraction=after.share,
            stale_updates=outcome.stale or None,
            rule={} if result is None else result.diagnostics,
            diverged=1 if outcome.diverged else None,
            benched=len(after.reputation.benched(after.round + 1)) or None,
            **{f"{phase}_seconds": taken for phase, taken in seconds.items()},
        )

    def write(self, metrics: MetricRecord) -> None:
        """Write what there is into a round's metrics."""
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name == "reasons":
                metrics.update({f"rejected-{reason}": count for reason, count in value.items()})
            elif each.name == "rule":
                metrics.update(value)
            elif value is not None:
                metrics[each.name.replace("_", "-")] = value


def own_names() -> set[str]:
    """Return the names of all figures that a server may report."""
    plain = {f.name.replace("_", "-") for f in fields(Figures) if f.name not in _MAPPINGS}
    return plain | {f"rejected-{reason.value}" for reason in Rejection} | figure_names()
