"""What an operator should hear of, once: at the start, and where a round shows it."""

import logging
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from fl_bgmd.aggregators.norms import euclidean_norms
from fl_bgmd.layout import ModelLayout
from fl_bgmd.replies import Rejection
from fl_bgmd.shares import FEWEST, hostile_count

from .reputation import far_out
from .sent import Sent
from .step import Round
from .ties import equal_arrays, part

if TYPE_CHECKING:
    from .intake import Intake
    from .robust import RobustStrategy

LOG = logging.getLogger("flwr.fl_bgmd")

TOO_FEW = (
    f"of fewer than {FEWEST} replies nobody can tell which one lies: use {FEWEST} nodes or more, "
    "or, where all clients can be trusted, byzantine_fraction=0 (min_valid_replies=1 takes the "
    "risk)"
)
"""What to do about it."""

_LIARS, _TIES = "liars", "ties"


class Alerts:
    """The warnings of a run: each subject once."""

    def __init__(self, strategy: "RobustStrategy") -> None:
        self._strategy = strategy
        self._said: set[str] = set()

    def once(self, subject: str, message: str, *args: object) -> None:
        """Log a warning, the first of its subject in a run."""
        if subject not in self._said:
            self._said.add(subject)
            LOG.warning(message, *args)

    def start(self) -> None:
        """Begin a run: say what the settings cannot protect from, or give away."""
        self._said.clear()
        for number, note in enumerate(self._notes()):
            self.once(f"note {number}", "%s", note)

    def _notes(self) -> list[str]:
        strategy = self._strategy
        name, fraction = type(strategy).__name__, strategy.assumed_fraction
        found = []
        if not strategy.robust:
            found.append(
                f"{name} tolerates no hostile client: one moves the model wherever it wants"
            )
        elif not fraction:
            found.append("byzantine_fraction is 0: no client is expected to lie")
        elif strategy.min_valid_replies < FEWEST:
            found.append(
                f"min_valid_replies is {strategy.min_valid_replies}: in a round of fewer than "
                f"{FEWEST} valid replies a hostile one moves the model wherever it wants"
            )
        drawn = strategy.rule.draws
        drawn += [] if strategy.fraction_train in (0.0, 1.0) else ["nodes"]
        if strategy.seed is not None and drawn:
            found.append(
                "seed is given: clients can find it from what they are sent and foresee the "
                f"{' and '.join(drawn)} that it draws; without a seed nobody can"
            )
        return found

    def of_few_asked(self, count: int) -> None:
        """Say, before anybody trains, that so few cannot move the model."""
        least = self._strategy.min_valid_replies
        if count < least:
            self.once(
                "asked",
                "%s nodes are asked to train and a round needs %s valid replies "
                "(min_valid_replies): such rounds keep the model; %s",
                *(count, least, TOO_FEW),
            )

    def of_replies(self, number: int, intake: "Intake", asked: int, layout: ModelLayout) -> None:
        """Say what the counts of a round mean: few replies, or a hostile majority of them."""
        strategy, count = self._strategy, len(intake.accepted)
        # What was rejected for its content was not sent by an honest client.
        hostile = hostile_count(strategy.assumed_fraction, max(asked, count))
        hostile -= _lied(intake.rejected)
        if count <= 2 * hostile:
            LOG.warning(
                "round %s: %s valid replies of %s asked, of which %s may be hostile "
                "(byzantine_fraction, min_valid_replies)",
                *(number, count, asked, hostile),
            )
        if count < FEWEST and strategy.assumed_fraction and strategy.robust:
            self.once(
                "few",
                "round %s has %s valid replies: of fewer than %s a hostile one cannot be told",
                *(number, count, FEWEST),
            )
        if strategy.robust:
            delta = strategy.settings.contraction(layout)
            feedback = strategy.settings.error_feedback and delta > 0
            notes = strategy.rule.notes(count, delta=delta, feedback=feedback)
            for subject, sentence in notes.items():
                self.once(subject, "%s", sentence)

    def advice(self, intake: "Intake") -> str:
        """Return what to do about a round of too few valid replies, empty if nobody knows."""
        safe = self._strategy.min_valid_replies == FEWEST
        return TOO_FEW if intake.accepted and safe else ""

    def of_dropped(self, intake: "Intake") -> None:
        """Say whose metric was not finite: an honest client may want to know."""
        if intake.dropped:
            self.once(
                "not finite",
                "%s: it is dropped, the rest of the reply counts",
                intake.first_dropped,
            )

    def of_names(self, dropped: list[str]) -> None:
        """Say that clients' metrics are dropped: no client says what the server found."""
        if dropped:
            self.once(
                "own names",
                "the clients' metrics %s are dropped: the server's have their names",
                f"{dropped[:5]!r}"[:200],
            )

    def of_ties(self, sent: Sent, known: Mapping[str, str]) -> None:
        """Say that lossy replies, or a rounded model, do not show what is tied."""
        settings = self._strategy.settings
        if _TIES in self._said or settings.packing is settings.rounding is None:
            return
        self._said.add(_TIES)
        own: ModelLayout = sent.own_layout
        for group in equal_arrays(own.directions, own.values):
            values = own.values[part(group[0])]
            if group[-1].key not in known and (values != values[0]).any():
                LOG.warning(
                    "arrays %r and %r go out equal; if they are one tensor (tied), compression "
                    "hides it: they are counted apart and will not stay equal",
                    group[0].key,
                    group[-1].key,
                )

    def of_stale(self, count: int, kept: int) -> None:
        """Say that there is no room for the last updates of all clients."""
        if kept < count:
            self.once(
                "stale",
                "stale_bytes is %s, with room for the last updates of %s of %s clients: the "
                "oldest are dropped",
                *(self._strategy.settings.stale_bytes, kept, count),
            )

    def accused(self, current: Round) -> dict[int, float]:
        """Return the lengths of updates by node where, with weights, they may bench a node."""
        if not (self._strategy.bench_after and self._strategy.weights_tell):
            return {}
        return dict(zip(current.nodes, euclidean_norms(current.updates), strict=True))

    def of_liars(self, number: int, intake: "Intake", asked: int, norms: dict[int, float]) -> None:
        """Say when more look hostile than are expected to be."""
        strategy = self._strategy
        far, lied = sorted(far_out(norms)), _lied(intake.rejected)
        asked = max(asked, len(intake.accepted) + intake.rejected.total())
        fraction = strategy.assumed_fraction if strategy.robust else 0.0
        if lied + len(far) > hostile_count(fraction, asked):
            self.once(
                _LIARS,
                "%s; %s of %s clients look hostile in round %s: %s replies rejected, %s updates "
                "longer than ten times the median one (nodes %s)",
                f"byzantine_fraction is {fraction}"
                if strategy.robust
                else f"{type(strategy).__name__} tolerates no hostile client",
                *(lied + len(far), asked, number, lied, len(far), far[:10]),
            )


def _lied(rejected: Counter[str]) -> int:
    """Return how many replies were rejected for what they held."""
    return rejected.total() - rejected[Rejection.ERROR.value]
