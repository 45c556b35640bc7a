"""Lies against the honest mean: the directed deviations of Fang et al., and two groups of liars."""

import functools
import itertools
import math
from typing import Annotated, Any

import torch
from annotated_types import Ge
from pydantic import AllowInfNan
from torch import Tensor

from fl_bgmd.options import Count

from .attack import Strength, attack
from .collusion import squared_distances
from .search import SEARCH_EVERY, searched
from .view import Pipeline

_BEYOND = (1.0, 1.25, 2.0, 5.0)
_LENGTHS = (0.03, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 20.0)
_DISGUISES = tuple(itertools.product((0.25, 0.5, 1.0, 2.0, 5.0), (0.5, 1.0, 2.0, 5.0)))
_OF_GROUPS = tuple(
    itertools.product((0.2, 0.35, 0.5, 0.6, 0.7, 0.8, 1.0), (0.3, 0.5, 0.7, 0.85, 1.0))
)
"""Lengths and widths."""
_THRESHOLD = 1e-5
"""Below it the paper gives up."""


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


@attack("Fang et al. (USENIX Security 2020), Section 4.1 and Theorem 1", sweep=(None, 1.0))
def fang_krum(
    honest: Tensor,
    num_byzantine: int,
    memory: dict[str, Any],
    pipeline: Pipeline | None,
    length: Strength | None = None,
    every: Count = SEARCH_EVERY,
) -> Tensor:
    """Return ``-size`` times the signs of the honest mean: all lies alike, so that Krum picks one.

    Parameters
    ----------
    honest : Tensor
        (h, d).
    num_byzantine : int
        f.
    memory : dict
        Its own, from round to round.
    pipeline : Pipeline or None
        See :class:`.view.View`.
    length : float, optional
        The lie's norm over the median honest one, searched by default (without the rule: the
        paper's, see :func:`krum_deviation`).
    every : int
        Rounds between two searches.
    """
    norm = _median_norm(honest)
    signs = honest.mean(0).sign()
    if length is None and pipeline is None:
        return -krum_deviation(honest, num_byzantine) * signs

    def lie(length: float) -> Tensor:
        return (-length * norm / math.sqrt(len(signs))) * signs

    if length is None:
        length = searched(lie, _LENGTHS, honest, memory, pipeline, every)
    return lie(length)


@attack("this project", sweep=(None, 0.7), players=2)
def two_groups(
    honest: Tensor,
    colluders: Tensor,
    memory: dict[str, Any],
    pipeline: Pipeline | None,
    length: Strength | None = None,
    width: Strength = 0.7,
    every: Count = SEARCH_EVERY,
) -> Tensor:
    """Return lies against the honest mean in two groups that differ along a second direction.

    A rule that drops rows while *one* direction stands out sees two alike. The second one is that
    in which honest rows spread most beside their mean, where it takes the least. With ``l`` the
    lies' length against the mean, f of n rows spread by ``f (n - f) l^2 / n^2`` along it and by
    ``f (width l)^2 / n`` along the second, beside what honest rows do.

    Parameters
    ----------
    honest : Tensor
        (h, d).
    colluders : Tensor
        (m, d): for how many there are.
    memory : dict
        Its own, from round to round.
    pipeline : Pipeline or None
        See :class:`.view.View`.
    length : float, optional
        Of the lies against the mean over the median honest norm. By default it and the width are
        searched (without the rule: 0.7).
    width : float
        Along the second direction, over the length; of a length that is given.
    every : int
        Rounds between two searches.

    Returns
    -------
    Tensor
        (m, d): a row for each of those who play it.
    """
    norm = _median_norm(honest)
    against = -torch.nn.functional.normalize(honest.mean(0), dim=0)
    beside = _widest_beside(honest, against)
    sides = torch.ones(len(colluders), 1, dtype=honest.dtype, device=honest.device)
    sides[1::2] = -1

    def lies(strength: tuple[float, float]) -> Tensor:
        length, width = strength
        return length * norm * (against + width * sides * beside)

    if length is not None:
        return lies((length, width))
    blind = (0.7, width)
    return lies(searched(lies, _OF_GROUPS, honest, memory, pipeline, every, blind=blind))


@attack("this project", sweep=(None, 1.0), players=2)
def disguised(
    honest: Tensor,
    colluders: Tensor,
    memory: dict[str, Any],
    pipeline: Pipeline | None,
    length: Strength | None = None,
    width: Strength = 1.0,
    every: Count = SEARCH_EVERY,
) -> Tensor:
    """Return lies that agree in what they do and look as if their senders had nothing in common.

    Colluders who send equal rows are found by rules that look for clients who are too much alike.
    These are pulls against the honest mean, each beside what its sender's own update has apart from
    the other colluders' ones: the wider that is, the smaller are the cosines between lies.

    Parameters
    ----------
    honest : Tensor
        (h, d).
    colluders : Tensor
        (m, d): the updates that they trained.
    memory : dict
        Its own, from round to round.
    pipeline : Pipeline or None
        See :class:`.view.View`.
    length : float, optional
        Against the mean, in median honest norms. By default it and the width are searched (without
        the rule: 1).
    width : float
        Of the own part, in median honest norms; of a length that is given.
    every : int
        Rounds between two searches.

    Returns
    -------
    Tensor
        (m, d): a row for each of those who play it.
    """
    norm = _median_norm(honest)
    against = -torch.nn.functional.normalize(honest.mean(0), dim=0)
    own = torch.nn.functional.normalize(colluders - colluders.mean(0), dim=1)

    def lies(strength: tuple[float, float]) -> Tensor:
        length, width = strength
        return norm * (length * against + width * own)

    if length is not None:
        return lies((length, width))
    blind = (1.0, width)
    return lies(searched(lies, _DISGUISES, honest, memory, pipeline, every, blind=blind))


def _median_norm(rows: Tensor) -> float:
    return float(torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).median())


def _widest_beside(rows: Tensor, direction: Tensor) -> Tensor:
    """Return the unit vector (d,) across a direction along which rows (h, d) spread most."""
    across = rows - (rows @ direction)[:, None] * direction
    across = across - across.mean(0)
    vectors = torch.linalg.eigh((across @ across.T).double()).eigenvectors
    return torch.nn.functional.normalize(vectors[:, -1].to(across) @ across, dim=0)


def krum_deviation(honest: Tensor, num_byzantine: int) -> float:
    """Return the size at which Krum picks the lies ``-size * signs`` of f equal rows.

    Fang et al. (USENIX Security 2020), Section 4.1, with full knowledge: Theorem 1 bounds it, and
    it is halved until Krum picks a lie, or it is below 1e-5 (then that, which it need not pick).
    Updates are differences from the global model already.

    Parameters
    ----------
    honest : Tensor
        (h, d).
    num_byzantine : int
        f, 1 or more.
    """
    rows, d = honest.double(), honest.shape[1]
    n, f = len(rows) + num_byzantine, num_byzantine
    squares = rows.square().sum(1)
    apart = squared_distances(rows @ rows.T)
    along = rows @ rows.mean(0).sign()
    own = apart.sort(1).values[:, 1:]  # each row's distance to itself comes first
    nearest = own[:, : max(1, n - f - 2)].sum(1).min() if len(rows) > 1 else torch.tensor(0.0)
    bound = math.sqrt(float(nearest) / (max(1, n - 2 * f - 1) * d))
    size = bound + math.sqrt(float(squares.max()) / d)
    neighbors = max(1, n - f - 2)
    while size >= _THRESHOLD:
        # |x_i + size s|^2 for each honest row; the lies are no distance apart.
        to_lie = squares + 2 * size * along + size**2 * float((rows.mean(0) != 0).sum())
        lies = torch.cat([torch.zeros(f - 1).double(), to_lie]).sort().values[:neighbors].sum()
        others = torch.cat([own, to_lie[:, None].expand(-1, f)], dim=1)
        if lies < others.sort(1).values[:, :neighbors].sum(1).min():
            break
        size /= 2
    return size
