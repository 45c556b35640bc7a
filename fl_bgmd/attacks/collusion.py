"""Attacks of clients that see each other's updates, or everybody's.

Each is a function of (m, d) tensors: the updates that the attack declares to know. All hostile
clients send the same vector. A grid that sees all replies plays them in simulations
(:class:`simulations.adversary.AdversarialGrid`); on real nodes they would need a channel between
the attackers.
"""

import functools
import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Annotated, Any

import torch
from annotated_types import Ge
from pydantic import AllowInfNan
from torch import Tensor

from fl_bgmd.aggregators import geometric_median
from fl_bgmd.options import Fraction, Positive

from .attack import Outcome, Strength, attack
from .search import honest_mean, searched

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


# One client alone has no spread.
@attack("Baruch et al. (NeurIPS 2019), Algorithm 3", sweep=(None, 1.5), players=2)
def alie(
    colluders: Tensor,
    num_clients: int,
    z: Positive | None = None,
    *,
    num_byzantine: int | None = None,
) -> Tensor:
    """Return ``mean - z * std`` per coordinate over the colluders' true updates.

    The paper's attackers know their own data only. A single one knows no deviation: it sends its
    own update.

    Parameters
    ----------
    colluders : Tensor
        (m, d): their true updates.
    num_clients : int
        n.
    z : float, optional
        Standard deviations, by default the paper's, from n and f. See :func:`alie_deviations`;
        where that is 0 it is 1.5, since the mean itself would be no attack.
    num_byzantine : int, optional
        f; by default m.
    """
    hostile = len(colluders) if num_byzantine is None else num_byzantine
    z = z or alie_deviations(num_clients, hostile) or _FEW_ATTACKERS_Z
    mean = colluders.mean(0)
    return mean - z * _deviation(colluders - mean)


@attack("Xie et al. (UAI 2019), Equation 1", sweep=(0.1, 0.5, 10.0))
def ipm(honest: Tensor, eps: Strength = 0.5) -> Tensor:
    """Return ``-eps * mean`` of the honest updates: inner-product manipulation.

    A small ``eps`` passes filters of norms; a large one breaks averaging.

    Parameters
    ----------
    honest : Tensor
        (h, d).
    eps : float
        Length relative to the honest mean.
    """
    return -eps * honest.mean(0)


@attack("Karimireddy et al. (ICLR 2022), Section 5")
def mimic(
    honest: Tensor,
    honest_ids: Sequence[int],
    colluders: Tensor,
    colluder_ids: Sequence[int],
    memory: dict[str, Any],
) -> Tensor:
    """Return the victim's update (d,): always the same client's, as long as it answers.

    The victim is that of :func:`mimic_victim` in the first round.
    """
    known: dict[int, Tensor] = dict(
        zip((*honest_ids, *colluder_ids), (*honest, *colluders), strict=True)
    )
    victim = memory.get("victim")
    if victim not in known:
        victim = honest_ids[mimic_victim(honest)]
        memory.setdefault("victim", victim)
    return known[victim]


def mimic_victim(honest: Tensor) -> int:
    """Return which honest update (row of (h, d)) to copy: the furthest out along their top axis.

    Karimireddy et al. (ICLR 2022), Section 5: hostile clients that repeat one client throughout
    over-represent its data, which hurts where the clients' data differ. The paper learns the axis
    over the first rounds; here it is that of the first round's updates.
    """
    centered = (honest - honest.mean(0)).double()
    values, vectors = torch.linalg.eigh(centered @ centered.T)
    return int(vectors[:, -1].abs().argmax()) if values[-1] > 0 else 0


@attack("Shejwalkar and Houmansadr (NDSS 2021), Equation 5", sweep=(1.0, 3.0))
def min_max(honest: Tensor, scale: Strength = 1.0) -> Tensor:
    """Return ``mean - gamma * std``, no further from any honest update than they are apart.

    With the paper's "inverse standard deviation" as perturbation. They search for the largest
    gamma; here it is the root of a quadratic.

    Parameters
    ----------
    honest : Tensor
        (h, d).
    scale : float
        Multiple of the largest gamma.
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


@attack("Shejwalkar and Houmansadr (NDSS 2021), Equation 6", sweep=(1.0, 3.0))
def min_sum(honest: Tensor, scale: Strength = 1.0) -> Tensor:
    """Return ``mean - gamma * std``, its squared distances summing to no more than theirs do.

    The sum of squared distances to the honest updates is at most the largest such sum of an honest
    one.

    Parameters
    ----------
    honest : Tensor
        (h, d).
    scale : float
        Multiple of the largest gamma.
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


@attack("this project", sweep=(1.0, 10.0, 100.0))
def memory_poison(honest: Tensor, scale: Strength = 100.0, strong: Fraction = 0.2) -> Tensor:
    """Return the honest mean on the strong coordinates and ``-scale`` times it on the others.

    Against the memory of BGMD, this project's own: the row is plausible where a block of large
    coordinates looks, and dumps everything into the residual that the memory keeps.

    Parameters
    ----------
    honest : Tensor
        (h, d).
    scale : float
        Factor.
    strong : float
        Share of the coordinates, those with the largest squares, that counts as strong.
    """
    mean = honest.mean(0)
    kept = _strongest(honest, strong)
    poisoned = -scale * mean
    poisoned[kept] = mean[kept]
    return poisoned


@attack("this project", sweep=(None, 10.0))
def memory_takeover(
    honest: Tensor,
    memory: dict[str, Any],
    outcome: Outcome | None,
    scale: Strength | None = None,
    strong: Fraction = 0.3,
) -> Tensor:
    """Return :func:`takeover_lie` (d,), by default of the scale that harms most.

    Parameters
    ----------
    honest : Tensor
        (h, d).
    memory : dict
        Its own, from round to round.
    outcome : callable or None
        See :class:`.attack.View`.
    scale : float, optional
        Factor, searched by default.
    strong : float
        Share of the coordinates, those with the largest squares, that counts as strong.
    """
    lie = functools.partial(takeover_lie, honest, honest_mean(honest, memory), strong=strong)
    if scale is None:
        scale = searched(lie, (0.5, 1.0, 3.0, 10.0, 30.0, 100.0), honest, memory, outcome)
    return lie(scale)


def takeover_lie(
    honest: Tensor, running: Tensor, scale: float = 10.0, *, strong: float = 0.3
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


@attack("this project", sweep=(None, 1.0))
def memory_consistent(
    honest: Tensor,
    memory: dict[str, Any],
    outcome: Outcome | None,
    scale: Strength | None = None,
    strong: Fraction = 0.2,
) -> Tensor:
    """Return :func:`consistent_lie` (d,), by default of the scale that harms most.

    Parameters
    ----------
    honest : Tensor
        (h, d).
    memory : dict
        Its own, from round to round.
    outcome : callable or None
        See :class:`.attack.View`.
    scale : float, optional
        Length relative to the median update, searched by default.
    strong : float
        Share of the coordinates, those with the largest squares, that counts as strong.
    """
    lie = functools.partial(consistent_lie, honest, honest_mean(honest, memory), strong=strong)
    if scale is None:
        scale = searched(lie, (0.25, 0.5, 1.0, 2.0, 5.0, 20.0), honest, memory, outcome)
    return lie(scale)


def consistent_lie(
    honest: Tensor, running: Tensor, scale: float = 1.0, *, strong: float = 0.2
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


@attack("Fang et al. (USENIX Security 2020), Section 4.2", sweep=(None, 2.0))
def fang(
    honest: Tensor,
    memory: dict[str, Any],
    outcome: Outcome | None,
    beyond: Annotated[float, Ge(1), AllowInfNan(False)] | None = None,
) -> Tensor:
    """Return :func:`directed_deviation` (d,), by default as far out as harms most.

    Parameters
    ----------
    honest : Tensor
        (h, d).
    memory : dict
        Its own, from round to round.
    outcome : callable or None
        See :class:`.attack.View`.
    beyond : float, optional
        Multiple of the honest extreme, searched by default (2 without the rule).
    """
    lie = functools.partial(directed_deviation, honest)
    if beyond is None:
        beyond = searched(lie, (1.0, 1.25, 2.0, 5.0), honest, memory, outcome, blind=2.0)
    return lie(beyond)


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
