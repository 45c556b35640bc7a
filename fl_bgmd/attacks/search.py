"""Strengths that are tried on the rule, not chosen beforehand."""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import Tensor

from .view import Pipeline

SEARCH_EVERY = 12
"""Rounds that an attack is played with the strength it has found, unless it is told otherwise."""

HORIZON = 6
"""Rounds that each strength is tried for: what enters a memory does its harm later."""


S = TypeVar("S")


def honest_mean(honest: Tensor, memory: dict[str, Any]) -> Tensor:
    """Return the running mean (d,) of the means of ``honest`` (h, d); keep it in the memory."""
    now = honest.mean(0)
    before = memory.get("running-mean")
    running = now if before is None else 0.9 * before + 0.1 * now
    memory["running-mean"] = running
    return running


def searched(
    lie: Callable[[S], Tensor],
    strengths: Sequence[S],
    honest: Tensor,
    memory: dict[str, Any],
    pipeline: Pipeline | None,
    every: int = SEARCH_EVERY,
    *,
    blind: S | None = None,
) -> S:
    """Return the one of the strengths that harms most, searched in every ``every``-th round.

    Harm is progress lost: what the server would move by in :data:`HORIZON` rounds, along the mean
    of the honest updates. The first of equals wins.

    Parameters
    ----------
    lie : callable
        ``strength -> (d,)``, or (m, d) where each player sends its own.
    strengths : sequence
        What to try: numbers, or tuples of plain values.
    honest : Tensor
        (h, d): the updates of the honest clients.
    memory : dict
        Where the search keeps what it has found.
    pipeline : Pipeline or None
        See :class:`.view.View`.
    every : int
        Rounds that an attack is played with the strength it has found.
    blind : optional
        The strength where there is no rule to be tried.

    Raises
    ------
    ValueError
        Where there is no rule to be tried, and no ``blind`` strength.
    """
    if pipeline is None:
        if blind is not None:
            return blind
        raise ValueError(
            "the strength is None (searched) and the grid was not told the server's rule; allowed: "
            "a strength, or a grid with preview="
        )
    number = int(memory.get("round", 0))
    memory["round"] = number + 1
    if number % every == 0:
        memory["strength"] = min(strengths, key=lambda s: _progress(lie(s), honest, pipeline))
    strength: S = memory["strength"]
    return strength


def _progress(lie: Tensor, honest: Tensor, pipeline: Pipeline) -> float:
    """Return how far the server would move along the honest mean, infinite where nobody knows."""
    moved = pipeline(lie, HORIZON).double()
    progress = float(moved @ honest.mean(0).to(moved))
    return math.inf if math.isnan(progress) else progress
