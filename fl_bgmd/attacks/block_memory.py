"""Attacks on the memory of BGMD, this project's own: plausible where the block is likely to be."""

import functools
from typing import Any

import torch
from torch import Tensor

from fl_bgmd.aggregators import geometric_median
from fl_bgmd.options import Count, Fraction

from .attack import Strength, attack
from .search import SEARCH_EVERY, honest_mean, searched
from .view import Pipeline

_MEDIAN_TOL = 1e-4  # a lie need not be certified to the last digit
_TAKEOVER_SCALES = (0.5, 1.0, 3.0, 10.0, 30.0, 100.0)
_CONSISTENT_SCALES = (0.25, 0.5, 1.0, 2.0, 5.0, 20.0)


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
    pipeline: Pipeline | None,
    scale: Strength | None = None,
    strong: Fraction = 0.3,
    every: Count = SEARCH_EVERY,
) -> Tensor:
    """Return :func:`takeover_lie` (d,), by default of the scale that harms most.

    Parameters
    ----------
    honest : Tensor
        (h, d).
    memory : dict
        Its own, from round to round.
    pipeline : Pipeline or None
        See :class:`.view.View`.
    scale : float, optional
        Factor, searched by default.
    strong : float
        Share of the coordinates, those with the largest squares, that counts as strong.
    every : int
        Rounds between two searches.
    """
    lie = functools.partial(takeover_lie, honest, honest_mean(honest, memory), strong=strong)
    if scale is None:
        scale = searched(lie, _TAKEOVER_SCALES, honest, memory, pipeline, every)
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
    pipeline: Pipeline | None,
    scale: Strength | None = None,
    strong: Fraction = 0.2,
    every: Count = SEARCH_EVERY,
) -> Tensor:
    """Return :func:`consistent_lie` (d,), by default of the scale that harms most.

    Parameters
    ----------
    honest : Tensor
        (h, d).
    memory : dict
        Its own, from round to round.
    pipeline : Pipeline or None
        See :class:`.view.View`.
    scale : float, optional
        Length relative to the median update, searched by default.
    strong : float
        Share of the coordinates, those with the largest squares, that counts as strong.
    every : int
        Rounds between two searches.
    """
    lie = functools.partial(consistent_lie, honest, honest_mean(honest, memory), strong=strong)
    if scale is None:
        scale = searched(lie, _CONSISTENT_SCALES, honest, memory, pipeline, every)
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


def _strongest(honest: Tensor, share: float) -> Tensor:
    """Return the indices of the share of the coordinates with the largest sums of squares."""
    return torch.topk(honest.square().sum(0), max(1, int(share * honest.shape[1]))).indices
