"""The geometric median of many rows: Newton's method in R^d by passes over the rows.

With ``b_i = x_i - y``, ``r_i = ||b_i||`` and weights ``o_i`` the objective ``sum_i o_i r_i`` has
the gradient ``-sum_i (o_i / r_i) b_i`` and the Hessian ``S I - sum_i (o_i / r_i^3) b_i b_i^T``,
``S = sum_i o_i / r_i``. Neither the n x n Gram matrix nor a d x d matrix is formed: conjugate
gradients ask for products with the Hessian, one pass over the rows each. Distances along a line
follow from n inner products, so the line search is exact and costs no pass at all. Every step ends
with Weiszfeld's map, which brings y into the convex hull. Where that map, a pass each time, is to
come near enough in fewer passes than Newton's step takes, as where rows lie in many directions, a
step does nothing else.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .certificate import HullPoint, better
from .coordinates import coordinate_median
from .rows import dot, native, squared_sizes
from .strips import sum_weighted

Array = NDArray[np.float64]

_EPSILON = float(np.finfo(np.float64).eps)
_CG_STEPS = 50
_STALLED = 3  # steps in a row that gain nothing
_MAPS = 3  # that are fewer passes than a Newton step


@dataclass(frozen=True)
class _View:
    """What one pass sees from a point y.

    Attributes
    ----------
    y : (d,)
    distances : (n,)
        ``r_i``, by subtraction.
    coincident : (n,)
        Rows that float64 cannot tell from y.
    pulls : (n,)
        ``o_i / r_i``, 0 for coincident rows.
    resultant : (d,)
        ``sum_i pulls_i (x_i - y)``.
    along : (n,)
        ``<step, x_i - y>`` of the step that was asked for.
    """

    y: Array
    distances: Array
    coincident: NDArray[np.bool_]
    pulls: Array
    resultant: Array
    along: Array


def minimize_in_space(
    rows: Tensor, row_weights: Array, tol: float = 1e-6, max_iter: int = 1000
) -> tuple[HullPoint, Array, int]:
    """Minimize ``sum_i row_weights[i] ||y - x_i||`` by passes over the rows.

    Parameters
    ----------
    rows : Tensor
        (n, d), safe to square: see :func:`~fl_bgmd.aggregators.rows.in_range`.
    row_weights : (n,)
        0 or more, not all 0.
    tol, max_iter
        Stop at this certified gap, or after this many steps.

    Returns
    -------
    point : HullPoint
        The best point found.
    y : (d,)
        That point, float64.
    iterations : int
        Steps taken.

    Raises
    ------
    ValueError
        Naming the row that holds a NaN or an infinity.

    Notes
    -----
    A geometric median that coincides with a row is recognized by trying the row that is nearest
    to y, which takes one pass; steps alone would creep toward it.
    """
    start = _look(rows, row_weights, coordinate_median(rows).vector.cpu().double().numpy())
    point, view = _enter_hull(rows, row_weights, start)
    moved = start
    best, best_y = point, view.y
    tried: set[int] = set()
    iterations = stalled = 0
    # The margin leaves room for the rounding of the vector, so that the final gap is below tol.
    while best.gap > 0.99 * tol and iterations < max_iter and stalled < _STALLED:
        nearest = _nearest(view, row_weights)
        if nearest not in tried and 2 * view.distances[nearest] < np.median(view.distances):
            tried.add(nearest)
            row_point, row_view = _at_row(rows, row_weights, nearest)
            if better(row_point, best):
                best, best_y = row_point, row_view.y
            if best.gap <= 0.99 * tol:
                break
        iterations += 1
        sizes = [float(np.linalg.norm(seen.resultant)) for seen in (view, moved)]
        fall = sizes[0] / sizes[1] if sizes[0] < sizes[1] else 1.0  # by the last map
        before = view
        if point.gap * fall**_MAPS > 0.99 * tol:
            direction, along = _direction(rows, view, 0.3 * tol * row_weights.sum() / 2)
            length = _line_search(row_weights, view.distances, along, float(direction @ direction))
            moved = _look(rows, row_weights, view.y + length * direction)
            point, view = _enter_hull(rows, row_weights, moved, before.y)
        else:
            for _ in range(_MAPS):
                moved = view
                point, view = _enter_hull(rows, row_weights, moved, before.y)
                if point.gap <= 0.99 * tol:
                    break
        is_better, gains = better(point, best), _is_lower(row_weights, before, view)
        if is_better:
            best, best_y = point, view.y
        stalled = 0 if is_better or gains else stalled + 1
    return best, best_y, iterations


def _look(rows: Tensor, row_weights: Array, y: Array, step: Array | None = None) -> _View:
    """Pass over the rows once and return what is seen from y."""
    n, size = len(row_weights), float(np.linalg.norm(y))
    measures = [lambda columns, block: squared_sizes(block)]
    if step is not None:
        direction = native(step, rows)
        measures.append(lambda columns, block: dot(block, direction[columns]))

    def is_near(squared: Array) -> NDArray[np.bool_]:
        distances = np.sqrt(squared)
        near: NDArray[np.bool_] = distances <= 8 * _EPSILON * (distances + size)
        return near

    def pull(part: slice, values: Array) -> Array:
        near = is_near(values[0])
        pulls: Array = row_weights[part] / np.where(near, 1.0, np.sqrt(values[0]))
        return np.where(near, 0.0, pulls)

    values, resultant = sum_weighted(measures, pull, rows, torch.from_numpy(-y))
    along = np.zeros(n) if step is None else values[1]
    distances, pulls = np.sqrt(values[0]), pull(slice(0, n), values)
    return _View(y, distances, is_near(values[0]), pulls, resultant, along)


def _nearest(view: _View, row_weights: Array) -> int:
    """Return the row nearest to y among those that count."""
    return int(np.argmin(np.where(row_weights > 0, view.distances, np.inf)))


def _at_row(
    rows: Tensor, row_weights: Array, k: int, before: Array | None = None
) -> tuple[HullPoint, _View]:
    """Return row k as a point of the hull."""
    y = rows[k].cpu().double().numpy().copy()
    view = _look(rows, row_weights, y, None if before is None else y - before)
    hull_weights = np.zeros(len(row_weights))
    hull_weights[k] = 1.0
    return _certify(view, hull_weights, row_weights), view


def _enter_hull(
    rows: Tensor, row_weights: Array, view: _View, before: Array | None = None
) -> tuple[HullPoint, _View]:
    """Return Weiszfeld's map of any point; where it coincides with a row, that row.

    The view's ``along`` belongs to the step from ``before``.
    """
    total = view.pulls.sum()
    if total == 0.0 or (view.coincident & (row_weights > 0)).any():
        return _at_row(rows, row_weights, _nearest(view, row_weights), before)
    y = view.y + view.resultant / total
    mapped = _look(rows, row_weights, y, None if before is None else y - before)
    return _certify(mapped, view.pulls / total, row_weights), mapped


def _certify(view: _View, hull_weights: Array, row_weights: Array) -> HullPoint:
    """Return the view's certificate, its rounding included."""
    near = view.coincident
    # b_i is rounded in its last digit, and n + d of them are summed up, each at most o_i long.
    noise = (len(row_weights) + len(view.y)) * _EPSILON * float(row_weights.sum())
    size = float(np.linalg.norm(view.resultant)) + noise
    return HullPoint(
        hull_weights=hull_weights,
        pulls=view.pulls,
        distances=view.distances,
        objective=float(row_weights @ view.distances),
        pull=max(0.0, size - float(row_weights[near].sum())),
        slack=float(2 * row_weights[near] @ view.distances[near]),
        row_weights=row_weights,
    )


def _direction(rows: Tensor, view: _View, enough: float) -> tuple[Array, Array]:
    """Return Newton's step ``p`` by conjugate gradients, (d,), and ``<p, x_i - y>``, (n,).

    They end once what is left of the gradient is ``enough``, or a tenth of it: the next step sees
    a new Hessian. Where the objective has no curvature (all rows on a line) the gradient is left.
    """
    gradient = view.resultant
    total = float(view.pulls.sum())
    size = float(gradient @ gradient)
    goal = size * min(0.1, max(1e-3, enough / max(size**0.5, 1e-300))) ** 2
    step, step_along = np.zeros_like(gradient), np.zeros_like(view.pulls)
    left, search, squared = gradient.copy(), gradient.copy(), size
    # At a row that is not the median there is no Hessian: straight downhill.
    for _ in range(1 if view.coincident.any() else _CG_STEPS):
        product, along = _hessian_product(rows, view, search)
        curvature = float(search @ product)
        if view.coincident.any() or curvature <= 1e-9 * total * float(search @ search):
            if not step.any():
                step, step_along = search / total, along / total
            break
        length = squared / curvature
        step += length * search
        step_along += length * along
        left -= length * product
        before, squared = squared, float(left @ left)
        if squared <= goal:
            break
        search = left + (squared / before) * search
    return step, step_along


def _hessian_product(rows: Tensor, view: _View, vector: Array) -> tuple[Array, Array]:
    """Return the Hessian times ``vector``, (d,), and ``<vector, x_i - y>``, (n,)."""
    safe = np.where(view.coincident, 1.0, view.distances)
    direction = native(vector, rows)
    [along], product = sum_weighted(
        [lambda columns, block: dot(block, direction[columns])],
        lambda part, values: view.pulls[part] * (values[0] / safe[part] / safe[part]),
        rows,
        torch.from_numpy(-view.y),
    )
    return view.pulls.sum() * vector - product, along


def _line_search(row_weights: Array, distances: Array, along: Array, squared: float) -> float:
    """Return the t > 0 that minimizes ``sum_i o_i ||x_i - y - t p||``, ``squared = ||p||^2``.

    The distances are ``(r_i^2 - 2 t <p, x_i - y> + t^2 ||p||^2)^(1/2)``. Their sum is convex: the
    zero of its slope is bracketed and halved, down to the kink that a row on the line makes.
    """
    longest = squared**0.5

    def slope(t: float) -> float:
        moved = np.sqrt(np.maximum(distances * distances + t * (t * squared - 2 * along), 0.0))
        slopes = (t * squared - along) / np.where(moved > 0, moved, np.inf)
        return float(row_weights @ np.clip(slopes, -longest, longest))

    low, high = 0.0, 1.0
    steepest = abs(slope(0.0))
    for _ in range(200):
        here = slope(high)
        if abs(here) <= 0.1 * steepest:
            return high
        if here > 0:
            break
        low, high = high, 2 * high
    for _ in range(100):
        middle = (low + high) / 2
        here = slope(middle)
        if abs(here) <= 0.1 * steepest or high - low <= 4 * _EPSILON * high:
            return middle
        low, high = (low, middle) if here > 0 else (middle, high)
    return (low + high) / 2


def _is_lower(row_weights: Array, old: _View, new: _View) -> bool:
    """Whether the objective has fallen by more than the rounding of its change.

    With ``s = new - old`` and ``b_i = x_i - new``: ``r_old^2 - r_new^2 = 2 <s, b_i> + ||s||^2``,
    as accurate as the step is small.
    """
    step = new.y - old.y
    squared = float(step @ step)
    total = old.distances + new.distances
    decrease = row_weights @ ((2 * new.along + squared) / np.where(total > 0, total, 1.0))
    noise = (len(row_weights) + len(step)) * _EPSILON * squared**0.5 * row_weights.sum()
    return bool(decrease > noise)
