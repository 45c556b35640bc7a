"""A laboratory of attacks, and who runs them when."""

from .roles import SELECTIONS, byzantine_clients
from .updates import ATTACKS, Attack, bit_flip, gaussian

__all__ = [
    "ATTACKS",
    "SELECTIONS",
    "Attack",
    "bit_flip",
    "byzantine_clients",
    "gaussian",
]
