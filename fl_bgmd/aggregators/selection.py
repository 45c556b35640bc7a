"""Krum and Multi-Krum: rules that pick the rows with the closest neighbors."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fl_bgmd.options import Count, Share
from fl_bgmd.shares import floor_share

from .coordinates import coordinate_median
from .results import FilteredAggregate, average_of
from .rows import (
    check_updates,
    in_range,
    is_dense,
    pairwise_squared_distances,
)
from .rule import rule
from .strips import measure_strips


def _krum_limits(n: int, hostile: int, share: float) -> Iterator[tuple[str, str]]:
    if n <= 2 * hostile + 2:
        yield "krum", f"{hostile} of {n} clients may be hostile; krum is proved for n > 2 f + 2"


def _selection_limits(
    n: int, hostile: int, share: float, *, num_selected: int | None
) -> Iterator[tuple[str, str]]:
    if num_selected is not None and min(num_selected, n) > n - hostile:
        yield (
            "num_selected",
            f"num_selected is {num_selected} of {n} updates, of which {hostile} may be hostile",
        )


@rule("krum", limits=_krum_limits, sharded=True)
def krum(updates: Tensor, *, byzantine_fraction: Share = 0.25) -> FilteredAggregate:
    """Return the row with the least summed squared distance to its ``n - f - 2`` nearest rows.

    Blanchard et al. (NeurIPS 2017), Section 4, ``f = floor(byzantine_fraction * n)``. Their
    guarantee needs ``n > 2 f + 2``; with fewer rows at least one neighbor is counted.
    See :func:`multi_krum` for the parameters and errors.
    """
    return multi_krum(updates, byzantine_fraction=byzantine_fraction, num_selected=1)


@rule("multi-krum", limits=_selection_limits, sharded=True)
def multi_krum(
    updates: Tensor, *, byzantine_fraction: Share = 0.25, num_selected: Count | None = None
) -> FilteredAggregate:
    """Average the ``num_selected`` rows with the best Krum scores.

    Blanchard et al. (NeurIPS 2017), Section 5. As Krum it needs ``n > 2 f + 2``. Distances come
    from float64 inner products of centered rows; more than 1,000 rows are compared strip by strip,
    without an n x n matrix.

    Parameters
    ----------
    updates : Tensor
        (n, d), floating point.
    byzantine_fraction : float
        0 to below 1/2.
    num_selected : int, optional
        How many are averaged, all where there are fewer; ``n - f`` by default.

    Raises
    ------
    TypeError, ValueError
        For input outside of the above; a row with a NaN or an infinity is named.
    """
    updates = check_updates(updates)
    n = updates.shape[0]
    byzantine = floor_share(byzantine_fraction, n)
    num_selected = n - byzantine if num_selected is None else min(num_selected, n)
    scores = _scores(updates, max(1, n - byzantine - 2))
    kept = np.zeros(n, dtype=bool)
    kept[np.argsort(scores, kind="stable")[:num_selected]] = True
    return average_of(kept, updates)


def _scores(updates: Tensor, neighbors: int) -> NDArray[np.float64]:
    """Return the summed squared distance of each row to its ``neighbors`` nearest, (n,)."""
    n = updates.shape[0]
    scores = np.empty(n)
    if is_dense(updates):
        squared = np.sort(pairwise_squared_distances(updates), axis=1)
        scores[:] = squared[:, 1 : 1 + neighbors].sum(axis=1)  # column 0 is the row itself
        return scores

    def score(rows: slice, squared: NDArray[np.float64]) -> None:
        squared.partition(neighbors, axis=1)
        scores[rows] = squared[:, : neighbors + 1].sum(axis=1)  # the row itself adds 0

    safe, _ = in_range(updates)
    measure_strips(score, safe, coordinate_median(safe).vector)
    return scores
