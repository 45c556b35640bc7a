"""The directed deviations of Fang et al.: every coordinate moves against its honest direction."""

import functools
from typing import Annotated, Any

import torch
from annotated_types import Ge
from pydantic import AllowInfNan
from torch import Tensor

from fl_bgmd.options import Count

from .attack import attack
from .search import SEARCH_EVERY, searched
from .view import Pipeline

_BEYOND = (1.0, 1.25, 2.0, 5.0)


@attack("Fang et al. (USENIX Security 2020), Section 4.2", sweep=(None, 2.0))
def fang(
    honest: Tensor,
    memory: dict[str, Any],
    pipeline: Pipeline | None,
    beyond: Annotated[float, Ge(1), AllowInfNan(False)] | None = None,
    every: Count = SEARCH_EVERY,
) -> Tensor:
    """Return :func:`directed_deviation` (d,), by default as far out as harms most.

    Parameters
    ----------
    honest : Tensor
        (h, d).
    memory : dict
        Its own, from round to round.
    pipeline : Pipeline or None
        See :class:`.view.View`.
    beyond : float, optional
        Multiple of the honest extreme, searched by default (2 without the rule).
    every : int
        Rounds between two searches.
    """
    lie = functools.partial(directed_deviation, honest)
    if beyond is None:
        beyond = searched(lie, _BEYOND, honest, memory, pipeline, every, blind=2.0)
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
