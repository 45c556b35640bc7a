"""Rules that look for the best ``n - f`` of n rows among all of them: for few rows."""

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fl_bgmd.options import Share
from fl_bgmd.shares import floor_share

from .results import FilteredAggregate, average_of
from .rows import (
    blas_on_one_thread,
    center,
    check_updates,
    gram_matrix,
    in_range,
    pairwise_squared_distances,
)
from .rule import rule

MOST_LEFT_OUT = 16
"""Rows that :func:`minimum_diameter_averaging` leaves out at most: its search has 2^f ends."""

MOST_SUBSETS = 100_000
"""That :func:`smallest_eigenvalue_averaging` compares: a few seconds."""

_ELEMENTS = 1 << 20  # of the Gram matrices that are looked at together

Mask = NDArray[np.bool_]


def _diameter_limits(n: int, hostile: int, share: float) -> Iterator[tuple[str, str]]:
    if hostile > MOST_LEFT_OUT:
        yield "mda", _too_many_left_out(hostile, n)


def _too_many_left_out(hostile: int, n: int) -> str:
    return (
        f"{hostile} of {n} updates are to be left out; allowed: {MOST_LEFT_OUT} at most, since mda "
        "compares up to 2^f sets of rows"
    )


@rule("mda", limits=_diameter_limits, sharded=True)
def minimum_diameter_averaging(
    updates: Tensor, *, byzantine_fraction: Share = 0.25
) -> FilteredAggregate:
    """Average the ``n - f`` rows whose largest distance from each other is least.

    MDA of El Mhamdi et al. (Genuinely Distributed Byzantine Machine Learning, PODC 2020), ``f =
    floor(byzantine_fraction * n)``; of several such sets the one of least summed squared distance.
    Exact: rows fit within a diameter if f of them touch every longer pair (a vertex cover), which
    is searched for by branching on the row with most of these pairs.

    Parameters
    ----------
    updates : Tensor
        (n, d), floating point.
    byzantine_fraction : float
        0 to below 1/2.

    Raises
    ------
    TypeError, ValueError
        For input outside of the above, and where f is above 16; a row with a NaN or an infinity
        is named.
    """
    updates = check_updates(updates)
    n = updates.shape[0]
    hostile = floor_share(byzantine_fraction, n)
    if hostile > MOST_LEFT_OUT:
        raise ValueError(_too_many_left_out(hostile, n))
    return average_of(_least_diameter(pairwise_squared_distances(updates), hostile), updates)


def _least_diameter(squared: NDArray[np.float64], hostile: int) -> Mask:
    """Return which rows are left when the ``hostile`` that stretch the diameter most are out."""
    n = len(squared)
    diameters = np.unique(squared)
    low, high = 0, len(diameters) - 1
    while low < high:
        middle = (low + high) // 2
        found = next(_without_longer(squared > diameters[middle], hostile), None)
        low, high = (low, middle) if found is not None else (middle + 1, high)
    best, least = np.ones(n, dtype=bool), math.inf
    for kept in _without_longer(squared > diameters[low], hostile):
        while kept.sum() > n - hostile:  # equal distances: more go than have to
            kept[np.argmax(np.where(kept, squared @ kept, -1.0))] = False
        total = float(squared[np.ix_(kept, kept)].sum())
        if total < least:
            best, least = kept, total
    return best


def _without_longer(longer: Mask, budget: int) -> Iterator[Mask]:
    """Yield sets of rows without a longer pair, (n,) each, that leave out ``budget`` at most."""
    n = len(longer)
    pairs = [sum(1 << int(j) for j in np.flatnonzero(row)) for row in longer]
    for left in _covered(pairs, (1 << n) - 1, budget):
        yield np.array([bool(left >> i & 1) for i in range(n)])


def _covered(pairs: Sequence[int], left: int, budget: int) -> Iterator[int]:
    """Yield what is left, a bit a row, once one row of each pair is out."""
    counts = [(pairs[i] & left).bit_count() if left >> i & 1 else 0 for i in range(len(pairs))]
    most = max(counts)
    if most == 0:
        yield left
        return
    if sum(counts) > 2 * budget * most:  # too few rows are left to touch all pairs
        return
    row = counts.index(most)
    yield from _covered(pairs, left & ~(1 << row), budget - 1)
    if most <= budget:
        yield from _covered(pairs, left & ~pairs[row], budget - most)


def _eigenvalue_limits(n: int, hostile: int, share: float) -> Iterator[tuple[str, str]]:
    if math.comb(n, hostile) > MOST_SUBSETS:
        yield "smea", _too_many_subsets(hostile, n)


def _too_many_subsets(hostile: int, n: int) -> str:
    return (
        f"{hostile} of {n} updates are to be left out, {math.comb(n, hostile):,} choices; allowed: "
        f"{MOST_SUBSETS:,} at most, since smea compares them all"
    )


@rule("smea", limits=_eigenvalue_limits, sharded=True)
@blas_on_one_thread()
def smallest_eigenvalue_averaging(
    updates: Tensor, *, byzantine_fraction: Share = 0.25
) -> FilteredAggregate:
    """Average the ``n - f`` rows whose covariance has the smallest top eigenvalue.

    SMEA (smallest maximum eigenvalue averaging) of Allouah et al. (On the Privacy-Robustness-
    Utility Trilemma in Distributed Learning, ICML 2023), ``f = floor(byzantine_fraction * n)``. All
    sets are compared, exactly, by eigenvalues of parts of the rows' Gram matrix.

    Parameters
    ----------
    updates : Tensor
        (n, d), floating point.
    byzantine_fraction : float
        0 to below 1/2.

    Raises
    ------
    TypeError, ValueError
        For input outside of the above, and where there are more than 100,000 choices of f rows; a
        row with a NaN or an infinity is named.
    """
    updates = check_updates(updates)
    n = updates.shape[0]
    hostile = floor_share(byzantine_fraction, n)
    if math.comb(n, hostile) > MOST_SUBSETS:
        raise ValueError(_too_many_subsets(hostile, n))
    rows, _ = in_range(updates)
    return average_of(_least_eigenvalue(center(rows, gram_matrix(rows)), n - hostile), updates)


def _least_eigenvalue(gram: NDArray[np.float64], count: int) -> Mask:
    """Return which ``count`` rows have the covariance of the smallest top eigenvalue, (n,)."""
    subsets = itertools.combinations(range(len(gram)), count)
    best, least = np.ones(len(gram), dtype=bool), math.inf
    while batch := list(itertools.islice(subsets, max(1, _ELEMENTS // count**2))):
        chosen = np.array(batch)
        parts = gram[chosen[:, :, None], chosen[:, None, :]]
        means = parts.mean(axis=2, keepdims=True)
        parts -= means + means.swapaxes(1, 2) - means.mean(axis=1, keepdims=True)
        tops = np.linalg.eigvalsh(parts)[:, -1]
        first = int(np.argmin(tops))
        if tops[first] < least:
            best, least = np.isin(np.arange(len(gram)), chosen[first]), float(tops[first])
    return best
