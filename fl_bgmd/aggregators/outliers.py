"""Rules that look for outliers along the direction in which the rows spread most."""

from typing import Annotated

import numpy as np
import torch
from annotated_types import Ge
from numpy.typing import NDArray
from torch import Tensor

from fl_bgmd.options import Count, Positive, Share
from fl_bgmd.shares import ceil_share, floor_share

from .directions import errors_along_top, top_of_few, top_spread
from .means import Scaled
from .norms import clip_factors, lower_median
from .results import Aggregate, FilteredAggregate, average_of
from .rows import (
    blas_on_one_thread,
    center,
    check_updates,
    combine,
    gram_matrix,
    in_range,
    is_dense,
    refuse_non_finite,
    result_dtype,
    row_norms,
)
from .rule import rule

Array = NDArray[np.float64]

_NOTHING = 1e-9  # of the weights: what rounding leaves of rows that are equally far out


@rule("caf", sharded=True)
@blas_on_one_thread()
def covariance_agnostic_filter(updates: Tensor, *, byzantine_fraction: Share = 0.25) -> Aggregate:
    """Down-weight rows along the top of the covariance; return the mean that spread least.

    CAF, the covariance bound-agnostic filter of Allouah, Guerraoui and Stephan (ICML 2025, arXiv
    2505.01874), Algorithm 2, ``f = floor(byzantine_fraction * n)``: with weights ``c = 1`` at
    first, while they sum to more than ``n - 2 f``, ``c_i <- c_i (1 - tau_i / tau_max)`` where
    ``tau_i`` is the square of row i along the top eigenvector of the weighted covariance and
    ``tau_max`` the largest of the rows that still have weight; of all weighted means on the way the
    one with the smallest top eigenvalue. With ``f = 0`` the mean.
    Eigenvectors are those of the n x n Gram matrix, of more than 1,000 rows by passes over them.

    Parameters
    ----------
    updates : Tensor
        (n, d), floating point.
    byzantine_fraction : float
        0 to below 1/2.

    Raises
    ------
    TypeError, ValueError
        For input outside of the above; a row with a NaN or an infinity is named.
    """
    updates = check_updates(updates)
    n = updates.shape[0]
    least_sum = n - 2 * floor_share(byzantine_fraction, n)
    rows, scales = in_range(updates)
    gram = center(rows, gram_matrix(rows)) if is_dense(updates) else None
    if gram is None:
        row_norms(rows)  # names a row that is not finite
    weights, best, smallest = np.ones(n), np.ones(n), np.inf
    while weights.sum() > least_sum:
        errors = (
            top_spread(rows, weights).errors if gram is None else errors_along_top(gram, weights)
        )
        eigenvalue = float(weights @ errors) / weights.sum()
        if eigenvalue < smallest:
            best, smallest = weights, eigenvalue
        farthest = float(errors[weights > 0].max())
        if farthest == 0.0:
            break
        weights = weights * np.maximum(1.0 - errors / farthest, 0.0)
    shares = best / best.sum()
    # Rows that were scaled down to be squared stay so.
    shares = shares * (scales.min() / scales)
    return Aggregate(combine(shares, updates, result_dtype(updates)), torch.from_numpy(shares))


@rule("gap-filter", sharded=True)
@blas_on_one_thread()
def gap_filter(
    updates: Tensor,
    *,
    byzantine_fraction: Share = 0.25,
    gap: Annotated[float, Ge(1)] = 1.3,
    far: Annotated[float, Ge(1)] = 8.0,
) -> Aggregate:
    """Clip to the median norm, down-weight rows while one direction stands out, average.

    This project's own. Honest clients who each go their own way spread about as much along several
    directions; rows that pull together are one direction of their own. Rows longer than ``far``
    times the lower median norm have no weight, the m others are clipped to it. Then, while the top
    eigenvalue of the weighted covariance is more than ``gap`` times the next one and the weights
    sum to more than ``m - 2 g``, they go down as in :func:`covariance_agnostic_filter`. That rule
    returns the mean of least spread, and may prefer small lies to honest clients far from the rest;
    this one stops when nothing stands out, or when all rows are equally far out and none would be
    left.

    ``g`` is how many of the m may be hostile: ``floor(byzantine_fraction * n)`` without the rows
    longer than ``far**2`` median norms, and less than half of m. Rows between ``far`` and
    ``far**2`` are out and not counted: they may be honest clients whose data are learned last,
    while the liars are among the others.

    Parameters
    ----------
    updates : Tensor
        (n, d), floating point.
    byzantine_fraction : float
        0 to below 1/2.
    gap : float
        1 or more: how much larger than the next one the top eigenvalue may be.
    far : float
        1 or more, in median norms. Clients whose data are learned last have had up to eight.

    Raises
    ------
    TypeError, ValueError
        For input outside of the above; a row with a NaN or an infinity is named.
    """
    updates = check_updates(updates)
    n = updates.shape[0]
    rows, scales = in_range(updates)
    lengths = row_norms(rows)
    median = lower_median(lengths)
    weights, factors = np.where(lengths <= far * median, 1.0, 0.0), clip_factors(lengths, median)
    left, gross = int(weights.sum()), int((lengths > far**2 * median).sum())
    hostile = max(0, floor_share(byzantine_fraction, n) - gross)
    least_sum = left - 2 * min(hostile, (left - 1) // 2)  # a majority of them is honest
    if is_dense(updates):
        gram = gram_matrix(rows) * factors[:, None] * factors
    else:
        rows = Scaled(factors).apply(rows)
    while weights.sum() > least_sum:
        if is_dense(updates):
            errors, found = top_of_few(gram, weights)
        else:
            spread = top_spread(rows, weights)
            errors, found = spread.errors, spread.gap
        farthest = float(errors[weights > 0].max())
        if found <= gap or farthest == 0.0:
            break
        lighter = weights * np.maximum(1.0 - errors / farthest, 0.0)
        if lighter.sum() < _NOTHING * weights.sum():
            break
        weights = lighter
    shares = weights / weights.sum()
    # Rows that were scaled down to be squared stay so.
    vector = combine(shares * factors * (scales.min() / scales), updates, result_dtype(updates))
    return Aggregate(vector, torch.from_numpy(shares))


def _drawn_columns(d: int, count: int, generator: torch.Generator | None) -> Tensor:
    """Return ``count`` of d columns, int64 ascending."""
    seed = int(torch.randint(2**62, (1,), generator=generator))
    drawn = np.random.default_rng(seed).choice(d, count, replace=False, shuffle=False)
    return torch.from_numpy(np.sort(drawn))


@rule("dnc", draws="coordinates")
@blas_on_one_thread()
def divide_and_conquer(
    updates: Tensor,
    *,
    byzantine_fraction: Share = 0.25,
    generator: torch.Generator | None = None,
    iterations: Count = 1,
    coordinates: Count = 10_000,
    filter_share: Positive = 1.0,
) -> FilteredAggregate:
    """Leave out the rows furthest along the top direction of a random part of the coordinates.

    DnC of Shejwalkar and Houmansadr (NDSS 2021), Algorithm 2: in each iteration ``b`` random
    coordinates are drawn, the rows are centered there, and the ``c f`` rows of the largest squares
    along the top right singular vector are outliers, ``f = floor(byzantine_fraction * n)``. The
    rows that no iteration has left out are averaged; where there are none, those that the fewest
    have. The vector is that of the n x n Gram matrix of the drawn coordinates.

    Hostile rows of very different lengths hide each other from it: along the longest one's
    direction the next is no further out than honest rows. Clip before it (``dnc+clipping``).

    Parameters
    ----------
    updates : Tensor
        (n, d), floating point.
    byzantine_fraction : float
        0 to below 1/2.
    generator : torch.Generator, optional
        CPU generator of the coordinates; torch's global one by default.
    iterations : int
        Draws of coordinates, 1 or more: the paper's niters.
    coordinates : int
        How many are drawn, 1 or more: the paper's b. All where there are fewer.
    filter_share : float
        What a draw leaves out, in multiples of the hostile share, above 0: the paper's c.

    Raises
    ------
    TypeError, ValueError
        For input outside of the above; a row with a NaN or an infinity is named.
    """
    updates = check_updates(updates)
    n, d = updates.shape
    dropped = min(n - 1, ceil_share(filter_share, floor_share(byzantine_fraction, n)))
    rows, _ = in_range(updates)
    if d > coordinates or not is_dense(updates):
        row_norms(rows)  # names a row that is not finite, also one that is not drawn
    out = np.zeros(n, dtype=np.int64)
    for _ in range(iterations):
        part = rows
        if d > coordinates:
            part = rows[:, _drawn_columns(d, coordinates, generator).to(rows.device)]
        if is_dense(updates):
            scores = errors_along_top(center(part, gram_matrix(part)), np.ones(n))
        else:
            scores = top_spread(part, np.ones(n)).errors
        out[np.argsort(scores, kind="stable")[n - dropped :]] += 1
    kept = out == out.min()
    result = average_of(kept, updates)
    if not bool(torch.isfinite(result.vector).all()):
        refuse_non_finite(updates)
    return result
