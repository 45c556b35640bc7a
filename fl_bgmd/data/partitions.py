"""Which training examples belong to which client.

``shards`` is the partition of the BGMD paper (80 shards over 10 clients), a variant of the
pathological split of McMahan et al., "Communication-Efficient Learning of Deep Networks from
Decentralized Data" (2017), section 3. ``dirichlet`` is that of Hsu, Qi and Brown, "Measuring the
Effects of Non-Identical Data Distribution for Federated Visual Classification" (2019), in the
form where every class is split over the clients.
"""

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

SCHEMES: tuple[str, ...] = ("shards", "iid", "dirichlet")
"""Names that :func:`partition` knows."""

Indices = NDArray[np.int64]


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
        ``"shards"``: sort by label, cut into ``num_shards`` shards of equal size (as nearly as N
        allows), deal them out at random, the same number to every client.
        ``"iid"``: random parts of equal size, as nearly as N allows.
        ``"dirichlet"``: each class is divided in proportions drawn from Dirichlet(alpha); a
        client left with nothing then takes one example from the client that has the most.
    num_shards
        For ``"shards"``: a multiple of ``num_partitions``, at most N.
    alpha
        For ``"dirichlet"``: concentration, above 0 and at most 1e6. Small means that few clients
        hold most of a class.
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
    if scheme not in SCHEMES:
        raise ValueError(f"scheme must be one of {', '.join(SCHEMES)}, got {scheme!r}")
    if not 1 <= num_partitions <= len(classes):
        raise ValueError(
            f"num_partitions must be between 1 and the number of labels {len(classes)}, "
            f"got {num_partitions}"
        )
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")
    generator = np.random.default_rng(seed)
    if scheme == "shards":
        parts = _shards(classes, num_partitions, num_shards, generator)
    elif scheme == "iid":
        parts = np.array_split(generator.permutation(len(classes)), num_partitions)
    else:
        parts = _dirichlet(classes, num_partitions, alpha, generator)
    return [np.sort(part).astype(np.int64) for part in parts]


def _shards(
    classes: NDArray[np.integer],
    num_partitions: int,
    num_shards: int,
    generator: np.random.Generator,
) -> list[Indices]:
    if not 1 <= num_shards <= len(classes) or num_shards % num_partitions:
        raise ValueError(
            f"num_shards must be a multiple of num_partitions {num_partitions} and at most the "
            f"number of labels {len(classes)}, got {num_shards}"
        )
    shards = np.array_split(np.argsort(classes, kind="stable"), num_shards)
    dealt = generator.permutation(num_shards).reshape(num_partitions, -1)
    return [np.concatenate([shards[shard] for shard in hand]) for hand in dealt]


def _dirichlet(
    classes: NDArray[np.integer], num_partitions: int, alpha: float, generator: np.random.Generator
) -> list[Indices]:
    # Above 1e6 the split is even to a tenth of a percent, and near 1e308 the sampler overflows.
    if not (math.isfinite(alpha) and 0 < alpha <= 1e6):
        raise ValueError(f"alpha must be above 0 and at most 1e6, got {alpha}")
    owner = np.empty(len(classes), np.int64)
    for label in np.unique(classes):
        members = generator.permutation(np.flatnonzero(classes == label))
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
