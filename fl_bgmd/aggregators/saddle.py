"""The saddle point problem of Data and Diggavi's filter, Equations 91 and 94, in Gram space.

Each row is reconstructed from the others: ``g_i ~ G w_i`` with ``w_i`` in the simplex, every entry
at most ``cap``, and the W is sought that leaves the smallest top eigenvalue of
``sum_i c_i (g_i - G w_i) (g_i - G w_i)^T``. With ``E = I - W`` and ``D = diag(c)`` that matrix has
the eigenvalues of ``S(W) = D^1/2 E^T K E D^1/2``, n x n, K the Gram matrix of the rows.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Saddle:
    """An approximate saddle point.

    Attributes
    ----------
    errors : (m,)
        ``tau_i`` of Equation 93.
    value : float
        The top eigenvalue that W leaves: an upper bound on the value of the game.
    gap : float
        ``(value - lower bound) / value``, the relative duality gap, 0 or more.
    """

    errors: Array
    value: float
    gap: float


def solve_saddle(
    gram: Array, weights: Array, cap: float, *, tol: float = 0.02, max_iter: int = 300
) -> Saddle:
    """Solve Equation 91 by accelerated projected gradient on a smoothed top eigenvalue.

    Parameters
    ----------
    gram : (m, m)
        Of the active rows.
    weights : (m,)
        ``c_i``, above 0.
    cap : float
        Largest entry of W; at least ``1 / m``.
    tol : float
        Relative duality gap at which to stop.
    max_iter : int
        Return the best point after this many steps, with its true gap.

    Notes
    -----
    ``mu log tr exp(S / mu)`` smooths the top eigenvalue; its gradient belongs to the density
    matrix Y that maximizes the smoothed game. For that Y the minimum over W splits into columns
    and is bounded from below by its linearization, whose minimum over the capped simplex is
    known: the duality gap is certified whatever the solver did.
    """
    m = len(gram)
    largest = float(np.diagonal(gram).max())
    if m == 1 or largest <= 0.0:
        return Saddle(np.zeros(m), 0.0, 0.0)
    gram = gram / largest
    point = momentum = np.full((m, m), 1.0 / m)
    step, pace = 1.0, 1.0
    best: Saddle | None = None
    lower = 0.0
    smoothing = 0.0
    for _ in range(max_iter):
        current = _evaluate(gram, weights, momentum, smoothing)
        if smoothing == 0.0:
            smoothing = current.value * tol / math.log(m + 1)
            current = _evaluate(gram, weights, momentum, smoothing)
        lower = max(lower, current.mean_value + _linear_minimum(current.gradient, momentum, cap))
        if best is None or current.value < best.value:
            best = Saddle(current.errors, current.value, 0.0)
        if best.value <= 1e-14 or best.value - lower <= tol * best.value:
            break
        step *= 1.5
        while True:
            moved = project_columns(momentum - step * current.gradient, cap)
            change = moved - momentum
            trial = _evaluate(gram, weights, moved, smoothing).smooth_value
            model = current.smooth_value + float((current.gradient * change).sum())
            if trial <= model + float((change**2).sum()) / (2 * step) + 1e-15 or step < 1e-12:
                break
            step /= 2
        next_pace = (1 + math.sqrt(1 + 4 * pace**2)) / 2
        # Restarted when the momentum points uphill (O'Donoghue and Candes 2015).
        if float((current.gradient * (moved - point)).sum()) > 0:
            next_pace = 1.0
        momentum = moved + (pace - 1) / next_pace * (moved - point)
        point, pace = moved, next_pace
        final = _evaluate(gram, weights, point, smoothing)
        if final.value < best.value:
            best = Saddle(final.errors, final.value, 0.0)
    assert best is not None
    gap = max(0.0, best.value - lower) / best.value if best.value > 0 else 0.0
    return Saddle(best.errors * largest, best.value * largest, gap)


@dataclass(frozen=True)
class _Point:
    errors: Array
    value: float
    smooth_value: float
    mean_value: float
    gradient: Array


def _evaluate(gram: Array, weights: Array, reconstruction: Array, smoothing: float) -> _Point:
    """Evaluate the top eigenvalue, its smoothing, Y's errors and the gradient at W."""
    roots = np.sqrt(weights)
    scaled = (np.eye(len(gram)) - reconstruction) * roots[None, :]  # E D^1/2
    product = gram @ scaled
    values, vectors = np.linalg.eigh(scaled.T @ product)
    values = np.maximum(values, 0.0)
    top = float(values[-1])
    if smoothing > 0:
        density = np.exp((values - top) / smoothing)
        total = float(density.sum())
        smooth_value = top + smoothing * math.log(total)
        density /= total
    else:
        density = np.zeros_like(values)
        density[-1] = 1.0
        smooth_value = top
    spread = (vectors * density) @ vectors.T
    # (g_i - G w_i)^T v_k = sqrt(lambda_k / c_i) a_ki, so tau_i = sum_k q_k lambda_k a_ki^2 / c_i.
    errors = (vectors**2) @ (density * values) / weights
    return _Point(
        errors=errors,
        value=top,
        smooth_value=smooth_value,
        mean_value=float(density @ values),
        gradient=-2 * (product @ spread) * roots[None, :],
    )


def _linear_minimum(gradient: Array, point: Array, cap: float) -> float:
    """Minimum of ``<gradient, W - point>`` over capped simplices: fill the cheapest entries."""
    m = len(gradient)
    full = min(m, int(1.0 / cap + 1e-12))
    ordered = np.sort(gradient, axis=0)
    cheapest = cap * ordered[:full].sum(axis=0)
    if full < m:
        cheapest += max(0.0, 1.0 - cap * full) * ordered[full]
    return float(cheapest.sum() - (gradient * point).sum())


def project_columns(matrix: Array, cap: float) -> Array:
    """Project every column on ``{0 <= w <= cap, sum w = 1}`` by bisection on the shift."""
    low = matrix.min(axis=0) - 1.0
    high = matrix.max(axis=0)
    for _ in range(60):
        middle = (low + high) / 2
        too_much = np.clip(matrix - middle, 0.0, cap).sum(axis=0) > 1.0
        low = np.where(too_much, middle, low)
        high = np.where(too_much, high, middle)
    projected: Array = np.clip(matrix - (low + high) / 2, 0.0, cap)
    return projected
