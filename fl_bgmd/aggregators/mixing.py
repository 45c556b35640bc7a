"""Pre-aggregators: they replace the rows by means of rows before a rule sees them."""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fl_bgmd.options import Count, Positive, Share
from fl_bgmd.shares import floor_share, largest_bucket

from .chain import Points
from .coordinates import coordinate_median
from .geometric_median import geometric_median, minimize_in_hull
from .means import Buckets, Dense, Mixing, Neighbors, Recentered, Scaled, Toward
from .norms import clip_factors, finite_norms, lower_median
from .rows import (
    check_updates,
    in_range,
    is_dense,
    pairwise_squared_distances,
    row_norms,
)
from .rule import mixing
from .strips import measure_strips


def nearest_neighbor_mixing(updates: Tensor, *, byzantine_fraction: float = 0.25) -> Tensor:
    """Replace every row by the mean of the ``n - f`` rows nearest to it, itself included.

    NNM of Allouah et al. (AISTATS 2023, Algorithm 2), ``f = floor(byzantine_fraction * n)``.
    Rows of heterogeneous clients move toward each other, so the rule behind it faces less spread.
    More than 1,000 rows are compared strip by strip, without an n x n matrix of distances.

    Parameters
    ----------
    updates : Tensor
        (n, d), floating point.
    byzantine_fraction : float
        0 to below 1/2.

    Returns
    -------
    Tensor
        (n, d), in the dtype of the input but never less precise than float32.

    Raises
    ------
    TypeError, ValueError
        For input outside of the above; a row with a NaN or an infinity is named.
    """
    return nearest_neighbors(updates, byzantine_fraction=byzantine_fraction).apply(updates)


@mixing("nearest-neighbor", chains="distances", sharded=True)
def nearest_neighbors(updates: Tensor | Points, *, byzantine_fraction: Share = 0.25) -> Mixing:
    """Replace every row by the mean of the rows nearest to it (Allouah et al., AISTATS 2023).

    The means of :func:`nearest_neighbor_mixing`, not yet taken.
    """
    n = len(updates) if isinstance(updates, Points) else len(check_updates(updates))
    count = n - floor_share(byzantine_fraction, n)
    if isinstance(updates, Points) or is_dense(updates):
        squared = (
            updates.squared_distances()
            if isinstance(updates, Points)
            else pairwise_squared_distances(updates.detach())
        )
        nearest = np.argsort(squared, axis=1, kind="stable")
        matrix = np.zeros((n, n))
        np.put_along_axis(matrix, nearest[:, :count], 1.0 / count, axis=1)
        return Dense(matrix)
    bits = np.empty((n, (n + 7) // 8), np.uint8)

    def mark(rows: slice, squared: NDArray[np.float64]) -> None:
        bits[rows] = np.packbits(_nearest(squared, count), axis=1)

    safe, _ = in_range(updates.detach())
    measure_strips(mark, safe, coordinate_median(safe).vector)
    return Neighbors(bits, count)


def _nearest(squared: NDArray[np.float64], count: int) -> NDArray[np.bool_]:
    """Return which ``count`` entries of each row are the smallest, ties to the lower index."""
    limit = np.partition(squared, count - 1, axis=1)[:, count - 1 : count]
    nearest: NDArray[np.bool_] = squared <= limit
    excess = np.count_nonzero(nearest, axis=1) - count
    for i in np.flatnonzero(excess):
        tied = np.flatnonzero(squared[i] == limit[i])
        nearest[i, tied[len(tied) - excess[i] :]] = False
    return nearest


def bucketing(
    updates: Tensor, *, bucket_size: Count = 2, generator: torch.Generator | None = None
) -> Tensor:
    """Shuffle the rows and replace each ``bucket_size`` of them by their mean.

    Karimireddy et al. (ICLR 2022), Algorithm 1. The last bucket may be smaller.

    Parameters
    ----------
    updates : Tensor
        (n, d), floating point.
    bucket_size : int
        1 or more. The hostile fraction may grow by this factor.
    generator : torch.Generator, optional
        CPU generator of the shuffle; torch's global one by default.

    Returns
    -------
    Tensor
        (ceil(n / bucket_size), d), never less precise than float32.

    Raises
    ------
    TypeError, ValueError
        For input outside of the above.
    """
    return buckets(
        updates, byzantine_fraction=0.0, bucket_size=bucket_size, generator=generator
    ).apply(updates)


def _bucket_limits(
    n: int, hostile: int, share: float, *, bucket_size: int
) -> Iterator[tuple[str, str]]:
    size = largest_bucket(bucket_size, hostile, n)
    if size < bucket_size:
        yield (
            "buckets",
            f"bucket_size is {bucket_size}: of {n} replies {hostile} may be hostile, and hostile "
            f"buckets must not be the majority: buckets of {size}",
        )


@mixing("bucketing", keeps_rows=False, draws="buckets", limits=_bucket_limits, sharded=True)
def buckets(
    updates: Tensor,
    *,
    byzantine_fraction: Share = 0.25,
    generator: torch.Generator | None = None,
    bucket_size: Count = 2,
) -> Mixing:
    """Replace random buckets of rows by their means (Karimireddy et al., ICLR 2022).

    The means of :func:`bucketing`, not yet taken.

    Parameters
    ----------
    bucket_size : int
        Rows in a bucket; smaller where hostile buckets could be the majority.
    """
    n = check_updates(updates).shape[0]
    size = largest_bucket(bucket_size, floor_share(byzantine_fraction, n), n)
    order = torch.randperm(n, generator=generator).numpy()
    bucket = np.empty(n, np.int64)
    bucket[order] = np.arange(n) // size
    return Buckets(bucket, np.bincount(bucket))


@mixing("centering", sharded=True)
def centering(updates: Tensor, *, last: Tensor | None = None) -> Mixing:
    """Let the clipping that follows go to the last round's aggregate, not to zero.

    ``centering+clipping`` clips how far rows are from what the server did last, as centered
    clipping does (Karimireddy et al., ICML 2021); the rows stay where they are. In the first round
    it does nothing.
    """
    if last is not None and tuple(last.shape) != (updates.shape[1],):
        raise ValueError(f"last has shape {tuple(last.shape)}; allowed: ({updates.shape[1]},)")
    return Recentered(None if last is None else last.to(updates.device))


@mixing("clipping", chains="norms", sharded=True)
def clipping(
    updates: Tensor | Points,
    *,
    origin: Tensor | None = None,
    radius: Positive | None = None,
    factor: Positive = 1.0,
) -> Mixing:
    """Scale every row down to at most the lower median norm.

    Before :func:`nearest_neighbors` it keeps long rows from drawing the others' means; alone it
    lets rows of ordinary length be anything. Of the (n + 1) / 2 shortest rows, rounded down, at
    least one is honest where the hostile are the minority: its norm bounds all.

    Parameters
    ----------
    radius : float, optional
        What rows are clipped to; the lower median of their norms by default.
    factor : float
        Multiple of that.
    """
    norms = _norms(updates, origin)
    limit = lower_median(norms) if radius is None else radius
    return _scaled(clip_factors(norms, factor * limit), origin)


@mixing("arc", chains="norms", sharded=True)
def adaptive_clipping(
    updates: Tensor | Points, *, origin: Tensor | None = None, byzantine_fraction: Share = 0.25
) -> Mixing:
    """Clip the ``2 f (n - f) / n`` longest rows to the next one's norm.

    Adaptive robust clipping of Allouah et al. (arXiv 2405.14432), Algorithm 2, with ``f =
    floor(byzantine_fraction n)``: ``k = floor(2 (f / n) (n - f))`` rows are clipped to the norm of
    the (k + 1)-th longest.
    """
    norms = _norms(updates, origin)
    n = len(norms)
    hostile = floor_share(byzantine_fraction, n)
    count = 2 * hostile * (n - hostile) // n
    return _scaled(clip_factors(norms, float(np.sort(norms)[n - 1 - count])), origin)


@mixing("median-clipping", chains="distances", sharded=True)
def median_clipping(updates: Tensor | Points, *, factor: Positive = 1.0) -> Mixing:
    """Clip every row's distance to the geometric median to the lower median distance.

    Parameters
    ----------
    factor : float
        Multiple of that distance.
    """
    if isinstance(updates, Points):
        point, _ = minimize_in_hull(updates.gram(), np.ones(len(updates)))
        factors = clip_factors(point.distances, factor * lower_median(point.distances))
        return Toward(factors, point.hull_weights)
    updates = check_updates(updates)
    median = geometric_median(updates)
    assert median.weights is not None
    distances = _norms(updates, median.vector)
    factors = clip_factors(distances, factor * lower_median(distances))
    return Toward(factors, median.weights.numpy(), median.vector)


def _scaled(factors: NDArray[np.float64], origin: Tensor | None) -> Mixing:
    """Return rows that are brought closer to an origin."""
    return Scaled(factors) if origin is None else Toward(factors, 0.0 * factors, origin)


def _norms(updates: Tensor | Points, origin: Tensor | None = None) -> NDArray[np.float64]:
    """Return the distances to an origin, (n,), the largest number for those beyond it."""
    if isinstance(updates, Points):
        return updates.norms()
    updates = check_updates(updates)
    if origin is None:
        return finite_norms(updates)
    rows, scales = in_range(updates)
    scale = float(scales.min())
    with np.errstate(over="ignore"):
        norms = row_norms(rows, -origin.double() / scale) * scale
    most: NDArray[np.float64] = np.minimum(norms, np.finfo(np.float64).max)
    return most
