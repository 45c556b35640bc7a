"""Rules and mixings by name: what declares one, and what a text such as ``gmd+bucketing:3`` builds.

A rule is a function of an (n, d) tensor of updates that returns an :class:`Aggregate`, and declares
itself with :func:`rule`. What it is given follows from the names of its parameters:

=================== ==============================================================================
``updates``         (n, d): the rows
``weights``         float64 (n,): the clients' weights under ``weighting="examples"``, or None
``norms``           float64 (n,): the norms of the uncompressed updates, or None
``nodes``           list of int: whose row each is, or None
``byzantine_fraction``  the hostile share of the rows that is to be expected
``generator``       what it draws from
``memory``          its result's ``memory`` of the last round, None at first
``root``            (d,): the server's own update, None where it has none
``last``            (d,): the last round's aggregate, None at first
``step_size``       the server's step along the result, 0 or more
``origin``          of a mixing, (d,): what it clips to, None for zero
=================== ==============================================================================

Its other parameters, by keyword, are its options.
"""

import dataclasses
import functools
import inspect
import itertools
import typing
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, ParamSpec, TypeVar

import torch
from torch import Tensor

from fl_bgmd.options import Option, OptionError, Options, Share, check_all, checked, declared
from fl_bgmd.registry import Registry, split_specs, value_text
from fl_bgmd.shares import floor_share, hostile_count

from .chain import chained
from .means import Buckets, Mixing, Recentered, mixed
from .results import Aggregate
from .rows import result_dtype

P = ParamSpec("P")
R = TypeVar("R")
A = TypeVar("A", bound=Aggregate)
M = TypeVar("M", bound=Mixing)

INJECTED = (
    *("updates", "weights", "norms", "nodes", "byzantine_fraction", "generator"),
    *("memory", "root", "last", "origin", "step_size"),
)

Limits = Callable[..., Iterator[tuple[str, str]]]
"""``(n, hostile, share, **options)`` to subjects and sentences: what cannot be promised then.

One with a parameter ``delta`` or ``feedback`` is told what the compressor guarantees (1: none) and
whether clients add what it lost to the next update.
"""

RECOMMENDED = "gap-filter"
"""The spec of the recommended strategy: the best worst case measured (docs/attacks.md)."""


@dataclass(frozen=True)
class Kind:
    """A rule or a mixing as it was declared.

    Attributes
    ----------
    name : str
        Kebab-case.
    function : callable
        What does the work.
    options : mapping of str to Option
        All of its parameters that are not in :data:`INJECTED`.
    takes : mapping of str to str
        What it is given, and the parameters that take it.
    robust : bool
        Whether it holds up against a hostile minority.
    weights_tell : bool
        Whether a weight near zero is evidence against a client. Not for rules that leave out honest
        clients, too.
    uses : callable
        Options by parameter to what it makes use of under them, of what it takes; raises
        :class:`OptionError` for options that do not fit together.
    keeps_rows : bool
        Of a mixing: whether each of its rows stands for one client.
    chains : str
        Of a mixing that can take :class:`.chain.Points` for ``updates``: what it asks them for,
        ``norms`` or ``distances``.
    draws : str
        What it draws with the generator, in the plural.
    limits : callable or None
        See :data:`Limits`.
    sharded : bool or callable
        Whether its rows may be :class:`~fl_bgmd.shards.Sharded`: all that it asks of them are
        functions under :func:`~fl_bgmd.shards.over_shards`. A function of the options by parameter
        where that depends on them.
    """

    name: str
    function: Callable[..., Any]
    options: Options
    takes: Mapping[str, str]
    robust: bool = True
    weights_tell: bool = False
    uses: Callable[[Mapping[str, Any]], Collection[str]] = lambda options: INJECTED
    keeps_rows: bool = True
    chains: str = ""
    draws: str = ""
    limits: Limits | None = None
    sharded: "bool | Callable[[Mapping[str, Any]], bool]" = False

    @property
    def weightable(self) -> bool:
        """Whether clients may have weights."""
        return "weights" in self.takes

    @property
    def needs_root(self) -> bool:
        """Whether it is nothing without an update of the server's own."""
        parameter = inspect.signature(self.function).parameters.get(self.takes.get("root", ""))
        return parameter is not None and parameter.default is inspect.Parameter.empty

    @property
    def summary(self) -> str:
        """The first line of its documentation."""
        return (inspect.getdoc(self.function) or "").partition("\n")[0]

    def bound(self, given: Mapping[str, Any]) -> "Bound":
        """Return the rule with options by name, checked; the others have their defaults."""
        values = {o.parameter: o.default for o in self.options.values()}
        values |= check_all(self.name, given, self.options)
        self.uses(values)
        return Bound(self, values)


@dataclass(frozen=True)
class Bound:
    """A rule or a mixing with the values of its options, by their parameters' names."""

    kind: Kind
    values: Mapping[str, Any]

    def __call__(self, **inputs: Any) -> Any:
        """Call the function with what it takes of the inputs."""
        taken = {parameter: inputs[name] for name, parameter in self.kind.takes.items()}
        return self.kind.function(**taken, **self.values)

    def uses(self, name: str) -> bool:
        """Whether it makes use of one of its inputs."""
        return name in self.kind.takes and name in self.kind.uses(self.values)

    @property
    def sharded(self) -> bool:
        """Whether its rows may be in shards."""
        says = self.kind.sharded
        return says(self.values) if callable(says) else says

    def notes(self, n: int, hostile: int, share: float, **packing: float) -> dict[str, str]:
        """Return what it cannot promise with n rows."""
        limits = self.kind.limits
        if limits is None:
            return {}
        asked = inspect.signature(limits).parameters
        told = {name: value for name, value in packing.items() if name in asked}
        return dict(limits(n, hostile, share, **told, **self.values))

    def __str__(self) -> str:
        """Return the spec."""
        told = [
            f"{option.key}={value_text(value)}"
            for option in self.kind.options.values()
            if (value := self.values[option.parameter]) != option.default
        ]
        return f"{self.kind.name}:{','.join(told)}" if told else self.kind.name


@dataclass(frozen=True)
class Rule:
    """A rule behind its mixings: itself a rule.

    Built by :func:`build_rule`.

    Attributes
    ----------
    rule : Bound
        What is applied last.
    mixings : tuple of Bound
        What is applied before, in this order.
    byzantine_fraction : float
        The hostile share of the clients: of three or more at least one (see
        :func:`fl_bgmd.shares.hostile_count`).
    generator : torch.Generator or None
        What blocks and buckets are drawn from, on the CPU; torch's global one where it is None.
    call : callable or None
        Is called in the place of ``rule``, with the inputs of the module's table.
    """

    rule: Bound
    mixings: tuple[Bound, ...] = ()
    byzantine_fraction: float = 0.25
    generator: torch.Generator | None = None
    call: Callable[..., Aggregate] | None = None

    def __post_init__(self) -> None:
        """Refuse mixings that take from the rule what it asks for."""
        for mixing in self.mixings:
            if self.rule.uses("norms"):
                raise OptionError(
                    f"mixing is {mixing.kind.name!r} with {self.rule}; allowed: none, since mixed "
                    "rows have other norms than clients report"
                )
            if self.rule.uses("nodes") and not mixing.kind.keeps_rows:
                keep = ", ".join(name for name, kind in MIXINGS.items() if kind.keeps_rows)
                raise OptionError(
                    f"mixing is {mixing.kind.name!r} with {self.rule}; allowed: none, {keep}, "
                    "since a row of several clients is nobody's own"
                )

    def __str__(self) -> str:
        """Return the spec."""
        return "+".join(str(bound) for bound in (self.rule, *self.mixings))

    def __call__(
        self,
        updates: Tensor,
        memory: Any = None,
        *,
        weights: Tensor | None = None,
        norms: Tensor | None = None,
        nodes: Sequence[int] | None = None,
        root: Tensor | None = None,
        last: Tensor | None = None,
        step_size: float = 1.0,
        overwrite: bool = False,
    ) -> Aggregate:
        """Apply the mixings and the rule.

        Parameters
        ----------
        updates : Tensor
            (n, d), floating point.
        memory : object, optional
            The ``memory`` of the last round's result.
        weights, norms, nodes, root, last, step_size : optional
            See the module's table.
        overwrite : bool
            Whether mixings may write into ``updates``, which saves an (n, d) tensor.

        Returns
        -------
        Aggregate
            ``weights`` are those of the n rows that were given.

        Raises
        ------
        TypeError, ValueError
            For input that the rule refuses.
        """
        n = len(updates)
        taken: list[Mixing] = []
        changed = False
        origin: Tensor | None = None
        for bounds in self._chains() if n > 1 else ():
            inputs = {
                "byzantine_fraction": self.tolerated(n, len(updates)),
                "generator": self.generator,
                "last": last,
            }
            chain = chained(bounds, updates, origin, **inputs) if len(bounds) > 1 else None
            for part in bounds if chain is None else (chain,):
                made: Mixing = (
                    part
                    if isinstance(part, Mixing)
                    else part(updates=updates, origin=origin, **inputs)
                )
                keeps = isinstance(part, Mixing) or part.kind.keeps_rows
                # Means are never less precise than float32: in narrower rows they have no place.
                fits = updates.dtype == result_dtype(updates)
                fits = fits and (keeps or isinstance(made, Buckets))
                into = updates if (overwrite or changed) and fits else None
                updates = mixed(made, updates, out=into)
                origin = made.origin if isinstance(made, Recentered) else origin
                changed = changed or not isinstance(made, Recentered)
                taken.append(made)
                norms = None  # reported norms are not the rows' any more
                if weights is not None:
                    weights = torch.from_numpy(made.average(weights.double().numpy()))
        result: Aggregate = (self.call or self.rule)(
            updates=updates,
            memory=memory,
            weights=weights,
            norms=norms,
            nodes=nodes,
            root=root,
            last=last,
            step_size=step_size,
            byzantine_fraction=self.tolerated(n, len(updates)),
            generator=self.generator,
        )
        if taken and result.weights is not None:
            shares = result.weights.numpy()
            for mixing in reversed(taken):
                shares = mixing.spread(shares)
            result = dataclasses.replace(result, weights=torch.from_numpy(shares))
        return result

    def _chains(self) -> Iterator[list[Bound]]:
        """Yield the mixings, together those that can share a Gram matrix and need one."""
        for chains, bounds in itertools.groupby(self.mixings, lambda b: bool(b.kind.chains)):
            group = list(bounds)
            if chains and any(b.kind.chains == "distances" for b in group):
                yield group
            else:
                yield from ([bound] for bound in group)

    def uses(self, name: str) -> bool:
        """Whether the rule or a mixing makes use of one of its inputs."""
        return any(bound.uses(name) for bound in (self.rule, *self.mixings))

    @property
    def norm_order(self) -> float | None:
        """The order of the norms that clients are to report, None where nobody asks for any.

        That of the rule's option ``order``, 2 where it has none.
        """
        return float(self.rule.values.get("order", 2.0)) if self.uses("norms") else None

    def tolerated(self, n: int, rows: int) -> float:
        """Return the hostile share of the rows that came of n clients.

        ``byzantine_fraction`` where that is a client or more; of so few that it would be nobody the
        share that one is. A bucket is hostile if one of its rows is: after bucketing it is the
        same number of rows out of fewer.
        """
        hostile = hostile_count(self.byzantine_fraction, n)
        if rows == n and hostile == floor_share(self.byzantine_fraction, n):
            return self.byzantine_fraction
        return hostile / rows

    def notes(self, n: int, *, delta: float = 1.0, feedback: bool = False) -> dict[str, str]:
        """Return what cannot be promised of n clients, sentences by their subjects.

        ``delta`` is what their compressor guarantees (1: they send updates as they are),
        ``feedback`` whether they add what it lost to the next update.
        """
        hostile = hostile_count(self.byzantine_fraction, n)
        found: dict[str, str] = {}
        for bound in (*self.mixings, self.rule):
            found |= bound.notes(n, hostile, self.tolerated(n, n), delta=delta, feedback=feedback)
        return found

    @property
    def draws(self) -> list[str]:
        """What is drawn that clients had better not foresee."""
        return [b.kind.draws for b in (self.rule, *self.mixings) if b.uses("generator")]

    def to_state(self, memory: Any) -> Any:
        """Return a memory as tensors, numbers and dictionaries."""
        return dict(vars(memory)) if dataclasses.is_dataclass(memory) else memory

    def from_state(self, state: Any, device: torch.device) -> Any:
        """Rebuild a memory from the output of :meth:`to_state`, on a device."""
        if isinstance(state, Tensor):
            return state.to(device)
        kind = _memory_type(self.rule.kind)
        if kind is None or state is None:
            return state
        memory = kind(**state)
        return memory.to(device) if hasattr(memory, "to") else memory


def _memory_type(kind: Kind) -> Any:
    """Return the dataclass that a rule's memory is, None for one of another type."""
    hint = typing.get_type_hints(kind.function).get(kind.takes.get("memory", ""))
    for member in (*typing.get_args(hint), hint):
        if isinstance(member, type) and dataclasses.is_dataclass(member):
            return member
    return None


# ------------------------------------------------------------------------------- declarations


def _accept(what: str, kinds: Registry[Kind]) -> Callable[[Any], Kind]:
    def accept(found: Any) -> Kind:
        kind = getattr(found, "kind", None)
        if not isinstance(kind, Kind) or kind not in kinds.values():
            raise ValueError(f"it is a {type(found).__name__}; allowed: a function under @{what}")
        return kind

    return accept


RULES: Registry[Kind] = Registry("rule", lambda found: _accept("rule", RULES)(found))
"""Rules by name."""

MIXINGS: Registry[Kind] = Registry("mixing", lambda found: _accept("mixing", MIXINGS)(found))
"""Mixings by name."""


def _declare(
    kinds: Registry[Kind],
    name: str,
    function: Callable[P, R],
    renamed: Mapping[str, str],
    **said: Any,
) -> Callable[P, R]:
    takes = {
        next((own for own, other in renamed.items() if other == parameter), parameter): parameter
        for parameter in inspect.signature(function).parameters
        if parameter in (*INJECTED, *renamed.values())
    }
    options = declared(function, but=takes.values())
    said = {key: value for key, value in said.items() if value is not None}
    public = checked(function)
    public.kind = Kind(name, function, options, takes, **said)  # type: ignore[attr-defined]
    kinds.add(name, public.kind)  # type: ignore[attr-defined]
    return public


def rule(
    name: str,
    *,
    memory: str = "memory",
    robust: bool = True,
    weights_tell: bool = False,
    uses: Callable[[Mapping[str, Any]], Collection[str]] | None = None,
    draws: str = "",
    limits: Limits | None = None,
    warns: bool = False,
    sharded: bool | Callable[[Mapping[str, Any]], bool] = False,
) -> Callable[[Callable[P, A]], Callable[P, A]]:
    """Declare a function as a rule: see the module and :class:`Kind`.

    ``memory`` is the parameter that takes the memory. Called directly, the function checks its
    options, and with ``warns`` it warns of its limits.
    """

    def declare(function: Callable[P, A]) -> Callable[P, A]:
        public = _declare(
            RULES,
            name,
            function,
            {"memory": memory},
            robust=robust,
            weights_tell=weights_tell,
            uses=uses,
            draws=draws,
            limits=limits,
            sharded=sharded,
        )
        return _warning(public) if warns else public

    return declare


def _warning(function: Callable[P, A]) -> Callable[P, A]:
    """Let a rule that is called directly warn of its limits, as strategies log them."""
    kind: Kind = function.kind  # type: ignore[attr-defined]

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> A:
        result = function(*args, **kwargs)  # which checks the options
        share, rows = kwargs.get("byzantine_fraction"), kwargs.get("updates", *args[:1])
        if isinstance(share, float) and isinstance(rows, Tensor) and kind.limits is not None:
            hostile = floor_share(share, len(rows))
            for _, sentence in kind.limits(len(rows), hostile, share):
                warnings.warn(sentence, stacklevel=2)
        return result

    return call


def mixing(
    name: str,
    *,
    keeps_rows: bool = True,
    chains: Literal["", "norms", "distances"] = "",
    draws: str = "",
    limits: Limits | None = None,
    sharded: bool = False,
) -> Callable[[Callable[P, M]], Callable[P, M]]:
    """Declare a function of ``updates`` that returns a :class:`.means.Mixing` as a mixing.

    See :class:`Kind`.
    """

    def declare(function: Callable[P, M]) -> Callable[P, M]:
        said = {"keeps_rows": keeps_rows, "chains": chains, "draws": draws, "limits": limits}
        return _declare(MIXINGS, name, function, {}, **said, sharded=sharded)

    return declare


def build_rule(
    spec: str,
    *,
    byzantine_fraction: Share = 0.25,
    generator: torch.Generator | None = None,
    mixing: str = "none",
    **options: Any,
) -> Rule:
    """Build a rule from its spec, such as ``bgmd:block-fraction=0.3+nearest-neighbor``.

    ``name``, ``name:value`` (of the first option) or ``name:option=value,option=value``; then the
    mixings, in the order in which they are applied, each behind a ``+``. ``package.module:NAME`` is
    a function of your own under :func:`rule` or :func:`mixing`.

    Parameters
    ----------
    spec : str
        See :data:`RULES` and :data:`MIXINGS` for the names.
    byzantine_fraction : float
        0 to below 1/2.
    generator : torch.Generator, optional
        What blocks and buckets are drawn from, on the CPU; torch's global one by default.
    mixing : str
        Specs of mixings that come after those in ``spec``, or ``none``.
    **options
        Options of the rule that ``spec`` does not hold.

    Raises
    ------
    OptionError
        A ``TypeError`` and ``ValueError``, for an unknown name or option, and values that are not
        allowed or do not fit together.
    """
    _SHARE.check(byzantine_fraction)
    first, *others = split_specs(spec)
    kind, parsed = RULES.parse(first)
    values = parsed.values(kind.options)
    if twice := sorted(values.keys() & options.keys()):
        raise OptionError(f"{', '.join(twice)} is given beside {first!r}; allowed: once")
    mixings = (*(_bound_mixing(part) for part in others), *build_mixings(mixing))
    return Rule(kind.bound(values | options), mixings, byzantine_fraction, generator)


_SHARE = Option("byzantine_fraction", "byzantine_fraction", Share)


def build_mixings(text: str) -> tuple[Bound, ...]:
    """Build mixings from their specs, joined by ``+``; ``none`` is none.

    Raises :class:`OptionError` for an unknown name or option, and for values that are not allowed.
    """
    return () if text == "none" else tuple(_bound_mixing(part) for part in split_specs(text))


def _bound_mixing(text: str) -> Bound:
    kind, spec = MIXINGS.parse(text)
    return kind.bound(spec.values(kind.options))
