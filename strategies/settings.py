"""The options of all strategies, declared once."""

import inspect
import math
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from annotated_types import Ge, Gt, Le, Lt
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import FedAvg
from pydantic import AfterValidator, StringConstraints

from fl_bgmd.aggregators import MIXINGS, RULES, Rule, build_mixings
from fl_bgmd.checkpoints import Checkpoints
from fl_bgmd.compression import Compressor, build_compressor, build_downlink, names_of
from fl_bgmd.devices import resolve_device
from fl_bgmd.extras import require
from fl_bgmd.layout import ModelLayout
from fl_bgmd.options import (
    Allowed,
    Count,
    Environment,
    NonNegative,
    Operation,
    Option,
    OptionError,
    Options,
    Positive,
    Share,
    declared,
)
from fl_bgmd.shares import FEWEST

from .optimizer import Build, build_optimizer, takes_momentum


class OwnRounds:
    """In an annotation: an option of this project's rounds, which the older API does not have."""


def _accepted_by(build: Callable[[str], object]) -> AfterValidator:
    """Accept texts that ``build`` makes something of."""

    def check(text: str) -> str:
        build(text)
        return text

    return AfterValidator(check)


_AUTO = r"^auto(:0(\.[0-4][0-9]*)?)?$"
_LEAST = 0.1
_FIRST = 0.25
"""What is prepared for until rounds have shown less."""


def _least(text: str) -> float:
    """Return the least share of ``auto`` or ``auto:LEAST``."""
    _, colon, least = text.partition(":")
    return float(least) if colon else _LEAST


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The options of all strategies beside those of the rule and of Flower's ``FedAvg``.

    Parameters
    ----------
    server_learning_rate : float or callable
        Step of the server along the update, above 0. Or a function from the round, from 1 up, to
        it, which may return 0.
    server_optimizer : str
        The optimizer of the server (torch's), which takes the aggregate for a gradient: ``sgd``,
        ``adam`` (with options: ``adam:beta1=0.9,beta2=0.99,eps=1e-3`` is FedAdam of Reddi et al.,
        Algorithm 2), or ``package.module:NAME``, such as ``torch.optim:Adagrad``. Of ``adam`` each
        coordinate moves by about ``server_learning_rate`` whatever the updates' length: 0.001 in
        the BGMD authors' runs on MNIST.
    server_momentum : float
        Momentum of the server's SGD, 0 to below 1.
    server_nesterov : bool
        Whether the server's momentum is Nesterov's; needs a momentum.
    projection_radius : float
        The model's trained values stay in a ball of this radius: the projection on C of Data and
        Diggavi and on W of Ghosh et al., after the server's step. 0 for none.
    projection_center : {"initial", "origin"}
        Center of the ball that ``projection_radius`` keeps the model in: the model that the run
        began with (the papers' x_0 and w_0), or zero.
    model_average : float
        Share of the rounds so far over which the model is averaged that is evaluated, returned and
        saved, 0 to 1: 0 is the last model, 0.1 the average of about the last tenth. Clients train
        the last one. Under attack the last model's accuracy may swing by tens of points from round
        to round, the average's hardly does: see :class:`.averaging.ModelAverage`.
    mixing : str
        Pre-aggregation: the specs of mixings, joined by ``+``, in the order in which they are
        applied (see :func:`fl_bgmd.aggregators.build_rule`). Recommended where clients hold
        different data: ``nearest-neighbor``.
    byzantine_fraction : float or str
        Hostile share of the clients to prepare for, 0 to below 1/2. Above 0 it means at least one
        of three or more clients (see :func:`fl_bgmd.shares.hostile_count`). ``auto:0.2`` counts in
        each round what does not fit in with the majority (see :mod:`.estimate`), and prepares for
        that, for 0.2 at least; ``auto`` for 0.1 at least. Clients that lie so that they fit in are
        not counted: of those the least is all there is.
    weighting : {"uniform", "examples"}
        Whether ``num-examples`` weights the clients. Each number is capped at the median of all,
        and lower where the hostile among them would come near half of the weight. Only for rules
        that take weights.
    min_valid_replies : int, optional
        Accepted replies without which a round keeps the model. 1 or more. By default 3 where
        ``byzantine_fraction`` is above 0 (of two replies nobody can tell which one lies), else 1;
        1 for :class:`Mean`, which tolerates nobody.
    max_empty_rounds : int
        How many rounds in a row may come to nothing before the run ends. It ends with
        :class:`.EmptyRoundsError`; so does a run at its end whose rounds all came to nothing.
    node_wait_timeout : float
        Seconds to wait for enough nodes to be connected, above 0.
    too_few_nodes : {"fail", "go-on"}
        What to do when too few nodes are connected after ``node_wait_timeout``. ``fail`` ends the
        run with :class:`.MissingNodesError`; ``go-on`` runs the round with those that are there.
    bench_after : int
        Bad rounds in a row after which a node sits out; 0 for never. A bad round is one in which
        its reply is rejected, or so far out that it gets next to no weight where the rule's weights
        tell (see :class:`.reputation.Reputation`). At most ``floor(byzantine_fraction n)`` sit out
        at a time.
    bench_rounds : int
        How many rounds a node sits out.
    stale_updates : int
        For how many rounds the last update of a client that is not asked stays in use; 0 for none.
        The rule then sees the fresh updates and, behind them, these (delayed aggregation, DeMoA),
        and ``byzantine_fraction`` is the hostile share of all of them, whoever is sampled. For
        rounds in which a fraction of the clients is sampled, with
        :class:`fl_bgmd.mods.MomentumMod`; about three times the rounds in which every client is
        asked once, and a smaller ``server_learning_rate``: the model moves by updates of older
        models.
    stale_bytes : int
        Memory for stale updates, in bytes (the oldest are dropped first). They are part of
        checkpoints.
    checkpoints : Checkpoints or path, optional
        Folder to save checkpoints to and resume from.
    compressor : str
        Compressor of the updates of clients with :class:`fl_bgmd.mods.CompressionMod`: see
        :func:`fl_bgmd.compression.build_compressor`. ``none`` asks for nothing. Clients without
        the mod are understood as well.
    error_feedback : bool
        Whether clients add what compression lost to their next update. Only where the
        compressor is a contraction.
    shared_coordinates : bool
        Whether the server chooses the coordinates of ``rand-k`` in each round, the same for all.
        Its seed travels down, k values travel up, and the rule works in R^k (Algorithm 2 of Data
        and Diggavi, with ``compressor="scaled-rand-k:..."``). Not for rules that remember
        coordinates.
    downlink_compressor : str
        Compressor of the model on its way to the clients: ``qsgd`` or ``qsgd:levels``. The updates
        are those of the rounded model; the server keeps its own. Every client then needs
        :class:`fl_bgmd.mods.CompressionMod`.
    seed : int, optional
        Seed of the sampling of nodes, blocks and buckets, for runs that can be repeated. By default
        nobody knows it: who can foresee the block can be plausible there alone. A seed that is
        given makes them public: clients see the ``round-seed`` that is made of it, and any seed
        that a person would choose is found by trying. For experiments, not for deployments.
    device : str
        Where the update matrix lives: ``auto`` is CUDA where there is one, else the CPU.
    rows : {"auto", "memory", "file"}
        Where the updates of a round are kept, one row for each client. ``file`` takes a file
        without a name in ``rows_dir``, which rules work on as on memory, with the same results;
        ``auto`` does where the rows need more than half of the memory that is available when the
        round starts. On a GPU they have to fit there. With ``file`` the model is in files there,
        too: see :mod:`fl_bgmd.filed`.
    rows_dir : path
        Folder on a disk with room for the rows of a round; by default that of temporary files,
        which must not be in memory itself.
    shards : {"none", "ray"}
        Where the rule works on the rows: ``ray`` sends each machine of a Ray cluster a range of
        the columns, which it holds in memory for the round, and what the rule asks of the rows is
        computed there. For rules and mixings that can. A worker that dies is replaced, and gets
        its columns again from ``rows``.
    shards_address : str
        ``HOST:PORT`` of a running Ray cluster; empty: that which this process is connected to, or
        else a Ray of its own on this machine.
    verdict_distances : bool
        Whether verdicts say how far each update is from the aggregate, which costs about as much as
        a sum over the rows, with mixings four times as much.
    on_round : callable, optional
        Called after each round with its number and a dict of floats: all of the round's figures,
        ``accepted`` and the like as in the metrics, evaluation as ``evaluate-...`` and
        ``server-...``. What it raises is logged once and ends nothing.
    root_update : callable, optional
        What the server's own data say, for rules that ask for a ``root``: a function from the
        arrays of the model and the round to the arrays that the server has trained on its data the
        way that clients do. It is called once a round.
    """

    server_learning_rate: Annotated[
        Annotated[float, Gt(0), Lt(math.inf)] | Callable[[int], float],
        Allowed("above 0, or a function from the round to it"),
    ] = 1.0
    server_optimizer: Annotated[
        str,
        _accepted_by(build_optimizer),
        Allowed("sgd, adam, adam:beta1=...,beta2=...,eps=..., or package.module:NAME"),
    ] = "sgd"
    server_momentum: Annotated[float, Ge(0), Lt(1)] = 0.0
    server_nesterov: bool = False
    projection_radius: NonNegative = 0.0
    projection_center: Literal["initial", "origin"] = "initial"
    model_average: Annotated[float, Ge(0), Le(1), OwnRounds()] = 0.0
    mixing: Annotated[str, _accepted_by(build_mixings), Allowed("none, or specs of mixings")] = (
        "none"
    )
    byzantine_fraction: Annotated[
        Share | Annotated[str, StringConstraints(pattern=_AUTO)],
        Allowed("0 to below 0.5, or auto, auto:LEAST with a LEAST of 0 to below 0.5"),
    ] = 0.25
    weighting: Literal["uniform", "examples"] = "uniform"
    min_valid_replies: Annotated[Count | None, Operation()] = None
    max_empty_rounds: Annotated[Count, Operation()] = 10
    node_wait_timeout: Annotated[Positive, Operation(), OwnRounds()] = 600.0
    too_few_nodes: Annotated[Literal["fail", "go-on"], Operation(), OwnRounds()] = "fail"
    bench_after: Annotated[int, Ge(0), Operation(), OwnRounds()] = 0
    bench_rounds: Annotated[Count, Operation(), OwnRounds()] = 10
    stale_updates: Annotated[int, Ge(0)] = 0
    stale_bytes: Count = 2**30
    checkpoints: Annotated[Checkpoints | str | Path | None, Operation(), OwnRounds()] = None
    compressor: Annotated[
        str, _accepted_by(build_compressor), Allowed("the spec of a compressor")
    ] = "none"
    error_feedback: bool = True
    shared_coordinates: bool = False
    downlink_compressor: Annotated[
        str,
        _accepted_by(build_downlink),
        OwnRounds(),
        Allowed("none, or the spec of a compressor that carries a model"),
    ] = "none"
    seed: Annotated[
        Annotated[int, Ge(0), Lt(2**63)] | None, Allowed("None, or 0 to below 2^63")
    ] = None
    device: Annotated[str, _accepted_by(resolve_device), Operation()] = "auto"
    rows: Annotated[Literal["auto", "memory", "file"], Operation(), Environment()] = "auto"
    rows_dir: Annotated[str | Path, Operation(), Environment()] = ""
    shards: Annotated[Literal["none", "ray"], Operation(), Environment()] = "none"
    shards_address: Annotated[
        Annotated[str, StringConstraints(pattern=r"^(\S+:\d+)?$")],
        Operation(),
        Environment(),
        Allowed("HOST:PORT of a running Ray cluster, or empty"),
    ] = ""
    verdict_distances: Annotated[bool, Operation(), OwnRounds()] = True
    on_round: Annotated[
        Callable[[int, dict[str, float]], object] | None,
        Operation(),
        OwnRounds(),
        Allowed("a function of the round and a dict of floats, or None"),
    ] = None
    root_update: Annotated[
        Callable[[ArrayRecord, int], ArrayRecord] | None,
        Allowed(
            "a function from the model's arrays and the round to those the server has trained, or "
            "None"
        ),
    ] = None

    def __post_init__(self) -> None:
        """Refuse a momentum where there is none."""
        if self.server_nesterov and not self.server_momentum:
            raise OptionError(
                "server_nesterov is True with server_momentum 0; allowed: False, or a "
                "server_momentum above 0"
            )
        if self.server_momentum and not takes_momentum(self.server_optimizer):
            raise OptionError(
                f"server_momentum is {self.server_momentum} with server_optimizer "
                f"{self.server_optimizer!r}; allowed: 0"
            )

    @property
    def estimated(self) -> bool:
        """Whether the hostile share is estimated round by round."""
        return isinstance(self.byzantine_fraction, str)

    @property
    def least_share(self) -> float:
        """The hostile share to prepare for at least."""
        given = self.byzantine_fraction
        return _least(given) if isinstance(given, str) else given

    @property
    def first_share(self) -> float:
        """The hostile share to prepare for until rounds have been seen."""
        return max(self.least_share, _FIRST) if self.estimated else self.least_share

    @property
    def least_replies(self) -> int:
        """``min_valid_replies`` of settings that are :meth:`fitted`."""
        assert self.min_valid_replies is not None
        return self.min_valid_replies

    @cached_property
    def torch_device(self) -> torch.device:
        """``device``."""
        return resolve_device(self.device)

    @cached_property
    def packing(self) -> Compressor | None:
        """``compressor``, None for ``none``."""
        return None if self.compressor == "none" else build_compressor(self.compressor)

    def contraction(self, layout: ModelLayout) -> float:
        """Return the delta that ``compressor`` guarantees for updates of a model, 1 without."""
        if self.packing is None:
            return 1.0
        return self.packing.for_shapes(layout.shapes).delta(layout.num_directions)

    @cached_property
    def rounding(self) -> Compressor | None:
        """``downlink_compressor``, None for ``none``."""
        return build_downlink(self.downlink_compressor)

    @cached_property
    def folder(self) -> Checkpoints | None:
        """``checkpoints``."""
        given = self.checkpoints
        return Checkpoints(given) if isinstance(given, str | Path) else given

    def learning_rate(self, number: int) -> float:
        """Return the server's step of a round. Raises ``ValueError`` for one that is none."""
        rate = self.server_learning_rate
        step = rate(number) if callable(rate) else rate
        if not 0 <= step < math.inf:
            raise ValueError(
                f"server_learning_rate is {step} in round {number}; allowed: 0 or more"
            )
        return float(step)

    @cached_property
    def optimizer(self) -> Build:
        """``server_optimizer``, of a list of tensors and a learning rate."""
        own: dict[str, Any] = {"momentum": self.server_momentum, "nesterov": self.server_nesterov}
        given = {name: value for name, value in own.items() if value}
        return partial(build_optimizer(self.server_optimizer), **given)

    def fitted(self, rule: Rule, name: str) -> Self:
        """Return the settings with a rule: what it does not say filled in.

        ``name`` is the rule's, or its class's. Raises :class:`OptionError` for what does not fit.
        """
        kind = rule.rule.kind
        if self.weighting != "uniform" and not kind.weightable:
            raise OptionError(f"weighting is {self.weighting!r} with {name}; allowed: uniform")
        self._check_root(rule, name)
        self._check_shards(rule, name)
        if self.shared_coordinates:
            if self.packing is None or not self.packing.can_share_coordinates:
                raise OptionError(
                    f"shared_coordinates is True with compressor {self.compressor!r}; allowed: "
                    + names_of(lambda kind: kind.can_share_coordinates)
                )
            if rule.uses("memory") or rule.uses("last"):
                raise OptionError(
                    f"shared_coordinates is True with {name}; allowed: False, since what it "
                    "remembers belongs to coordinates"
                )
            if self.stale_updates:
                raise OptionError(
                    f"shared_coordinates is True with stale_updates {self.stale_updates}; "
                    "allowed: False, since stale updates are of other coordinates"
                )
        if self.min_valid_replies is not None:
            return self
        safe = kind.robust and self.first_share > 0
        return replace(self, min_valid_replies=FEWEST if safe else 1)

    def _check_shards(self, rule: Rule, name: str) -> None:
        """Refuse shards for a rule that reads its rows in other ways, and an address for none."""
        if self.shards == "none":
            if self.shards_address:
                raise OptionError(
                    f"shards_address is {self.shards_address!r} with shards 'none'; allowed: empty"
                )
            return
        for bound, kinds in ((rule.rule, RULES), *((b, MIXINGS) for b in rule.mixings)):
            if not bound.sharded:
                able = ", ".join(key for key, kind in kinds.items() if kind.sharded)
                raise OptionError(
                    f"shards is {self.shards!r} with {bound}; allowed: none, or one of {able}"
                )
        if self.torch_device.type != "cpu":
            raise OptionError(
                f"shards is {self.shards!r} with device {self.device!r}; allowed: device cpu"
            )
        require("ray", f"shards={self.shards!r}", "simulation")

    def _check_root(self, rule: Rule, name: str) -> None:
        """Refuse a rule without the root that it needs, and a root that nobody asks for."""
        kind = rule.rule.kind
        if kind.needs_root and self.root_update is None:
            allowed = OWN_OPTIONS["root_update"].allowed.removesuffix(", or None")
            raise OptionError(f"root_update is None with {name}; allowed: {allowed}")
        if self.root_update is not None and "root" not in kind.takes:
            raise OptionError(
                f"root_update is given with {name}, which asks for no root; allowed: None"
            )


OWN_OPTIONS: Options = declared(Settings)
"""By name."""

_SHARE_OF_NODES = Annotated[float, Ge(0), Le(1)]
_FLOWERS_BOUNDS: Mapping[str, Any] = {
    "fraction_train": _SHARE_OF_NODES,
    "fraction_evaluate": Annotated[_SHARE_OF_NODES, Operation()],
    **dict.fromkeys(
        ("min_train_nodes", "min_evaluate_nodes", "min_available_nodes"),
        Annotated[int, Operation()],
    ),
}


def _flowers_options() -> dict[str, Option]:
    """Return the options of Flower's FedAvg, with bounds that it does not state."""
    hints = typing.get_type_hints(FedAvg.__init__)
    return {
        name: Option(name, name, _FLOWERS_BOUNDS.get(name, hints.get(name, Any)), parameter.default)
        for name, parameter in inspect.signature(FedAvg).parameters.items()
    }


FLOWERS_OPTIONS: Options = _flowers_options()
"""By name."""
