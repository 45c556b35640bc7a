"""Centered clipping: the mean of what each row adds to a center, clipped."""

import numpy as np
import torch
from torch import Tensor

from ._rows import check_updates, combine, gram_matrix, in_range, result_dtype
from .results import Aggregate


def centered_clipping(
    updates: Tensor,
    *,
    radius: float | None = None,
    center: Tensor | None = None,
    iterations: int = 3,
) -> Aggregate:
    """Iterate ``v <- v + mean_i clip(x_i - v, radius)`` from ``center``.

    Karimireddy et al. (ICML 2021), Equation 5 and Algorithm 2. All steps happen on the n x n
    Gram matrix of ``x_i - center``.

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
        ``vector = center + sum_i weights[i] (x_i - center)``.

    Raises
    ------
    TypeError, ValueError
        For input outside of the above; a row with a NaN or an infinity is named.
    """
    check_updates(updates)
    n, d = updates.shape
    if radius is not None and not radius > 0:
        raise ValueError(f"radius is {radius}; allowed: above 0")
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}; allowed: 1 or more")
    if center is not None and tuple(center.shape) != (d,):
        raise ValueError(f"center has shape {tuple(center.shape)}; allowed: ({d},)")
    rows, scale = in_range(updates)
    gram = gram_matrix(rows, None if center is None else -center.double() / scale)
    weights = np.zeros(n)
    for _ in range(iterations):
        product = gram @ weights
        squared = np.diagonal(gram) - 2 * product + weights @ product
        distances = np.sqrt(np.maximum(squared, 0.0))
        limit = float(np.median(distances)) if radius is None else radius / scale
        factors = np.minimum(1.0, limit / np.where(distances > 0, distances, np.inf)) / n
        weights = weights * (1.0 - factors.sum()) + factors
    vector = combine(weights, updates, result_dtype(updates))
    if center is not None:
        vector += (1.0 - weights.sum()) * center
    return Aggregate(vector, torch.from_numpy(weights))
