"""The options of all strategies, declared once."""

import inspect
import math
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Le, Lt
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import FedAvg
from pydantic import AfterValidator

from fl_bgmd.aggregators import RULES, build_mixings
from fl_bgmd.aggregators.rule import Kind
from fl_bgmd.checkpoints import Checkpoints
from fl_bgmd.compression import build_compressor, build_downlink
from fl_bgmd.options import (
    Allowed,
    Count,
    Operation,
    Option,
    OptionError,
    Options,
    Positive,
    Share,
    declared,
    nearest,
    unmarked,
    with_parameters,
)
from fl_bgmd.registry import split_specs


class OwnRounds:
    """In an annotation: an option of this project's rounds, which the older API does not have."""


def _accepted_by(build: Callable[[str], object]) -> AfterValidator:
    """Accept texts that ``build`` makes something of."""

    def check(text: str) -> str:
        build(text)
        return text

    return AfterValidator(check)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The options of all strategies beside those of the rule and of Flower's ``FedAvg``.

    Parameters
    ----------
    server_learning_rate : float or callable
        Step of the server along the update, above 0. Or a function from the round, from 1 up, to
        it, which may return 0.
    server_momentum : float
        Momentum of the server's SGD (torch's), 0 to below 1.
    server_nesterov : bool
        Whether that momentum is Nesterov's; needs a momentum.
    mixing : str
        Pre-aggregation: the specs of mixings, joined by ``+``, in the order in which they are
        applied (see :func:`fl_bgmd.aggregators.build_rule`). Recommended where clients hold
        different data: ``nearest-neighbor``.
    byzantine_fraction : float
        Hostile share of the clients to prepare for, 0 to below 1/2. Above 0 it means at least one
        of three or more clients (see :func:`fl_bgmd.shares.hostile_count`).
    weighting : {"uniform", "examples"}
        Whether ``num-examples`` weights the clients. Each number is capped at the median of all,
        and lower where the hostile among them would come near half of the weight. Only for rules
        that take weights.
    min_valid_replies : int, optional
        With fewer accepted replies the round keeps the model. 1 or more. By default 3 where
        ``byzantine_fraction`` is above 0 (of two replies nobody can tell which one lies), else 1;
        1 for :class:`Mean`, which tolerates nobody.
    max_empty_rounds : int
        How many rounds in a row may come to nothing before the run ends. It ends with
        :class:`.EmptyRoundsError`; so does a run at its end whose rounds all came to nothing.
    node_wait_timeout : float
        Seconds to wait for enough nodes to be connected, above 0.
    too_few_nodes : {"fail", "go-on"}
        What happens when they are not there by then. ``fail`` ends the run with
        :class:`.MissingNodesError`; ``go-on`` runs the round with the nodes that are there.
    bench_after : int
        Bad rounds in a row after which a node sits out; 0 for never. A bad round is one in which
        its reply is rejected, or so far out that it gets next to no weight where the rule's weights
        tell (see :class:`.reputation.Reputation`). At most ``floor(byzantine_fraction n)`` sit out
        at a time.
    bench_rounds : int
        How many rounds a node sits out.
    checkpoints : Checkpoints or path, optional
        Folder to save checkpoints to and resume from.
    compressor : str
        What clients with :class:`fl_bgmd.mods.CompressionMod` pack their updates with: see
        :func:`fl_bgmd.compression.build_compressor`. ``none`` asks for nothing. Clients without
        the mod are understood as well.
    error_feedback : bool
        Whether these clients keep what the compression lost for the next round. Only where the
        compressor is a contraction.
    shared_coordinates : bool
        Whether the server chooses the coordinates of ``rand-k`` in each round, the same for all.
        Its seed travels down, k values travel up, and the rule works in R^k (Algorithm 2 of Data
        and Diggavi, with ``compressor="scaled-rand-k:..."``). Not for rules that remember
        coordinates.
    downlink_compressor : str
        What the model is rounded with on its way down: ``qsgd`` or ``qsgd:levels``. The updates are
        those of the rounded model; the server keeps its own. Every client then needs
        :class:`fl_bgmd.mods.CompressionMod`.
    seed : int, optional
        Seed of the sampling of nodes, blocks and buckets, for runs that can be repeated. By default
        nobody knows it: who can foresee the block can be plausible there alone. A seed that is
        given makes them public: clients see the ``round-seed`` that is made of it, and any seed
        that a person would choose is found by trying. For experiments, not for deployments.
    device : str
        Where the update matrix lives: ``auto`` is CUDA where there is one, else the CPU.
    root_update : callable, optional
        What the server's own data say, for rules that ask for a ``root``: a function from the
        arrays of the model to those that the server has trained on its data the way that clients
        do. It is called once a round.
    """

    server_learning_rate: Annotated[
        Annotated[float, Gt(0), Lt(math.inf)] | Callable[[int], float],
        Allowed("above 0, or a function from the round to it"),
    ] = 1.0
    server_momentum: Annotated[float, Ge(0), Lt(1)] = 0.0
    server_nesterov: bool = False
    mixing: Annotated[str, _accepted_by(build_mixings), Allowed("none, or specs of mixings")] = (
        "none"
    )
    byzantine_fraction: Share = 0.25
    weighting: Literal["uniform", "examples"] = "uniform"
    min_valid_replies: Annotated[Count | None, Operation()] = None
    max_empty_rounds: Annotated[Count, Operation()] = 10
    node_wait_timeout: Annotated[Positive, Operation(), OwnRounds()] = 600.0
    too_few_nodes: Annotated[Literal["fail", "go-on"], Operation(), OwnRounds()] = "fail"
    bench_after: Annotated[int, Ge(0), Operation(), OwnRounds()] = 0
    bench_rounds: Annotated[Count, Operation(), OwnRounds()] = 10
    checkpoints: Annotated[Checkpoints | str | Path | None, Operation(), OwnRounds()] = None
    compressor: Annotated[
        str, _accepted_by(build_compressor), Allowed("the spec of a compressor")
    ] = "none"
    error_feedback: bool = True
    shared_coordinates: bool = False
    downlink_compressor: Annotated[
        str, _accepted_by(build_downlink), OwnRounds(), Allowed("none, qsgd, qsgd:levels")
    ] = "none"
    seed: Annotated[
        Annotated[int, Ge(0), Lt(2**63)] | None, Allowed("None, or 0 to below 2^63")
    ] = None
    device: Annotated[str, Operation()] = "auto"
    root_update: Annotated[
        Callable[[ArrayRecord], ArrayRecord] | None,
        Allowed("a function from the model's arrays to those the server has trained, or None"),
    ] = None

    def __post_init__(self) -> None:
        """Refuse a Nesterov momentum that is none."""
        if self.server_nesterov and not self.server_momentum:
            raise OptionError(
                "server_nesterov is True with server_momentum 0; allowed: False, or a "
                "server_momentum above 0"
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


def options_of(cls: type, rule: str | Kind = "") -> dict[str, Option]:
    """Return what can be given to a strategy class by keyword, by name.

    Those of its constructors, of its rule (or of ``rule``, a spec or what was declared), of all
    strategies, and Flower's.
    """
    found: dict[str, Option] = {}
    for base in cls.__mro__:
        own = vars(base)
        if base is FedAvg or ("spec" in own and "given" in own.get("__annotations__", {})):
            break
        constructor = own.get("__init__")
        if constructor is None:
            continue
        found = declared(constructor, ("self",), positional=True) | found
        kinds = [p.kind for p in inspect.signature(constructor).parameters.values()]
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            return found
    spec = (getattr(cls, "spec", "") or rule) if isinstance(rule, str) else ""
    kind = rule if isinstance(rule, Kind) else None
    if spec:
        kind = RULES.parse(split_specs(spec)[0])[0]
    options = {**FLOWERS_OPTIONS, **OWN_OPTIONS, **(kind.options if kind else {})}
    for name, value in getattr(cls, "defaults", {}).items():
        if name not in options | found:
            raise OptionError(f"{cls.__name__}.defaults has {name!r}; {nearest(name, options)}")
        if name in options:
            options[name] = replace(options[name], default=value)
    return {**options, **found}


def signature_of(cls: type, options: Options, *, takes_spec: bool) -> inspect.Signature:
    """Return the signature of a strategy class: its constructor's, with each option by name.

    ``takes_spec`` says whether it is given a rule, whose options may be any.
    """
    rest = [*inspect.signature(cls.__init__).parameters.values()][1:]  # type: ignore[misc]
    others = [p for p in rest if p.kind is inspect.Parameter.VAR_KEYWORD and takes_spec]
    own = [
        p
        for p in rest
        if p.kind is not inspect.Parameter.VAR_KEYWORD
        and (takes_spec or p.kind is not inspect.Parameter.POSITIONAL_ONLY)
    ]
    names = {p.name for p in own}
    added = [
        inspect.Parameter(
            option.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=option.default,
            annotation=unmarked(option.annotation),
        )
        for option in options.values()
        if option.name not in names
    ]
    return inspect.Signature([*own, *added, *others])


def docstring_of(cls: type, options: Options) -> str:
    """Return the docstring of a strategy class, the rule's where it has none, with its options."""
    text, spec = cls.__doc__ or "", getattr(cls, "spec", "")
    if not text and spec:
        text = RULES.parse(split_specs(spec)[0])[0].summary
    changed = getattr(cls, "defaults", {})
    common = {**FLOWERS_OPTIONS, **OWN_OPTIONS}
    own = [o for name, o in options.items() if name not in common or name in changed]
    return with_parameters(text, own, _OTHERS)


_OTHERS = "Those of every strategy and Flower's, as for :class:`RobustStrategy`."


def resolve_device(device: str) -> torch.device:
    """Return the torch device that ``device`` names; ``auto`` is CUDA where there is one.

    Raises ``ValueError`` for a name torch does not know or a CUDA device that is not there.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device is {device!r}; allowed: auto, cpu, cuda, cuda:N") from error
    if resolved.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {device!r}; allowed: auto, cpu, cuda, cuda:N")
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device is {device!r}; this machine has {torch.cuda.device_count()}")
    return resolved
