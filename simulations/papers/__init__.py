"""The experiments of the papers: tables as study files, and figures that are no study.

A table is a file beside this one (see :mod:`simulations.study`). A figure computes on problems of
its own, without a federated run; :data:`FIGURES` has them by name.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..report.drawing import Done

__all__ = ["FIGURES", "Figure", "reproduce_figure"]


@dataclass(frozen=True)
class Figure:
    """Where a figure is drawn.

    Attributes
    ----------
    module, function : str
        ``function(folder, seeds=..., done=...)`` writes ``table.md`` and pictures and returns the
        table's path.
    seeds : int
        How many draws, calls or runs it takes by default.
    takes_jobs : bool
        Whether it computes several runs at a time: it takes ``jobs`` too.
    """

    module: str
    function: str
    seeds: int
    takes_jobs: bool = False


FIGURES: Mapping[str, Figure] = {
    "fig-toy": Figure("figures", "draw_toy", 200),
    "fig-complexity": Figure("figures", "draw_complexity", 5),
    "fig-breakdown": Figure("figures", "draw_breakdown", 5),
    "fig-tolerance": Figure("figures", "draw_tolerance", 3),
    "fig-speedup": Figure("figures", "draw_speedup", 2),
    "theory-bgmd": Figure("theory", "draw_bgmd", 20),
    "theory-ghosh": Figure("theory", "draw_ghosh", 3),
    "data-diggavi": Figure("diggavi", "reproduce_diggavi", 3),
    "ghosh-regression": Figure("ghosh", "reproduce_regression", 20, takes_jobs=True),
    "ghosh-mnist": Figure("ghosh", "reproduce_mnist", 5, takes_jobs=True),
    "ghosh-mnist-full-batch": Figure("ghosh", "reproduce_full_batch", 1, takes_jobs=True),
}


def reproduce_figure(name: str, folder: Path, *, seeds: int | None, jobs: int, done: Done) -> Path:
    """Draw a figure of :data:`FIGURES` into ``folder``; return its table.

    ``done`` is called with a line after each step; ``seeds`` None: as many as the figure takes.
    """
    figure = FIGURES[name]
    draw = getattr(importlib.import_module(f".{figure.module}", __name__), figure.function)
    more: dict[str, Any] = {"jobs": jobs} if figure.takes_jobs else {}
    table: Path = draw(folder, seeds=seeds or figure.seeds, done=done, **more)
    return table
