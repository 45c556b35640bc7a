"""Rules on the cosines between rows: FoolsGold and FLAME."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fl_bgmd.options import NonNegative, Positive

from .norms import clip_factors, finite_norms
from .results import Aggregate, FilteredAggregate
from .rows import check_updates, combine, gram_matrix, in_range, result_dtype, stacked, written
from .rule import rule

Array = NDArray[np.float64]


@dataclass(frozen=True)
class History:
    """What clients have sent over the rounds.

    Attributes
    ----------
    sums : Tensor
        (m, d), float32 or float64: the sum of each client's updates.
    nodes : tuple of int
        (m,): whose they are.
    """

    sums: Tensor
    nodes: tuple[int, ...]

    def to(self, device: torch.device) -> "History":
        """Return the history on a device."""
        return History(self.sums.to(device), self.nodes)


def _gold_limits(n: int, hostile: int, share: float, **_: object) -> Iterator[tuple[str, str]]:
    if hostile:
        yield (
            "fools-gold",
            "fools-gold finds hostile clients by their likeness to each other; one by itself, or "
            "several that differ, may send anything",
        )


@rule("fools-gold", robust=False, limits=_gold_limits)
def fools_gold(
    updates: Tensor,
    *,
    nodes: Sequence[int] | None = None,
    memory: History | None = None,
    confidence: Positive = 1.0,
) -> Aggregate:
    """Give less weight to clients whose updates, summed over the rounds, are like another's.

    FoolsGold of Fung, Yoon and Beschastnikh (RAID 2020), Algorithm 1, without the weights of
    features: with ``cs_ij`` the cosines of the sums and ``v_i = max_j cs_ij``, pardoned ``cs_ij <-
    cs_ij v_i / v_j`` where ``v_j > v_i``; ``alpha_i = 1 - max_j cs_ij`` over their maximum; then
    ``kappa (ln(alpha_i / (1 - alpha_i)) + 1/2)``, cut to 0 to 1, is what a row counts. Their step
    is the sum of the rows, for updates that are shares of one; here, as in the authors' code, it is
    divided by n. For clients that all hold different data: those whose data are alike are taken for
    one attacker's. A single hostile row may be anything.

    Parameters
    ----------
    updates : Tensor
        (n, d), floating point.
    nodes : sequence of int, optional
        Whose row each is; 0 to n - 1 by default.
    memory : History, optional
        The last round's. It holds d values for each client that has ever been seen.
    confidence : float
        Steepness of the weights, above 0: the paper's kappa.

    Raises
    ------
    TypeError, ValueError
        For input outside of the above, and a memory of another d; a row with a NaN or an infinity
        is named.
    """
    updates = check_updates(updates)
    n, d = updates.shape
    whose = tuple(range(n)) if nodes is None else tuple(nodes)
    if memory is not None and memory.sums.shape[1] != d:
        raise ValueError(f"memory has {memory.sums.shape[1]} values a client; allowed: {d}")
    history = _with(memory, updates, whose)
    weights = _pardoned(_cosines(history.sums[:n]), confidence) / n
    vector = combine(weights, updates, result_dtype(updates))
    return Aggregate(vector, torch.from_numpy(weights), memory=history)


def _with(memory: History | None, updates: Tensor, nodes: tuple[int, ...]) -> History:
    """Return the history with a round's updates; its first rows are those of this round's nodes."""
    shape, dtype = (updates.shape[0], updates.shape[1]), result_dtype(updates)
    sums = written(lambda rows: updates[rows].to(dtype), shape, updates, dtype)
    if memory is None:
        return History(sums, nodes)
    place = {node: i for i, node in enumerate(memory.nodes)}
    for i, node in enumerate(nodes):
        if node in place:
            sums[i] += memory.sums[place[node]]
    absent = [i for node, i in place.items() if node not in nodes]
    if not absent:
        return History(sums, nodes)
    sums = stacked([*sums, *(memory.sums[i] for i in absent)], sums)
    return History(sums, (*nodes, *(memory.nodes[i] for i in absent)))


def _pardoned(cosines: Array, confidence: float) -> Array:
    """Return what each client counts, 0 to 1, (n,)."""
    n = len(cosines)
    if n == 1:
        return np.ones(1)
    likeness = np.where(np.eye(n, dtype=bool), -np.inf, cosines)
    most = likeness.max(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        pardon = np.where(most[None, :] > most[:, None], most[:, None] / most[None, :], 1.0)
        # Opposite to all: there is nothing to pardon.
        pardon = np.where((most[:, None] > 0) & (most[None, :] > 0), pardon, 1.0)
        counts = 1.0 - (np.where(np.isfinite(likeness), likeness, -1.0) * pardon).max(axis=1)
        counts = np.clip(counts, 0.0, 1.0)
        if counts.max() == 0.0:
            return np.zeros(n)
        counts /= counts.max()
        counts = confidence * (np.log(counts / (1.0 - counts)) + 0.5)
    return np.asarray(np.clip(counts, 0.0, 1.0))


def _flame_uses(options: Mapping[str, Any]) -> Collection[str]:
    """Return what is made use of: nothing is drawn without noise."""
    return ("updates", "generator") if options["noise"] else ("updates",)


@rule("flame", uses=_flame_uses, draws="noise", sharded=True)
def flame(
    updates: Tensor, *, generator: torch.Generator | None = None, noise: NonNegative = 0.0
) -> FilteredAggregate:
    """Keep the majority that points the same way, clip to the median norm, average.

    FLAME of Nguyen et al. (USENIX Security 2022), Algorithm 1. Its clustering is HDBSCAN by cosine
    distances for clusters of at least ``n / 2 + 1``, one neighbor and a single cluster allowed:
    that is single linkage up to the distance at which one cluster is that large. All norms set the
    median that the rows are clipped to. Distances are those of the updates, where the paper has
    whole models, which on the way to convergence all point the same way.

    Parameters
    ----------
    updates : Tensor
        (n, d), floating point.
    generator : torch.Generator, optional
        CPU generator of the noise; torch's global one by default.
    noise : float
        Standard deviation of normal noise to add, in median norms, 0 or more: the paper's lambda.
        None by default; the paper has 0.001 for images.

    Raises
    ------
    TypeError, ValueError
        For input outside of the above; a row with a NaN or an infinity is named.
    """
    updates = check_updates(updates)
    norms = finite_norms(updates)
    # Equal rows are equally far from others, but for the last digits.
    kept = _majority_cluster(np.round(1.0 - _cosines(updates), 12))
    middle = float(np.median(norms))
    weights = np.where(kept, clip_factors(norms, middle), 0.0) / kept.sum()
    vector = combine(weights, updates, result_dtype(updates))
    if noise:
        drawn = torch.randn(len(vector), generator=generator, dtype=torch.float64)
        vector += (noise * middle * drawn).to(vector.device, vector.dtype)
    return FilteredAggregate(
        vector, torch.from_numpy(weights) if not noise else None, kept=torch.from_numpy(kept)
    )


def _cosines(updates: Tensor) -> Array:
    """Return the cosines between the rows, (n, n); those of a row of zeros are 0."""
    gram = gram_matrix(in_range(updates)[0])
    norms = np.sqrt(np.diagonal(gram))
    norms = np.where(norms > 0, norms, np.inf)
    return np.asarray(np.clip(gram / norms[:, None] / norms[None, :], -1.0, 1.0))


def _majority_cluster(distances: Array) -> NDArray[np.bool_]:
    """Return, (n,), the more than n / 2 rows that are the first to hang together."""
    n = len(distances)
    lengths, ends = _spanning_tree(distances)
    cluster = np.arange(n)
    limit = np.inf
    for i in np.argsort(lengths, kind="stable"):
        if lengths[i] > limit:
            break
        first, second = cluster[ends[i]]
        cluster[cluster == second] = first
        if limit == np.inf and np.bincount(cluster).max() > n // 2:
            limit = lengths[i]
    return np.asarray(cluster == np.bincount(cluster).argmax())


def _spanning_tree(distances: Array) -> tuple[Array, NDArray[np.int64]]:
    """Return the lengths, (n - 1,), and ends, (n - 1, 2), of a minimum spanning tree (Prim)."""
    n = len(distances)
    outside = np.ones(n, dtype=bool)
    outside[0] = False
    nearest, length = np.zeros(n, dtype=np.int64), distances[0].copy()
    lengths, ends = np.empty(n - 1), np.empty((n - 1, 2), dtype=np.int64)
    for step in range(n - 1):
        new = int(np.argmin(np.where(outside, length, np.inf)))
        lengths[step], ends[step] = length[new], (nearest[new], new)
        outside[new] = False
        closer = distances[new] < length
        nearest[closer], length[closer] = new, distances[new][closer]
    return lengths, ends
