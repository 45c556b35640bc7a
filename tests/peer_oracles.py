"""Slow float64 references for the peers' rules, straight from their papers.

Like :mod:`oracles`: in R^d, one row at a time, no code or idea of the rules under test.
"""

import itertools
import math

import numpy as np
from oracles import Array, krum_scores, pairwise_squared_distances


def mean_around_median(rows: Array, kept: int) -> Array:
    """Return, per coordinate, the mean of the ``kept`` values nearest to the median."""
    found = np.empty(rows.shape[1])
    for j, values in enumerate(rows.T):
        middle = float(np.median(values))
        nearest = sorted(values, key=lambda value: (abs(value - middle), value))
        found[j] = math.fsum(nearest[:kept]) / kept
    return found


def bulyan(rows: Array, hostile: int) -> tuple[Array, list[int]]:
    """Return the aggregate of Bulyan and the rows that Krum has selected one after the other."""
    left, chosen = list(range(len(rows))), []
    first = krum_scores(rows, hostile)
    for _ in range(len(rows) - 2 * hostile):
        scores = krum_scores(rows[left], hostile) if len(left) > 1 else np.zeros(1)
        best = min(range(len(left)), key=lambda i: (scores[i], first[left[i]]))
        chosen.append(left.pop(best))
    count = max(len(rows) - 4 * hostile, 2 - len(rows) % 2)
    return mean_around_median(rows[chosen], count), sorted(chosen)


def subsets(n: int, count: int) -> list[list[int]]:
    """Return all choices of ``count`` out of n rows."""
    return [list(chosen) for chosen in itertools.combinations(range(n), count)]


def squared_diameter(rows: Array) -> float:
    """Return the largest squared distance of two rows."""
    return float(pairwise_squared_distances(rows).max())


def top_eigenvalue(rows: Array) -> float:
    """Return that of the rows' covariance, by singular values in R^d."""
    residuals = rows - rows.mean(axis=0)
    return float(np.linalg.svd(residuals, compute_uv=False)[0]) ** 2 / len(rows)


def covariance_agnostic_filter(rows: Array, hostile: int) -> Array:
    """Return the aggregate of CAF's Algorithm 2, by singular values in R^d."""
    c = np.ones(len(rows))
    best, least = rows.mean(axis=0), math.inf
    while c.sum() > len(rows) - 2 * hostile:
        mean = c @ rows / c.sum()
        residuals = rows - mean
        _, values, directions = np.linalg.svd(np.sqrt(c / c.sum())[:, None] * residuals)
        if values[0] ** 2 < least:
            best, least = mean, values[0] ** 2
        tau = (residuals @ directions[0]) ** 2
        if tau[c > 0].max() == 0.0:
            break
        c = c * np.maximum(1 - tau / tau[c > 0].max(), 0)
    return np.asarray(best)


def gap_filter(rows: Array, hostile: int, gap: float = 1.3, far: float = 8.0) -> Array:
    """Return the aggregate of the gap filter, by singular values in R^d."""
    norms = np.linalg.norm(rows, axis=1)
    median = sorted(norms)[(len(rows) - 1) // 2]
    c = (norms <= far * median).astype(float)
    hostile = max(0, hostile - int((norms > far**2 * median).sum()))
    least = c.sum() - 2 * min(hostile, (int(c.sum()) - 1) // 2)
    clipped = rows * np.minimum(1.0, median / np.maximum(norms, 1e-300))[:, None]
    while True:
        mean = c @ clipped / c.sum()
        residuals = clipped - mean
        _, values, directions = np.linalg.svd(np.sqrt(c)[:, None] * residuals)
        squares = [*values**2, 0.0]
        tau = (residuals @ directions[0]) ** 2
        stands_out = squares[0] > gap * squares[1] and tau[c > 0].max() > 0
        if not stands_out or c.sum() <= least:
            return np.asarray(mean)
        lighter = c * np.maximum(1 - tau / tau[c > 0].max(), 0)
        if lighter.sum() < 1e-9 * c.sum():
            return np.asarray(mean)
        c = lighter


def divide_and_conquer(rows: Array, dropped: int) -> Array:
    """Return the aggregate of DnC's Algorithm 2 with all coordinates and one iteration."""
    residuals = rows - rows.mean(axis=0)
    scores = (residuals @ np.linalg.svd(residuals)[2][0]) ** 2
    return np.asarray(rows[np.argsort(scores)[: len(rows) - dropped]].mean(axis=0))
