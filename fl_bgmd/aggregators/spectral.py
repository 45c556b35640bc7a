"""The robust outlier filter of Data and Diggavi, in Gram space.

The paper works with d x n matrices and their singular vectors. Everything Algorithm 3 asks for
lies in the span of the n rows, so one pass over the data builds their Gram matrix and every
iteration is an n x n eigenproblem. Of many rows only the top eigenvector is sought, by passes
over them: no n x n or d x d matrix is made.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from annotated_types import Ge, Le
from numpy.typing import NDArray
from torch import Tensor

from fl_bgmd.options import Positive, Share
from fl_bgmd.shards import Sharded
from fl_bgmd.shares import ceil_share

from .coordinates import coordinate_median
from .directions import STEPS, errors_along_top, top_spread
from .results import FilteredAggregate
from .rows import (
    blas_on_one_thread,
    center,
    check_updates,
    combine,
    gram_matrix,
    in_range,
    result_dtype,
    row_norms,
)
from .rule import rule
from .saddle import solve_saddle

Array = NDArray[np.float64]

PROVEN_FRACTION = 0.25
EXACT_ROWS = 300
"""Up to this many rows sigma_0 is estimated one dropped row at a time, by whole eigenproblems."""

_BATCHES = 16
_LATER_STEPS = 10  # of a search that starts where the last one ended
_FAR = 4.0  # median distances


@dataclass(frozen=True, kw_only=True)
class SpectralFilter(FilteredAggregate):
    """The result of :func:`spectral_filter`.

    Attributes
    ----------
    iterations : int
        Rounds of down-weighting.
    sigma0 : float
        The bound on the honest standard deviation that was used, given or estimated.
    gap : float or None
        Largest relative duality gap of the saddle point problems solved; None for ``mean``.
    """

    iterations: int
    sigma0: float
    gap: float | None

    figures: ClassVar[tuple[str, ...]] = (*FilteredAggregate.figures, "iterations", "sigma0", "gap")


def _limits(
    n: int, hostile: int, share: float, slack: float = 0.0, **_: object
) -> Iterator[tuple[str, str]]:
    if share + slack > PROVEN_FRACTION:
        beside = f" and a slack of {slack:.2f}" if slack else ""
        yield (
            "proven",
            f"a hostile share of {share:.2f} ({hostile} of {n}){beside}: the guarantee of the "
            f"robust filter (Data and Diggavi, Theorem 3) ends at {PROVEN_FRACTION}",
        )


def theoretical_sigma0(
    sigma: float,
    kappa: float,
    *,
    batch_size: int,
    num_clients: int,
    dimensions: int,
    byzantine_fraction: float,
    slack: float,
) -> float:
    """Return the sigma_0 of Data and Diggavi, Equation 12, for :func:`spectral_filter`.

    ``sigma_0^2 = 24 sigma^2 / (b eps') (1 + d / ((1 - (eps + eps')) R)) + 16 kappa^2`` bounds the
    variance of ``(1 - (eps + eps')) R`` honest gradients in every direction, with probability
    ``1 - exp(-eps'^2 (1 - eps) R / 16)``. It is far above what honest gradients show (24 / eps' is
    480 for a slack of 0.05), so that a filter with it drops next to nobody: what catches attacks in
    practice is the estimate.

    Parameters
    ----------
    sigma : float
        Assumption 1, 0 or more: the root of the largest mean squared distance of a client's
        gradients on single examples from their mean.
    kappa : float
        Assumption 2, 0 or more: the largest distance of a client's mean gradient from that of all.
    batch_size, num_clients, dimensions : int
        b, R and d, 1 or more. For Algorithm 2 (Theorem 4), with k coordinates of d that the server
        chooses: ``sigma = sqrt(d / k) G`` and ``dimensions = k``.
    byzantine_fraction, slack : float
        eps, 0 or more, and eps', above 0, together at most 1/4.

    Raises
    ------
    ValueError
        For values outside of the above.
    """
    if not (slack > 0 and byzantine_fraction >= 0):
        raise ValueError(
            f"byzantine_fraction is {byzantine_fraction}, slack {slack}; allowed: 0 or more, "
            "and above 0"
        )
    if byzantine_fraction + slack > PROVEN_FRACTION + 1e-12:
        raise ValueError(
            f"byzantine_fraction + slack is {byzantine_fraction + slack:g}; allowed: at most "
            f"{PROVEN_FRACTION}"
        )
    for name, value in (("sigma", sigma), ("kappa", kappa)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} is {value}; allowed: 0 or more")
    counts = {"batch_size": batch_size, "num_clients": num_clients, "dimensions": dimensions}
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; allowed: 1 or more")
    honest = (1 - (byzantine_fraction + slack)) * num_clients
    sampling = 24 * sigma**2 / (batch_size * slack) * (1 + dimensions / honest)
    return math.sqrt(sampling + 16 * kappa**2)


@rule("robust-filter", limits=_limits, warns=True, sharded=True)
@blas_on_one_thread()
def spectral_filter(
    updates: Tensor,
    *,
    byzantine_fraction: Share = 0.25,
    sigma0: Positive | None = None,
    method: Literal["mean", "saddle"] = "mean",
    slack: Annotated[float, Ge(0), Le(0.25)] = 0.0,
) -> SpectralFilter:
    """Down-weight rows that stretch the rows' covariance, drop them, average the rest.

    Algorithm 3 (RGE) of Data and Diggavi; line numbers below are theirs. Rows of ordinary norm
    that pull together in one direction are found, which no rule on norms can do.

    Parameters
    ----------
    updates : Tensor
        (n, d), floating point.
    byzantine_fraction : float
        0 to below 1/2. The paper's guarantee holds up to 1/4; more is allowed with a warning.
    sigma0 : float, optional
        Above 0, the paper's sigma_0: bound on the standard deviation of the honest rows in every
        direction. Estimated by default: the top eigenvalue of the covariance is brought down by
        dropping, one at a time, the row furthest along the top eigenvector, until
        ``ceil((1 - byzantine_fraction) n)`` are left; its root is taken.
        :func:`theoretical_sigma0` is the paper's. Of more than 300 rows those beyond four median
        distances from the coordinate-wise median go first, the farthest before the others, and
        then a sixteenth of what is still to go at a time, furthest along any of the top
        eigenvectors: at most 16 eigenproblems.
    method : {"mean", "saddle"}
        How a row is reconstructed from the others: ``mean`` takes their weighted mean; ``saddle``
        solves the paper's problem, Equations 91 and 94, see
        :func:`~fl_bgmd.aggregators.saddle.solve_saddle`. It costs an n x n eigenproblem a step,
        so it is for hundreds of rows, not thousands.
    slack : float
        The paper's eps', 0 to 1/4: how many of the honest rows, as a share of all, may be outliers
        as well. ``alpha = 1 - (byzantine_fraction + slack)`` is the share of the rows that
        ``saddle`` makes up each row of.

    Raises
    ------
    TypeError, ValueError
        For input outside of the above; a row with a NaN or an infinity is named.
    """
    updates = check_updates(updates)
    n = updates.shape[0]
    rows, scales = in_range(updates)
    scale = float(scales.min())
    few = n <= EXACT_ROWS or isinstance(rows, Sharded)
    saddle_gram = center(rows, gram_matrix(rows)) if few or method == "saddle" else np.empty(0)
    view: _View = _GramView(saddle_gram) if few else _PassView(rows)
    variance = view.honest_variance(byzantine_fraction) if sigma0 is None else (sigma0 / scale) ** 2

    honest = 1 - (byzantine_fraction + slack)  # alpha, line 1
    cap = (4 - honest) / (honest * (2 + honest) * n)  # Equation 94
    gap: float | None = None
    weights = np.ones(n)  # c_i, line 1
    active = view.not_hopeless(variance)  # A, line 1
    iterations = int(not active.all())
    while active.sum() > 1:
        if method == "mean":
            errors = view.errors(weights, active)
        else:
            errors = np.zeros(n)
            inner = saddle_gram[np.ix_(active, active)]
            saddle = solve_saddle(inner, weights[active], max(cap, 1 / active.sum()))  # line 3
            errors[active] = saddle.errors  # line 4
            gap = max(gap or 0.0, saddle.gap)
        # Line 5. Rounding is allowed for: rows that are all equal must pass with sigma0 = 0.
        rounding = 1e-12 * float(view.squared_sizes[active].max())
        if errors @ weights <= max(4 * n * variance, rounding) or errors.max() == 0.0:
            break
        iterations += 1
        weights = weights * (1 - errors / errors.max())  # line 6
        left = active & (weights >= 0.5)  # line 7
        if not left.any():
            # So many outliers that every row is half explained by them: the worst ones go.
            left = active & (errors < (1 - 1e-9) * errors.max())
        if not left.any():
            break  # all equally wrong: no row is an outlier
        active = left
    share = active / active.sum()
    vector = combine(share, updates, result_dtype(updates))  # line 12
    return SpectralFilter(
        vector,
        torch.from_numpy(share),
        kept=torch.from_numpy(active),
        iterations=iterations,
        sigma0=math.sqrt(variance) * scale,
        gap=gap,
    )


class _View(ABC):
    """What Algorithm 3 asks of the rows."""

    squared_sizes: Array
    """Squared distances to a point among the rows, (n,)."""

    @abstractmethod
    def errors(self, weights: Array, active: NDArray[np.bool_]) -> Array:
        """Return tau of Equation 93 with the mean as reconstruction, (n,), 0 if not active."""

    @abstractmethod
    def honest_variance(self, byzantine_fraction: float) -> float:
        """Estimate sigma_0^2: the top eigenvalue that is left when the worst rows are gone.

        The rows nearest to some center would not do: corrupt rows on the honest rows' shell,
        shifted together, can be nearer to it than honest ones.
        """

    def not_hopeless(self, variance: float) -> NDArray[np.bool_]:
        """Return the rows that may be left at the end, (n,)."""
        return np.ones(len(self.squared_sizes), dtype=bool)


class _GramView(_View):
    """Few rows: their Gram matrix."""

    def __init__(self, gram: Array) -> None:
        self.gram = gram
        self.squared_sizes = np.diagonal(gram)

    def errors(self, weights: Array, active: NDArray[np.bool_]) -> Array:
        errors = np.zeros(len(weights))
        inner = self.gram[np.ix_(active, active)]
        errors[active] = errors_along_top(inner, weights[active])
        return errors

    def honest_variance(self, byzantine_fraction: float) -> float:
        n = self.gram.shape[0]
        active = np.arange(n)
        left = ceil_share(1 - byzantine_fraction, n)
        while True:
            inner = self.gram[np.ix_(active, active)]
            errors = errors_along_top(inner, np.ones(len(active)))
            if len(active) <= max(left, 1):
                return float(errors.sum()) / len(active)
            active = np.delete(active, int(np.argmax(errors)))


class _PassView(_View):
    """Many rows: passes over them."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        self.squared_sizes = row_norms(rows, -coordinate_median(rows).vector.double()) ** 2

    def errors(self, weights: Array, active: NDArray[np.bool_]) -> Array:
        return np.where(active, top_spread(self.rows, weights * active).errors, 0.0)

    def honest_variance(self, byzantine_fraction: float) -> float:
        n = len(self.squared_sizes)
        to_drop = n - max(1, ceil_share(1 - byzantine_fraction, n))
        # A row that far is the top eigenvector; dropped by itself it would cost a round.
        far = self.squared_sizes > _FAR**2 * np.median(self.squared_sizes)
        order = np.argsort(-self.squared_sizes, kind="stable")[: min(to_drop, int(far.sum()))]
        active = np.ones(n, dtype=bool)
        active[order] = False
        to_drop -= len(order)
        batch = max(1, math.ceil(to_drop / _BATCHES))
        start: Array | None = None
        while to_drop > 0:
            steps = STEPS if start is None else _LATER_STEPS
            spread = top_spread(self.rows, active.astype(float), start, steps)
            # Several directions at once: as many small groups of rows may each have their own.
            worst = np.argsort(np.where(active, -spread.scores, np.inf), kind="stable")
            gone = worst[: min(batch, to_drop)]
            active[gone] = False
            to_drop -= len(gone)
            start = spread.start
        spread = top_spread(self.rows, active.astype(float), start)
        return float(spread.errors[active].mean())

    def not_hopeless(self, variance: float) -> NDArray[np.bool_]:
        """Return the rows within twice the distance that can be left when line 5 is content.

        It is content when ``c_i |x_i - m|^2``, at most the top eigenvalue, is below
        ``4 n sigma_0^2`` for each row, and c_i is at least 1/2. Rows of all sizes would otherwise
        cost an iteration for each size.
        """
        n = len(self.squared_sizes)
        near: NDArray[np.bool_] = self.squared_sizes <= 4 * 8 * n * variance
        return near if 2 * near.sum() > n else np.ones(n, dtype=bool)
