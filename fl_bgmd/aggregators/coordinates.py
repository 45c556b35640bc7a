"""Rules that treat each coordinate by itself: the median and the trimmed mean.

A sorting network sorts the n values of every coordinate at once: each comparator is one
element-wise minimum and one maximum of two rows of a column block, without branches or indices.
Comparators that cannot reach the wanted order statistics are left out.
"""

from functools import lru_cache

import torch
from torch import Tensor

from ._rows import (
    check_fraction,
    check_updates,
    column_blocks,
    refuse_non_finite,
    result_dtype,
)
from .results import Aggregate

_BLOCK_ELEMENTS = 1 << 18
_MIN, _MAX, _BOTH = 1, 2, 3


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
    check_updates(updates)
    n = updates.shape[0]
    return _mean_of_middle(updates, (n - 1) // 2)


def trimmed_mean(updates: Tensor, *, trim_fraction: float = 0.25) -> Aggregate:
    """Drop the ``floor(trim_fraction * n)`` smallest and largest values and average the rest.

    Coordinate by coordinate; Yin et al. (ICML 2018), Definition 2. Breakdown point
    ``trim_fraction``.

    Parameters
    ----------
    updates : Tensor
        (n, d), floating point.
    trim_fraction : float
        0 to below 1/2.

    Raises
    ------
    TypeError, ValueError
        For input outside of the above; a row with a NaN or an infinity is named.
    """
    check_updates(updates)
    check_fraction("trim_fraction", trim_fraction, below=0.5)
    return _mean_of_middle(updates, int(trim_fraction * updates.shape[0] + 1e-9))


def _mean_of_middle(updates: Tensor, trim: int) -> Aggregate:
    """Average, per coordinate, the values of rank ``trim`` to ``n - trim - 1``."""
    n, d = updates.shape
    dtype = result_dtype(updates)
    vector = torch.empty(d, dtype=dtype, device=updates.device)
    comparators = selection_network(n, trim)
    share = 1.0 / (n - 2 * trim)
    zeros: Tensor | None = None
    for columns, block in column_blocks(updates, dtype=dtype, elements=_BLOCK_ELEMENTS):
        # 0 * x is NaN for a NaN or an infinity: one dot product finds them.
        flat = block.view(-1)
        zeros = torch.zeros_like(flat) if zeros is None else zeros
        if bool(torch.dot(flat, zeros[: len(flat)]).isnan()):
            refuse_non_finite(updates)
        wires = list(block.unbind(0))
        spare = torch.empty_like(wires[0])
        for low, high, wanted in comparators:
            a, b = wires[low], wires[high]
            if wanted == _BOTH:
                torch.minimum(a, b, out=spare)
                torch.maximum(a, b, out=b)
                wires[low], spare = spare, a
            elif wanted == _MIN:
                torch.minimum(a, b, out=a)
            else:
                torch.maximum(a, b, out=b)
        middle = wires[trim] * share
        for wire in wires[trim + 1 : n - trim]:
            middle.add_(wire, alpha=share)
        vector[columns] = middle
    return Aggregate(vector, None)


@lru_cache(maxsize=64)
def selection_network(n: int, trim: int) -> tuple[tuple[int, int, int], ...]:
    """Return comparators ``(low, high, outputs)`` that bring the ranks kept to the middle.

    Batcher's merge-exchange network (Knuth, The Art of Computer Programming, vol. 3, Algorithm
    5.2.2M), pruned backwards: a comparator is dropped when none of its outputs is used, or when
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
