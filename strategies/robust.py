"""The base of all strategies: from Flower messages to a rule and back."""

import hashlib
import inspect
import math
import secrets
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result
from torch import Tensor

from fl_bgmd.aggregators import Aggregate, Rule, build_rule
from fl_bgmd.aggregators.norms import euclidean_norms
from fl_bgmd.aggregators.rows import vector_norm
from fl_bgmd.aggregators.rule import INJECTED, Bound, Kind, build_mixings
from fl_bgmd.checkpoints import Checkpoints
from fl_bgmd.compression import build_compressor, build_downlink, names_of
from fl_bgmd.held import num_bytes
from fl_bgmd.layout import ModelLayout
from fl_bgmd.options import OptionError, check_all
from fl_bgmd.replies import median_metrics
from fl_bgmd.shares import FEWEST
from fl_bgmd.wire import MODEL_RECORD, Terms, pack_model

from .alerts import TOO_FEW, Alerts
from .errors import EmptyRoundsError
from .figures import Figures, own_names
from .intake import LOG, Intake, capped_examples, in_order, take_in
from .reporting import log_options
from .reputation import Reputation
from .roster import Roster
from .rounds import EvaluateFn, StopFn, run_rounds
from .settings import (
    FLOWERS_OPTIONS,
    OWN_OPTIONS,
    Settings,
    docstring_of,
    options_of,
    resolve_device,
    signature_of,
)
from .step import Round, Sent, State, aggregate, take_step
from .ties import Tied, find_ties

_METRICS_FUNCTIONS = {"train": "train_metrics_aggr_fn", "evaluate": "evaluate_metrics_aggr_fn"}


class RobustStrategy(FedAvg):
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

    spec: ClassVar[str] = ""
    """The rule of a subclass."""

    defaults: ClassVar[Mapping[str, Any]] = {}
    """Options that a subclass sets where they are not given."""

    weightable = False
    """Whether the rule makes use of weights. A subclass with an :meth:`aggregate` may say so."""

    robust = True
    """Whether it holds up against a hostile minority."""

    can_share_coordinates = True
    """Whether rows may be of other coordinates in each round."""

    weights_tell = False
    """Whether a weight near zero speaks against a client: not where honest ones are left out."""

    __signature__: ClassVar[inspect.Signature]

    given: dict[str, Any]
    """The options as they were given."""

    def __init_subclass__(cls, **keywords: Any) -> None:
        """Tell :func:`help` and :func:`inspect.signature` the options of a subclass."""
        super().__init_subclass__(**keywords)
        options = options_of(cls)
        takes_spec = not cls.spec and cls.aggregate is RobustStrategy.aggregate
        cls.__signature__ = signature_of(cls, options, takes_spec=takes_spec)
        if sys.flags.optimize < 2:  # -OO: without docstrings
            cls.__doc__ = docstring_of(cls, options)

    def __new__(cls, *args: Any, **options: Any) -> Self:
        """Check the options before any constructor computes with them."""
        rule = cls.spec or (args[0] if args and isinstance(args[0], str) else "")
        check_all(cls.__name__, options, options_of(cls, rule))
        strategy = super().__new__(cls)
        strategy.given = options
        return strategy

    def __init__(self, rule: str = "", /, **options: Any) -> None:
        has_rule = bool(self.spec) or type(self).aggregate is not RobustStrategy.aggregate
        if bool(rule) == has_rule:
            allowed = "none, the class has one" if has_rule else "a spec such as 'gmd+bucketing'"
            raise OptionError(f"rule is {rule!r} for {type(self).__name__}; allowed: {allowed}")
        options = {**self.defaults, **options}
        flowers = {name: options.pop(name) for name in FLOWERS_OPTIONS if name in options}
        own = {name: options.pop(name) for name in OWN_OPTIONS if name in options}
        settings = Settings(**own)
        super().__init__(**flowers)
        self.rule = self._build_rule(rule or self.spec, settings, options)
        kind = self.rule.rule.kind
        self.robust, self.weightable = kind.robust, kind.weightable
        self.weights_tell = kind.weights_tell
        self.can_share_coordinates = not self.rule.rule.uses("memory")
        if settings.min_valid_replies is None:
            safe = self.robust and settings.byzantine_fraction > 0
            settings = replace(settings, min_valid_replies=FEWEST if safe else 1)
        self.settings = settings
        self.compressor = (
            None if settings.compressor == "none" else build_compressor(settings.compressor)
        )
        self._check_together()
        self.device = resolve_device(settings.device)
        self._downlink = build_downlink(settings.downlink_compressor)
        folder = settings.checkpoints
        self._checkpoints = Checkpoints(folder) if isinstance(folder, str | Path) else folder
        self.combines_by_median = {
            phase: flowers.get(name) is None for phase, name in _METRICS_FUNCTIONS.items()
        }
        seed = secrets.randbits(63) if settings.seed is None else settings.seed
        self._reputation = Reputation(settings.bench_after, settings.bench_rounds)
        self._roster = Roster(
            seed, settings.node_wait_timeout, settings.too_few_nodes, self._reputation
        )
        self._alerts = Alerts(self)
        self._state = State(torch.Generator().manual_seed(seed).get_state())
        self._sent: Sent | None = None
        self._failure = ""
        self._has_run = False
        self._before_run: dict[str, Any] = {}

    def _build_rule(self, spec: str, settings: Settings, options: dict[str, Any]) -> Rule:
        """Return the rule behind its mixings, which calls :meth:`aggregate`."""
        share = settings.byzantine_fraction
        if spec:
            rule = build_rule(spec, byzantine_fraction=share, mixing=settings.mixing, **options)
        else:
            kind = Kind(
                type(self).__name__,
                self.aggregate,
                {},
                {name: name for name in INJECTED if name != "weights" or self.weightable},
                robust=self.robust,
                weights_tell=self.weights_tell,
                uses=_uses_nothing if self.can_share_coordinates else _uses_memory,
            )
            rule = Rule(Bound(kind, {}), build_mixings(settings.mixing), share)
        return replace(rule, call=self._aggregate)

    def _check_together(self) -> None:
        """Refuse options that do not fit the rule."""
        settings = self.settings
        name = type(self).__name__ if self.spec else str(self.rule)
        if settings.weighting != "uniform" and not self.weightable:
            raise OptionError(f"weighting is {settings.weighting!r} with {name}; allowed: uniform")
        if not settings.shared_coordinates:
            return
        if self.compressor is None or not self.compressor.can_share_coordinates:
            raise OptionError(
                f"shared_coordinates is True with compressor {settings.compressor!r}; allowed: "
                + names_of(lambda kind: kind.can_share_coordinates)
            )
        if not self.can_share_coordinates:
            raise OptionError(
                f"shared_coordinates is True with {name}; allowed: False, since what it remembers "
                "belongs to coordinates"
            )

    def __getattr__(self, name: str) -> Any:
        """Return the value of an option."""
        known = self.__dict__
        if name in OWN_OPTIONS and "settings" in known:
            return getattr(known["settings"], name)
        bound = known["rule"].rule if "rule" in known else None
        if bound is not None and name in bound.kind.options:
            return bound.values[bound.kind.options[name].parameter]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def aggregate(self, current: Round) -> Aggregate:
        """Apply the rule to the rows of a round.

        An override may keep what it remembers in the result's ``memory``: it comes back as
        ``current.memory``, is part of checkpoints, and of a round that fails nothing stays.
        """
        result: Aggregate = self.rule.rule(**vars(current))
        return result

    def _aggregate(self, **inputs: Any) -> Aggregate:
        return self.aggregate(Round(**inputs))

    # ---------------------------------------------------------------- Flower's side of a round

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
    ) -> Result:
        """Run the rounds, as :meth:`flwr.serverapp.strategy.Strategy.start`.

        With ``checkpoints`` the run goes on from the newest one, ``initial_arrays`` then only says
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
        if self._has_run:  # what an earlier run left behind is not this one's
            self.load_state_dict(self._before_run)
        else:
            self._before_run = self.state_dict()
        self._sent, self._failure = None, ""
        self.warn_at_start()
        try:
            with nullcontext() if self._checkpoints is None else self._checkpoints.locked():
                return run_rounds(
                    self,
                    grid,
                    initial_arrays,
                    num_rounds=num_rounds,
                    timeout=timeout,
                    # Copies: what this strategy asks of clients is not the next one's.
                    train_config=ConfigRecord(dict(train_config or {})),
                    evaluate_config=ConfigRecord(dict(evaluate_config or {})),
                    evaluate_fn=evaluate_fn,
                    should_stop=should_stop,
                    checkpoints=self._checkpoints,
                )
        finally:
            self._has_run = True

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Sample nodes and send them the model, the round and the round's seed."""
        self._roster.discard_late(grid)
        self.open_round(server_round, arrays, config)
        if self.fraction_train == 0.0:
            return []
        assert self._sent is not None
        content, received = self._broadcast(arrays, config, self._round_seed(server_round))
        layout = self._sent.layout if received is arrays else ModelLayout(received)
        [sent] = content.array_records.values()
        self._sent = replace(self._sent, layout=layout, num_bytes=_num_bytes(sent))
        return self._sample_and_send(
            MessageType.TRAIN,
            server_round,
            content,
            grid,
            self.fraction_train,
            self.min_train_nodes,
        )

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

        Returns its layout. Raises ``ValueError`` for a model that holds a NaN or an infinity.
        """
        layout = ModelLayout(arrays)
        before = None if self._sent is None else self._sent.layout
        if before is not None and (before.directions, before.buffers) != (
            layout.directions,
            layout.buffers,
        ):
            raise ValueError(
                "arrays are of another model than in the last round, whose state this strategy "
                "keeps; allowed: the same keys, shapes and dtypes, or a new strategy"
            )
        if not (np.isfinite(layout.values).all() and np.isfinite(layout.buffer_values).all()):
            raise ValueError("arrays of the global model hold a NaN or an infinity")
        seed = self._round_seed(server_round)
        if self.seed is None:  # nothing of earlier rounds tells what this one draws
            fresh = torch.Generator()
            fresh.seed()
            self._state = replace(self._state, generator=fresh.get_state())
        compressor, coordinates = self.compressor, None
        Terms(
            round=server_round,
            seed=seed,
            compressor=None if compressor is None else compressor.name,
            error_feedback=self.error_feedback,
            compression_seed=seed if self.shared_coordinates else None,
        ).to_config(config)
        if self.shared_coordinates and compressor is not None:
            compressor = compressor.for_round(seed)
            coordinates = compressor.coordinates(layout.num_directions)
        self._sent = Sent(arrays, layout, layout, compressor, coordinates, _num_bytes(arrays))
        return layout

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Sample nodes and send them the model to evaluate."""
        if self.fraction_evaluate == 0.0:
            return []
        return self._sample_and_send(
            MessageType.EVALUATE,
            server_round,
            self._broadcast(arrays, config, self._round_seed(server_round, 1))[0],
            grid,
            self.fraction_evaluate,
            self.min_evaluate_nodes,
        )

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Screen the replies, apply the rule, return the new model and the round's diagnostics.

        Raises ``RuntimeError`` when called before :meth:`configure_train`, which keeps the model
        that the updates refer to.
        """
        sent = self._sent
        if sent is None:
            raise RuntimeError("aggregate_train was called before configure_train")
        started = time.perf_counter()
        self._state = replace(self._state, round=server_round)
        if self.fraction_train == 0.0:
            return None, None
        messages = in_order(replies)
        intake = self._take_in("train", messages, sent)
        self._roster.answered(server_round, messages)
        metrics, figures = self._metrics("train", intake), intake.figures()
        self._drop_own(metrics)
        asked = self._roster.num_asked
        figures.missing = max(0, asked - len(messages))
        figures.late = self._roster.late or None
        figures.bytes_down = asked * sent.num_bytes
        arrays, weights, norms = self._step(sent, intake, figures)
        figures.benched = (
            self._roster.judge(
                server_round,
                intake.suspects,
                weights,
                norms,
                intake.nodes,
                self.byzantine_fraction,
                self.min_valid_replies,
            )
            or None
        )
        figures.aggregation_seconds = time.perf_counter() - started
        figures.write(metrics)
        empty = self._state.empty_rounds
        if empty >= self.max_empty_rounds:
            few = len(intake.accepted) < self.min_valid_replies
            lack = f"had fewer than {self.min_valid_replies} valid replies"
            came = f"{empty} rounds in a row {lack if few else 'came to nothing'}"
            raise EmptyRoundsError(f"{came}; {self._failure}", metrics)
        return arrays, metrics

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Combine the clients' evaluation metrics by their median."""
        intake = self._take_in("evaluate", in_order(replies), None)
        if not intake.accepted:
            return None
        metrics = self._metrics("evaluate", intake)
        if intake.dropped:
            metrics["dropped-metrics"] = intake.dropped
        return metrics

    def _step(
        self, sent: Sent, intake: Intake, figures: Figures
    ) -> tuple[ArrayRecord, dict[int, float], dict[int, float]]:
        """Take the step of a round; return the model, and weights and norms that may accuse."""
        number, count = self._state.round, len(intake.accepted)
        asked, nodes = self._roster.num_asked, intake.nodes
        if count < self.min_valid_replies:
            why = f"{count} valid replies, min_valid_replies is {self.min_valid_replies}"
            LOG.warning("round %s keeps the model: %s", number, why)
            self._alerts.of_liars(number, intake, asked, {})
            few = TOO_FEW if count and self.min_valid_replies == FEWEST else ""
            self._failure = self._account(intake, few)
            self._state = replace(self._state, empty_rounds=self._state.empty_rounds + 1)
            return sent.model, {}, {}
        self._alerts.of_replies(number, intake, asked)
        rows = self._merge_ties(sent, intake.rows[:count])
        current = intake.round(rows, self.weighting, self.device, self.byzantine_fraction)
        norms: dict[int, float] = {}
        if self.bench_after and self.weights_tell:
            norms = dict(zip(nodes, euclidean_norms(current.updates), strict=True))
        self._alerts.of_liars(number, intake, asked, norms or self._alerts.lengths(current))
        outcome = take_step(
            self._state,
            sent,
            current,
            intake.buffers[:count],
            self.rule,
            learning_rate=self._learning_rate(),
            momentum=self.server_momentum,
            nesterov=self.server_nesterov,
        )
        self._state = outcome.state
        weights: dict[int, float] = {}
        if outcome.failure:
            LOG.warning("round %s keeps the model: %s", number, outcome.failure)
            figures.diverged = 1
            self._failure = self._account(intake, outcome.failure)
        if (result := outcome.result) is not None:
            figures.update_norm, figures.rule = vector_norm(result.vector), result.diagnostics
            if result.weights is not None:
                figures.client_weights = [float(share) for share in result.weights]
                weights = dict(zip(nodes, figures.client_weights, strict=True))
        return outcome.arrays, weights if norms and not outcome.failure else {}, norms

    def preview(
        self, updates: Tensor, nodes: list[int], examples: list[float], rounds: int
    ) -> Tensor:
        """Return what the server would move by if so many rounds brought these updates.

        For simulated attackers that know the server, what it draws and remembers included; the
        strategy stays as it is. Mixing and the rule, without momentum and learning rate; arrays
        are tied where they were before the round. A round in which the rule fails moves nothing.

        Parameters
        ----------
        updates : Tensor
            (n, d), in the server's order (:func:`.intake.in_order`); not changed.
        nodes : list of int
            (n,): whose they are.
        examples : list of float
            (n,): how many examples they report.
        rounds : int
            1 or more.

        Returns
        -------
        Tensor
            (d,), float64 on the CPU: the sum of the rounds' aggregates.

        Raises
        ------
        ValueError
            For another shape, or number of rounds.
        RuntimeError
            Before :meth:`configure_train`.
        """
        sent = self._sent
        if sent is None:
            raise RuntimeError("preview was called before configure_train")
        expected = (len(nodes), sent.layout.num_directions)
        if tuple(updates.shape) != expected or len(examples) != len(nodes):
            raise ValueError(
                f"updates have shape {tuple(updates.shape)} with {len(nodes)} nodes and "
                f"{len(examples)} numbers of examples; allowed: {expected} and as many"
            )
        if rounds < 1:
            raise ValueError(f"rounds is {rounds}; allowed: 1 or more")
        moved = torch.zeros(sent.layout.num_directions, dtype=torch.float64)
        if len(nodes) < self.min_valid_replies:
            return moved
        state = self._state
        if sent.coordinates is not None:
            updates = updates[:, torch.from_numpy(sent.coordinates)]
        elif state.ties:
            updates = Tied(sent.layout.directions, state.ties).merge(updates.clone())
        weights = None
        if self.weighting == "examples":
            weights = capped_examples(examples, self.byzantine_fraction)
        for _ in range(rounds):
            # A copy: the rule may overwrite it.
            current = Round(updates.to(self.device, copy=True), weights, nodes)
            try:
                with np.errstate(all="ignore"):
                    result, drawn = aggregate(self.rule, current, state)
            except ValueError:
                continue
            state = replace(state, generator=drawn, memory=result.memory)
            moved += sent.spread(result.vector, state.ties).cpu().double()
        return moved

    # ------------------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next round depends on, as tensors, numbers and dictionaries."""
        state = self._state
        return {
            **vars(state),
            "ties": dict(state.ties),
            "memory": self.rule.to_state(state.memory),
            "seed": self._roster.seed,
            "reputation": self._reputation.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned."""
        self._has_run = False
        own = {name: state[name] for name in vars(self._state)}
        self._state = State(**own | {"memory": self.rule.from_state(own["memory"], self.device)})
        self._roster.seed = int(state["seed"])
        self._reputation.load_state_dict(state["reputation"])

    @property
    def failure(self) -> str:
        """What the last round that left the model as it was came to, empty if none did."""
        return self._failure

    def summary(self) -> None:
        """Log the configuration of the strategy: every option and its value."""
        super().summary()
        log_options(self)

    # ---------------------------------------------------------------------------- details

    def _learning_rate(self) -> float:
        """Return the server's step of this round."""
        rate, number = self.server_learning_rate, self._state.round
        step = rate(number) if callable(rate) else rate
        if not 0 <= step < math.inf:
            raise ValueError(
                f"server_learning_rate is {step} in round {number}; allowed: 0 or more"
            )
        return float(step)

    def _broadcast(
        self, arrays: ArrayRecord, config: ConfigRecord, seed: int
    ) -> tuple[RecordDict, ArrayRecord]:
        """Return what goes to the clients, and the model that they make of it."""
        content = RecordDict({self.arrayrecord_key: arrays, self.configrecord_key: config})
        if self._downlink is None:
            return content, arrays
        packed, received = pack_model(arrays, self._downlink, seed)
        content[self.arrayrecord_key] = packed["arrays"]
        content[MODEL_RECORD] = packed[MODEL_RECORD]
        return content, received

    def _round_seed(self, server_round: int, *phase: int) -> int:
        """Return what a round tells its clients to draw from; it does not give away the rest."""
        digest = hashlib.sha256(f"{self._roster.seed}".encode()).digest()
        own = int.from_bytes(digest[:8], "big") if self.seed is None else self.seed
        return int(np.random.SeedSequence([own, server_round, *phase]).generate_state(1)[0])

    def _take_in(self, phase: str, messages: list[Message], sent: Sent | None) -> Intake:
        """Screen the replies of a phase."""
        intake = take_in(
            messages,
            None if sent is None else sent.layout,
            width=0 if sent is None else sent.width,
            keep_contents=not self.combines_by_median[phase],
            examples_key=self.weighted_by_key,
            needs_examples=self.weighting == "examples",
            asked=self._roster.asked,
            compressor=self.compressor if sent is None else sent.compressor,
            coordinates=None if sent is None else sent.coordinates,
        )
        LOG.info(
            "aggregate_%s: accepted %s replies, rejected %s",
            phase,
            len(intake.accepted),
            intake.rejected.total(),
        )
        self._alerts.of_dropped(intake)
        return intake

    def _drop_own(self, metrics: MetricRecord) -> None:
        """Drop metrics with names of the server's own: no client says what the server found."""
        own = own_names()
        dropped = [key for key in metrics if key in own or key.startswith("rejected-")]
        for key in dropped:
            del metrics[key]
        self._alerts.of_names(dropped)

    def _merge_ties(self, sent: Sent, rows: Tensor) -> Tensor:
        """Return the rows with each tensor once; see :mod:`.ties`."""
        lossy = self.compressor is not None or self._downlink is not None
        known = dict(self._state.ties)
        if sent.coordinates is not None:
            self._alerts.of_ties(sent, known, lossy=lossy)
            return rows
        layout = sent.layout
        ties = find_ties(layout.directions, layout.values, rows.numpy(), known)
        if ties != known:
            for key in ties.keys() - known.keys():
                LOG.info("arrays %r and %r are one tensor (tied): counted once", ties[key], key)
            for key in known.keys() - ties.keys():
                LOG.warning("arrays %r and %r are no longer tied", known[key], key)
            # What is kept of each coordinate is of another width.
            self._state = replace(self._state, ties=ties, memory=None)
        self._alerts.of_ties(sent, ties, lossy=lossy)
        return Tied(layout.directions, ties).merge(rows) if ties else rows

    def _account(self, intake: Intake, failure: str) -> str:
        """Return what a round came to, with an example of each reason to reject a reply."""
        reasons = ", ".join(
            f"{reason} {number} ({intake.examples[reason]})"
            for reason, number in sorted(intake.rejected.items())
        )
        return (
            f"in round {self._state.round}: {self._roster.num_asked} nodes asked, "
            f"{len(intake.accepted)} replies accepted, rejected: {reasons or 'none'}"
            + (failure and f"; {failure}")
        )

    def _metrics(self, phase: str, intake: Intake) -> MetricRecord:
        """Combine the clients' metrics: by the user's function if given, else by medians."""
        own = self.combines_by_median[phase]
        if not own and intake.accepted and not intake.contents:
            LOG.warning("%s_metrics_aggr_fn: no reply has only finite metrics; medians", phase)
        if not own and intake.contents:
            try:
                combined = getattr(self, _METRICS_FUNCTIONS[phase])(
                    intake.contents, self.weighted_by_key
                )
                return MetricRecord() if combined is None else combined
            except Exception as error:  # it reads what clients sent: it must not end the run
                LOG.warning("%s_metrics_aggr_fn failed (%s): medians are used", phase, error)
        return median_metrics(screened.metrics for screened in intake.accepted)

    def _sample_and_send(
        self,
        message_type: str,
        server_round: int,
        record: RecordDict,
        grid: Grid,
        fraction: float,
        minimum: int,
    ) -> list[Message]:
        """Sample nodes once enough are there, the same ones for the same seed and node ids."""
        needed = max(self.min_available_nodes, minimum)
        chosen = self._roster.sample(grid, server_round, message_type, fraction, minimum, needed)
        if message_type == MessageType.TRAIN:
            self._alerts.of_few_asked(len(chosen))
        Terms(round=server_round).to_config(record.config_records[self.configrecord_key])
        messages = [Message(record, node, message_type) for node in chosen]
        self._roster.sent(messages)
        return messages


def _num_bytes(arrays: ArrayRecord) -> int:
    return sum(map(num_bytes, arrays.values()))


def _uses_nothing(_: Mapping[str, Any]) -> tuple[str, ...]:
    return ()


def _uses_memory(_: Mapping[str, Any]) -> tuple[str, ...]:
    return ("memory",)


RobustStrategy.__signature__ = signature_of(
    RobustStrategy, options_of(RobustStrategy), takes_spec=True
)
