"""Rules that treat each coordinate by itself: the median and the trimmed mean.

Few rows go through a sorting network: each comparator is one element-wise minimum and one maximum
of two rows of a column block, without branches or indices; comparators that cannot reach the
wanted order statistics are left out. Many rows on a CPU are transposed block by block and sorted
by NumPy, whose vectorized sort then beats the network. Column ranges run on all cores. Other
devices sort where there are so many rows that the network would be thousands of small steps.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fl_bgmd.options import Share
from fl_bgmd.shards import over_shards, side_by_side
from fl_bgmd.shares import floor_share

from .results import Aggregate
from .rows import (
    SORTING,
    check_updates,
    empty,
    on_cores,
    refuse_non_finite,
    result_dtype,
    width_of_blocks,
)
from .rule import rule

_NETWORK_ELEMENTS, _SORT_WIDTH, _SORT_ELEMENTS = 1 << 18, 1 << 12, 1 << 20
_NETWORK_ROWS, _NETWORK_ROWS_ON_DEVICE = 16, 128  # with more rows sorting is faster
_MIN, _MAX, _BOTH = 1, 2, 3


@rule("cmd", sharded=True)
def coordinate_median(updates: Tensor) -> Aggregate:
    """Return the median of every coordinate; the mean of the two middle values for even n.

    CmD of Acharya et al. (Table 1), after Yin et al. (ICML 2018). Breakdown point 1/2 in each
    coordinate; the error grows with sqrt(d).

    Parameters
    ----------
    updates : Tensor
        (n, d), floating point.

    Raises
    ------
    TypeError, ValueError
        For input outside of the above; a row with a NaN or an infinity is named.
    """
    updates = check_updates(updates)
    n = updates.shape[0]
    return Aggregate(_mean_of_middle(updates, (n - 1) // 2))


def _trim_limits(
    n: int, hostile: int, share: float, *, trim_fraction: float | None
) -> Iterator[tuple[str, str]]:
    trim = share if trim_fraction is None else trim_fraction
    if floor_share(trim, n) < hostile:
        yield (
            "trim_fraction",
            f"trim_fraction is {trim}: {floor_share(trim, n)} of {n} values go at each end and "
            f"{hostile} may be hostile",
        )


@rule("trimmed-mean", limits=_trim_limits, sharded=True)
def trimmed_mean(
    updates: Tensor, *, trim_fraction: Share | None = None, byzantine_fraction: Share = 0.25
) -> Aggregate:
    """Drop the ``floor(trim_fraction * n)`` smallest and largest values and average the rest.

    Coordinate by coordinate; Yin et al. (ICML 2018), Definition 2. Breakdown point
    ``trim_fraction``.

    Parameters
    ----------
    updates : Tensor
        (n, d), floating point.
    trim_fraction : float, optional
        Dropped at each end. 0 to below 1/2; ``byzantine_fraction`` by default.
    byzantine_fraction : float
        0 to below 1/2.

    Raises
    ------
    TypeError, ValueError
        For input outside of the above; a row with a NaN or an infinity is named.
    """
    updates = check_updates(updates)
    trim = byzantine_fraction if trim_fraction is None else trim_fraction
    return Aggregate(_mean_of_middle(updates, floor_share(trim, updates.shape[0])))


@over_shards(side_by_side)
def _mean_of_middle(updates: Tensor, trim: int) -> Tensor:
    """Average, per coordinate, the values of rank ``trim`` to ``n - trim - 1``."""
    n, d = updates.shape
    vector = empty(d, updates, result_dtype(updates))
    if updates.device.type != "cpu":
        few = n <= _NETWORK_ROWS_ON_DEVICE
        (_network if few else _sort_on_device)(updates, trim, vector, slice(0, d))
        return vector
    few = n <= _NETWORK_ROWS
    method, passes = (_network, 1) if few else (_sort, SORTING)
    on_cores(lambda columns: method(updates, trim, vector, columns), d, elements=passes * n * d)
    return vector


def _network(updates: Tensor, trim: int, vector: Tensor, columns: slice) -> None:
    """Write the means of the middle ranks of ``columns`` into ``vector``: selection network."""
    n = updates.shape[0]
    comparators = selection_network(n, trim)
    share = 1.0 / (n - 2 * trim)
    on_cpu = updates.device.type == "cpu"
    # NumPy and torch share these names; NumPy's run on this thread alone.
    library: Any = np if on_cpu else torch
    width = width_of_blocks(_NETWORK_ELEMENTS, updates)
    for start in range(columns.start, columns.stop, width):
        part = slice(start, min(start + width, columns.stop))
        block = (
            column_block(updates, part, vector.dtype)
            if on_cpu
            else updates[:, part].to(vector.dtype, copy=True)
        )
        check_sum(float(block.sum()), updates)
        wires: list[Any] = list(block)
        spare = library.empty_like(wires[0])
        for low, high, wanted in comparators:
            a, b = wires[low], wires[high]
            if wanted == _BOTH:
                library.minimum(a, b, out=spare)
                library.maximum(a, b, out=b)
                wires[low], spare = spare, a
            elif wanted == _MIN:
                library.minimum(a, b, out=a)
            else:
                library.maximum(a, b, out=b)
        middle = wires[trim] * share
        for wire in wires[trim + 1 : n - trim]:
            middle += wire * share
        vector[part] = torch.from_numpy(middle) if on_cpu else middle


def _sort(updates: Tensor, trim: int, vector: Tensor, columns: slice) -> None:
    """Write the means of the middle ranks of ``columns`` into ``vector``: sort on the CPU."""
    n = updates.shape[0]
    result = vector.numpy()
    width = min(_SORT_WIDTH, width_of_blocks(_SORT_ELEMENTS, updates, least=16))
    for start in range(columns.start, columns.stop, width):
        part = slice(start, min(start + width, columns.stop))
        block = np.ascontiguousarray(column_block(updates, part, vector.dtype).T)
        block.sort(axis=1)
        check_sum(float(block[:, [0, -1]].sum()), updates)
        result[part] = block[:, trim : n - trim].mean(axis=1, dtype=np.float64)


def _sort_on_device(updates: Tensor, trim: int, vector: Tensor, columns: slice) -> None:
    """Write the means of the middle ranks of ``columns`` into ``vector``: sort where they are."""
    n = updates.shape[0]
    width = width_of_blocks(_SORT_ELEMENTS, updates, least=16)
    for start in range(columns.start, columns.stop, width):
        part = slice(start, min(start + width, columns.stop))
        block = updates[:, part].to(vector.dtype).sort(dim=0).values
        check_sum(float(block[0].sum() + block[-1].sum()), updates)
        vector[part] = block[trim : n - trim].mean(dim=0, dtype=torch.float64)


def column_block(updates: Tensor, columns: slice, dtype: torch.dtype) -> NDArray[np.floating]:
    """Return a NumPy copy of a block of columns."""
    if updates.dtype == dtype:
        return updates.numpy()[:, columns].copy()
    converted: NDArray[np.floating] = updates[:, columns].to(dtype).numpy()
    return converted


def check_sum(total: float, updates: Tensor) -> None:
    """Look for NaN and infinity where a sum is not finite (which may also have overflowed)."""
    if not np.isfinite(total):
        refuse_non_finite(updates)


@lru_cache(maxsize=64)
def selection_network(n: int, trim: int) -> tuple[tuple[int, int, int], ...]:
    """Return comparators ``(low, high, outputs)`` that bring the ranks kept to the middle.

    Batcher's merge-exchange network (Knuth, The Art of Computer Programming, vol. 3, Algorithm
    5.2.2M), pruned backward: a comparator is dropped when none of its outputs is used, or when
    both only enter the sum of the middle ranks, whose order does not matter.
    """
    unused, summed, used = 0, 1, 2
    state = [summed if trim <= i < n - trim else unused for i in range(n)]
    kept: list[tuple[int, int, int]] = []
    for low, high in reversed(_merge_exchange(n)):
        if state[low] == state[high] and state[low] != used:
            continue
        outputs = (_MIN if state[low] else 0) | (_MAX if state[high] else 0)
        kept.append((low, high, outputs))
        state[low] = state[high] = used
    return tuple(reversed(kept))


def _merge_exchange(n: int) -> list[tuple[int, int]]:
    """Return the comparators ``(low, high)``, low < high of Batcher's sorting network."""
    comparators: list[tuple[int, int]] = []
    if n < 2:
        return comparators
    top = 1 << ((n - 1).bit_length() - 1)
    p = top
    while p > 0:
        q, r, distance = top, 0, p
        while distance > 0:
            comparators.extend((i, i + distance) for i in range(n - distance) if (i & p) == r)
            distance, q, r = q - p, q >> 1, p
        p >>= 1
    return comparators
