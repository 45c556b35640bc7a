"""The base of all strategies: from Flower messages to a rule and back."""

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from fl_bgmd.arrivals import as_they_arrive
from fl_bgmd.layout import ModelLayout
from fl_bgmd.wire import Terms

from .alerts import Alerts
from .declared import DeclaredStrategy
from .metrics import combined
from .preview import preview
from .reporting import log_options
from .rounds import EvaluateFn, StopFn, run_rounds
from .sent import packed
from .session import Session
from .step import State
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
        self._alerts = Alerts(self)
        self._session = Session(self, self._alerts)

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
        self._session.begin()
        self.warn_at_start()
        # Copies: what this strategy asks of clients is not the next one's.
        train, evaluate = (ConfigRecord(dict(c or {})) for c in (train_config, evaluate_config))
        folder, rounds, stop = self.settings.folder, num_rounds, should_stop
        model = [initial_arrays]
        del initial_arrays  # where the caller has let go of it the run can, too
        try:
            with nullcontext() if folder is None else folder.locked():
                # No tuple of arguments, which would hold on to the model.
                return run_rounds(
                    self, grid, model.pop(), rounds, timeout, train, evaluate, evaluate_fn, stop
                )
        finally:
            self._session.end()

    # ---------------------------------------------------------------------------- what goes out

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Sample nodes and send them the model, the round and the round's seed."""
        session = self._session
        session.roster.discard_late(grid)
        self.open_round(server_round, arrays, config)
        if self.fraction_train == 0.0:
            return []
        content, received = self._packed(arrays, config, server_round)
        session.sent = session.known_sent("configure_train").as_received(content, received)
        share, least = self.fraction_train, self.min_train_nodes
        messages = self._ask(grid, MessageType.TRAIN, server_round, content, share, least)
        self._alerts.of_few_asked(len(messages))
        session.make_room(len(messages))
        return messages

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Sample nodes and send them the model to evaluate."""
        if self.fraction_evaluate == 0.0:
            return []
        Terms(round=server_round).to_config(config)
        content, _ = self._packed(arrays, config, server_round, 1)
        share, least = self.fraction_evaluate, self.min_evaluate_nodes
        return self._ask(grid, MessageType.EVALUATE, server_round, content, share, least)

    def warn_at_start(self) -> None:
        """Begin a run's warnings: say what the settings cannot protect from, or give away."""
        self._alerts.start()

    def expect(self, count: int) -> None:
        """Take note of how many are asked to train, where no messages say so."""
        self._session.roster.num_asked = count
        self._alerts.of_few_asked(count)

    def sent(self, messages: list[Message]) -> None:
        """Take note of what goes out, whoever has built it; other replies are rejected."""
        self._session.roster.sent(messages)

    def open_round(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord
    ) -> ModelLayout:
        """Keep the model that goes out; write what clients need to know into ``config``.

        Returns its layout. Raises ``ValueError`` for a model that holds a NaN or an infinity, or is
        another one than in the last round.
        """
        return self._session.open_round(server_round, arrays, config).layout

    def _packed(
        self, arrays: ArrayRecord, config: ConfigRecord, *phase: int
    ) -> tuple[RecordDict, ArrayRecord]:
        seed = self._session.seed_of(*phase)
        content = RecordDict({self.arrayrecord_key: arrays, self.configrecord_key: config})
        return packed(content, self.arrayrecord_key, self.settings.rounding, seed)

    def _ask(
        self, grid: Grid, kind: str, number: int, content: RecordDict, share: float, least: int
    ) -> list[Message]:
        """Sample nodes once enough are there, the same ones for the same seed and node ids."""
        needed = max(self.min_available_nodes, least)
        state = self._session.state
        return self._session.roster.ask(grid, state, kind, number, content, share, least, needed)

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
        return self._session.aggregate(server_round, replies)

    @as_they_arrive
    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Combine the clients' evaluation metrics by their median."""
        intake = self._session.take_in("evaluate", replies, None)
        if not intake.accepted:
            return None
        metrics = combined(intake, "evaluate", self.combiners["evaluate"], self.weighted_by_key)
        if intake.dropped:
            metrics["dropped-metrics"] = intake.dropped
        return metrics

    def preview(
        self, updates: Tensor, nodes: list[int], examples: list[float], rounds: int
    ) -> Tensor:
        """Return what the server would move by if ``rounds`` rounds brought these updates.

        For simulated attackers that know the server, what it draws and remembers included; the
        strategy stays as it is. See :func:`.preview.preview`. Raises ``RuntimeError`` before
        :meth:`configure_train`.
        """
        sent, state = self._session.known_sent("preview"), self._session.state
        return preview(self.rule, sent, state, self.settings, updates, nodes, examples, rounds)

    # ----------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next round depends on, as tensors, numbers and dictionaries."""
        return self._session.state.to_dict(self.rule)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned."""
        self._session.resume(State.from_dict(state, self.rule, self.device))

    @property
    def verdicts(self) -> Verdicts:
        """What the rounds of the run made of each client."""
        return self._session.verdicts

    @verdicts.setter
    def verdicts(self, verdicts: Verdicts) -> None:
        self._session.verdicts = verdicts

    @property
    def assumed_fraction(self) -> float:
        """The hostile share to prepare for: ``byzantine_fraction``, or the latest estimate."""
        return self._session.state.assumed(self.settings)

    @property
    def failure(self) -> str:
        """What the last round that left the model as it was came to, empty if none did."""
        return self._session.state.failure

    def summary(self) -> None:
        """Log the configuration of the strategy: every option and its value."""
        super().summary()
        log_options(self)
