"""Attacks of clients that see each other's updates, or everybody's.

Each is a function of (m, d) tensors: the updates that the attack declares to know. All hostile
clients send the same vector. A grid that sees all replies plays them in simulations
(:class:`simulations.adversary.AdversarialGrid`); on real nodes they would need a channel between
the attackers.
"""

import math
from statistics import NormalDist

import torch
from torch import Tensor

from fl_bgmd.aggregators import geometric_median

_FEW_ATTACKERS_Z = 1.5
_MEDIAN_TOL = 1e-4  # a lie need not be certified to the last digit


def alie_deviations(num_clients: int, num_byzantine: int) -> float:
    """Return the z of "A little is enough" for n clients of which f are hostile.

    Baruch et al. (NeurIPS 2019), Algorithm 3: with ``s = floor(n / 2 + 1) - f`` honest supporters
    needed, z is the largest with ``Phi(z) < (n - f - s) / (n - f)``. 0 where the attackers are too
    few (or too many) for the formula.
    """
    honest = num_clients - num_byzantine
    supporters = num_clients // 2 + 1 - num_byzantine
    if honest < 1 or supporters < 1:
        return 0.0
    share = (honest - supporters) / honest
    return max(0.0, NormalDist().inv_cdf(share)) if 0 < share < 1 else 0.0


def alie(
    colluders: Tensor, num_clients: int, z: float = 0.0, *, num_byzantine: int | None = None
) -> Tensor:
    """Return ``mean - z * std`` per coordinate over the colluders' true updates.

    Baruch et al. (NeurIPS 2019), Algorithm 3, whose attackers know their own data only. ``z = 0``
    takes the paper's, :func:`alie_deviations` for ``num_byzantine`` hostile clients (by default the
    colluders), and 1.5 where that is 0: the mean itself would be no attack. A single attacker knows
    no deviation: it sends its own update.
    """
    hostile = len(colluders) if num_byzantine is None else num_byzantine
    z = z or alie_deviations(num_clients, hostile) or _FEW_ATTACKERS_Z
    mean = colluders.mean(0)
    return mean - z * _deviation(colluders - mean)


def ipm(honest: Tensor, eps: float = 0.5) -> Tensor:
    """Return ``-eps * mean`` of the honest updates: inner-product manipulation.

    Xie et al. (UAI 2019), Equation 1. A small ``eps`` passes filters of norms; a large one breaks
    averaging.
    """
    return -eps * honest.mean(0)


def mimic_victim(honest: Tensor) -> int:
    """Return which honest update (row of (h, d)) to copy: the furthest out along their top axis.

    Karimireddy et al. (ICLR 2022), Section 5: hostile clients that repeat one client throughout
    over-represent its data, which hurts where the clients' data differ. The paper learns the axis
    over the first rounds; here it is that of the first round's updates.
    """
    centered = (honest - honest.mean(0)).double()
    values, vectors = torch.linalg.eigh(centered @ centered.T)
    return int(vectors[:, -1].abs().argmax()) if values[-1] > 0 else 0


def min_max(honest: Tensor, scale: float = 1.0) -> Tensor:
    """Return ``mean - gamma * std``, no further from any honest update than they are apart.

    Shejwalkar and Houmansadr (NDSS 2021), Equation 5, with their "inverse standard deviation" as
    perturbation. They search for the largest gamma; here it is the root of a quadratic. ``scale``
    multiplies it.
    """
    mean, direction, offsets = _perturbation(honest)
    squared = float(direction @ direction)
    if squared == 0:
        return honest.mean(0)
    gram = offsets @ offsets.T
    limit = float(_squared_distances(gram).max())
    along = offsets @ direction
    slack = gram.diagonal() - limit
    # |mean - x_i + gamma p|^2 = limit, solved for gamma, for every i.
    roots = (-along + (along**2 - squared * slack).clamp_min(0).sqrt()) / squared
    return (mean + scale * float(roots.min()) * direction).to(honest.dtype)


def min_sum(honest: Tensor, scale: float = 1.0) -> Tensor:
    """Return ``mean - gamma * std``, its squared distances summing to no more than theirs do.

    Shejwalkar and Houmansadr (NDSS 2021), Equation 6: the sum of squared distances to the honest
    updates is at most the largest such sum of an honest one. ``scale`` multiplies gamma.
    """
    mean, direction, offsets = _perturbation(honest)
    squared = float(direction @ direction)
    if squared == 0:
        return honest.mean(0)
    gram = offsets @ offsets.T
    limit = float(_squared_distances(gram).sum(1).max())
    # The offsets sum to zero, so the mixed term does too.
    gamma = max(0.0, limit - float(gram.trace())) / (len(honest) * squared)
    return (mean + scale * math.sqrt(gamma) * direction).to(honest.dtype)


def memory_poison(honest: Tensor, scale: float = 100.0, strong: float = 0.2) -> Tensor:
    """Return the honest mean on the strong coordinates and ``-scale`` times it on the others.

    Against the memory of BGMD, this project's own: the row is plausible where a block of large
    coordinates looks, and dumps everything into the residual that the memory keeps. The strong
    coordinates are the ``strong`` share with the largest squares.
    """
    mean = honest.mean(0)
    kept = _strongest(honest, strong)
    poisoned = -scale * mean
    poisoned[kept] = mean[kept]
    return poisoned


def memory_takeover(
    honest: Tensor, running: Tensor, scale: float = 10.0, strong: float = 0.3
) -> Tensor:
    """Return the honest geometric median on the strong coordinates, ``-scale * running`` elsewhere.

    Against the memory of BGMD, this project's own: where the block is likely to be, equal rows in
    the middle of the honest ones own its median, and with it what the memory replays; elsewhere
    they push against ``running`` (d,), the running mean of the honest means.
    """
    lie = -scale * running
    kept = _strongest(honest, strong)
    lie[kept] = geometric_median(honest[:, kept], tol=_MEDIAN_TOL).vector.to(lie.dtype)
    return lie


def memory_consistent(
    honest: Tensor, running: Tensor, scale: float = 1.0, strong: float = 0.2
) -> Tensor:
    """Return the honest mean on the strong coordinates, elsewhere a push against ``running``.

    Against the memory of BGMD, this project's own: the push is minus the direction of ``running``
    (d,), the running mean of the honest means, times ``scale`` and the median honest norm. It
    hardly changes from round to round, as honest updates do not.
    """
    norms = torch.linalg.vector_norm(honest, dim=1)
    length = float(torch.linalg.vector_norm(running))
    lie = running * (-scale * float(norms.median()) / length if length > 0 else 0.0)
    kept = _strongest(honest, strong)
    lie[kept] = honest[:, kept].mean(0)
    return lie


def directed_deviation(honest: Tensor, beyond: float = 2.0) -> Tensor:
    """Return, against the sign of each coordinate's mean, what lies beyond the honest extreme.

    Fang et al. (USENIX Security 2020), Section 4.2, their attack on the trimmed mean with full
    knowledge: below the least value ``low`` where the mean is above 0, by ``(beyond - 1) |low|``,
    above the largest where it is below. They draw from an interval up to there (its end is
    ``low / b`` for a ``low`` above 0), so that no two lies are alike; these are its far end.
    """
    mean, low, high = honest.mean(0), honest.amin(0), honest.amax(0)
    against = torch.where(mean < 0, high + (beyond - 1) * high.abs(), mean)
    return torch.where(mean > 0, low - (beyond - 1) * low.abs(), against)


def _strongest(honest: Tensor, share: float) -> Tensor:
    """Return the indices of the share of the coordinates with the largest sums of squares."""
    return torch.topk(honest.square().sum(0), max(1, int(share * honest.shape[1]))).indices


def _perturbation(honest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean, minus the standard deviation, and mean minus each row, in float64."""
    rows = honest.to(torch.float64, copy=True)
    mean = rows.mean(0)
    offsets = torch.sub(mean, rows, out=rows)
    return mean, _deviation(offsets).neg_(), offsets


def _deviation(offsets: Tensor) -> Tensor:
    """Return the standard deviation of rows of mean 0 (torch's own is many times slower)."""
    return offsets.square().mean(0).sqrt_()


def _squared_distances(gram: Tensor) -> Tensor:
    """Return all squared distances between rows, (m, m), from their inner products."""
    squares = gram.diagonal()
    return (squares[:, None] + squares[None, :] - 2 * gram).clamp_min(0)
