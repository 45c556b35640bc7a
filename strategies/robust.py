"""The base of all strategies: from Flower messages to a rule and back."""

import secrets
import time
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from fl_bgmd.arrivals import Arrivals, as_they_arrive
from fl_bgmd.layout import ModelLayout
from fl_bgmd.shards import Crew
from fl_bgmd.wire import Terms

from .alerts import Alerts
from .declared import DeclaredStrategy
from .errors import EmptyRoundsError
from .figures import Figures
from .intake import LOG, Intake, take_in
from .metrics import combined, drop_own
from .preview import preview
from .reporting import log_options
from .roster import Roster
from .rounds import EvaluateFn, StopFn, run_rounds
from .rows import gathered
from .sent import Sent, packed, round_seed
from .stale import StaleUpdates, heard
from .step import Outcome, Round, State, take_step
from .storage import crew_for, rows_in_file
from .verdicts import RobustResult, Verdicts


class RobustStrategy(DeclaredStrategy):
    """A rule, by its spec or in a subclass, as a Flower strategy.

    ``RobustStrategy("gmd+nearest-neighbor", byzantine_fraction=0.2)`` takes any spec of
    :func:`fl_bgmd.aggregators.build_rule`. A subclass names a rule in :attr:`spec`, or is one by
    overriding :meth:`aggregate`. Everything a client sends is screened (:mod:`fl_bgmd.replies`); a
    rejected reply is logged and counted and never stops a round.

    Parameters
    ----------
    rule : str
        The spec of the rule and its mixings. Not for subclasses, which have one.
    **options
        Those of the rule, of :class:`.settings.Settings` (every strategy's), and all of
        :class:`flwr.serverapp.strategy.FedAvg`'s.

    Raises
    ------
    OptionError
        A ``TypeError`` and ``ValueError``: for an option that the strategy does not have, with the
        nearest that it has, and for a value that is not allowed.
    """

    def __init__(self, rule: str = "", /, **options: Any) -> None:
        super().__init__(rule, **options)
        seed = secrets.randbits(63) if self.settings.seed is None else self.settings.seed
        self._state = State.first(seed)
        self._before_run: State | None = None
        self._sent: Sent | None = None
        self._rows: Tensor | None = None
        self._crew: Crew | None = None
        self.verdicts = Verdicts()
        self._roster, self._alerts = Roster(self.settings), Alerts(self)

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: EvaluateFn | None = None,
        should_stop: StopFn | None = None,
    ) -> RobustResult:
        """Run the rounds, as :meth:`flwr.serverapp.strategy.Strategy.start`.

        With ``checkpoints`` the run resumes from the newest one; ``initial_arrays`` then only says
        what the model looks like. A second run of the same strategy starts like the first, and with
        a ``seed`` goes like it. ``should_stop`` is called after each round with its number and the
        results so far; the run ends, regularly, once it returns True. (Flower's own strategies
        have it from 1.43 on.)

        Raises
        ------
        EmptyRoundsError
            After ``max_empty_rounds`` rounds in a row without enough valid replies, and after the
            last round if none has moved the model.
        MissingNodesError
            When ``too_few_nodes`` is ``fail`` and nodes are missing after ``node_wait_timeout``.
        CheckpointError
            For a checkpoint of another strategy, model or configuration.
        """
        # What an earlier run left behind is not this one's.
        before = self._state = self._before_run or self._state
        self._sent, self.verdicts = None, Verdicts()
        self.warn_at_start()
        # Copies: what this strategy asks of clients is not the next one's.
        train, evaluate = (ConfigRecord(dict(c or {})) for c in (train_config, evaluate_config))
        folder, rounds, stop = self.settings.folder, num_rounds, should_stop
        model = [initial_arrays]
        del initial_arrays  # where the caller has let go of it the run can, too
        self._crew = self._crew or crew_for(self.settings)
        try:
            with nullcontext() if folder is None else folder.locked():
                # No tuple of arguments, which would hold on to the model.
                return run_rounds(
                    self, grid, model.pop(), rounds, timeout, train, evaluate, evaluate_fn, stop
                )
        finally:
            self._before_run = before
            if self._crew is not None:
                self._crew.close()
                self._crew = None

    # ---------------------------------------------------------------------------- what goes out

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Sample nodes and send them the model, the round and the round's seed."""
        self._roster.discard_late(grid)
        self.open_round(server_round, arrays, config)
        if self.fraction_train == 0.0:
            return []
        content, received = self._packed(arrays, config, self._seed(server_round))
        self._sent = self._known_sent("configure_train").as_received(content, received)
        share, least = self.fraction_train, self.min_train_nodes
        messages = self._ask(grid, MessageType.TRAIN, server_round, content, share, least)
        self._alerts.of_few_asked(len(messages))
        self._rows = self._rows_in_file(len(messages), self._sent)
        return messages

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Sample nodes and send them the model to evaluate."""
        if self.fraction_evaluate == 0.0:
            return []
        Terms(round=server_round).to_config(config)
        content, _ = self._packed(arrays, config, self._seed(server_round, 1))
        share, least = self.fraction_evaluate, self.min_evaluate_nodes
        return self._ask(grid, MessageType.EVALUATE, server_round, content, share, least)

    def warn_at_start(self) -> None:
        """Begin a run's warnings: say what the settings cannot protect from, or give away."""
        self._alerts.start()

    def expect(self, count: int) -> None:
        """Take note of how many are asked to train, where no messages say so."""
        self._roster.num_asked = count
        self._alerts.of_few_asked(count)

    def sent(self, messages: list[Message]) -> None:
        """Take note of what goes out, whoever has built it; other replies are rejected."""
        self._roster.sent(messages)

    def open_round(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord
    ) -> ModelLayout:
        """Keep the model that goes out; write what clients need to know into ``config``.

        Returns its layout. Raises ``ValueError`` for a model that holds a NaN or an infinity, or is
        another one than in the last round.
        """
        seed = self._seed(server_round)
        sent = Sent.of(arrays, server_round, seed, self.settings, self.rule)
        if self._sent is not None:
            sent.check_follows(self._sent)
        if self.seed is None:
            self._state = self._state.redrawn()
        sent.terms.to_config(config)
        self._sent = sent
        return sent.layout

    def _seed(self, server_round: int, *phase: int) -> int:
        return round_seed(self._state.seed, server_round, *phase, secret=self.seed is None)

    def _packed(
        self, arrays: ArrayRecord, config: ConfigRecord, seed: int
    ) -> tuple[RecordDict, ArrayRecord]:
        content = RecordDict({self.arrayrecord_key: arrays, self.configrecord_key: config})
        return packed(content, self.arrayrecord_key, self.settings.rounding, seed)

    def _ask(
        self, grid: Grid, kind: str, number: int, content: RecordDict, share: float, least: int
    ) -> list[Message]:
        """Sample nodes once enough are there, the same ones for the same seed and node ids."""
        needed = max(self.min_available_nodes, least)
        return self._roster.ask(grid, self._state, kind, number, content, share, least, needed)

    # ----------------------------------------------------------------------------- what comes in

    @as_they_arrive
    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Screen the replies, apply the rule, return the new model and the round's diagnostics.

        A run hands over an :class:`~fl_bgmd.arrivals.Arrivals`: each reply is looked at as it
        comes, and released. A list is as good; a subclass that overrides this is given one.

        Raises ``RuntimeError`` when called before :meth:`configure_train`, which keeps the model
        that the updates refer to.
        """
        sent = self._known_sent("aggregate_train")
        # While clients still train the state is that of the round before.
        intake = self._take_in("train", replies, sent) if self.fraction_train else None
        self._state = replace(self._state, round=server_round)
        if intake is None:
            return None, None
        started = time.perf_counter() - intake.seconds
        self._roster.answered(server_round, intake)
        metrics = combined(intake, "train", self.combiners["train"], self.weighted_by_key)
        self._alerts.of_names(drop_own(metrics))
        stepping = time.perf_counter()
        outcome, norms = self._step(sent, intake)
        stepped = time.perf_counter()
        self._state = self._judge(intake, outcome, norms)
        self._keep_verdicts(intake, outcome)
        seconds = {
            "waiting": intake.waited,
            "screening": intake.seconds,
            "rule": stepped - stepping,
            "aggregation": time.perf_counter() - started,
        }
        Figures.of(sent, intake, outcome, self._state, self._roster, seconds).write(metrics)
        if self._state.empty_rounds >= self.max_empty_rounds:
            lack = f"had fewer than {self.min_valid_replies} valid replies"
            came = f"{self._state.empty_rounds} rounds in a row "
            came += "came to nothing" if outcome.diverged else lack
            raise EmptyRoundsError(f"{came}; {self.failure}", metrics)
        return outcome.arrays, metrics

    @as_they_arrive
    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Combine the clients' evaluation metrics by their median."""
        intake = self._take_in("evaluate", replies, None)
        if not intake.accepted:
            return None
        metrics = combined(intake, "evaluate", self.combiners["evaluate"], self.weighted_by_key)
        if intake.dropped:
            metrics["dropped-metrics"] = intake.dropped
        return metrics

    def _rows_in_file(self, count: int, sent: Sent) -> Tensor | None:
        """Return room for the rows of a round, those of stale updates too; None: in memory."""
        count += len(self._state.stale.heard)
        return rows_in_file(count, sent.width, sent.row_dtype, self.settings)

    def _take_in(self, phase: str, replies: Iterable[Message], sent: Sent | None) -> Intake:
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
            slots=None if sent is None else self._roster.slots,
            keep_contents=self.combiners[phase] is not None,
            examples_key=self.weighted_by_key,
            needs_examples=self.weighting == "examples",
            asked=self._roster.asked,
            compressor=self.compressor,
        )
        self._alerts.of_dropped(intake)
        return intake

    def _step(self, sent: Sent, intake: Intake) -> tuple[Outcome, dict[int, float]]:
        """Take the step of a round; return what it came to, and lengths that may accuse."""
        state, asked = self._state, self._roster.num_asked
        count, least = len(intake.accepted), self.settings.least_replies
        if count < least:
            self._alerts.of_liars(state.round, intake, asked, {})
            why = f"{count} valid replies, min_valid_replies is {least}"
            return Outcome(state.emptied(), sent.model, failure=why), {}
        self._alerts.of_replies(state.round, intake, asked, sent.layout)
        state, fresh = intake.as_round(state, sent, self.settings)
        self._alerts.of_ties(sent, state.ties)
        norms, nodes = self._alerts.accused(fresh), fresh.nodes
        current, stale = self._gathered(state, fresh, intake)
        buffers, rows = intake.buffers[:count], [current]
        del fresh, current  # the step lets go of the rows before it makes a model
        seed = self._seed(state.round, 2)
        crew = self._crew = self._crew or crew_for(self.settings)
        # No tuple of arguments, which would hold on to the rows.
        rule, settings = self.rule, self.settings
        outcome = take_step(state, sent, rows.pop(), stale, buffers, rule, settings, seed, crew)
        assert outcome.survey is not None
        long = dict(zip(nodes, outcome.survey.norms.tolist(), strict=True))
        self._alerts.of_liars(state.round, intake, asked, long)
        return outcome, norms

    def _gathered(self, state: State, fresh: Round, intake: Intake) -> tuple[Round, StaleUpdates]:
        """Return all rows of a round, and what its nodes have sent last if it succeeds.

        A node whose reply was rejected has no say in it, and none later by what it sent before.
        """
        settings, counts = self.settings, intake.num_examples
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
            state = replace(state, failure=intake.account(state.round, self._roster.num_asked, why))
            weights = None
        reputation = self._roster.reputation_after(state, intake, weights or [], norms)
        stale = state.stale.without(reputation.benched(state.round + 1))
        return replace(state, reputation=reputation, stale=stale)

    def _keep_verdicts(self, intake: Intake, outcome: Outcome) -> None:
        """Keep what the round made of each client."""
        survey, reputation = outcome.survey, self._state.reputation
        number, asked = self._state.round, self._roster.nodes_asked
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

    def preview(
        self, updates: Tensor, nodes: list[int], examples: list[float], rounds: int
    ) -> Tensor:
        """Return what the server would move by if ``rounds`` rounds brought these updates.

        For simulated attackers that know the server, what it draws and remembers included; the
        strategy stays as it is. See :func:`.preview.preview`. Raises ``RuntimeError`` before
        :meth:`configure_train`.
        """
        sent = self._known_sent("preview")
        return preview(
            self.rule, sent, self._state, self.settings, updates, nodes, examples, rounds
        )

    def _known_sent(self, caller: str) -> Sent:
        if self._sent is None:
            raise RuntimeError(f"{caller} was called before configure_train")
        return self._sent

    # ----------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next round depends on, as tensors, numbers and dictionaries."""
        return self._state.to_dict(self.rule)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned."""
        self._state = State.from_dict(state, self.rule, self.device)
        self._before_run = None

    @property
    def assumed_fraction(self) -> float:
        """The hostile share to prepare for: ``byzantine_fraction``, or the latest estimate."""
        return self._state.assumed(self.settings)

    @property
    def failure(self) -> str:
        """What the last round that left the model as it was came to, empty if none did."""
        return self._state.failure

    def summary(self) -> None:
        """Log the configuration of the strategy: every option and its value."""
        super().summary()
        log_options(self)
