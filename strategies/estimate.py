"""How many of a round's rows look hostile: for who does not know what share to prepare for.

Nobody can count hostile clients: one that trains honestly looks honest. What can be counted are
rows that do not fit in with the majority, and that is enough. What a rule has to be told of is
what would move it: rows far from the others, rows that are copies of each other, rows that stand
apart from the others in a direction. Rows that are none of it lie among the honest, and what they
gain is what any rule concedes to them.
"""

import math

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fl_bgmd.aggregators.rows import densest_row, pairwise_squared_distances
from fl_bgmd.shares import FEWEST

MOST = 0.45
"""No estimate is higher: of more nobody could say which half is honest."""

FADING = 0.9
"""Share of an estimate that is left in the next round, where that shows nothing."""

FAR = 2.0
"""A row is far if it is that many times as far from the middle row as the majority."""

ALIKE = 0.5
"""Rows are copies if they are nearer to each other than this share of the median such distance."""

_NORMAL = 2 / math.pi
"""Share of the spread between the halves of a normal distribution."""

_DIRECTIONS = 3
_NOTHING = 1e-9


def after_round(before: float, updates: Tensor, least: float) -> float:
    """Return the hostile share to prepare for in a round: quick to rise, slow to fall.

    It is used for the round whose rows it is made of: who has looked plausible for long and then
    strikes is counted with the strike.

    Parameters
    ----------
    before : float
        That of the round before.
    updates : Tensor
        (n, d).
    least : float
        Below 1/2.
    """
    now = odd_rows(updates) / len(updates) if len(updates) else 0.0
    return max(least, min(MOST, max(now, FADING * before + (1 - FADING) * now)))


def odd_rows(updates: Tensor) -> int:
    """Return how many of n rows do not fit in with the majority, at most ``(n - 1) // 2``.

    Parameters
    ----------
    updates : Tensor
        (n, d), finite.
    """
    n = len(updates)
    if n < FEWEST:
        return 0
    with np.errstate(all="ignore"):  # longer than a number can say
        squared = pairwise_squared_distances(updates)
    odd = _far(squared) | _alike(squared)
    if n - int(odd.sum()) >= FEWEST:
        rest = np.flatnonzero(~odd)
        odd[rest[_apart(squared[np.ix_(rest, rest)])]] = True
    return min(int(odd.sum()), (n - 1) // 2)


def _far(squared: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return which rows (n,) are far from the row with the majority closest around it."""
    middle, radius = densest_row(squared, len(squared) // 2 + 1)
    far: NDArray[np.bool_] = squared[middle] > FAR**2 * radius
    return far


def _alike(squared: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return which rows (n,) are much closer to another one than is usual."""
    others = squared + np.diag(np.full(len(squared), np.inf))
    nearest = others.min(axis=1)
    alike: NDArray[np.bool_] = nearest < ALIKE**2 * np.median(nearest)
    return alike


def _apart(squared: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the rows of the smaller group where two stand apart along a principal direction.

    They do if more of the spread is between them than ``2 / pi + 1 / sqrt(n)``, which the best cut
    of n normal values reaches once in 500 times (simulated: 10 to 200 values); never of 7 or less.
    """
    n = len(squared)
    centered = squared - squared.mean(axis=0) - squared.mean(axis=1)[:, None] + squared.mean()
    scale = float(np.abs(centered).max())
    if not scale > 0:
        return np.empty(0, dtype=np.int64)
    values, vectors = np.linalg.eigh(-0.5 * centered / scale)
    told = vectors[:, values > _NOTHING * values[-1]]  # the others are chance, or constant
    least = _NORMAL + 1 / math.sqrt(n)
    smaller: list[NDArray[np.int64]] = []
    for along in told[:, -_DIRECTIONS:].T:
        order = np.argsort(along, kind="stable")
        # Of 1..n-1 rows below the cut: sums of squares between the groups, of values around 0.
        below = np.arange(1, n)
        sums = np.cumsum(along[order] - along.mean())[:-1]
        between = sums**2 * n / (below * (n - below))
        cut = int(np.argmax(between))
        if between[cut] >= least * float(((along - along.mean()) ** 2).sum()):
            low, high = order[: cut + 1], order[cut + 1 :]
            smaller.append(low if len(low) < len(high) else high)
    return np.unique(np.concatenate(smaller)) if smaller else np.empty(0, dtype=np.int64)
