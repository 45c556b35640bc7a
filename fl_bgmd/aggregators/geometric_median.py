"""The geometric median, certified, for the price of two passes over few rows.

The median lies in the convex hull of the rows, ``y = sum_i w_i x_i``, so every distance the
iteration needs follows from the Gram matrix ``K = X X^T``::

    ||x_i - y||^2 = K_ii - 2 (K w)_i + w^T K w

One pass over the data builds ``K``, one forms ``w^T X``; in between the solver works on n x n
numbers, whatever d is. Many rows (where n x n numbers are more work than the rows) are left to
:mod:`~fl_bgmd.aggregators.newton`, which iterates in R^d.
"""

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fl_bgmd.options import Count, Positive

from .certificate import HullPoint, better, weiszfeld_weights
from .newton import minimize_in_space
from .results import GeometricMedian
from .rows import (
    blas_on_one_thread,
    center,
    check_updates,
    check_weights,
    combine,
    gram_matrix,
    in_range,
    majority_radius,
    prefers_gram,
    refuse_non_finite,
    result_dtype,
    row_norms,
    squared_distances,
    vector_norm,
)
from .rule import rule

Array = NDArray[np.float64]

Solver = Literal["gram", "newton", "weiszfeld"]

_EPSILON = float(np.finfo(np.float64).eps)


@rule("gmd", weights_tell=True, sharded=lambda options: options["solver"] != "newton")
def geometric_median(
    updates: Tensor,
    *,
    weights: Tensor | None = None,
    solver: Solver = "gram",
    tol: Positive = 1e-6,
    max_iter: Count = 1000,
) -> GeometricMedian:
    """Return the point of least summed distance to the rows, with a proof of its accuracy.

    Definition 3 and Equation 4 of Acharya et al. (BGMD). Breakdown point 1/2.

    Parameters
    ----------
    updates : Tensor
        (n, d), float16, bfloat16, float32 or float64, on any device. Rows may differ in size by
        any factor.
    weights : Tensor, optional
        (n,), finite, not negative, not all zero: ``sum_i weights_i ||y - x_i||`` is minimized.
        All ones by default.
    solver : {"gram", "newton", "weiszfeld"}
        ``gram`` iterates on the n x n Gram matrix: two passes over the data in all. Its steps cost
        n^3: many rows (from 129 on of few values, at 230 of 1,000 values, at 900 of very many) are
        left to ``newton``, Newton's method in R^d, mostly 6 to 30 passes and no n x n matrix. Both
        certify the same gap.
        ``weiszfeld`` is the classical iteration in R^d, two passes per step: the cost model of
        the papers, for comparison.
    tol : float
        Iterate until the certified ``gap`` is at most this. Float64 arithmetic certifies down to
        about 1e-7; a smaller ``tol`` returns the best point found with its true gap.
    max_iter : int
        Return the best point so far, with its true gap, after this many steps.

    Returns
    -------
    GeometricMedian
        ``weights`` are the convex coefficients of the rows in ``vector``.

    Raises
    ------
    TypeError, ValueError
        For input outside of the above; a row with a NaN or an infinity is named.

    Notes
    -----
    With ``u_i = (x_i - y) / ||x_i - y||`` and ``R = ||sum u_i||`` convexity gives
    ``g(y) - g* <= R ||y - y*|| <= R * 2 g(y) / n``. Rows that coincide with y contribute any
    vector of the unit ball to the subgradient (Vardi and Zhang, PNAS 2000). The reported gap also
    covers the rounding of the arithmetic and of the returned vector.
    """
    updates = check_updates(updates)
    n = updates.shape[0]
    row_weights = check_weights(weights, n)
    dtype = result_dtype(updates)
    rows, scales = in_range(updates)
    if solver == "newton" or (solver == "gram" and not prefers_gram(updates)):
        point, y, iterations = minimize_in_space(rows, row_weights, tol, max_iter)
        vector = torch.from_numpy(y).to(updates.device, dtype)
    else:
        solve = _in_gram_space if solver == "gram" else _classical
        point, iterations = solve(rows, row_weights, tol, max_iter)
        vector = combine(_single_if_coincident(point), rows, dtype)
    scale = float(scales.min())
    summands = row_weights * point.distances
    # A single row is returned as it is; a sum of rows is rounded to the dtype.
    is_row = np.count_nonzero(point.hull_weights) == 1
    rounding = 0.0 if is_row else float(torch.finfo(dtype).eps) / 2 * vector_norm(vector)
    if scale != 1.0:
        vector *= scale
    return GeometricMedian(
        vector=vector,
        weights=torch.from_numpy(point.hull_weights * (scale / scales)),
        gap=point.gap_after_moving(rounding),
        iterations=iterations,
        objective=sum(float(a) * float(b) for a, b in zip(summands, scales, strict=True)),
    )


def _in_gram_space(
    rows: Tensor, row_weights: Array, tol: float, max_iter: int
) -> tuple[HullPoint, int]:
    """Minimize on the rows' Gram matrix, the bulk of the rows at the origin."""
    gram = center(rows, gram_matrix(rows), row_weights)
    point, iterations = minimize_in_hull(gram, row_weights, tol, max_iter)
    if point.gap > tol and point.slack > 0:
        # Rows coincide with y up to rounding: seen from one of them, equal rows are equal.
        origin = int(np.argmin(point.distances))
        gram = gram_matrix(rows, -rows[origin].double())
        again, more = minimize_in_hull(gram, row_weights, tol, max_iter)
        iterations += more
        if better(again, point):
            point = again
    return point, iterations


@blas_on_one_thread()
def minimize_in_hull(
    gram: Array, row_weights: Array, tol: float = 1e-6, max_iter: int = 1000
) -> tuple[HullPoint, int]:
    """Minimize ``sum_i row_weights[i] ||y - x_i||`` given only the rows' Gram matrix.

    Rows are tried first: a geometric median that coincides with a row is recognized exactly
    (there Weiszfeld's iteration crawls). Otherwise each step is Weiszfeld's, taken from a Newton
    step of the same objective when that is lower. Returns the best point and the steps taken.
    """
    start = _optimal_rows(gram, row_weights)
    best = _hull_point(gram, row_weights, _start(gram, row_weights) if start is None else start)
    iterations = 0
    stalled = 0
    current = best
    # The margin leaves room for the rounding of the vector, so that the final gap is below tol.
    while best.gap > 0.99 * tol and iterations < max_iter and stalled < 3:
        iterations += 1
        previous, current = current, _step(gram, current)
        if better(current, best):
            best = current
        moving = current.pull < previous.pull or _decrease(gram, previous, current) > 0
        stalled = 0 if moving else stalled + 1
    return best, iterations


def _hull_point(gram: Array, row_weights: Array, hull_weights: Array) -> HullPoint:
    """Evaluate distances, objective and certificate of ``y = hull_weights @ X``."""
    product = gram @ hull_weights
    diagonal = np.diagonal(gram)
    squared_norm = max(float(hull_weights @ product), 0.0)
    squared = np.maximum(diagonal - 2 * product + squared_norm, 0.0)
    noise = 64 * _EPSILON * (diagonal + squared_norm)
    coincident = squared <= noise
    # A row that is y itself, to the bit, is at distance zero; others are only below the noise.
    exact = coincident & (hull_weights == 1.0)
    distances = np.sqrt(np.where(exact, 0.0, np.maximum(squared, noise)))
    pulls = np.where(coincident, 0.0, row_weights / np.where(coincident, 1.0, distances))
    lengths = np.sqrt(diagonal)
    # sum_i pulls_i (y - x_i) = coefficients @ X
    coefficients = pulls.sum() * hull_weights - pulls
    size = np.abs(coefficients) @ lengths
    squared_pull = max(float(coefficients @ gram @ coefficients), 0.0) + 4 * _EPSILON * size**2
    pull = max(0.0, np.sqrt(squared_pull) - float(row_weights[coincident].sum()))
    return HullPoint(
        hull_weights=hull_weights,
        pulls=pulls,
        distances=distances,
        objective=float(row_weights @ distances),
        pull=float(pull),
        slack=float(2 * row_weights[coincident] @ distances[coincident]),
        row_weights=row_weights,
    )


def _step(gram: Array, point: HullPoint) -> HullPoint:
    """Return Weiszfeld's next point, or that after a Newton step if it is lower."""
    plain = _hull_point(gram, point.row_weights, weiszfeld_weights(point))
    newton = _newton_weights(gram, point)
    if newton is None:
        return plain
    moved = _hull_point(gram, point.row_weights, newton)
    if (moved.pulls == 0).any():
        return plain  # Weiszfeld's map would keep the coefficients, which need not be convex
    polished = _hull_point(gram, point.row_weights, weiszfeld_weights(moved))
    return polished if _decrease(gram, plain, polished) > 0 else plain


def _decrease(gram: Array, old: HullPoint, new: HullPoint) -> float:
    """Return ``g(old) - g(new)``, as accurate as the step between them is small.

    ``||a||^2 - ||b||^2 = (||a|| - ||b||) (||a|| + ||b||)``, and with ``s = new - old`` the left
    side is ``||s||^2 - 2 <s, x_i - old>``.
    """
    step = new.hull_weights - old.hull_weights
    product = gram @ step
    change = step @ product - 2 * (product - old.hull_weights @ product)
    total = old.distances + new.distances
    return -float(old.row_weights @ (change / np.where(total > 0, total, 1.0)))


def _newton_weights(gram: Array, point: HullPoint) -> Array | None:
    """Hull coefficients of y after one Newton step, or None where the step is not defined.

    With ``b_i = x_i - y``, ``r_i = ||b_i||`` and weights ``o_i`` the Hessian is
    ``S I - sum_i (o_i / r_i^3) b_i b_i^T``, ``S = sum_i o_i / r_i``, and the step
    ``p = sum_i z_i (o_i / r_i) b_i`` solves ``S z_i - sum_j cos_ij (o_j / r_i) z_j = 1``.
    Coefficients may be negative: Weiszfeld's map brings them back into the hull.
    """
    if (point.pulls == 0).any():
        return None
    weights, distances = point.hull_weights, point.distances
    product = gram @ weights
    inner = gram - product[:, None] - product[None, :] + weights @ product
    cosines = np.clip(inner / np.outer(distances, distances), -1.0, 1.0)
    system = point.pulls.sum() * np.eye(len(weights))
    system -= cosines * point.row_weights[None, :] / distances[:, None]
    try:
        step = point.pulls * np.linalg.solve(system, np.ones(len(weights)))
    except np.linalg.LinAlgError:
        return None
    if not np.isfinite(step).all():
        return None
    moved: Array = (1 - step.sum()) * weights + step
    return moved


def _optimal_rows(gram: Array, row_weights: Array) -> Array | None:
    """Hull weights of the rows that are geometric medians themselves, or None.

    Row k is one if the unit vectors toward the rows elsewhere sum to at most the weight of the
    rows that coincide with it (Vardi and Zhang). Where several are, so is their average.
    """
    squared = squared_distances(gram)
    diagonal = np.diagonal(gram)
    coincident = squared <= 64 * _EPSILON * (diagonal[:, None] + diagonal[None, :])
    np.fill_diagonal(coincident, True)
    pulls = np.where(
        coincident, 0.0, row_weights[None, :] / np.sqrt(np.where(coincident, 1.0, squared))
    )
    coefficients = pulls - np.diag(pulls.sum(axis=1))
    squared_pull = np.einsum("ki,ki->k", coefficients @ gram, coefficients)
    # Rows that are optimal on the edge (all rows on a line, n even) must not fail by rounding;
    # the certificate is computed afterwards, for the point itself.
    noise = 4 * _EPSILON * (np.abs(coefficients) @ np.sqrt(diagonal)) ** 2
    held = coincident @ row_weights
    optimal = (squared_pull <= held**2 * (1 + 1e-9) + noise) & (row_weights > 0)
    if not optimal.any():
        return None
    weights: Array = optimal / optimal.sum()
    return weights


def _start(gram: Array, row_weights: Array) -> Array:
    """Weiszfeld's weights seen from the row of least summed distance, softened near that row."""
    distances = np.sqrt(squared_distances(gram))
    medoid = int(np.argmin(distances @ row_weights))
    from_medoid = distances[medoid]
    # Were this 0, the medoid would hold the majority and be the median itself.
    near = majority_radius(from_medoid, row_weights)
    pulls = row_weights / np.hypot(from_medoid, near)
    weights: Array = pulls / pulls.sum()
    return weights


def _single_if_coincident(point: HullPoint) -> Array:
    """Hull weights for forming the vector: all rows equal means any one of them, to the bit."""
    if point.objective > 0.0:
        return point.hull_weights
    single = np.zeros_like(point.hull_weights)
    single[int(np.argmax(point.row_weights))] = 1.0
    return single


def _classical(
    rows: Tensor, row_weights: Array, tol: float, max_iter: int
) -> tuple[HullPoint, int]:
    """Weiszfeld's iteration in R^d from the mean, in float64."""
    refuse_non_finite(rows)
    hull_weights = row_weights / row_weights.sum()
    best: HullPoint | None = None
    iteration = 0
    while True:
        point = _classical_point(rows, row_weights, hull_weights)
        if not point.pulls.any():
            # All rows coincide with y up to rounding: a row itself is exact if they are equal.
            single = np.zeros_like(row_weights)
            single[int(np.argmax(row_weights))] = 1.0
            return _classical_point(rows, row_weights, single), iteration
        if best is None or better(point, best):
            best = point
        if point.gap <= 0.99 * tol or iteration == max_iter:
            return best, iteration
        hull_weights = weiszfeld_weights(point)
        iteration += 1


def _classical_point(rows: Tensor, row_weights: Array, hull_weights: Array) -> HullPoint:
    """Evaluate ``y = hull_weights @ rows`` and its certificate by passes over the data."""
    y = combine(hull_weights, rows, torch.float64)
    distances = row_norms(rows, -y)
    coincident = distances <= 8 * _EPSILON * (distances + vector_norm(y))
    pulls = np.where(coincident, 0.0, row_weights / np.where(coincident, 1.0, distances))
    total = float(pulls.sum())
    held = float(row_weights[coincident].sum())
    resultant = 0.0
    if total > 0:
        # sum_i pulls_i (x_i - y) = total * (Weiszfeld's next point - y)
        resultant = total * vector_norm(combine(pulls / total, rows, torch.float64) - y)
    return HullPoint(
        hull_weights=hull_weights,
        pulls=pulls,
        distances=distances,
        objective=float(row_weights @ distances),
        pull=max(0.0, resultant - held),
        slack=float(2 * row_weights[coincident] @ distances[coincident]),
        row_weights=row_weights,
    )
