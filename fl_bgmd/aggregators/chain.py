"""A chain of mixings as one: their matrices on the rows' Gram matrix, the rows touched once.

Mixings that bring rows closer to an origin or to each other take affine combinations of the rows
and the origin. With ``K`` the Gram matrix of those, relative to any point, and ``B`` the
combinations, ``B K B^T`` is the Gram matrix of the mixed rows: the next mixing finds its norms and
distances there, and the rows themselves are mixed at the end, by the product of all matrices.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .means import Dense, Mixing, add_to_rows
from .rows import (
    bordered_gram,
    check_updates,
    densest_row,
    in_range,
    prefers_gram,
    squared_distances,
)

Array = NDArray[np.float64]

_MOST_OFFSET = 1e4  # spreads from the point that the Gram matrix is relative to


class DigitsLostError(ArithmeticError):
    """The rows have come so near to each other that their Gram matrix does not tell them apart."""


class Points:
    """Few rows and what mixings have made of them, known by their Gram matrix.

    Parameters
    ----------
    rows : Tensor
        (n, d), floating point, safe to square.
    origin : Tensor or None
        (d,): the point that rows are clipped to; zero by default.

    Attributes
    ----------
    matrix : ndarray
        (n, n): how much the mixed rows hold of each row; the rest of each is the origin.
    """

    def __init__(self, rows: Tensor, origin: Tensor | None = None) -> None:
        n, d = rows.shape
        point = torch.zeros(d, dtype=torch.float64, device=rows.device)
        self._bordered = bordered_gram(rows, point if origin is None else origin.double())
        self.matrix = np.eye(n)
        self._gram = self._bordered

    def __len__(self) -> int:
        """Return n."""
        return len(self.matrix)

    def mix(self, mixing: Mixing) -> None:
        """Apply a mixing that keeps rows."""
        n = len(self)
        self.matrix = np.stack([mixing.spread(row) for row in np.eye(n)]) @ self.matrix
        whole = np.zeros((n + 1, n + 1))
        whole[:n, :n], whole[:n, n], whole[n, n] = self.matrix, 1 - self.matrix.sum(axis=1), 1.0
        self._gram = whole @ self._bordered @ whole.T

    def norms(self) -> Array:
        """Return the distances to the origin, (n,)."""
        gram = self._gram
        squared = np.diagonal(gram) - 2 * gram[-1] + gram[-1, -1]
        return np.asarray(np.sqrt(np.maximum(squared[:-1], 0.0)))

    def squared_distances(self) -> Array:
        """Return those between the mixed rows, (n, n)."""
        squared = squared_distances(self._gram[:-1, :-1])
        middle, radius = densest_row(squared, len(squared) // 2 + 1)
        if self._gram[middle, middle] > _MOST_OFFSET**2 * radius:
            raise DigitsLostError
        return squared

    def gram(self) -> Array:
        """Return the Gram matrix of the mixed rows, one of them in their middle the origin."""
        squared = self.squared_distances()
        middle, _ = densest_row(squared, len(squared) // 2 + 1)
        gram = self._gram[:-1, :-1]
        return np.asarray(gram - gram[middle] - gram[:, middle, None] + gram[middle, middle])


@dataclass(frozen=True)
class Chain(Mixing):
    """Several mixings in a row.

    Attributes
    ----------
    parts : tuple of Mixing
        In their order.
    matrix : ndarray
        (n, n): see :attr:`Points.matrix`.
    origin : Tensor or None
        (d,): what the rest of each row is.
    """

    parts: tuple[Mixing, ...]
    matrix: Array
    origin: Tensor | None

    def apply(self, updates: Tensor, out: Tensor | None = None) -> Tensor:
        """See :class:`Mixing`."""
        mixed = Dense(self.matrix).apply(updates, out)
        if self.origin is not None:
            add_to_rows(mixed, 1.0 - self.matrix.sum(axis=1), self.origin)
        return mixed

    def average(self, values: Array) -> Array:
        """See :class:`Mixing`."""
        for part in self.parts:
            values = part.average(values)
        return values

    def spread(self, shares: Array) -> Array:
        """See :class:`Mixing`."""
        return shares @ self.matrix


def chained(
    mixings: Sequence[Any], updates: Tensor, origin: Tensor | None, **inputs: Any
) -> Chain | None:
    """Return mixings as one; None where they must be applied one by one.

    That is where the Gram matrix of this many rows costs more, where the rows' squares are out of
    range, and where digits would be lost.
    """
    updates = check_updates(updates)
    if not prefers_gram(updates):
        return None
    rows, scales = in_range(updates)
    if (scales != 1.0).any():
        return None
    points, parts = Points(rows, origin), []
    try:
        for mixing in mixings:
            parts.append(mixing(updates=points, origin=origin, **inputs))
            points.mix(parts[-1])
    except DigitsLostError:
        return None
    return Chain(tuple(parts), points.matrix, origin)
