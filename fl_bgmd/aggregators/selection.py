"""Krum and Multi-Krum: rules that pick the rows with the closest neighbours."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fl_bgmd.shares import floor_share

from .coordinates import coordinate_median
from .results import FilteredAggregate
from .rows import (
    DENSE_ROWS,
    check_fraction,
    check_updates,
    combine,
    in_range,
    measure_strips,
    pairwise_squared_distances,
    result_dtype,
)


def krum(updates: Tensor, *, byzantine_fraction: float = 0.25) -> FilteredAggregate:
    """Return the row with the least summed squared distance to its ``n - f - 2`` nearest rows.

    Blanchard et al. (NeurIPS 2017), Section 4, ``f = floor(byzantine_fraction * n)``. Their
    guarantee needs ``n > 2 f + 2``; with fewer rows at least one neighbour is counted.
    See :func:`multi_krum` for the parameters and errors.
    """
    return multi_krum(updates, byzantine_fraction=byzantine_fraction, num_selected=1)


def multi_krum(
    updates: Tensor, *, byzantine_fraction: float = 0.25, num_selected: int | None = None
) -> FilteredAggregate:
    """Average the ``num_selected`` rows with the best Krum scores.

    Blanchard et al. (NeurIPS 2017), Section 5. Distances come from float64 inner products of
    centered rows; more than 1,000 rows are compared strip by strip, without an n x n matrix.

    Parameters
    ----------
    updates : Tensor
        (n, d), floating point.
    byzantine_fraction : float
        0 to below 1/2.
    num_selected : int, optional
        1 to n; ``n - f`` by default.

    Raises
    ------
    TypeError, ValueError
        For input outside of the above; a row with a NaN or an infinity is named.
    """
    updates = check_updates(updates)
    check_fraction("byzantine_fraction", byzantine_fraction, below=0.5)
    n = updates.shape[0]
    byzantine = floor_share(byzantine_fraction, n)
    num_selected = n - byzantine if num_selected is None else num_selected
    if not 1 <= num_selected <= n:
        raise ValueError(f"num_selected is {num_selected}; allowed: 1 to {n}, the number of rows")
    scores = _scores(updates, max(1, n - byzantine - 2))
    kept = np.zeros(n, dtype=bool)
    kept[np.argsort(scores, kind="stable")[:num_selected]] = True
    weights = kept / kept.sum()
    vector = combine(weights, updates, result_dtype(updates))
    return FilteredAggregate(vector, torch.from_numpy(weights), kept=torch.from_numpy(kept))


def _scores(updates: Tensor, neighbors: int) -> NDArray[np.float64]:
    """Return the summed squared distance of each row to its ``neighbors`` nearest, (n,)."""
    n = updates.shape[0]
    scores = np.empty(n)
    if n <= DENSE_ROWS:
        squared = np.sort(pairwise_squared_distances(updates), axis=1)
        scores[:] = squared[:, 1 : 1 + neighbors].sum(axis=1)  # column 0 is the row itself
        return scores

    def score(rows: slice, squared: NDArray[np.float64]) -> None:
        squared.partition(neighbors, axis=1)
        scores[rows] = squared[:, : neighbors + 1].sum(axis=1)  # the row itself adds 0

    safe, _ = in_range(updates)
    measure_strips(score, safe, coordinate_median(safe).vector)
    return scores
