"""Attacks of clients that see each other's updates, or everybody's.

Each is a function of (m, d) tensors: the updates that the attack declares to know. All hostile
clients send the same vector, unless it returns one for each. A grid that sees all replies plays
them in simulations (:class:`simulations.adversary.AdversarialGrid`); on real nodes they would need
a channel between the attackers.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any, Literal

import torch
from torch import Tensor

from fl_bgmd.options import Positive

from .attack import Strength, attack

_FEW_ATTACKERS_Z = 1.5

Perturbation = Literal["std", "unit", "sign"]


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
    return mean - z * deviation(colluders - mean)


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
def min_max(honest: Tensor, scale: Strength = 1.0, *, perturbation: Perturbation = "std") -> Tensor:
    """Return ``mean + gamma * p``, no further from any honest update than they are apart.

    They search for the largest
    gamma; here it is the root of a quadratic.

    Parameters
    ----------
    honest : Tensor
        (h, d).
    scale : float
        Multiple of the largest gamma.
    perturbation : {"std", "unit", "sign"}
        Direction p of the deviation: minus the standard deviation of each coordinate, minus the
        mean at length 1, or minus its signs ("inverse" each, in the paper).
    """
    mean, direction, offsets = _perturbed(honest, perturbation)
    squared = float(direction @ direction)
    if squared == 0:
        return honest.mean(0)
    gram = offsets @ offsets.T
    limit = float(squared_distances(gram).max())
    along = offsets @ direction
    slack = gram.diagonal() - limit
    # |mean - x_i + gamma p|^2 = limit, solved for gamma, for every i.
    roots = (-along + (along**2 - squared * slack).clamp_min(0).sqrt()) / squared
    return (mean + scale * float(roots.min()) * direction).to(honest.dtype)


@attack("Shejwalkar and Houmansadr (NDSS 2021), Equation 6", sweep=(1.0, 3.0))
def min_sum(honest: Tensor, scale: Strength = 1.0, *, perturbation: Perturbation = "std") -> Tensor:
    """Return ``mean + gamma * p``, its squared distances summing to no more than theirs do.

    The sum of squared distances to the honest updates is at most the largest such sum of an honest
    one.

    Parameters
    ----------
    honest : Tensor
        (h, d).
    scale : float
        Multiple of the largest gamma.
    perturbation : {"std", "unit", "sign"}
        Direction p of the deviation: minus the standard deviation of each coordinate, minus the
        mean at length 1, or minus its signs ("inverse" each, in the paper).
    """
    mean, direction, offsets = _perturbed(honest, perturbation)
    squared = float(direction @ direction)
    if squared == 0:
        return honest.mean(0)
    gram = offsets @ offsets.T
    limit = float(squared_distances(gram).sum(1).max())
    # The offsets sum to zero, so the mixed term does too.
    gamma = max(0.0, limit - float(gram.trace())) / (len(honest) * squared)
    return (mean + scale * math.sqrt(gamma) * direction).to(honest.dtype)


def _perturbed(honest: Tensor, perturbation: Perturbation) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean, the perturbation, and mean minus each row, in float64."""
    rows = honest.to(torch.float64, copy=True)
    mean = rows.mean(0)
    offsets = torch.sub(mean, rows, out=rows)
    if perturbation == "std":
        return mean, deviation(offsets).neg_(), offsets
    direction = (
        -mean.sign() if perturbation == "sign" else -torch.nn.functional.normalize(mean, dim=0)
    )
    return mean, direction, offsets


def deviation(offsets: Tensor) -> Tensor:
    """Return the standard deviation of rows of mean 0 (torch's own is many times slower)."""
    return offsets.square().mean(0).sqrt_()


def squared_distances(gram: Tensor) -> Tensor:
    """Return all squared distances between rows, (m, m), from their inner products."""
    squares = gram.diagonal()
    return (squares[:, None] + squares[None, :] - 2 * gram).clamp_min(0)


@attack("this project", sweep=(1.0, 1.5))
def other_world(honest: Tensor, num_byzantine: int, length: Positive = 1.0) -> Tensor:
    """Return what makes the mean of other clients zero, those who could be the honest ones.

    Of n clients f are hostile. With n - 2f honest ones, R, they are as many as the honest clients,
    and with ``-sum_R / f`` their mean is zero. Nobody who sees the updates and nothing else can
    tell whether those are the honest clients, at an optimum, and the other f the hostile ones. R
    is chosen so that the lie is short.

    Parameters
    ----------
    honest : Tensor
        (n - f, d): the honest updates.
    num_byzantine : int
        f.
    length : float
        Multiple of that vector.
    """
    kept = balanced_rows(honest @ honest.T, max(0, len(honest) - num_byzantine))
    return -length / num_byzantine * honest[kept].sum(0)


def balanced_rows(gram: Tensor, count: int) -> list[int]:
    """Return ``count`` rows whose sum is short, given their inner products (m, m).

    Greedily: of all rows the one whose loss makes the sum shortest is left out, again and again.
    """
    kept, gram = list(range(len(gram))), gram.double()
    while len(kept) > count:
        part = gram[kept][:, kept]
        # |s - x_i|^2 = |s|^2 - 2 s x_i + |x_i|^2
        kept.pop(int((part.diagonal() - 2 * part.sum(0)).argmin()))
    return kept
