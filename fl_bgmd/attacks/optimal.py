"""Attacks whose strength is tried on the deployed pipeline, not taken from their papers.

ByzFL's Optimal_ALittleIsEnough and Optimal_InnerProductManipulation search the strength at which
the aggregate is furthest from the honest mean, for one aggregator and in every round. Here all that
is deployed is tried, mixings and memory included, with its state as it stands, and harm is progress
lost (:func:`.search.searched`).
"""

import functools
import itertools
from typing import Any

from torch import Tensor

from fl_bgmd.options import Count

from .attack import attack
from .collusion import Perturbation, deviation, ipm, min_max
from .search import SEARCH_EVERY, searched
from .view import Pipeline

_DEVIATIONS = (0.25, 0.5, 1.0, 1.5, 2.5, 5.0, 10.0)
_LENGTHS = (0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0)
_GAMMAS = (0.25, 0.5, 1.0, 1.5, 2.5, 5.0, 10.0)
_PERTURBATIONS: tuple[Perturbation, ...] = ("std", "unit", "sign")


@attack("Baruch et al. (NeurIPS 2019), Algorithm 3; strength as in ByzFL's Optimal_ALIE")
def optimal_alie(
    honest: Tensor,
    memory: dict[str, Any],
    pipeline: Pipeline | None,
    every: Count = SEARCH_EVERY,
) -> Tensor:
    """Return ``mean - z * std`` per coordinate of the honest updates, of the z that harms most.

    Of either sign: whether adding or subtracting standard deviations costs progress is not known
    beforehand.

    Parameters
    ----------
    honest : Tensor
        (h, d).
    memory : dict
        Its own, from round to round.
    pipeline : Pipeline or None
        See :class:`.view.View`.
    every : int
        Rounds between two searches.
    """
    mean = honest.mean(0)
    spread = deviation(honest - mean)

    def lie(z: float) -> Tensor:
        return mean - z * spread

    strengths = (*_DEVIATIONS, *(-z for z in _DEVIATIONS))
    return lie(searched(lie, strengths, honest, memory, pipeline, every))


@attack("Xie et al. (UAI 2019), Equation 1; strength as in ByzFL's Optimal_IPM")
def optimal_ipm(
    honest: Tensor,
    memory: dict[str, Any],
    pipeline: Pipeline | None,
    every: Count = SEARCH_EVERY,
) -> Tensor:
    """Return ``-eps * mean`` of the honest updates, of the eps that harms most.

    Parameters
    ----------
    honest : Tensor
        (h, d).
    memory : dict
        Its own, from round to round.
    pipeline : Pipeline or None
        See :class:`.view.View`.
    every : int
        Rounds between two searches.
    """
    lie = functools.partial(ipm, honest)
    return lie(searched(lie, _LENGTHS, honest, memory, pipeline, every))


@attack("Shejwalkar and Houmansadr (NDSS 2021), Equation 5 and their tailored attacks")
def optimal_min_max(
    honest: Tensor,
    memory: dict[str, Any],
    pipeline: Pipeline | None,
    every: Count = SEARCH_EVERY,
) -> Tensor:
    """Return :func:`.collusion.min_max` with the perturbation and multiple that harm most.

    The distances that its gamma keeps to are those before any mixing: behind one, less or more may
    pass. Minus the standard deviation alone may even help the server along.

    Parameters
    ----------
    honest : Tensor
        (h, d).
    memory : dict
        Its own, from round to round.
    pipeline : Pipeline or None
        See :class:`.view.View`.
    every : int
        Rounds between two searches.
    """

    def lie(strength: tuple[Perturbation, float]) -> Tensor:
        perturbation, scale = strength
        return min_max(honest, scale, perturbation=perturbation)

    strengths = list(itertools.product(_PERTURBATIONS, _GAMMAS))
    return lie(searched(lie, strengths, honest, memory, pipeline, every))
