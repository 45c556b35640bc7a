"""Rules that look at the rows' norms only: thresholding, clipping and projection."""

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Ge, Lt
from numpy.typing import NDArray
from torch import Tensor

from fl_bgmd.options import Named, Positive, Share, checked
from fl_bgmd.shares import ceil_share

from .results import Aggregate, FilteredAggregate
from .rows import (
    check_updates,
    combine,
    in_range,
    native,
    refuse_non_finite,
    result_dtype,
    row_norms,
    sum_blocks,
    vector_norm,
)
from .rule import rule

DropFraction = Annotated[float, Ge(0), Lt(1)]
Order = Annotated[float, Ge(1)]


@checked
def norm_threshold(
    updates: Tensor,
    *,
    drop_fraction: DropFraction = 0.25,
    order: Order = 2,
    norms: Tensor | None = None,
) -> FilteredAggregate:
    """Drop the ``ceil(drop_fraction * n)`` rows of largest norm and average the rest.

    Algorithms 1 and 2 of Ghosh et al., the central machine's step, with ``drop_fraction`` their
    beta. Tolerates ``drop_fraction * n`` rows of any size; rows of ordinary size that point
    anywhere are averaged in.

    Parameters
    ----------
    updates : Tensor
        (n, d), floating point.
    drop_fraction : float
        0 to below 1. The paper asks for at least the hostile fraction and below 1/2.
    order : float
        The q of the norm, 1 or more, ``math.inf`` included.
    norms : Tensor, optional
        (n,), 0 or more: the norms that clients report (Option I). Computed from the rows when
        not given (Option II).

    Raises
    ------
    TypeError, ValueError
        For input outside of the above; a row with a NaN or an infinity is named.
    """
    updates = check_updates(updates)
    n = updates.shape[0]
    if norms is None:
        sizes = norms_of_order(updates, order)
    else:
        sizes = torch.as_tensor(norms).detach().cpu().double().numpy()
        if sizes.shape != (n,) or not (sizes >= 0).all():
            raise ValueError(f"norms is {sizes.tolist()}; allowed: {n} values of 0 or more")
    dropped = min(n - 1, ceil_share(drop_fraction, n))
    kept = np.zeros(n, dtype=bool)
    kept[np.argsort(sizes, kind="stable")[: n - dropped]] = True
    vector = combine(kept / kept.sum(), updates, result_dtype(updates))
    if norms is not None and not math.isfinite(vector_norm(vector)):
        refuse_non_finite(updates)
    return FilteredAggregate(
        vector, torch.from_numpy(kept / kept.sum()), kept=torch.from_numpy(kept)
    )


def _limits(
    n: int,
    hostile: int,
    share: float,
    *,
    drop_fraction: float | None,
    use: str,
    delta: float = 1.0,
    feedback: bool = False,
    **_: object,
) -> Iterator[tuple[str, str]]:
    drop = share if drop_fraction is None else drop_fraction
    if ceil_share(drop, n) < hostile:
        yield (
            "drop_fraction",
            f"drop_fraction is {drop}: {ceil_share(drop, n)} of {n} updates are dropped and "
            f"{hostile} may be hostile",
        )
    theorem = 3 if feedback else 1 if use == "reported" else 2
    if delta < 1 and not is_proven(delta, share, drop, theorem):
        yield (
            "proven",
            f"a hostile share of {share:.2f} under a compressor of which delta {delta:.2g} is "
            f"guaranteed: Theorem {theorem} of Ghosh et al. promises nothing there (at that delta "
            f"it ends at {most_hostile(delta, theorem):.3f}; it is far from tight)",
        )


def least_delta(alpha: float, beta: float, theorem: int) -> float:
    """Return the delta that a compressor must exceed for norm thresholding to converge.

    Ghosh et al., Theorems 1 (Option I: restricted adversaries) and 2 (Option II: arbitrary ones),
    with their lambda_0 toward 0, ``alpha`` the hostile share and ``beta`` the share dropped.
    """
    if theorem == 1:
        return 1 - (1 - beta) ** 2 + 4 * alpha - 9 * alpha**2 + 4 * alpha**3
    first = 1 - (1 - beta) ** 2 / (1 + beta) ** 2
    return first + 4 * alpha - 8 * alpha**2 + 4 * alpha**3


def is_proven(delta: float, alpha: float, beta: float, theorem: int) -> bool:
    """Whether a theorem of Ghosh et al. (3: error feedback) promises convergence."""
    if theorem == 3:
        spread = alpha**2 + beta**2 + (beta - alpha) ** 2
        return (1 + math.sqrt(1 - delta)) ** 2 / (1 - beta) ** 2 * spread < 0.107
    return delta > least_delta(alpha, beta, theorem)


def most_hostile(delta: float, theorem: int) -> float:
    """Return the largest hostile share, to a thousandth, where beta is alpha."""
    shares = [i / 1000 for i in range(500)]
    return max((a for a in shares if is_proven(delta, a, a, theorem)), default=0.0)


def _uses(options: Mapping[str, Any]) -> Collection[str]:
    """Return what is made use of: the clients' norms only where they are to be believed."""
    if options["use"] == "computed":
        return ("updates", "byzantine_fraction")
    return ("updates", "byzantine_fraction", "norms")


@rule("norm-threshold", limits=_limits, uses=_uses)
def threshold_norms(
    updates: Tensor,
    norms: Tensor | None = None,
    byzantine_fraction: Share = 0.25,
    *,
    drop_fraction: DropFraction | None = None,
    order: Order = 2.0,
    use: Annotated[Literal["computed", "reported"], Named("norms")] = "computed",
) -> FilteredAggregate:
    """Drop the updates of largest norm, average the rest: Algorithms 1 and 2 of Ghosh et al.

    :func:`norm_threshold` for a server that knows how many clients may lie.

    Parameters
    ----------
    drop_fraction : float, optional
        The paper's beta, 0 to below 1; the hostile share by default.
    order : float
        The paper's q, order of the norm, 1 or more.
    norms : {"computed", "reported"}
        Option II computes the norms of the updates as received. Option I takes the norms of the
        uncompressed updates that clients with :class:`fl_bgmd.mods.CompressionMod` report, of the
        order that the server asks for; where a reply without one is accepted they are computed.
    """
    return norm_threshold(
        updates,
        drop_fraction=byzantine_fraction if drop_fraction is None else drop_fraction,
        order=order,
        norms=norms if use == "reported" else None,
    )


@rule("norm-clip", sharded=True)
def norm_clip(updates: Tensor, *, radius: Positive | None = None) -> Aggregate:
    """Scale every row down to at most ``radius`` and average: norm clipping.

    Sun et al. (Can You Really Backdoor Federated Learning?, 2019), Section 4, without noise; with
    ``f`` of n rows hostile their pull is at most ``f / n`` of the radius.

    Parameters
    ----------
    updates : Tensor
        (n, d), floating point.
    radius : float, optional
        Above 0; the median row norm by default, which no minority can raise beyond the largest
        honest norm.

    Raises
    ------
    TypeError, ValueError
        For input outside of the above; a row with a NaN or an infinity is named.
    """
    updates = check_updates(updates)
    with np.errstate(over="ignore"):  # longer than a number can say
        sizes = np.minimum(euclidean_norms(updates), np.finfo(np.float64).max)
    factors = clip_factors(sizes, float(np.median(sizes)) if radius is None else radius)
    coefficients = factors / len(sizes)
    vector = combine(coefficients, updates, result_dtype(updates))
    return Aggregate(vector, torch.from_numpy(coefficients))


def euclidean_norms(updates: Tensor) -> NDArray[np.float64]:
    """Return the Euclidean norms of the rows, (n,) float64, whatever the size of their entries."""
    rows, scales = in_range(updates)
    return row_norms(rows) * scales


def finite_norms(updates: Tensor) -> NDArray[np.float64]:
    """Return the norms of the rows, (n,), the largest number for those beyond it."""
    with np.errstate(over="ignore"):
        norms: NDArray[np.float64] = np.minimum(euclidean_norms(updates), np.finfo(np.float64).max)
    return norms


def lower_median(values: NDArray[np.float64]) -> float:
    """Return the middle value; of two the smaller, which no half of the rows can raise."""
    return float(np.sort(values)[(len(values) - 1) // 2])


def clip_factors(norms: NDArray[np.float64], radius: float) -> NDArray[np.float64]:
    """Return ``min(1, radius / norm)`` for each norm, 1 for a norm of 0; (n,) float64."""
    factors: NDArray[np.float64] = np.minimum(
        1.0, radius / np.where(norms > 0, norms, np.inf) + (norms == 0)
    )
    return factors


def project(vector: Tensor, radius: float, center: Tensor | None = None) -> Tensor:
    """Project ``vector`` (d,) on the ball of ``radius`` around ``center`` (the origin by default).

    The papers' projection on C (Data and Diggavi, Algorithm 1) and on W (Ghosh et al.,
    Algorithms 1 and 2) for a ball. Raises ``ValueError`` for a radius that is not above 0.
    """
    if not radius > 0:
        raise ValueError(f"radius is {radius}; allowed: above 0")
    offset = vector if center is None else vector - center
    norm = vector_norm(offset)
    if norm <= radius:
        return vector
    offset = offset * (radius / norm)
    return offset if center is None else center + offset


def norms_of_order(updates: Tensor, order: float) -> NDArray[np.float64]:
    """Return the norms of ``order`` of the rows, (n,) float64."""
    if order == 2:
        return euclidean_norms(updates)
    largest = updates.abs().amax(dim=1).double()
    if not bool(torch.isfinite(largest).all()):
        refuse_non_finite(updates)
    scale = largest.cpu().numpy()
    if order == math.inf:
        return np.asarray(scale)
    safe = native(np.where(scale > 0, scale, 1.0)[:, None], updates)
    powers = sum_blocks(lambda _, block: (abs(block / safe) ** order).sum(1), updates)
    return np.asarray(scale * powers ** (1 / order))
