"""Slow float64 references for the aggregation rules, and strategies that draw update matrices.

Nothing here shares code or ideas with the rules: every reference works in R^d on plain NumPy
arrays, one row at a time, straight from the definition.
"""

import math

import numpy as np
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

Array = NDArray[np.float64]

few_examples = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)


def numpy64(tensor: torch.Tensor) -> Array:
    """Return a float64 copy of ``tensor`` (any float dtype) as a NumPy array."""
    return tensor.detach().cpu().double().numpy().copy()


# --- Distances and the geometric median ---------------------------------------------------------


def norm(vector: Array, order: float = 2) -> float:
    """Return the norm of ``vector``, safe from overflow and underflow."""
    largest = float(np.abs(vector).max())
    if largest == 0.0:
        return 0.0
    return largest * float(np.linalg.norm(vector / largest, order))


def distances(point: Array, rows: Array) -> Array:
    """Return ``||row - point||`` for each row, by subtraction."""
    return np.array([norm(row - point) for row in rows])


def summed_distance(point: Array, rows: Array, weights: Array | None = None) -> float:
    """Return ``sum_i weights[i] ||rows[i] - point||``."""
    weights = np.ones(len(rows)) if weights is None else weights
    return math.fsum(weights * distances(point, rows))


def geometric_median(rows: Array, weights: Array | None = None) -> tuple[Array, float]:
    """Return a point and its objective, the lowest found by everything slow that we know.

    Candidates: every row, and the ends of Weiszfeld's iteration followed by a damped Newton
    method in R^d, started from the mean, the coordinate-wise median and the best row.
    """
    weights = np.ones(len(rows)) if weights is None else weights
    objectives = [summed_distance(row, rows, weights) for row in rows]
    best = int(np.argmin(objectives))
    point, value = rows[best].copy(), objectives[best]
    centered = rows - point
    scale = float(np.abs(centered).max())
    if scale == 0.0:
        return point, 0.0
    centered /= scale
    starts = [weights @ centered / weights.sum(), np.median(centered, axis=0)]
    away = _descent_from_row(centered, weights, best)
    if away is not None:
        starts.append(away)
    for start in starts:
        end = _newton(_weiszfeld(start, centered, weights), centered, weights)
        moved = point + scale * end
        moved_value = summed_distance(moved, rows, weights)
        if moved_value < value:
            point, value = moved, moved_value
    return point, value


def _radii(y: Array, rows: Array) -> Array:
    return np.sqrt(((rows - y) ** 2).sum(axis=1))


def _objective(y: Array, rows: Array, weights: Array) -> float:
    return float(weights @ _radii(y, rows))


def _descent_from_row(rows: Array, weights: Array, k: int) -> Array | None:
    """Return a lower point near row k, found by halving the step, or None if it is a minimum."""
    radii = _radii(rows[k], rows)
    away = radii > 0
    if not away.any():
        return None
    pull = (weights[away] / radii[away]) @ (rows[away] - rows[k])
    size = math.sqrt(float(pull @ pull))
    if size == 0.0:
        return None
    step = float(radii.max())
    here = _objective(rows[k], rows, weights)
    for _ in range(80):
        moved = rows[k] + step * pull / size
        if _objective(moved, rows, weights) < here:
            return moved
        step /= 2
    return None


def _weiszfeld(y: Array, rows: Array, weights: Array, steps: int = 100) -> Array:
    for _ in range(steps):
        radii = _radii(y, rows)
        if (radii == 0).any():
            break
        pulls = weights / radii
        y = pulls @ rows / pulls.sum()
    return y


def _newton(y: Array, rows: Array, weights: Array, steps: int = 60) -> Array:
    identity = np.eye(rows.shape[1])
    value = _objective(y, rows, weights)
    for _ in range(steps):
        radii = _radii(y, rows)
        if (radii == 0).any():
            break
        units = (rows - y) / radii[:, None]
        pulls = weights / radii
        gradient = -(weights @ units)
        hessian = pulls.sum() * identity - (units * pulls[:, None]).T @ units
        hessian += 1e-12 * pulls.sum() * identity
        step = -np.linalg.solve(hessian, gradient)
        length = 1.0
        while length > 1e-6:
            moved = y + length * step
            moved_value = _objective(moved, rows, weights)
            if moved_value < value:
                break
            length /= 2
        else:
            break
        y, value = moved, moved_value
    return y


# --- The other rules ----------------------------------------------------------------------------


def pairwise_squared_distances(rows: Array) -> Array:
    """Return the squared distances between all rows, by subtraction."""
    n = len(rows)
    return np.array([[float(((rows[i] - rows[j]) ** 2).sum()) for j in range(n)] for i in range(n)])


def trimmed_mean(rows: Array, trim: int) -> Array:
    """Return the mean of each coordinate without its ``trim`` smallest and largest values."""
    ordered = np.sort(rows, axis=0)
    return ordered[trim : len(rows) - trim].mean(axis=0)


def krum_scores(rows: Array, byzantine: int) -> Array:
    """Return, per row, the summed squared distance to its ``n - f - 2`` nearest other rows."""
    squared = pairwise_squared_distances(rows)
    count = max(1, len(rows) - byzantine - 2)
    return np.array([np.sort(np.delete(squared[i], i))[:count].sum() for i in range(len(rows))])


def nearest_neighbor_mixing(rows: Array, byzantine: int) -> Array:
    """Return, per row, the mean of the ``n - f`` rows nearest to it, ties to the lower index."""
    squared = pairwise_squared_distances(rows)
    mixed = np.empty_like(rows)
    for i in range(len(rows)):
        nearest = sorted(range(len(rows)), key=lambda j: (squared[i, j], j))
        mixed[i] = rows[nearest[: len(rows) - byzantine]].mean(axis=0)
    return mixed


def centered_clipping(
    rows: Array, radius: float | None, center: Array | None, iterations: int
) -> Array:
    """Return the last ``v`` of ``v <- v + mean_i clip(x_i - v, radius)``, in R^d."""
    v = np.zeros(rows.shape[1]) if center is None else center.copy()
    for _ in range(iterations):
        lengths = distances(v, rows)
        limit = float(np.median(lengths)) if radius is None else radius
        steps = [
            (row - v) * (min(1.0, limit / length) if length > 0 else 1.0)
            for row, length in zip(rows, lengths, strict=True)
        ]
        v = v + np.mean(steps, axis=0)
    return v


def spectral_filter(rows: Array, sigma0: float) -> tuple[Array, Array, int]:
    """Return ``(vector, kept, iterations)`` of Data and Diggavi's Algorithm 3 by SVD in R^d.

    Every row is reconstructed by the weighted mean of the rows that are left.
    """
    n = len(rows)
    c = np.ones(n)
    active = np.ones(n, dtype=bool)
    iterations = 0
    while active.sum() > 1:
        before = active.copy()
        left, weights = rows[active], c[active]
        residuals = left - weights @ left / weights.sum()
        _, _, directions = np.linalg.svd(np.sqrt(weights)[:, None] * residuals)
        tau = (residuals @ directions[0]) ** 2
        if weights @ tau <= 4 * n * sigma0**2 + 1e-12 * (residuals**2).sum(axis=1).max():
            break
        c[active] = weights * (1 - tau / tau.max())
        active &= c >= 0.5
        if not active.any():  # the paper does not say what then
            return rows[before].mean(axis=0), active, iterations
        iterations += 1
    return rows[active].mean(axis=0), active, iterations


def spectral_sigma0(rows: Array, left: int) -> float:
    """Return the root of the top eigenvalue when rows are dropped until ``left`` are left.

    The row furthest along the top eigenvector of the covariance goes first.
    """
    while True:
        residuals = rows - rows.mean(axis=0)
        _, values, directions = np.linalg.svd(residuals)
        if len(rows) <= left:
            return float(values[0]) / math.sqrt(len(rows))
        rows = np.delete(rows, int(np.argmax((residuals @ directions[0]) ** 2)), axis=0)


# --- Strategies ---------------------------------------------------------------------------------


def rotation(d: int, seed: int) -> torch.Tensor:
    """Return a random orthogonal (d, d) float64 matrix."""
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))
    return q


def _normal(rng: np.random.Generator, n: int, d: int) -> Array:
    return rng.standard_normal((n, d))


def _small_integers(rng: np.random.Generator, n: int, d: int) -> Array:
    return rng.integers(-2, 3, (n, d)).astype(float)


def _duplicated(rng: np.random.Generator, n: int, d: int) -> Array:
    return rng.standard_normal((n, d))[rng.integers(0, max(1, n // 2), n)]


def _collinear(rng: np.random.Generator, n: int, d: int) -> Array:
    return rng.standard_normal(d) + rng.standard_normal((n, 1)) * rng.standard_normal(d)


def _rows_of_all_sizes(rng: np.random.Generator, n: int, d: int) -> Array:
    return rng.standard_normal((n, d)) * 10.0 ** rng.uniform(-8, 15, (n, 1))


def _columns_of_all_sizes(rng: np.random.Generator, n: int, d: int) -> Array:
    return rng.standard_normal((n, d)) * 10.0 ** rng.uniform(-8, 15, d)


def _two_far_clusters(rng: np.random.Generator, n: int, d: int) -> Array:
    clusters = 1e6 * rng.standard_normal((2, d))
    return rng.standard_normal((n, d)) + clusters[rng.integers(0, 2, n)]


def _around_a_row(rng: np.random.Generator, n: int, d: int) -> Array:
    """Rows symmetric about one of them (for odd n), which is their geometric median."""
    half = rng.standard_normal((n // 2, d))
    middle = np.zeros((n - 2 * (n // 2), d))
    return rng.permutation(np.concatenate((half, -half, middle))) + rng.standard_normal(d)


def _near_a_row(rng: np.random.Generator, n: int, d: int) -> Array:
    """Nudge such rows: their geometric median is near a row but need not be it."""
    return _around_a_row(rng, n, d) + 1e-5 * rng.standard_normal((n, d))


def _mostly_zero(rng: np.random.Generator, n: int, d: int) -> Array:
    return rng.standard_normal((n, d)) * (rng.random((n, d)) < 0.2)


KINDS = {
    kind.__name__.strip("_"): kind
    for kind in (
        _normal,
        _small_integers,
        _duplicated,
        _collinear,
        _rows_of_all_sizes,
        _columns_of_all_sizes,
        _two_far_clusters,
        _around_a_row,
        _near_a_row,
        _mostly_zero,
    )
}


@st.composite
def update_matrices(
    draw: st.DrawFn,
    *,
    min_n: int = 1,
    max_n: int = 12,
    min_d: int = 1,
    max_d: int = 20,
    kinds: tuple[str, ...] = tuple(KINDS),
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64),
) -> torch.Tensor:
    """Draw an (n, d) update matrix of one of the named kinds."""
    kind = draw(st.sampled_from(kinds))
    n = draw(st.integers(min_n, max_n))
    d = draw(st.integers(min_d, max_d))
    dtype = draw(st.sampled_from(dtypes))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return torch.from_numpy(np.ascontiguousarray(KINDS[kind](rng, n, d))).to(dtype)


def redescending_weights(rows: np.ndarray) -> np.ndarray:
    """Return the weights of what a robust memory takes in, by plain iteration in R^d, (n,).

    Huber's location with the radius that holds a majority, then each row beyond that radius counts
    by the square of radius over distance.
    """
    rows = np.asarray(rows, dtype=np.float64)
    middle = len(rows) // 2
    center = np.zeros(rows.shape[1])
    for _ in range(2000):
        distances = np.array([norm(row - center) for row in rows])
        radius = max(np.sort(distances)[middle], 1e-12)
        weights = np.array([min(1.0, radius / max(r, 1e-300)) for r in distances])
        center = (weights[:, None] * rows).sum(axis=0) / weights.sum()
    distances = np.array([norm(row - center) for row in rows])
    radius = max(np.sort(distances)[middle], 1e-12)
    weights = np.array([min(1.0, radius / max(r, 1e-300)) ** 2 for r in distances])
    return weights / weights.sum()
