"""A robust location of rows that needs a sketch of them only: what BGMD's memory takes in.

The weights are those of a redescending M-estimator. Around a center the rows within the radius
that holds a majority count in full, and a row at distance ``r`` beyond it by ``(radius / r)^2``: it
has least to say where it is furthest out. The center is Huber's, whose rows count by
``radius / r``, so that it does not depend on where the search starts.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fl_bgmd.shards import PerShard, Sharded, within

from .rows import native, on_cores

_FEW_ROWS = 512  # up to which the rows' Gram matrix is the cheaper way to their distances
_MAX_ITER = 200
_WIDTH, _ELEMENTS = 2048, 1 << 17  # least columns of a sketch, and its size with few rows
_POOL, _STRIDE = 1 << 20, 40_503  # signs, of which every piece of the columns takes a run

Array = NDArray[np.float64]


def robust_weights(points: Array) -> Array:
    """Return convex weights of the rows, (n,) float64: their weighted mean is a robust location.

    Parameters
    ----------
    points : ndarray
        (n, m), float64, finite: rows, or a :func:`sketch` of them.

    Notes
    -----
    The rows within the radius are a majority, so honest ones are among them, and hostile rows can
    pull with at most the radius each. Rows that go further lose their weight instead of keeping
    the pull of a row at the radius, as they do in a geometric median or a clipped mean.
    """
    distances_from = _distances(points)
    distances = distances_from(np.zeros(len(points)))
    # Closer than this the sketch's own rounding tells rows apart.
    floor = 1e-6 * _majority(distances) + 1e-300
    radius = math.inf
    for _ in range(_MAX_ITER):
        radius, last = max(_majority(distances), floor), radius
        if abs(last - radius) <= 1e-3 * radius:
            break
        weights = radius / np.maximum(distances, radius)
        distances = distances_from(weights / weights.sum())
    far = np.maximum(distances, radius) / radius
    weights = far**-2.0
    result: Array = weights / weights.sum()
    return result


def sketch(
    rows: Tensor, left_out: Tensor, generator: torch.Generator | None, dtype: torch.dtype
) -> Array:
    """Return a sketch of the rows, (n, m), in which their distances can be measured.

    Every column is added to one of the sketch's with a random sign (Charikar, Chen and
    Farach-Colton 2002), in one pass over the rows. Squared distances come out right to
    ``sqrt(2 / m)``, at least 3 %, and exactly where d is at most m. Who does not know the signs
    cannot hide from it.

    Parameters
    ----------
    rows : Tensor
        (n, d), floating point, safe to square in ``dtype``.
    left_out : Tensor
        int64, ascending: columns that count as zero.
    generator : torch.Generator, optional
        CPU generator of the signs; torch's global one by default.
    dtype : torch.dtype
        What is added in, float32 or float64.
    """
    n, d = rows.shape
    width = min(d, max(_WIDTH, _ELEMENTS // n))
    secret, pool = 0, torch.ones(width, dtype=dtype)
    if d > width:
        secret, seed = torch.randint(2**62, (2,), generator=generator).tolist()
        bits = np.random.default_rng(seed).integers(0, 256, _POOL // 8, dtype=np.uint8)
        pool = torch.from_numpy(np.unpackbits(bits)).to(dtype).mul_(2).sub_(1)
    if isinstance(rows, Sharded):
        firsts = PerShard(lambda part: part.start)
        left = PerShard(lambda part: within(left_out, part))
        signs = PerShard(lambda part: pool)
        parts = rows.each(_sketched, left, signs, secret, width, firsts, d)
        return np.asarray(sum(parts), dtype=np.float64)
    return _sketched(rows, left_out, pool, secret, width, 0, d)


def _sketched(
    rows: Tensor, left_out: Tensor, pool: Tensor, secret: int, width: int, first: int, d: int
) -> Array:
    """Return the sketch of a range of d columns, from ``first`` on: ``rows`` and ``left_out``."""
    (n, columns), dtype = rows.shape, pool.dtype
    # Pieces begin at multiples of the width, of all columns.
    edges = [0, *range(width - first % width, columns, width), columns]
    bounds = np.searchsorted(left_out.cpu().numpy(), edges)
    chosen, signs_of_all = native(left_out, rows), native(pool, rows)

    multiply: Callable[..., Any] = np.multiply if rows.device.type == "cpu" else torch.mul

    def add_up(pieces: slice) -> Any:
        """Return the sum of some pieces of the columns, with their signs."""
        total = native(torch.zeros(n, width, dtype=dtype), rows)
        signed = native(torch.empty(n, width, dtype=dtype), rows)
        for i in range(pieces.start, pieces.stop):
            start, end = edges[i], edges[i + 1]
            whole, at = divmod(first + start, width)
            count = min(width, d - whole * width)
            offset = (secret + whole * _STRIDE) % (len(pool) - count + 1) + at
            signs = signs_of_all[offset : offset + end - start] * 1
            signs[chosen[bounds[i] : bounds[i + 1]] - start] = 0.0
            piece = native(rows[:, start:end].to(dtype), rows)
            multiply(piece, signs, out=signed[:, : end - start])
            total[:, at : at + end - start] += signed[:, : end - start]
        return total

    if rows.device.type != "cpu":
        return np.asarray(add_up(slice(0, len(edges) - 1)).double().cpu().numpy())
    parts = on_cores(add_up, len(edges) - 1, elements=rows.numel())
    return np.asarray(sum(parts), dtype=np.float64)


def _distances(points: Array) -> Callable[[Array], Array]:
    """Return a function from weights to the rows' distances from their weighted sum."""
    if len(points) > _FEW_ROWS:
        return lambda weights: np.linalg.norm(points - weights @ points, axis=1)
    gram = points @ points.T
    sizes = np.diagonal(gram)

    def from_gram(weights: Array) -> Array:
        product = gram @ weights
        squared: Array = sizes - 2 * product + weights @ product
        return np.sqrt(np.maximum(squared, 0.0))

    return from_gram


def _majority(distances: Array) -> float:
    """Return the least radius within which more than half of the rows lie."""
    return float(np.partition(distances, len(distances) // 2)[len(distances) // 2])
