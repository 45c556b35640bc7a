"""What all strategies share: screening, the update matrix, mixing, momentum, metrics."""

import copy
import hashlib
import math
import secrets
import time
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Self

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

from fl_bgmd.aggregators import Aggregate, GeometricMedian
from fl_bgmd.aggregators.mixing import Mixing, buckets, nearest_neighbors
from fl_bgmd.aggregators.norms import euclidean_norms
from fl_bgmd.aggregators.rows import vector_norm
from fl_bgmd.checkpoints import Checkpoints
from fl_bgmd.compression import build_compressor, build_downlink, names_of
from fl_bgmd.layout import ModelLayout
from fl_bgmd.replies import Rejection, median_metrics
from fl_bgmd.shares import FEWEST, floor_share, hostile_count, largest_bucket
from fl_bgmd.wire import MODEL_RECORD, Terms, pack_model

from .checks import check_options, options_of, require, resolve_device
from .intake import LOG, Intake, Round, capped_examples, in_order, take_in
from .notes import TOO_FEW, notes
from .reporting import log_options
from .reputation import Reputation, far_out
from .roster import TOO_FEW_NODES, Roster
from .rounds import EmptyRoundsError, EvaluateFn, StopFn, run_rounds
from .ties import Tied, equal_arrays, find_ties, part

MIXINGS = ("none", "nearest-neighbor", "bucketing")
WEIGHTINGS = ("uniform", "examples")

OWN_METRICS = (
    *("accepted", "rejected", "missing", "late", "benched", "bytes-up", "bytes-down"),
    *("bytes-rejected", "update-norm", "client-weights", "iterations", "gap", "diverged"),
    *("residual-ratio", "memory-norm", "curvature", "dropped", "sigma0", "aggregation-seconds"),
    *("dropped-metrics",),
)
"""Names of a round's own metrics, beside those that begin with ``rejected-``."""

_LIARS, _TIES = "liars", "ties"


class RobustStrategy(FedAvg):
    """Base of all strategies: from Flower messages to a rule on an (n, d) tensor and back.

    A subclass names a rule by implementing :meth:`aggregate`. Everything a client sends is
    screened (:mod:`fl_bgmd.replies`); a rejected reply is logged and counted and never stops a
    round.

    Parameters
    ----------
    server_learning_rate : float or callable
        The new model is ``global - server_learning_rate * update``. Above 0; or a function from
        the round, from 1 up, to it, which may return 0.
    server_momentum : float
        ``v <- server_momentum * v + update`` and ``v`` takes the update's place. 0 to below 1.
    server_nesterov : bool
        ``update + server_momentum * v`` takes it instead, as in torch's SGD; needs a momentum.
    mixing : {"none", "nearest-neighbor", "bucketing"}
        Pre-aggregation: see :mod:`fl_bgmd.aggregators.mixing`. Recommended where clients hold
        different data: ``nearest-neighbor``.
    byzantine_fraction : float
        The hostile fraction to be tolerated, for the rules and mixings that need to know it.
        0 to below 1/2. Above 0 it means at least one of three or more clients (see
        :func:`fl_bgmd.shares.hostile_count`).
    bucket_size : int
        Of ``mixing="bucketing"``; smaller in rounds where hostile buckets could be the majority.
    weighting : {"uniform", "examples"}
        Whether ``num-examples`` weights the clients, each capped at the median of all, and lower
        where the hostile among them would come near half of the weight. Only
        strategies with ``weightable`` set allow it.
    min_valid_replies : int, optional
        With fewer accepted replies the round keeps the model. 1 or more. By default 3 where
        ``byzantine_fraction`` is above 0 (of two replies nobody can tell which one lies), else 1;
        1 for :class:`Mean`, which tolerates nobody.
    max_empty_rounds : int
        After so many rounds in a row with fewer, or in which the rule failed, the run ends with
        :class:`.EmptyRoundsError`. 1 or more. So does a run at its end whose rounds all were so.
    node_wait_timeout : float
        Seconds to wait for enough nodes to be connected. Above 0.
    too_few_nodes : {"fail", "go-on"}
        What happens then: the run ends with :class:`.MissingNodesError`, or the round goes on with
        the nodes that are there.
    bench_after : int
        Nodes whose replies are rejected, or so far out that they get next to no weight where the
        rule's weights tell, in so many of their rounds in a row sit out the next ``bench_rounds``
        (see :class:`.reputation.Reputation`), at most ``floor(byzantine_fraction n)`` at a time.
        0: no bench.
    bench_rounds : int
        1 or more.
    checkpoints : Checkpoints or path, optional
        Where :meth:`start` keeps the state of the run, and goes on from.
    compressor : str
        What clients with :class:`fl_bgmd.mods.CompressionMod` pack their updates with: see
        :func:`fl_bgmd.compression.build_compressor`. ``none`` asks for nothing. Clients without
        the mod are understood as well.
    error_feedback : bool
        Whether these clients keep what the compression lost for the next round, where the
        compressor is a contraction.
    shared_coordinates : bool
        Whether the server chooses the coordinates of ``rand-k`` in each round, the same for all:
        its seed travels down, k values travel up, and the rule works in R^k (Algorithm 2 of Data
        and Diggavi, with ``compressor="scaled-rand-k:..."``). Not for strategies whose state
        belongs to coordinates.
    downlink_compressor : str
        ``qsgd`` or ``qsgd:levels``: the model goes down rounded to so many levels, and the updates
        are those of the rounded model; the server keeps its own. Every client then needs
        :class:`fl_bgmd.mods.CompressionMod`.
    seed : int, optional
        Of the sampling of nodes, blocks and buckets, for runs that can be repeated. By default
        nobody knows it: who can foresee the block can be plausible there alone. A seed that is
        given makes them public: clients see the ``round-seed`` that is made of it, and any seed
        that a person would choose is found by trying. For experiments, not for deployments.
    device : str
        Where the update matrix lives: ``auto`` is CUDA where there is one, else the CPU.
    **fedavg_options
        All of :class:`flwr.serverapp.strategy.FedAvg`'s arguments.

    Raises
    ------
    TypeError
        For an option that the strategy does not have, with the nearest that it has.
    ValueError
        For a value outside of the above.
    """

    weightable = False
    """Whether the rule accepts weights."""

    robust = True
    """Whether the rule holds up against a hostile minority."""

    can_share_coordinates = True
    """Whether rows may be of other coordinates in each round."""

    weights_tell = False
    """Whether a weight near zero speaks against a client: not where rules leave out honest ones."""

    given: dict[str, Any]
    """The options as they were given."""

    def __new__(cls, *_: Any, **options: Any) -> Self:
        """Check the options' names and types before any constructor computes with them."""
        check_options(cls.__name__, options, options_of(cls))
        strategy = super().__new__(cls)
        strategy.given = options
        return strategy

    def __init__(
        self,
        *,
        server_learning_rate: float | Callable[[int], float] = 1.0,
        server_momentum: float = 0.0,
        server_nesterov: bool = False,
        mixing: str = "none",
        byzantine_fraction: float = 0.25,
        bucket_size: int = 2,
        weighting: str = "uniform",
        min_valid_replies: int | None = None,
        max_empty_rounds: int = 10,
        node_wait_timeout: float = 600.0,
        too_few_nodes: str = "fail",
        bench_after: int = 0,
        bench_rounds: int = 10,
        checkpoints: Checkpoints | str | Path | None = None,
        compressor: str = "none",
        error_feedback: bool = True,
        shared_coordinates: bool = False,
        downlink_compressor: str = "none",
        seed: int | None = None,
        device: str = "auto",
        **fedavg_options: Any,
    ) -> None:
        require(
            "server_learning_rate",
            server_learning_rate,
            callable(server_learning_rate) or 0 < server_learning_rate < math.inf,
            "above 0, or a function from the round to it",
        )
        require("server_momentum", server_momentum, 0 <= server_momentum < 1, "0 to below 1")
        require(
            "server_nesterov",
            server_nesterov,
            not server_nesterov or server_momentum > 0,
            "False, or a server_momentum above 0",
        )
        require("mixing", mixing, mixing in MIXINGS, ", ".join(MIXINGS))
        require(
            "byzantine_fraction",
            byzantine_fraction,
            0 <= byzantine_fraction < 0.5,
            "0 to below 0.5",
        )
        require("bucket_size", bucket_size, bucket_size >= 1, "1 or more")
        if min_valid_replies is None:
            min_valid_replies = FEWEST if self.robust and byzantine_fraction > 0 else 1
        allowed = WEIGHTINGS if self.weightable else WEIGHTINGS[:1]
        require("weighting", weighting, weighting in allowed, ", ".join(allowed))
        for name, count, least in (
            ("min_valid_replies", min_valid_replies, 1),
            ("max_empty_rounds", max_empty_rounds, 1),
            ("bench_after", bench_after, 0),
            ("bench_rounds", bench_rounds, 1),
        ):
            whole = isinstance(count, int) and count >= least
            require(name, count, whole, f"a whole number, {least} or more")
        require("node_wait_timeout", node_wait_timeout, node_wait_timeout > 0, "above 0")
        require(
            "too_few_nodes",
            too_few_nodes,
            too_few_nodes in TOO_FEW_NODES,
            ", ".join(TOO_FEW_NODES),
        )
        require("seed", seed, seed is None or 0 <= seed < 2**63, "None, or 0 to below 2^63")
        for name in ("fraction_train", "fraction_evaluate"):
            share = fedavg_options.get(name, 1.0)
            require(name, share, 0 <= share <= 1, "0 to 1")
        metrics_given = {
            name: fedavg_options.get(name)
            for name in ("train_metrics_aggr_fn", "evaluate_metrics_aggr_fn")
        }
        super().__init__(**fedavg_options)
        self._own_metrics = {name: fn is None for name, fn in metrics_given.items()}
        self.server_learning_rate = server_learning_rate
        self.server_momentum = server_momentum
        self.server_nesterov = server_nesterov
        self.mixing = mixing
        self.byzantine_fraction = byzantine_fraction
        self.bucket_size = bucket_size
        self.weighting = weighting
        self.min_valid_replies = min_valid_replies
        self.max_empty_rounds = max_empty_rounds
        self.node_wait_timeout = node_wait_timeout
        self.too_few_nodes = too_few_nodes
        if isinstance(checkpoints, str | Path):
            checkpoints = Checkpoints(checkpoints)
        self._checkpoints = checkpoints
        self._reputation = Reputation(bench_after, bench_rounds)
        own_seed = secrets.randbits(63) if seed is None else seed
        self._roster = Roster(own_seed, node_wait_timeout, too_few_nodes, self._reputation)
        self.bench_after = bench_after
        self.bench_rounds = bench_rounds
        self.compressor = None if compressor == "none" else build_compressor(compressor)
        self.error_feedback = error_feedback
        if shared_coordinates and not (self.compressor and self.compressor.can_share_coordinates):
            raise ValueError(
                f"shared_coordinates is True with compressor {compressor!r}; allowed: "
                + names_of(lambda kind: kind.can_share_coordinates)
            )
        if shared_coordinates and not self.can_share_coordinates:
            raise ValueError(
                f"shared_coordinates is True with {type(self).__name__}; allowed: False, since "
                "what it remembers belongs to coordinates"
            )
        self.shared_coordinates = shared_coordinates
        self._coordinates: np.ndarray[Any, np.dtype[np.int64]] | None = None
        self.downlink_compressor = downlink_compressor
        self._downlink = build_downlink(downlink_compressor)
        self.seed = seed
        self.device = resolve_device(device)
        self.generator = torch.Generator().manual_seed(own_seed)
        self._velocity: Tensor | None = None
        self._round = 0
        self._layout: ModelLayout | None = None
        self._model: ArrayRecord | None = None
        self._sent_bytes = 0
        self._empty_rounds = 0
        self._ties: dict[str, str] = {}
        self._failure = ""
        self._said: set[str] = set()
        self._has_run = False
        self._before_run: dict[str, Any] = {}

    def tolerated(self, current: Round) -> float:
        """Return the hostile share of the rows that the rule has to expect.

        ``byzantine_fraction`` where that is a client or more; of so few that it would be nobody
        the share that one is. A bucket is hostile if one of its rows is: after bucketing it is the
        same number of rows out of fewer.
        """
        n, rows = len(current.nodes), len(current.updates)
        hostile = self.hostile(current)
        if rows == n and hostile == floor_share(self.byzantine_fraction, n):
            return self.byzantine_fraction
        return hostile / rows

    def hostile(self, current: Round) -> int:
        """Return how many rows of a round may be hostile, or hold something of one that is."""
        return hostile_count(self.byzantine_fraction, len(current.nodes))

    def say_once(self, subject: str, message: str, *args: object) -> None:
        """Log a warning, the first of its subject in a run."""
        if subject not in self._said:
            self._said.add(subject)
            LOG.warning(message, *args)

    def drawn(self) -> list[str]:
        """Return what the server draws that clients had better not foresee."""
        found = ["buckets"] if self.mixing == "bucketing" else []
        return found if self.fraction_train in (0.0, 1.0) else [*found, "nodes"]

    @property
    def combines_by_median(self) -> dict[str, bool]:
        """Whether the metrics of each phase are combined by medians, not by a given function."""
        return {name.partition("_")[0]: own for name, own in self._own_metrics.items()}

    @abstractmethod
    def aggregate(self, current: Round) -> Aggregate:
        """Apply the rule to the rows of a round; keep what the next round needs."""

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
        self._layout, self._failure = None, ""
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
        content, received = self._broadcast(arrays, config, self._round_seed(server_round))
        if received is not arrays:
            self._layout = ModelLayout(received)
        [sent] = content.array_records.values()
        self._sent_bytes = sum(len(array.data) for array in sent.values())
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
        self._said.clear()
        for number, note in enumerate(notes(self)):
            self.say_once(f"note {number}", "%s", note)

    def expect(self, count: int) -> None:
        """Take note of how many are asked to train, where no messages say so."""
        self._roster.num_asked = count
        self._warn_of_few_asked(count)

    def sent(self, messages: list[Message]) -> None:
        """Take note of what goes out, whoever has built it; other replies are rejected."""
        self._roster.sent(messages)

    def open_round(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord
    ) -> ModelLayout:
        """Keep the model that goes out; write what clients need to know into ``config``.

        Returns its layout. Raises ``ValueError`` for a model that holds a NaN or an infinity.
        """
        before, self._layout = self._layout, ModelLayout(arrays)
        if before is not None and (before.directions, before.buffers) != (
            self._layout.directions,
            self._layout.buffers,
        ):
            raise ValueError(
                "arrays are of another model than in the last round, whose state this strategy "
                "keeps; allowed: the same keys, shapes and dtypes, or a new strategy"
            )
        self._model = arrays
        self._sent_bytes = sum(len(array.data) for array in arrays.values())
        buffers_finite = np.isfinite(self._layout.buffer_values).all()
        if not (np.isfinite(self._layout.values).all() and buffers_finite):
            raise ValueError("arrays of the global model hold a NaN or an infinity")
        seed = self._round_seed(server_round)
        if self.seed is None:
            self.generator.seed()  # nothing of earlier rounds tells what this one draws
        Terms(
            round=server_round,
            seed=seed,
            compressor=None if self.compressor is None else self.compressor.name,
            error_feedback=self.error_feedback,
            compression_seed=seed if self.shared_coordinates else None,
        ).to_config(config)
        if self.shared_coordinates:
            assert self.compressor is not None
            self.compressor = self.compressor.for_round(seed)
            self._coordinates = self.compressor.coordinates(self._layout.num_directions)
        return self._layout

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Sample nodes and send them the model to evaluate."""
        if self.fraction_evaluate == 0.0:
            return []
        seed = self._round_seed(server_round, 1)
        return self._sample_and_send(
            MessageType.EVALUATE,
            server_round,
            self._broadcast(arrays, config, seed)[0],
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
        if self._layout is None or self._model is None:
            raise RuntimeError("aggregate_train was called before configure_train")
        started = time.perf_counter()
        self._round = server_round
        if self.fraction_train == 0.0:
            return None, None
        messages, layout = in_order(replies), self._layout
        intake = take_in(
            messages,
            layout,
            width=layout.num_directions if self._coordinates is None else len(self._coordinates),
            keep_contents=not self._own_metrics["train_metrics_aggr_fn"],
            **self._screening(),
        )
        count = len(intake.accepted)
        LOG.info(
            "aggregate_train: accepted %s replies, rejected %s", count, intake.rejected.total()
        )
        self._roster.answered(server_round, messages)
        metrics = self._metrics("train", intake)
        self._drop_own(metrics)
        self._warn_of_dropped(intake)
        intake.describe(metrics)
        metrics["missing"] = max(0, self._roster.num_asked - len(messages))
        if self._roster.late:
            metrics["late"] = self._roster.late
        metrics["bytes-down"] = self._roster.num_asked * self._sent_bytes
        arrays, weights, norms = self._model, None, {}
        nodes = intake.nodes
        if count < self.min_valid_replies:
            LOG.warning(
                "round %s keeps the model: %s valid replies, min_valid_replies is %s",
                server_round,
                count,
                self.min_valid_replies,
            )
            self._warn_of_liars(intake, {})
            self._count_empty_round(intake, metrics)
        else:
            self._warn_of_majority(count, intake.rejected)
            intake.rows = self._merge_ties(layout, intake.rows[:count])
            if count < FEWEST and self.byzantine_fraction and self.robust:
                self.say_once(
                    "few",
                    "round %s has %s valid replies: of fewer than %s a hostile one cannot be told",
                    *(server_round, count, FEWEST),
                )
            current = intake.round(self.weighting, self.device, self.byzantine_fraction)
            if self.bench_after and self.weights_tell:
                norms = dict(zip(nodes, euclidean_norms(current.updates), strict=True))
            self._warn_of_liars(intake, norms or self._lengths(current))
            arrays, weights = self._step(layout, current, intake, metrics)
        weight_of = dict(zip(nodes, weights, strict=True)) if norms and weights else {}
        benched = self._roster.judge(
            server_round,
            intake.suspects,
            weight_of,
            norms,
            nodes,
            self.byzantine_fraction,
            self.min_valid_replies,
        )
        if benched:
            metrics["benched"] = benched
        metrics["aggregation-seconds"] = time.perf_counter() - started
        return arrays, metrics

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Combine the clients' evaluation metrics by their median."""
        keep = not self._own_metrics["evaluate_metrics_aggr_fn"]
        intake = take_in(in_order(replies), None, keep_contents=keep, **self._screening())
        LOG.info(
            "aggregate_evaluate: accepted %s replies, rejected %s",
            len(intake.accepted),
            intake.rejected.total(),
        )
        if not intake.accepted:
            return None
        metrics = self._metrics("evaluate", intake)
        self._warn_of_dropped(intake)
        if intake.dropped:
            metrics["dropped-metrics"] = intake.dropped
        return metrics

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
        layout = self._layout
        if layout is None:
            raise RuntimeError("preview was called before configure_train")
        expected = (len(nodes), layout.num_directions)
        if tuple(updates.shape) != expected or len(examples) != len(nodes):
            raise ValueError(
                f"updates have shape {tuple(updates.shape)} with {len(nodes)} nodes and "
                f"{len(examples)} numbers of examples; allowed: {expected} and as many"
            )
        require("rounds", rounds, rounds >= 1, "1 or more")
        moved = torch.zeros(layout.num_directions, dtype=torch.float64)
        if len(nodes) < self.min_valid_replies:
            return moved
        if self._coordinates is not None:
            updates = updates[:, torch.from_numpy(self._coordinates)]
        elif self._ties:
            updates = Tied(layout.directions, self._ties).merge(updates.clone())
        weights = None
        if self.weighting == "examples":
            weights = capped_examples(examples, self.byzantine_fraction)
        twin = self._twin()
        for _ in range(rounds):
            before = twin.state_dict()
            # A copy: the rule may overwrite it.
            current = Round(updates.to(self.device, copy=True), weights, nodes)
            try:
                with np.errstate(all="ignore"):
                    vector = twin._mixed_and_aggregated(current)[0].vector
            except ValueError:
                twin.load_state_dict(before)
                continue
            moved += self._spread(layout, vector).cpu().double()
        return moved

    def _twin(self) -> Self:
        """Return a strategy that goes on from this one's state, and leaves it alone."""
        twin = copy.copy(self)
        twin.generator = torch.Generator()
        twin._reputation = copy.deepcopy(self._reputation)
        twin._roster = copy.copy(self._roster)
        twin.load_state_dict(copy.deepcopy(self.state_dict()))
        return twin

    # ------------------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next round depends on, as tensors and numbers."""
        return {
            "round": self._round,
            "generator": self.generator.get_state(),
            "velocity": self._velocity,
            "empty-rounds": self._empty_rounds,
            "ties": dict(self._ties),
            "seed": self._roster.seed,
            "reputation": self._reputation.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned."""
        self._has_run = False
        self._round = int(state["round"])
        self.generator.set_state(state["generator"])
        self._velocity = self._on_device(state["velocity"])
        self._empty_rounds = int(state["empty-rounds"])
        self._ties = dict(state["ties"])
        self._roster.seed = int(state["seed"])
        self._reputation.load_state_dict(state["reputation"])

    def forget(self) -> None:
        """Drop what is kept of each coordinate of an update; nothing by default.

        Called when arrays turn out to be tied, or no longer to be: the rows then have another
        width.
        """

    @property
    def failure(self) -> str:
        """What the last round that left the model as it was came to, empty if none did."""
        return self._failure

    def _on_device(self, tensor: Tensor | None) -> Tensor | None:
        """Bring back what a checkpoint held on the CPU."""
        return None if tensor is None else tensor.to(self.device)

    def summary(self) -> None:
        """Log the configuration of the strategy: every option and its value."""
        super().summary()
        log_options(self)

    # ---------------------------------------------------------------------------- details

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

    def _drop_own(self, metrics: MetricRecord) -> None:
        """Drop metrics with names of the server's own: no client says what the server found."""
        dropped = [key for key in metrics if key in OWN_METRICS or key.startswith("rejected-")]
        for key in dropped:
            del metrics[key]
        if dropped:
            names = f"{dropped[:5]!r}"[:200]
            self.say_once(
                "own names",
                "the clients' metrics %s are dropped: the server's have their names",
                names,
            )

    def _warn_of_majority(self, count: int, rejected: Counter[str]) -> None:
        """Say so when those whose replies are left may be hostile in the main.

        What was rejected for its content was not sent by an honest client.
        """
        hostile = hostile_count(self.byzantine_fraction, max(self._roster.num_asked, count))
        hostile -= rejected.total() - rejected[Rejection.ERROR.value]
        if count <= 2 * hostile:
            LOG.warning(
                "round %s: %s valid replies of %s asked, of which %s may be hostile "
                "(byzantine_fraction, min_valid_replies)",
                self._round,
                count,
                self._roster.num_asked,
                hostile,
            )

    def _warn_of_dropped(self, intake: Intake) -> None:
        """Say once whose metric was not finite: an honest client may want to know."""
        if intake.dropped:
            self.say_once(
                "not finite",
                "%s: it is dropped, the rest of the reply counts",
                intake.first_dropped,
            )

    def _merge_ties(self, layout: ModelLayout, rows: Tensor) -> Tensor:
        """Return the rows with each tensor once; see :mod:`.ties`."""
        if self._coordinates is not None:
            self._warn_of_ties(layout)
            return rows
        ties = find_ties(layout.directions, layout.values, rows.numpy(), self._ties)
        if ties != self._ties:
            for key in ties.keys() - self._ties.keys():
                LOG.info("arrays %r and %r are one tensor (tied): counted once", ties[key], key)
            for key in self._ties.keys() - ties.keys():
                LOG.warning("arrays %r and %r are no longer tied", self._ties[key], key)
            self._ties = ties
            self.forget()
        self._warn_of_ties(layout)
        return Tied(layout.directions, ties).merge(rows) if ties else rows

    def _warn_of_ties(self, layout: ModelLayout) -> None:
        """Say once that lossy replies, or a rounded model, do not show what is tied."""
        if _TIES in self._said or (self.compressor is None and self._downlink is None):
            return
        self._said.add(_TIES)
        assert self._model is not None
        own = layout if self._downlink is None else ModelLayout(self._model)
        for group in equal_arrays(own.directions, own.values):
            values = own.values[part(group[0])]
            if group[-1].key not in self._ties and (values != values[0]).any():
                LOG.warning(
                    "arrays %r and %r go out equal; if they are one tensor (tied), compression "
                    "hides it: they are counted apart and will not stay equal",
                    group[0].key,
                    group[-1].key,
                )

    def _lengths(self, current: Round) -> dict[int, float]:
        """Return about how long each node's update is; what is too long for its dtype is infinite.

        One pass over the rows, and none where nobody needs it any more.
        """
        if _LIARS in self._said:
            return {}
        rows = current.updates
        dtype = torch.promote_types(rows.dtype, torch.float32)
        lengths = torch.linalg.vector_norm(rows, dim=1, dtype=dtype)
        return dict(zip(current.nodes, lengths.tolist(), strict=True))

    def _warn_of_few_asked(self, count: int) -> None:
        """Say once, before anybody trains, that so few cannot move the model."""
        if count < self.min_valid_replies:
            self.say_once(
                "asked",
                "%s nodes are asked to train and a round needs %s valid replies "
                "(min_valid_replies): such rounds keep the model; %s",
                *(count, self.min_valid_replies, TOO_FEW),
            )

    def _warn_of_liars(self, intake: Intake, norms: dict[int, float]) -> None:
        """Say once a run when more look hostile than are expected to be."""
        far = sorted(far_out(norms))
        lied = intake.rejected.total() - intake.rejected[Rejection.ERROR.value]
        asked = max(self._roster.num_asked, len(intake.accepted) + intake.rejected.total())
        fraction = self.byzantine_fraction if self.robust else 0.0
        if lied + len(far) > hostile_count(fraction, asked):
            self.say_once(
                _LIARS,
                "%s; %s of %s clients look hostile in round %s: %s replies rejected, %s updates "
                "longer than ten times the median one (nodes %s)",
                f"byzantine_fraction is {fraction}"
                if self.robust
                else f"{type(self).__name__} tolerates no hostile client",
                *(lied + len(far), asked, self._round, lied, len(far), far[:10]),
            )

    def _count_empty_round(self, intake: Intake, metrics: MetricRecord, failure: str = "") -> None:
        """End the run if too many rounds in a row have come to nothing."""
        self._empty_rounds += 1
        few = not failure and intake.accepted and self.min_valid_replies == FEWEST
        self._failure = self._account(intake, TOO_FEW if few else failure)
        if self._empty_rounds >= self.max_empty_rounds:
            lack = f"had fewer than {self.min_valid_replies} valid replies"
            raise EmptyRoundsError(
                f"{self._empty_rounds} rounds in a row {'came to nothing' if failure else lack}; "
                f"{self._failure}",
                metrics,
            )

    def _account(self, intake: Intake, failure: str) -> str:
        """Return what a round came to, with an example of each reason to reject a reply."""
        reasons = ", ".join(
            f"{reason} {number} ({intake.examples[reason]})"
            for reason, number in sorted(intake.rejected.items())
        )
        return (
            f"in round {self._round}: {self._roster.num_asked} nodes asked, "
            f"{len(intake.accepted)} replies accepted, rejected: {reasons or 'none'}"
            + (failure and f"; {failure}")
        )

    def _screening(self) -> dict[str, Any]:
        """Return what :func:`fl_bgmd.replies.screen` needs to know beside the reply."""
        return {
            "examples_key": self.weighted_by_key,
            "needs_examples": self.weighting == "examples",
            "asked": self._roster.asked,
            "compressor": self.compressor,
            "coordinates": self._coordinates,
        }

    def _step(
        self,
        layout: ModelLayout,
        current: Round,
        intake: Intake,
        metrics: MetricRecord,
    ) -> tuple[ArrayRecord, list[float] | None]:
        """Mix, aggregate and move the model; write the diagnostics into ``metrics``.

        Returns the model and the weight of each client, where the rule gives weights.
        """
        before = self.state_dict()
        # Replies near the end of the range may overflow anywhere: the model is looked at below.
        with np.errstate(all="ignore"):
            try:
                result, mixing = self._mixed_and_aggregated(current)
            except ValueError as error:
                failure = f"the rule failed: {error}"
                kept = self._keep(before, failure, metrics)
                self._count_empty_round(intake, metrics, failure)
                return kept, None
            self._empty_rounds = 0
            update, tied = self._spread(layout, result.vector), Tied(layout.directions, self._ties)
            if self.server_momentum:
                velocity = update
                if self._velocity is not None:
                    velocity = update + self.server_momentum * self._velocity.to(update)
                self._velocity = velocity
                if self.server_nesterov:
                    velocity = update + self.server_momentum * velocity
                update = velocity
            assert self._model is not None
            own = layout if self._downlink is None else ModelLayout(self._model)
            step = self.server_learning_rate
            step = step(self._round) if callable(step) else step
            if not 0 <= step < math.inf:
                raise ValueError(
                    f"server_learning_rate is {step} in round {self._round}; allowed: 0 or more"
                )
            moved = own.values - step * update.cpu().numpy()
            moved = moved.astype(layout.dtype, copy=False)
            tied.level(moved)
        metrics["update-norm"] = vector_norm(result.vector)
        weights = None
        if result.weights is not None:
            shares = result.weights.numpy()
            shares = shares if mixing is None else mixing.spread(shares)
            metrics["client-weights"] = weights = [float(share) for share in shares]
        if isinstance(result, GeometricMedian):
            metrics["iterations"] = result.iterations
            metrics["gap"] = result.gap
        self.describe(result, metrics)
        if not layout.holds(moved):
            failure = "the new one is not finite"
            self._failure = self._account(intake, failure)
            return self._keep(before, failure, metrics), None
        buffers = intake.buffers[: len(intake.accepted)]
        middle = layout.buffer_values
        if buffers.size:
            middle = np.median(buffers, axis=0)
            shared = find_ties(layout.buffers, layout.buffer_values, buffers, {})
            Tied(layout.buffers, shared).level(middle)
        return layout.to_arrays(moved, middle), weights

    def _mixed_and_aggregated(self, current: Round) -> tuple[Aggregate, Mixing | None]:
        """Apply the mixing and the rule. Raises ``ValueError`` where the rule fails."""
        current, mixing = self._mix(current)
        width = current.updates.shape[1]
        result = self.aggregate(current)
        if result.vector.shape != (width,):
            raise ValueError(
                f"its vector has shape {tuple(result.vector.shape)}; allowed: ({width},)"
            )
        return result, mixing

    def _spread(self, layout: ModelLayout, vector: Tensor) -> Tensor:
        """Return what a rule made of rows as an update of all coordinates, (d,)."""
        if self._ties:
            vector = Tied(layout.directions, self._ties).spread(vector)
        if self._coordinates is None:
            return vector
        update = torch.zeros(layout.num_directions, dtype=vector.dtype)
        update[torch.from_numpy(self._coordinates)] = vector.cpu()
        return update

    def _keep(self, state: dict[str, Any], reason: str, metrics: MetricRecord) -> ArrayRecord:
        """Undo the round: the model and the state stay as they were."""
        LOG.warning("round %s keeps the model: %s", self._round, reason)
        metrics["diverged"] = 1
        self.load_state_dict(state)
        assert self._model is not None
        return self._model

    def describe(self, result: Aggregate, metrics: MetricRecord) -> None:
        """Add the rule's own diagnostics of a round to ``metrics``; nothing by default."""

    def _mix(self, current: Round) -> tuple[Round, Mixing | None]:
        """Apply the pre-aggregation, in place where it keeps the number of rows."""
        updates, n = current.updates, len(current.nodes)
        if self.mixing == "none" or updates.shape[0] == 1:
            return current, None
        if self.mixing == "nearest-neighbor":
            share = self.tolerated(current)
            mixing = nearest_neighbors(updates, byzantine_fraction=share)
            mixed = mixing.apply(updates, out=updates)
        else:
            hostile = self.hostile(current)
            size = largest_bucket(self.bucket_size, hostile, n)
            if size < self.bucket_size:
                self.say_once(
                    "buckets",
                    "bucket_size is %s: of %s replies %s may be hostile, and hostile buckets must "
                    "not be the majority: buckets of %s",
                    *(self.bucket_size, n, hostile, size),
                )
            mixing = buckets(n, size, self.generator)
            mixed = mixing.apply(updates)
        weights = current.weights
        if weights is not None:
            weights = torch.from_numpy(mixing.average(weights.double().numpy()))
        return Round(mixed, weights, current.nodes), mixing  # reported norms are not the rows'

    def _metrics(self, phase: str, intake: Intake) -> MetricRecord:
        """Combine the clients' metrics: by the user's function if given, else by medians."""
        own = self._own_metrics[f"{phase}_metrics_aggr_fn"]
        if not own and intake.accepted and not intake.contents:
            LOG.warning("%s_metrics_aggr_fn: no reply has only finite metrics; medians", phase)
        if not own and intake.contents:
            given = self.train_metrics_aggr_fn, self.evaluate_metrics_aggr_fn
            try:
                combined = given[phase == "evaluate"](intake.contents, self.weighted_by_key)
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
            self._warn_of_few_asked(len(chosen))
        Terms(round=server_round).to_config(record.config_records[self.configrecord_key])
        messages = list(self._construct_messages(record, chosen, message_type))
        self._roster.sent(messages)
        return messages
