"""Attacks of colluders that look at how the server moved: everybody sees the models it sends."""

import math
from typing import Annotated, Any

import torch
from annotated_types import Ge, Le
from torch import Tensor

from fl_bgmd.options import Count, Fraction

from .attack import Strength, attack

_SIGNIFICANT = 2.326
"""Standard deviations that a normal variable exceeds with a probability of 1 %."""

_LEAST = 0.5
"""The authors' code shrinks its factor no further."""


@attack("Xie, Fang and Gong (PoisonedFL, CVPR 2025), Section 4", sweep=(1.0, 8.0))
def consistent(
    colluders: Tensor,
    last_step: Tensor | None,
    memory: dict[str, Any],
    generator: torch.Generator,
    factor: Strength = 8.0,
    every: Count = 50,
    shrink: Fraction = 0.7,
) -> Tensor:
    """Push into one random direction of signs in all rounds, with magnitudes that adapt.

    Nothing of honest clients is needed. The magnitudes are those of what the others are thought to
    have moved: the server's last step less the last lie at the step's length. The lie is ``c``
    times as long as the step; c starts as ``factor`` and shrinks when the signs of what the server
    moved in the last ``every`` rounds agree with the direction no more often than by chance (1 %).
    In the first round, before any step, the colluders' mean is sent.

    Parameters
    ----------
    colluders : Tensor
        (m, d): their true updates.
    last_step : Tensor or None
        (d,): how far the server moved in the round before.
    memory : dict
        Its own, from round to round.
    generator : torch.Generator
        What the direction is drawn from, once.
    factor : float
        Length of a lie relative to the server's last step, to begin with.
    every : int
        Rounds between two looks at what has come of it.
    shrink : float
        What the factor is multiplied by where it was in vain, not below 0.5.
    """
    if "seed" not in memory:
        memory["seed"] = int(torch.randint(2**31, (1,), generator=generator))
    if last_step is None:
        return colluders.mean(0)
    signs = signs_of(memory["seed"], len(last_step)).to(last_step)
    moved = last_step + memory.get("moved", 0.0)
    rounds = int(memory.get("rounds", 0)) + 1
    scale = float(memory.get("factor", factor))
    if rounds == every:
        if not _is_followed(moved, signs) and scale * shrink >= _LEAST:
            scale *= shrink
        moved, rounds = torch.zeros_like(moved), 0
    length = float(torch.linalg.vector_norm(last_step))
    others = last_step
    if (last := memory.get("lie")) is not None:
        others = last_step - torch.nn.functional.normalize(last, dim=0) * length
    lie = scale * length * torch.nn.functional.normalize(others.abs(), dim=0) * signs
    memory.update(moved=moved, rounds=rounds, factor=scale, lie=lie)
    return lie.to(colluders.dtype)


def signs_of(seed: int, size: int) -> Tensor:
    """Return the direction (size,) of a seed: 1 or -1 in each coordinate, both as likely."""
    generator = torch.Generator().manual_seed(seed)
    return 2.0 * torch.randint(2, (size,), generator=generator) - 1.0


def _is_followed(moved: Tensor, signs: Tensor) -> bool:
    """Whether more coordinates of ``moved`` have these signs than in 99 % of random directions."""
    count = len(signs)
    return int((moved * signs > 0).sum()) > count / 2 + _SIGNIFICANT * math.sqrt(count) / 2


@attack("Ozfatura et al. (ROP, arXiv 2208.09894), Section 4", sweep=(0.5, 1.0, 3.0))
def rop(
    honest: Tensor,
    last_step: Tensor | None,
    scale: Strength = 1.0,
    angle: Annotated[float, Ge(0), Le(180)] = 90.0,
    history: Annotated[float, Ge(0), Le(1)] = 0.9,
    relocation: Annotated[float, Ge(0), Le(1)] = 1.0,
) -> Tensor:
    """Perturb the server's last step at an angle to where the honest updates go.

    Relocated orthogonal perturbation, against rules that look back, such as centered clipping: it
    is near what they clip to, and across the direction in which they would notice it. With the last
    step m' and the honest mean m, the reference is ``history * m' + (1 - history) * m``. The
    perturbation has ``angle`` to it, in the plane of the reference and the vector of ones, and
    starts from ``relocation * m' + (1 - relocation) * m``. In the first round m' is m. The paper's
    length z is absolute; here it is relative to the spread, so that units do not matter.

    Parameters
    ----------
    honest : Tensor
        (h, d).
    last_step : Tensor or None
        (d,): how far the server moved in the round before.
    scale : float
        Length of the perturbation in root mean squared distances of an honest update to their mean.
    angle : float
        Between the perturbation and the reference, in degrees.
    history : float
        Share of the last step in the reference (the paper's lambda).
    relocation : float
        Share of the last step in the point that is perturbed.
    """
    mean = honest.mean(0, dtype=torch.float64)
    last = mean if last_step is None else last_step.double()
    reference = torch.nn.functional.normalize(history * last + (1 - history) * mean, dim=0)
    ones = torch.ones_like(mean)
    across = torch.nn.functional.normalize(ones - (ones @ reference) * reference, dim=0)
    turn = math.radians(angle)
    direction = math.sin(turn) * across + math.cos(turn) * reference
    spread = float((honest.double() - mean).square().sum(1).mean().sqrt())
    start = relocation * last + (1 - relocation) * mean
    return (start + scale * spread * direction).to(honest.dtype)
