"""Centered clipping: the mean of what each row adds to a center, clipped."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fl_bgmd.options import Count, Positive

from .results import Aggregate
from .rows import (
    Block,
    bordered_gram,
    check_updates,
    combine,
    dot,
    in_range,
    native,
    prefers_gram,
    result_dtype,
    row_norms,
)
from .rule import rule
from .strips import sum_strips


@rule("centered-clipping", memory="center", sharded=True)
def centered_clipping(
    updates: Tensor,
    *,
    center: Tensor | None = None,
    radius: Positive | None = None,
    iterations: Count = 3,
) -> Aggregate:
    """Iterate ``v <- v + mean_i clip(x_i - v, radius)`` from ``center``.

    Karimireddy et al. (ICML 2021), Equation 5 and Algorithm 2. All steps happen on the n x n
    Gram matrix of the rows and the center; many rows are passed over twice a step instead.

    Parameters
    ----------
    updates : Tensor
        (n, d), floating point.
    radius : float, optional
        Above 0, the tau of the paper; by default, in each step, the median distance to v.
    center : Tensor, optional
        (d,), where to start: the paper's previous aggregate. The origin by default.
    iterations : int
        1 or more.

    Returns
    -------
    Aggregate
        ``vector = center + sum_i weights[i] (x_i - center)``, which is the ``memory``, too: the
        next round's center.

    Raises
    ------
    TypeError, ValueError
        For input outside of the above; a row with a NaN or an infinity is named.
    """
    updates = check_updates(updates)
    n, d = updates.shape
    if center is not None and tuple(center.shape) != (d,):
        raise ValueError(f"center has shape {tuple(center.shape)}; allowed: ({d},)")
    if center is not None and not bool(torch.isfinite(center).all()):
        raise ValueError("center holds a NaN or an infinity; allowed: finite values")
    rows, scales = in_range(updates)
    scale = float(scales.min())
    start = torch.zeros(d, dtype=torch.float64, device=updates.device)
    if center is not None:
        start = center.double() / scale
    limit = None if radius is None else radius / scale
    if prefers_gram(rows):
        weights = _clip_in_gram_space(rows, start, limit, iterations)
        vector = combine(weights[:n], rows, result_dtype(updates))
        if center is not None:
            vector += weights[n] * start.to(vector)
    else:
        vector, weights = _clip_in_space(rows, start, limit, iterations)
        vector = vector.to(result_dtype(updates))
    if scale != 1.0:
        vector *= scale
    weights = weights[:n] * (scale / scales)
    return Aggregate(vector, torch.from_numpy(weights), memory=vector)


def _clip_in_gram_space(
    rows: Tensor, start: Tensor, radius: float | None, iterations: int
) -> NDArray[np.float64]:
    """Return the coefficients of the rows and of the start in the last v, (n + 1,)."""
    n = rows.shape[0]
    # Distances between v and the rows keep their digits when the origin is among the rows; v
    # starts outside, so the start is one more row: weights[n] is what is left of it.
    gram = bordered_gram(rows, start)
    weights = np.zeros(n + 1)
    weights[n] = 1.0
    for _ in range(iterations):
        product = gram @ weights
        squared = np.diagonal(gram) - 2 * product + weights @ product
        distances = np.sqrt(np.maximum(squared[:n], 0.0))
        factors = _factors(distances, radius)
        weights = weights * (1.0 - factors.sum())
        weights[:n] += factors
    return weights


def _clip_in_space(
    rows: Tensor, start: Tensor, radius: float | None, iterations: int
) -> tuple[Tensor, NDArray[np.float64]]:
    """Return the last v, (d,) float64, and the same coefficients, by passes over the rows."""
    n = rows.shape[0]
    weights = np.zeros(n + 1)
    weights[n] = 1.0
    v = start.clone()
    for _ in range(iterations):
        factors = _factors(row_norms(rows, -v), radius)
        v += torch.from_numpy(_weighted_offsets(factors, rows, -v)).to(v.device)
        weights *= 1.0 - factors.sum()
        weights[:n] += factors
    return v, weights


def _weighted_offsets(
    factors: NDArray[np.float64], rows: Tensor, offset: Tensor
) -> NDArray[np.float64]:
    """Return ``sum_i factors_i (x_i + offset)``, (d,)."""

    def weigh(part: slice, block: Block) -> Block:
        return dot(native(factors[part], rows), block)

    total: NDArray[np.float64] = sum_strips(weigh, rows, offset)
    return total


def _factors(distances: NDArray[np.float64], radius: float | None) -> NDArray[np.float64]:
    """Return how much of each row's distance a step goes, ``clip / n``; (n,)."""
    limit = float(np.median(distances)) if radius is None else radius
    factors: NDArray[np.float64] = np.minimum(
        1.0, limit / np.where(distances > 0, distances, np.inf)
    )
    return factors / len(distances)
