"""What a run has between its messages, and what becomes of a round's replies."""

import secrets
import time
from collections.abc import Iterable
from dataclasses import replace

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from torch import Tensor

from fl_bgmd.arrivals import Arrivals
from fl_bgmd.shards import Crew

from .alerts import Alerts
from .declared import DeclaredStrategy
from .errors import EmptyRoundsError
from .figures import Figures
from .intake import LOG, Intake, take_in
from .metrics import combined, drop_own
from .roster import Roster
from .rows import gathered
from .sent import Sent, round_seed
from .stale import StaleUpdates, heard
from .step import Outcome, Round, State, take_step
from .storage import crew_for, rows_in_file
from .verdicts import Verdicts


class Session:
    """The state of a strategy, the model that is out, its nodes and what became of their replies.

    Parameters
    ----------
    strategy : DeclaredStrategy
        Whose options and rule the rounds follow.
    alerts : Alerts
        What the rounds show is told to them.

    Attributes
    ----------
    state : State
        All that the next round depends on.
    sent : Sent, optional
        What went out last; None before the first round.
    roster : Roster
        The nodes that were asked.
    verdicts : Verdicts
        What the rounds made of each client.
    crew : Crew, optional
        Holders of the rows' columns, where they are in shards.
    """

    def __init__(self, strategy: DeclaredStrategy, alerts: Alerts) -> None:
        self._strategy, self._alerts = strategy, alerts
        self._settings = strategy.settings
        seed = secrets.randbits(63) if self._settings.seed is None else self._settings.seed
        self.state = self._begun = State.first(seed)
        self._before_run: State | None = None
        self.sent: Sent | None = None
        self.roster = Roster(self._settings)
        self.verdicts = Verdicts()
        self.crew: Crew | None = None
        self._rows: Tensor | None = None

    # ------------------------------------------------------------------------------ of a run

    def begin(self) -> None:
        """Begin a run where the one before began: what it left behind is not this one's."""
        self.state = self._begun = self._before_run or self.state
        self.sent, self.verdicts = None, Verdicts()
        self.crew = self.crew or crew_for(self._settings)

    def end(self) -> None:
        """Let go of what the run held."""
        self._before_run = self._begun
        if self.crew is not None:
            self.crew.close()
            self.crew = None

    def resume(self, state: State) -> None:
        """Continue from a state; a run that follows begins there, too."""
        self.state, self._before_run = state, None

    # ---------------------------------------------------------------------------- of a round

    def open_round(self, number: int, arrays: ArrayRecord, config: ConfigRecord) -> Sent:
        """Keep the model that goes out; write what clients need to know into ``config``."""
        sent = Sent.of(arrays, number, self.seed_of(number), self._settings, self._strategy.rule)
        if self.sent is not None:
            sent.check_follows(self.sent)
        if self._settings.seed is None:
            self.state = self.state.redrawn()
        sent.terms.to_config(config)
        self.sent = sent
        return sent

    def seed_of(self, number: int, *phase: int) -> int:
        """Return the seed of a round, or of one of its phases."""
        return round_seed(self.state.seed, number, *phase, secret=self._settings.seed is None)

    def known_sent(self, caller: str) -> Sent:
        """Return what went out; raise ``RuntimeError`` where nothing has."""
        if self.sent is None:
            raise RuntimeError(f"{caller} was called before configure_train")
        return self.sent

    def make_room(self, count: int) -> None:
        """Prepare for the replies of so many nodes."""
        self._rows = self._rows_in_file(count, self.known_sent("make_room"))

    def aggregate(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Screen the replies, take the step, account for it; return the model and the metrics."""
        strategy, sent = self._strategy, self.known_sent("aggregate_train")
        # While clients still train the state is that of the round before.
        intake = self.take_in("train", replies, sent) if strategy.fraction_train else None
        self.state = replace(self.state, round=server_round)
        if intake is None:
            return None, None
        started = time.perf_counter() - intake.seconds
        self.roster.answered(server_round, intake)
        metrics = combined(intake, "train", strategy.combiners["train"], strategy.weighted_by_key)
        self._alerts.of_names(drop_own(metrics))
        stepping = time.perf_counter()
        outcome, norms = self._step(sent, intake)
        stepped = time.perf_counter()
        self.state = self._judge(intake, outcome, norms)
        self._keep_verdicts(intake, outcome)
        seconds = {
            "waiting": intake.waited,
            "screening": intake.seconds,
            "rule": stepped - stepping,
            "aggregation": time.perf_counter() - started,
        }
        Figures.of(sent, intake, outcome, self.state, self.roster, seconds).write(metrics)
        if self.state.empty_rounds >= strategy.max_empty_rounds:
            lack = f"had fewer than {strategy.min_valid_replies} valid replies"
            came = f"{self.state.empty_rounds} rounds in a row "
            came += "came to nothing" if outcome.diverged else lack
            raise EmptyRoundsError(f"{came}; {self.state.failure}", metrics)
        return outcome.arrays, metrics

    def _rows_in_file(self, count: int, sent: Sent) -> Tensor | None:
        """Return room for the rows of a round, those of stale updates too; None: in memory."""
        count += len(self.state.stale.heard)
        return rows_in_file(count, sent.width, sent.row_dtype, self._settings)

    def take_in(self, phase: str, replies: Iterable[Message], sent: Sent | None) -> Intake:
        """Screen the replies of a phase."""
        replies = replies if isinstance(replies, Arrivals) else list(replies)
        rows, self._rows = (None, self._rows) if sent is None else (self._rows, None)
        if sent is not None and (
            rows is None or rows.shape[1] != sent.width or len(rows) < len(replies)
        ):
            rows = self._rows_in_file(len(replies), sent)
        intake = take_in(
            phase,
            replies,
            sent,
            rows=rows,
            slots=None if sent is None else self.roster.slots,
            keep_contents=self._strategy.combiners[phase] is not None,
            examples_key=self._strategy.weighted_by_key,
            needs_examples=self._strategy.weighting == "examples",
            asked=self.roster.asked,
            compressor=self._strategy.compressor,
        )
        self._alerts.of_dropped(intake)
        return intake

    def _step(self, sent: Sent, intake: Intake) -> tuple[Outcome, dict[int, float]]:
        """Take the step of a round; return what it came to, and lengths that may accuse."""
        state, asked = self.state, self.roster.num_asked
        count, least = len(intake.accepted), self._settings.least_replies
        if count < least:
            self._alerts.of_liars(state.round, intake, asked, {})
            why = f"{count} valid replies, min_valid_replies is {least}"
            return Outcome(state.emptied(), sent.model, failure=why), {}
        self._alerts.of_replies(state.round, intake, asked, sent.layout)
        state, fresh = intake.as_round(state, sent, self._settings)
        self._alerts.of_ties(sent, state.ties)
        norms, nodes = self._alerts.accused(fresh), fresh.nodes
        current, stale = self._gathered(state, fresh, intake)
        buffers, rows = intake.buffers[:count], [current]
        del fresh, current  # the step lets go of the rows before it makes a model
        seed = self.seed_of(state.round, 2)
        crew = self.crew = self.crew or crew_for(self._settings)
        # No tuple of arguments, which would hold on to the rows.
        rule, settings = self._strategy.rule, self._settings
        outcome = take_step(state, sent, rows.pop(), stale, buffers, rule, settings, seed, crew)
        assert outcome.survey is not None
        long = dict(zip(nodes, outcome.survey.norms.tolist(), strict=True))
        self._alerts.of_liars(state.round, intake, asked, long)
        return outcome, norms

    def _gathered(self, state: State, fresh: Round, intake: Intake) -> tuple[Round, StaleUpdates]:
        """Return all rows of a round, and what its nodes have sent last if it succeeds.

        A node whose reply was rejected has no say in it, and none later by what it sent before.
        """
        settings, counts = self._settings, intake.num_examples
        replied = {*fresh.nodes, *intake.suspects}
        stale = state.stale.without(replied).usable(state.round, settings.stale_updates)
        current = gathered(fresh, counts, stale, settings)
        if not settings.stale_updates:
            return current, stale
        latest = heard(state.round, fresh.updates, fresh.nodes, counts, fresh.norms)
        kept = stale.after(latest, settings.stale_bytes)
        self._alerts.of_stale(len(stale.heard) + len(latest), len(kept.heard))
        return current, kept

    def _judge(self, intake: Intake, outcome: Outcome, norms: dict[int, float]) -> State:
        """Account for a failure and hold the round against its nodes; return the state after it."""
        state, weights = outcome.state, outcome.weights if norms else None
        if outcome.failure:
            LOG.warning("round %s keeps the model: %s", state.round, outcome.failure)
            why = outcome.failure if outcome.diverged else self._alerts.advice(intake)
            state = replace(state, failure=intake.account(state.round, self.roster.num_asked, why))
            weights = None
        reputation = self.roster.reputation_after(state, intake, weights or [], norms)
        stale = state.stale.without(reputation.benched(state.round + 1))
        return replace(state, reputation=reputation, stale=stale)

    def _keep_verdicts(self, intake: Intake, outcome: Outcome) -> None:
        """Keep what the round made of each client."""
        survey, reputation = outcome.survey, self.state.reputation
        number, asked = self.state.round, self.roster.nodes_asked
        near = None if survey is None else survey.distances
        self.verdicts.add(
            number,
            intake.heard,
            asked=asked,
            sat_out=reputation.benched(number) - asked,
            benched=reputation.benched(number + 1),
            norms=None if survey is None else survey.norms.tolist(),
            distances=None if near is None else near.tolist(),
            weights=outcome.weights,
        )
