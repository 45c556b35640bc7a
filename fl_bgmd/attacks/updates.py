"""Attacks that need nothing but the client's own update ``g``: what it sends instead of it.

They run on the client itself (:class:`fl_bgmd.mods.ByzantineMod`), in simulations and on real
nodes alike.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fl_bgmd.options import Count, Fraction

from .attack import Strength, attack

HUGE = 1e30

_BGMD = "Acharya et al. (BGMD), Section 7"


@attack(_BGMD, sweep=(1.5, 5.0, 100.0), authors_code={"": 5.0})
def bit_flip(update: Tensor, scale: Strength = 100.0) -> Tensor:
    """Return ``-scale * update``: flipped sign, inflated.

    Parameters
    ----------
    update : Tensor
        (d,).
    scale : float
        Factor.
    """
    return -scale * update


@attack(_BGMD, sweep=(0.01, 0.1, 10.0), authors_code={"cifar10": 100.0})
def gaussian(
    update: Tensor, std: Strength = 10.0, generator: torch.Generator | None = None
) -> Tensor:
    """Return ``update + N(0, std^2)`` in every coordinate: the paper's noise of variance 100.

    Parameters
    ----------
    update : Tensor
        (d,).
    std : float
        Standard deviation.
    generator : torch.Generator, optional
        Torch's global one by default.
    """
    return update + std * _normal(update, generator)


@attack("Blanchard et al. (NeurIPS 2017), Section 5", sweep=(0.01, 0.1, 10.0, 200.0))
def replace_gaussian(
    update: Tensor, std: Strength = 200.0, generator: torch.Generator | None = None
) -> Tensor:
    """Return ``N(0, std^2)`` in every coordinate.

    Parameters
    ----------
    update : Tensor
        (d,).
    std : float
        Standard deviation.
    generator : torch.Generator, optional
        Torch's global one by default.
    """
    return std * _normal(update, generator)


@attack("Ghosh et al., Section 8", sweep=(0.5, 0.9, 2.0))
def ascent(update: Tensor, eps: Strength = 0.9) -> Tensor:
    """Return ``-eps * update``: gradient ascent.

    Parameters
    ----------
    update : Tensor
        (d,).
    eps : float
        Length relative to the update (0 to 1 in the paper).
    """
    return -eps * update


@attack("Li et al. (AAAI 2019)")
def sign_flip(update: Tensor) -> Tensor:
    """Return ``-update`` (d,): of ordinary size, no norm gives it away."""
    return -update


@attack("common")
def zero(update: Tensor) -> Tensor:
    """Return zeros (d,): the client trained and withholds it."""
    return torch.zeros_like(update)


@attack("common", sweep=(1.0, 10.0))
def random(
    update: Tensor, scale: Strength = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """Return a random direction, ``scale`` times as long as the update.

    Parameters
    ----------
    update : Tensor
        (d,).
    scale : float
        Length relative to the update.
    generator : torch.Generator, optional
        Torch's global one by default.
    """
    noise = _normal(update, generator).double()
    length = float(torch.linalg.vector_norm(noise))
    norm = float(torch.linalg.vector_norm(update, dtype=torch.float64))
    return (noise * (scale * norm / length if length > 0 else 0.0)).to(update.dtype)


@attack("common")
def nan(update: Tensor) -> Tensor:
    """Return NaN in every coordinate (d,)."""
    return torch.full_like(update, math.nan)


@attack("ByzFL")
def inf(update: Tensor) -> Tensor:
    """Return infinity in every coordinate (d,)."""
    return torch.full_like(update, math.inf)


@attack("this project", sweep=(1e6, HUGE))
def huge(update: Tensor, size: Strength = HUGE) -> Tensor:
    """Return ``-size`` times the sign of the update.

    Parameters
    ----------
    update : Tensor
        (d,).
    size : float
        Absolute value, at most the largest of the dtype.
    """
    size = min(size, torch.finfo(update.dtype).max)
    return -size * torch.where(update == 0, 1.0, update.sign()).to(update.dtype)


@attack("Fraboni et al. (AISTATS 2021)", untrained=True)
def free_rider(update: Tensor) -> Tensor:
    """Return zeros (d,): the model as it was received, statistics of its layers included."""
    return torch.zeros_like(update)


@attack("common", sweep=(1, 5))
def delayed(update: Tensor, past: Sequence[Tensor], rounds: Count = 5) -> Tensor:
    """Return the update of some rounds ago: the oldest there is of the last ``rounds``.

    Parameters
    ----------
    update : Tensor
        (d,): sent while there is no past one.
    past : sequence of Tensor
        Earlier updates, oldest first.
    rounds : int
        How many rounds ago.
    """
    return past[-rounds:][0] if past else update


@attack("this project", sweep=(0.01, 1.0, 1e4))
def block_hijack(update: Tensor, size: Strength = 1e4, share: Fraction = 0.1) -> Tensor:
    """Return the update with ``size`` in a fixed random ``share`` of the coordinates.

    Against rules that choose coordinates by their norm (BGMD, Algorithm 2): the hostile clients,
    who choose the coordinates alike, own the block, and the model learns on those only. This
    project's own.

    Parameters
    ----------
    update : Tensor
        (d,).
    size : float
        Value of the chosen coordinates.
    share : float
        Share of the coordinates.
    """
    d = update.shape[0]
    chosen = torch.randperm(d, generator=torch.Generator().manual_seed(d))[: max(1, int(share * d))]
    hijacked = update.clone()
    hijacked[chosen] = size
    return hijacked


def _normal(update: Tensor, generator: torch.Generator | None) -> Tensor:
    noise = torch.randn(update.shape, generator=generator, dtype=torch.float32)
    return noise.to(update)
