"""The directions in which rows spread most: by their Gram matrix, of many rows by passes."""

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .rows import Block, combine, dot, native, numbers
from .strips import sum_strips

Array = NDArray[np.float64]

STEPS = 32  # passes over the rows at most
_ACCURACY = 1e-3  # of the top eigenvalue
_SEEN = 8  # directions that start the next search


@dataclass(frozen=True)
class Spread:
    """The top of the spectrum of ``C = sum_i c_i (x_i - m) (x_i - m)^T``, m the weighted mean.

    Attributes
    ----------
    errors : (n,)
        ``<x_i - m, v>^2`` along the top eigenvector v; ``sum_i c_i errors_i`` is its eigenvalue.
    gap : float
        That eigenvalue over the next one; infinite where there is no other, 1 where there is none.
    scores : (n,)
        The largest such square over all directions found whose eigenvalue is at least a quarter
        of the top one.
    start : (d,)
        Where a search after a few rows were dropped should start.
    """

    errors: Array
    gap: float
    scores: Array
    start: Array


def top_spread(
    rows: Tensor, weights: Array, start: Array | None = None, steps: int = STEPS
) -> Spread:
    """Find the top eigenvector by Lanczos' method, fully reorthogonalized, one pass a step.

    It ends when the residual is a thousandth of the eigenvalue, or after ``steps``: where the
    rows spread alike in many directions the eigenvalue is then a few hundredths low, and any of
    these directions is as good. The search starts from ``start`` and a random direction drawn
    from the rows themselves: the same for the same rows, and not to be known beforehand.
    """
    n, d = rows.shape
    middle = combine(weights / weights.sum(), rows, torch.float64)
    mean = middle.cpu().numpy()
    digest = hashlib.blake2b(mean.tobytes(), digest_size=8).digest()
    search = np.random.default_rng(int.from_bytes(digest, "big")).standard_normal(d)
    search /= np.linalg.norm(search)
    if start is not None and start.any():
        search = start / np.linalg.norm(start) + 0.1 * search
        search /= np.linalg.norm(search)
    steps = min(steps, d, n)
    basis, along = np.empty((steps, d)), np.empty((steps, n))
    diagonal, beside = np.zeros(steps), np.zeros(steps)
    count = 0
    for k in range(steps):
        basis[k] = search
        product, along[k] = _multiply(rows, middle, weights, search)
        count = k + 1
        diagonal[k] = search @ product
        for _ in range(2):  # twice is enough
            product -= (basis[:count] @ product) @ basis[:count]
        beside[k] = np.linalg.norm(product)
        band = np.diag(diagonal[:count]) + np.diag(beside[:k], 1) + np.diag(beside[:k], -1)
        values, vectors = np.linalg.eigh(band)
        residual = beside[k] * abs(vectors[-1, -1])
        if values[-1] <= 0 or residual <= _ACCURACY * values[-1]:
            break
        search = product / beside[k]
    if values[-1] <= 0:
        return Spread(np.zeros(n), 1.0, np.zeros(n), np.zeros(d))
    large = values >= values[-1] / 4
    squares = (vectors[:, large].T @ along[:count]) ** 2
    seen = vectors[:, large][:, -_SEEN:].sum(axis=1)
    return Spread(squares[-1], _gap(values), squares.max(axis=0), seen @ basis[:count])


def errors_along_top(gram: Array, weights: Array) -> Array:
    """Return ``<x_i - m, v>^2`` of few rows, (n,): see :class:`Spread` and :func:`top_of_few`."""
    return top_of_few(gram, weights)[0]


def top_of_few(gram: Array, weights: Array) -> tuple[Array, float]:
    """Return :class:`Spread`'s ``errors``, (n,), and ``gap`` of few rows.

    Data and Diggavi's tau_i of Equation 93 with the weighted mean as every row's reconstruction:
    the maximizer Y* of Equation 91 is then the projector on v.

    Parameters
    ----------
    gram : ndarray
        (n, n): of the rows.
    weights : ndarray
        (n,): the c_i.
    """
    share = weights / weights.sum()
    product = gram @ share
    centered = gram - product[:, None] - product[None, :] + share @ product
    roots = np.sqrt(weights)
    values, vectors = np.linalg.eigh(roots[:, None] * centered * roots[None, :])
    top = max(float(values[-1]), 0.0)
    if top == 0.0:
        return np.zeros(len(weights)), 1.0
    projections = centered @ (roots * vectors[:, -1]) / math.sqrt(top)
    squared: Array = projections**2
    return squared, _gap(values)


def _gap(values: Array) -> float:
    """Return the largest of ascending eigenvalues over the next one."""
    second = float(values[-2]) if len(values) > 1 else 0.0
    return float(values[-1]) / second if second > 0 else math.inf


def _multiply(rows: Tensor, middle: Tensor, weights: Array, vector: Array) -> tuple[Array, Array]:
    """Return ``C @ vector``, (d,), and ``<x_i - m, vector>``, (n,)."""
    along = np.empty(len(weights))
    direction = native(vector, rows)

    def multiply(part: slice, block: Block) -> Block:
        along[part] = numbers(dot(block, direction))
        return dot(native(weights[part] * along[part], rows), block)

    product: Array = sum_strips(multiply, rows, -middle)
    return product, along
