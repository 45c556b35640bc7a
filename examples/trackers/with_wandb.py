"""Figures of each round in W&B, offline: ``wandb sync`` uploads them when there is a network."""

from collections.abc import Callable

import wandb


def wandb_figures(project: str, folder: str = ".") -> Callable[[int, dict[str, float]], None]:
    """Return an ``on_round`` that writes to a W&B run in ``folder``."""
    run = wandb.init(project=project, dir=folder, mode="offline")
    return lambda number, figures: run.log(figures, step=number)
