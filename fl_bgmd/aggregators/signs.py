"""SignGuard: filters on the rows' norms and on the signs of their entries."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fl_bgmd.options import Fraction, NonNegative, Positive

from .norms import clip_factors, finite_norms
from .results import FilteredAggregate
from .rows import check_updates, combine, numbers, result_dtype, sum_blocks
from .rule import rule

Array = NDArray[np.float64]

_STEPS = 300  # of a mean shift at most
_COUNTED = 1 << 22  # signs that are counted together
_QUANTILE = 0.5  # of the neighbors that set its bandwidth


def _sign_limits(n: int, hostile: int, share: float, **_: object) -> Iterator[tuple[str, str]]:
    if hostile:
        yield (
            "sign-guard",
            "sign-guard knows no hostile share: it follows the largest cluster of sign statistics, "
            "which rows with the signs of honest ones join",
        )


@rule("sign-guard", draws="coordinates", limits=_sign_limits)
def sign_guard(
    updates: Tensor,
    *,
    generator: torch.Generator | None = None,
    lower: NonNegative = 0.1,
    upper: Positive = 3.0,
    coordinate_share: Fraction = 0.1,
) -> FilteredAggregate:
    """Keep rows of ordinary norm whose signs are like most others'; clip and average them.

    SignGuard of Xu et al. (ICDCS 2022, arXiv 2109.05872), Algorithm 2. The norm filter keeps rows
    of ``lower`` to ``upper`` times the median norm. The sign filter takes the shares of positive,
    zero and negative entries among some random coordinates for features of a row and keeps the
    largest cluster of a mean shift (:func:`mean_shift`). Rows that pass both are clipped to the
    median norm and averaged; where none does, those that pass the sign filter.

    Parameters
    ----------
    updates : Tensor
        (n, d), floating point.
    generator : torch.Generator, optional
        CPU generator of the coordinates; torch's global one by default.
    lower : float
        The paper's L, 0 or more.
    upper : float
        The paper's R, above 0.
    coordinate_share : float
        Share of the coordinates that signs are counted in, above 0 to 1; one is drawn from each
        stretch of ``1 / coordinate_share``.

    Raises
    ------
    TypeError, ValueError
        For input outside of the above; a row with a NaN or an infinity is named.
    """
    updates = check_updates(updates)
    norms = finite_norms(updates)
    middle = float(np.median(norms))
    ordinary = (norms >= lower * middle) & (norms <= upper * middle)
    features = _sign_shares(updates, _drawn(updates, coordinate_share, generator))
    labels = mean_shift(features)
    like_most = labels == np.bincount(labels).argmax()
    kept = ordinary & like_most
    if not kept.any():
        kept = like_most
    weights = np.where(kept, clip_factors(norms, middle), 0.0) / kept.sum()
    vector = combine(weights, updates, result_dtype(updates))
    return FilteredAggregate(vector, torch.from_numpy(weights), kept=torch.from_numpy(kept))


def _drawn(updates: Tensor, share: float, generator: torch.Generator | None) -> Tensor | None:
    """Return the columns to look at, one of each stretch at random; None for all of them."""
    d, step = updates.shape[1], round(1 / share)
    if step == 1:
        return None
    starts = torch.arange(0, d, step)
    lengths = torch.clamp(d - starts, max=step)
    drawn = torch.rand(len(starts), generator=generator, dtype=torch.float64) * lengths
    return (starts + drawn.long()).to(updates.device)


def _sign_shares(updates: Tensor, columns: Tensor | None) -> Array:
    """Return the shares of positive, zero and negative entries in some columns, (n, 3)."""

    def count(_: slice, block: Any) -> Any:
        return np.stack([numbers((block > 0).sum(1)), numbers((block < 0).sum(1))], axis=1)

    n, d = len(updates), updates.shape[1] if columns is None else len(columns)
    if columns is None:
        counts = sum_blocks(count, updates)
    else:  # a copy of all of them at once could be large
        parts = torch.split(columns, max(1, _COUNTED // n))
        counts = sum(sum_blocks(count, updates[:, part]) for part in parts)
    positive, negative = counts.T
    return np.stack([positive, d - positive - negative, negative], axis=1) / d


def mean_shift(points: Array) -> NDArray[np.int64]:
    """Return the cluster of each point, (n,), by a mean shift with a flat kernel.

    Comaniciu and Meer (2002), with the bandwidth that scikit-learn would estimate, which the
    authors of SignGuard use: the mean over the points of the distance to the neighbor that half of
    the points are nearer than. Every point moves to the mean of the points within the bandwidth
    until it rests; of rests nearer than the bandwidth to one with more points around it that one
    counts; points belong to the nearest rest.

    Parameters
    ----------
    points : ndarray
        (n, m), float64.
    """
    n = len(points)
    between = _distances(points, points)
    neighbors = max(1, int(n * _QUANTILE))
    bandwidth = float(np.partition(between, neighbors - 1, axis=1)[:, neighbors - 1].mean())
    # Shares of few entries are often as far as the bandwidth to the last digit, or all the same.
    bandwidth = max(bandwidth * (1 + 1e-9), 1e-12)
    centers = points
    for _ in range(_STEPS):
        near = _distances(centers, points) <= bandwidth
        moved = near @ points / near.sum(axis=1, keepdims=True)
        rests = np.abs(moved - centers).max() <= 1e-3 * bandwidth
        centers = moved
        if rests:
            break
    around = (_distances(centers, points) <= bandwidth).sum(axis=1)
    chosen: list[int] = []
    for i in np.lexsort((*centers.T[::-1], -around)):
        if all(np.linalg.norm(centers[i] - centers[j]) >= bandwidth for j in chosen):
            chosen.append(int(i))
    return np.asarray(_distances(points, centers[chosen]).argmin(axis=1))


def _distances(a: Array, b: Array) -> Array:
    """Return the distances of all points of a to all of b, (len(a), len(b))."""
    squares = [np.subtract.outer(ours, theirs) ** 2 for ours, theirs in zip(a.T, b.T, strict=True)]
    return np.asarray(np.sqrt(sum(squares)))
