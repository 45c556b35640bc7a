"""Rules that average, coordinate by coordinate, the values nearest to the median."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fl_bgmd.options import Share
from fl_bgmd.shards import over_shards, side_by_side
from fl_bgmd.shares import floor_share

from .coordinates import check_sum, column_block
from .results import Aggregate, FilteredAggregate
from .rows import (
    SORTING,
    check_updates,
    empty,
    on_cores,
    pairwise_squared_distances,
    result_dtype,
    width_of_blocks,
)
from .rule import rule

_ELEMENTS = 1 << 17  # of a block of columns


@rule("meamed", sharded=True)
def mean_around_median(updates: Tensor, *, byzantine_fraction: Share = 0.25) -> Aggregate:
    """Average, in every coordinate, the ``n - f`` values nearest to the median.

    MeaMed, the mean around the median of Xie, Koyejo and Gupta (Generalized Byzantine-tolerant SGD,
    2018), ``f = floor(byzantine_fraction * n)``. The median of an even number of values is the mean
    of the two in the middle; of two values that are equally far the lower one counts.

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
    kept = n - floor_share(byzantine_fraction, n)
    return Aggregate(_around_median(updates, np.arange(n), kept), None)


def _bulyan_limits(n: int, hostile: int, share: float) -> Iterator[tuple[str, str]]:
    if n < 4 * hostile + 3:
        yield (
            "bulyan",
            f"{hostile} of {n} clients may be hostile; bulyan is proved for n >= 4 f + 3",
        )


@rule("bulyan", limits=_bulyan_limits, sharded=True)
def bulyan(updates: Tensor, *, byzantine_fraction: Share = 0.25) -> FilteredAggregate:
    """Select ``n - 2 f`` rows by Krum, then average the values nearest to their median.

    El Mhamdi, Guerraoui and Rouault (The Hidden Vulnerability of Distributed Learning in Byzantium,
    ICML 2018), Section 4, with Krum and ``f = floor(byzantine_fraction * n)``: of the rows that are
    left, Krum's choice is taken out and into the selection, ``n - 2 f`` times; of the selection, in
    every coordinate, the ``n - 4 f`` values nearest to the median are averaged. Their guarantee
    needs ``n >= 4 f + 3``. Krum counts at least one neighbor, and of equal scores the one that was
    better among all rows decides; at least the middle value, or the two, are averaged.

    Parameters
    ----------
    updates : Tensor
        (n, d), floating point.
    byzantine_fraction : float
        0 to below 1/2.

    Returns
    -------
    FilteredAggregate
        ``kept`` is the selection; no ``weights``.

    Raises
    ------
    TypeError, ValueError
        For input outside of the above; a row with a NaN or an infinity is named.
    """
    updates = check_updates(updates)
    n = updates.shape[0]
    hostile = floor_share(byzantine_fraction, n)
    selected = _repeated_krum(pairwise_squared_distances(updates), n - 2 * hostile, hostile)
    count = max(n - 4 * hostile, 2 - n % 2)
    vector = _around_median(updates, np.flatnonzero(selected), count)
    return FilteredAggregate(vector, None, kept=torch.from_numpy(selected))


def _repeated_krum(squared: NDArray[np.float64], count: int, hostile: int) -> NDArray[np.bool_]:
    """Return which rows Krum takes out one after the other, (n,)."""
    n = len(squared)
    order = np.argsort(squared, axis=1, kind="stable")
    ordered = np.take_along_axis(squared, order, axis=1)
    left, first = np.ones(n, dtype=bool), np.zeros(n)
    for taken in range(count):
        neighbors = max(1, n - taken - hostile - 2)
        # The row itself, at distance 0, is one more.
        counts = left[order]
        counts &= np.cumsum(counts, axis=1) <= neighbors + 1
        scores = np.where(counts, ordered, 0.0).sum(axis=1)
        if taken == 0:
            first = scores
        # With one neighbor each, two rows have the same score: which one must not be up to order.
        left[np.lexsort((first, scores, ~left))[0]] = False
    return ~left


@over_shards(side_by_side)
def _around_median(updates: Tensor, chosen: NDArray[np.int64], count: int) -> Tensor:
    """Return the means of the ``count`` values of the chosen rows nearest to the median, (d,)."""
    d = updates.shape[1]
    vector = empty(d, updates, result_dtype(updates))
    width = width_of_blocks(_ELEMENTS, updates, least=16)
    on_cpu = updates.device.type == "cpu"

    def average(columns: slice) -> None:
        for start in range(columns.start, columns.stop, width):
            part = slice(start, min(start + width, columns.stop))
            if on_cpu:
                block = np.ascontiguousarray(column_block(updates, part, vector.dtype)[chosen].T)
                block.sort(axis=1)
                ordered: Any = block.astype(np.float64, copy=False)
            else:
                ordered = updates[torch.from_numpy(chosen).to(updates.device), part]
                ordered = ordered.double().T.sort(dim=1).values
            check_sum(float((ordered[:, 0] / 2 + ordered[:, -1] / 2).sum()), updates)
            means = _window_means(ordered, count)
            vector[part] = torch.from_numpy(means) if on_cpu else means

    on_cores(average, d, elements=SORTING * len(chosen) * d if on_cpu else 0)
    return vector


def _window_means(ordered: Any, count: int) -> Any:
    """Return, (c,), the means of the values nearest to the median of each ascending row, (c, n)."""
    n = ordered.shape[1]
    if count == n:
        return (ordered / n).sum(1)
    middle = ordered[:, (n - 1) // 2] / 2 + ordered[:, n // 2] / 2
    # They are neighbors. Halves: their sum is a number whatever they are.
    beyond = ordered[:, : n - count] / 2 + ordered[:, count:] / 2 < middle[:, None]
    start = beyond.sum(1)[:, None]
    if isinstance(ordered, np.ndarray):
        nearest = np.take_along_axis(ordered, start + np.arange(count), axis=1)
    else:
        places = torch.arange(count, device=ordered.device)
        nearest = ordered.take_along_dim(start + places, dim=1)
    return (nearest / count).sum(1)
