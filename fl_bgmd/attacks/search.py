"""Strengths that are tried on the rule, not chosen beforehand."""

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from .base import View

SEARCH_EVERY = 12
"""Rounds that an attack is played with the strength it has found."""

HORIZON = 6
"""Rounds that each strength is tried for: what enters a memory does its harm later."""


def honest_mean(view: View) -> Tensor:
    """Return the running mean (d,) of the honest clients' means; keep it in the view's memory."""
    assert view.honest is not None
    now = view.honest.mean(0)
    before = view.memory.get("running-mean")
    running = now if before is None else 0.9 * before + 0.1 * now
    view.memory["running-mean"] = running
    return running


def searched(
    view: View, lie: Callable[[float], Tensor], grid: Sequence[float], blind: float = 0.0
) -> float:
    """Return the strength of the grid that harms most, searched every :data:`SEARCH_EVERY` rounds.

    Harm is progress lost: what the server would move by in :data:`HORIZON` rounds, along the mean
    of the honest updates. The first of equals wins.

    Parameters
    ----------
    view : View
        Of an attack that knows the ``rule`` and ``remembers``.
    lie : callable
        ``strength -> (d,)``.
    grid : sequence of float
        Strengths.
    blind : float
        The strength where there is no rule to be tried; 0: there is none.

    Raises
    ------
    ValueError
        Where there is no rule to be tried, and ``blind`` is 0.
    """
    if view.outcome is None:
        if blind:
            return blind
        raise ValueError(
            "strength is 0 (searched) and the grid was not told the server's rule; allowed: a "
            "strength above 0, or a grid with preview="
        )
    number = int(view.memory.get("round", 0))
    view.memory["round"] = number + 1
    if number % SEARCH_EVERY == 0:
        view.memory["strength"] = min(grid, key=lambda strength: _progress(view, lie(strength)))
    return float(view.memory["strength"])


def _progress(view: View, lie: Tensor) -> float:
    """Return how far the server would move along the honest mean, infinite where nobody knows."""
    assert view.outcome is not None
    assert view.honest is not None
    moved = view.outcome(lie, HORIZON).double()
    progress = float(moved @ view.honest.mean(0).to(moved))
    return math.inf if math.isnan(progress) else progress
