"""Which training examples belong to which client.

``shards`` is the partition of the BGMD paper (80 shards over 10 clients), a variant of the
pathological split of McMahan et al., "Communication-Efficient Learning of Deep Networks from
Decentralized Data" (2017), section 3. ``dirichlet`` is that of Hsu, Qi and Brown, "Measuring the
Effects of Non-Identical Data Distribution for Federated Visual Classification" (2019), in the
form where every class is split over the clients.
"""

import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ParamSpec

import numpy as np
from annotated_types import Ge, Le
from numpy.typing import ArrayLike, NDArray

from fl_bgmd.options import Count, OptionError, Options, Positive, checked, declared
from fl_bgmd.registry import Registry, declared_under, parse_spec

P = ParamSpec("P")

Indices = NDArray[np.int64]
Fits = Callable[..., str]


@dataclass(frozen=True, eq=False)
class Scheme:
    """A way to split examples over clients, as it was declared: see :func:`scheme`.

    Attributes
    ----------
    name : str
        Kebab-case.
    function : callable
        Returns the indices of each client's examples.
    takes : tuple of str
        Which of ``labels``, ``num_partitions`` and ``generator`` it asks for.
    options : mapping of str to Option
        Its keyword parameters.
    fits : callable or None
        See :func:`scheme`.
    """

    name: str
    function: Callable[..., Sequence[Indices]]
    takes: tuple[str, ...]
    options: Options
    fits: Fits | None = None


@dataclass(frozen=True)
class Bound:
    """A scheme with the values of its options."""

    scheme: Scheme
    values: Mapping[str, Any] = field(hash=False)

    def check(self, num_examples: int, num_partitions: int) -> None:
        """Raise :class:`OptionError` where the examples cannot be split over the clients."""
        if not 1 <= num_partitions <= num_examples:
            raise OptionError(
                f"num_partitions is {num_partitions}; allowed: 1 to {num_examples}, the examples"
            )
        fits = self.scheme.fits
        if fits is not None and (problem := fits(num_examples, num_partitions, **self.values)):
            raise OptionError(problem)

    def __call__(
        self, labels: NDArray[np.integer], num_partitions: int, seed: int
    ) -> list[Indices]:
        """Return the indices of each client's examples, ascending; see :func:`partition`."""
        self.check(len(labels), num_partitions)
        inputs = {
            "labels": labels,
            "num_partitions": num_partitions,
            "generator": np.random.default_rng(seed),
        }
        parts = self.scheme.function(
            **{name: inputs[name] for name in self.scheme.takes}, **self.values
        )
        found = [np.sort(part).astype(np.int64) for part in parts]
        if len(found) != num_partitions or not all(map(len, found)):
            raise ValueError(
                f"partition {self.scheme.name} returned examples for "
                f"{sum(len(part) > 0 for part in found)} clients; allowed: for {num_partitions}"
            )
        dealt = np.concatenate(found)
        if dealt.min() < 0 or dealt.max() >= len(labels) or len(np.unique(dealt)) < len(dealt):
            raise ValueError(
                f"partition {self.scheme.name} returned indices outside 0 to {len(labels) - 1}, or "
                "one twice; allowed: each at most once"
            )
        return found


SCHEMES: Registry[Scheme] = Registry("partition", declared_under("scheme", Scheme))
"""Schemes by name. ``SCHEMES["package.module:NAME"]`` imports one of your own."""


def scheme(
    name: str, *, fits: Fits | None = None
) -> Callable[[Callable[P, Sequence[Indices]]], Callable[P, Sequence[Indices]]]:
    """Declare a function as a scheme.

    It asks for what it needs by its parameters' names: ``labels`` (N,) int64, ``num_partitions``
    and ``generator`` (:class:`numpy.random.Generator`). Its keyword parameters are options. This
    package's are listed in :data:`SCHEMES`; one of your own goes by ``package.module:NAME``.

    ``fits(num_examples, num_partitions, **options)`` says what is wrong with them together, or
    ``""``: runs ask before any data is loaded.
    """

    def declare(function: Callable[P, Sequence[Indices]]) -> Callable[P, Sequence[Indices]]:
        public = checked(function)
        inputs = ("labels", "num_partitions", "generator")
        takes = tuple(p for p in inspect.signature(function).parameters if p in inputs)
        found = Scheme(name, function, takes, declared(function, but=inputs), fits)
        public.scheme = found  # type: ignore[attr-defined]
        if function.__module__.partition(".")[0] == __name__.partition(".")[0]:
            SCHEMES.add(name, found)
        return public

    return declare


def build_partition(spec: str, **options: Any) -> Bound:
    """Build a scheme from its spec: ``iid``, ``shards:80``, ``dirichlet:alpha=0.5``.

    Parameters
    ----------
    spec : str
        ``name``, ``name:value`` (of the first option) or ``name:option=value,option=value``;
        ``package.module:NAME`` is a function of your own under :func:`scheme`.
    **options
        Defaults of options that ``spec`` does not hold.

    Raises
    ------
    OptionError
        A ``ValueError``, for an unknown name or option, and values that are not allowed.
    """
    parsed = parse_spec(spec, SCHEMES)
    found = SCHEMES[parsed.name]
    try:
        given = {**options, **parsed.values(found.options)}
    except OptionError as error:
        raise OptionError(f"partition is {spec!r}: {error}") from None
    return Bound(
        found,
        {
            option.parameter: option.check(given.get(name, option.default))
            for name, option in found.options.items()
        },
    )


def partition(
    labels: ArrayLike,
    num_partitions: int,
    *,
    scheme: str = "shards",
    num_shards: int = 80,
    alpha: float = 0.5,
    seed: int = 0,
) -> list[Indices]:
    """Split examples over clients, each example to exactly one.

    Parameters
    ----------
    labels
        Integer classes, (N,).
    num_partitions
        Number of clients, 1 to N. Every one gets at least one example.
    scheme
        A name of :data:`SCHEMES`, or a spec (see :func:`build_partition`).
    num_shards
        For ``"shards"`` where the spec does not say: a multiple of ``num_partitions``, at most N.
    alpha
        For ``"dirichlet"`` where the spec does not say: above 0 and at most 1e6.
    seed
        Not negative. Equal arguments give equal partitions.

    Returns
    -------
    list of int64 arrays
        For each client the indices of its examples, ascending.

    Raises
    ------
    ValueError
        If an argument is out of its range; the message names it.
    """
    classes = np.asarray(labels)
    if classes.ndim != 1 or not len(classes) or not np.issubdtype(classes.dtype, np.integer):
        raise ValueError(
            "labels must be a non-empty one-dimensional array of integers, "
            f"got {classes.dtype} of shape {classes.shape}"
        )
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")
    bound = build_partition(scheme, num_shards=operator.index(num_shards), alpha=float(alpha))
    return bound(classes, num_partitions, seed)


# ------------------------------------------------------------------------------------- schemes


def _shards_fit(num_examples: int, num_partitions: int, num_shards: int) -> str:
    if num_shards % num_partitions == 0 and num_shards <= num_examples:
        return ""
    return (
        f"num-shards is {num_shards}; allowed: a multiple of the clients ({num_partitions}), at "
        f"most {num_examples}, the examples"
    )


@scheme("shards", fits=_shards_fit)
def shards(
    labels: NDArray[np.integer],
    num_partitions: int,
    generator: np.random.Generator,
    *,
    num_shards: Count = 80,
) -> list[Indices]:
    """Sort by label, cut into shards of equal size, deal the same number to every client.

    Parameters
    ----------
    num_shards : int
        A multiple of the clients.
    """
    cut = np.array_split(np.argsort(labels, kind="stable"), num_shards)
    dealt = generator.permutation(num_shards).reshape(num_partitions, -1)
    return [np.concatenate([cut[shard] for shard in hand]) for hand in dealt]


@scheme("iid")
def iid(
    labels: NDArray[np.integer], num_partitions: int, generator: np.random.Generator
) -> list[Indices]:
    """Random parts of equal size."""
    return np.array_split(generator.permutation(len(labels)), num_partitions)


@scheme("dirichlet")
def dirichlet(
    labels: NDArray[np.integer],
    num_partitions: int,
    generator: np.random.Generator,
    *,
    # Above 1e6 the split is even to a tenth of a percent, and near 1e308 the sampler overflows.
    alpha: Annotated[Positive, Le(1e6)] = 0.5,
) -> list[Indices]:
    """Divide each class in proportions drawn from Dirichlet(alpha).

    A client left with nothing then takes one example from the client that has the most.

    Parameters
    ----------
    alpha : float
        Concentration. Small means that few clients hold most of a class.
    """
    owner = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        shares = generator.dirichlet(np.full(num_partitions, alpha))
        # Rounding the running sum, not each share, assigns every example exactly once.
        ends = np.rint(np.cumsum(shares) * len(members)).astype(np.int64)
        owner[members] = np.searchsorted(ends[:-1], np.arange(len(members)), side="right")
    counts = np.bincount(owner, minlength=num_partitions)
    for client in np.flatnonzero(counts == 0):
        richest = int(np.argmax(counts))
        owner[generator.choice(np.flatnonzero(owner == richest))] = client
        counts[richest] -= 1
        counts[client] = 1
    return [np.flatnonzero(owner == client) for client in range(num_partitions)]


@scheme("similarity")
def similarity(
    labels: NDArray[np.integer],
    num_partitions: int,
    generator: np.random.Generator,
    *,
    shared: Annotated[float, Ge(0), Le(1)] = 0.5,
) -> list[Indices]:
    """Deal out a share of the examples at random; sort the others by label, one run a client.

    The similarity of Karimireddy et al. (SCAFFOLD, ICML 2020), Section 7, and of ByzFL.

    Parameters
    ----------
    shared : float
        0 (clients have next to no label in common) to 1 (all draw from the same examples).
    """
    alike, rest = np.split(generator.permutation(len(labels)), [round(shared * len(labels))])
    parts = np.array_split(alike, num_partitions)
    # All clients have as many examples: where the first part is one shorter, the second is longer.
    sizes = [len(part) for part in np.array_split(labels, num_partitions)]
    owners = generator.permutation(num_partitions)
    lengths = [sizes[owner] - len(parts[owner]) for owner in owners]
    ordered = rest[np.argsort(labels[rest], kind="stable")]
    for owner, run in zip(owners, np.split(ordered, np.cumsum(lengths)[:-1]), strict=True):
        parts[owner] = np.concatenate([parts[owner], run])
    return parts
