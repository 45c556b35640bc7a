"""What an attack sees in the tests: rows drawn from a seed, under a deployed rule."""

from typing import Any

import torch
from torch import Tensor

from fl_bgmd.aggregators import build_rule
from fl_bgmd.attacks import Pipeline, View, build_attacks


def honest_rows(h: int = 10, d: int = 60, seed: int = 0) -> Tensor:
    """Return rows (h, d) around a mean, as honest updates are."""
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(d, generator=generator, dtype=torch.float64)
    return mean + 0.7 * torch.randn(h, d, generator=generator, dtype=torch.float64)


def deployed(spec: str, honest: Tensor, hostile: int = 4) -> Pipeline:
    """Return the pipeline of a rule without memory, told how many of the rows lie."""
    share = hostile / (hostile + len(honest))

    def pipeline(lies: Tensor, rounds: int = 1) -> Tensor:
        rows = torch.cat([lies.expand(hostile, -1), honest])
        return rounds * build_rule(spec, byzantine_fraction=share)(rows).vector

    return pipeline


def view_of(honest: Tensor, hostile: int = 4, **seen: Any) -> View:
    """Return the view of colluders whose true updates are the last of the honest ones."""
    h = len(honest)
    return View(
        **{
            "update": honest[-1],
            "generator": torch.Generator().manual_seed(0),
            "num_clients": h + hostile,
            "num_byzantine": hostile,
            "colluders": honest[-hostile:],
            "honest": honest,
            "colluder_ids": tuple(range(h, h + hostile)),
            "honest_ids": tuple(range(h)),
            **seen,
        }
    )


def lie_of(spec: str, view: View) -> Tensor:
    """Return what the attack of a spec sends."""
    [bound] = build_attacks(spec)
    return bound.lie(view)
