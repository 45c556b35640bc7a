"""Attacks on the update: what a hostile client sends instead of the ``g`` it trained.

An attack is a function ``(update, strength, generator) -> update`` on flat float tensors, entered
into :data:`ATTACKS` under its kebab-case name.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Attack:
    """An entry of the laboratory.

    Attributes
    ----------
    name : str
        Kebab-case.
    apply : callable
        ``(update (d,), strength, generator) -> (d,)``.
    strength : float
        The paper's value of its knob.
    """

    name: str
    apply: Callable[[Tensor, float, torch.Generator], Tensor]
    strength: float


def bit_flip(update: Tensor, scale: float = 100.0) -> Tensor:
    """Return ``-scale * update``: flipped sign, inflated.

    Acharya et al. (BGMD), Section 7, use a scale of 100 (their code: 5).
    """
    return -scale * update


def gaussian(update: Tensor, std: float = 10.0, generator: torch.Generator | None = None) -> Tensor:
    """Return ``update + N(0, std^2)`` in every coordinate.

    Acharya et al. (BGMD), Section 7: additive noise of variance 100 (their code: std 10 and 100).
    """
    noise = torch.randn(update.shape, generator=generator, dtype=torch.float32)
    return update + std * noise.to(update)


ATTACKS: dict[str, Attack] = {
    attack.name: attack
    for attack in (
        Attack("bit-flip", lambda update, scale, _: bit_flip(update, scale), 100.0),
        Attack("gaussian", gaussian, 10.0),
    )
}
"""Attacks by name."""
