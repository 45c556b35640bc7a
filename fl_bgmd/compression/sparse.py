"""Few of the values and where they are."""

import struct
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fl_bgmd.options import Fraction

from .base import Compressor, Internal, compressor
from .bits import (
    check_length,
    indices_size,
    pack_floats,
    pack_indices,
    unpack_floats,
    unpack_indices,
)


@compressor("top-k")
@dataclass(frozen=True)
class TopK(Compressor):
    """The ``k = max(1, round(fraction d))`` values of largest magnitude and where they are.

    Ghosh et al., Section 3, example 1; Stich et al. (NeurIPS 2018). Message: k float32 values, then
    the indices (:func:`.bits.pack_indices`).

    Parameters
    ----------
    fraction : float
        Share of the coordinates that is sent: above 0 to 1.
    """

    fraction: Fraction = 0.1

    def encode(self, vector: Tensor, generator: torch.Generator | None = None) -> bytes:
        """Return values and indices."""
        sizes = vector.detach().abs()
        sizes = sizes if sizes.dtype == torch.float64 else sizes.float()  # NumPy has no bfloat16
        chosen = _largest(sizes.numpy(), _count(self.fraction, len(vector)))
        values = pack_floats(vector[torch.from_numpy(chosen)])
        return values + pack_indices(chosen, len(vector)).tobytes()

    def decode(self, data: bytes, size: int) -> Tensor:
        """Return the values in their places, 0 elsewhere."""
        check_length(data, self.num_bytes(size), self.name)
        k = _count(self.fraction, size)
        values = unpack_floats(data[: 4 * k], k)
        indices = unpack_indices(np.frombuffer(data, np.uint8, offset=4 * k), k, size)
        result = np.zeros(size, np.float32)
        result[indices] = values
        return torch.from_numpy(result)

    def num_bytes(self, size: int) -> int:
        """Return 4 bytes a value and about ``log2(1 / fraction) + 2`` bits an index."""
        k = _count(self.fraction, size)
        return 4 * k + indices_size(k, size)

    def delta(self, size: int) -> float:
        """Return k / d."""
        return _count(self.fraction, size) / size


@compressor("scaled-rand-k", scaled=True)
@compressor("rand-k", scaled=False)
@dataclass(frozen=True)
class RandK(Compressor):
    """``k = max(1, round(fraction d))`` random coordinates; ``scaled`` by d / k: unbiased.

    Stich et al. (2018); scaled: Data and Diggavi, Section 5.2, with
    ``E ||Q(x) - x||^2 = (d / k - 1) ||x||^2`` (Lemma 2). Message: the seed of the coordinates and k
    float32 values. With ``seed`` set the coordinates are the server's and the message holds the
    values alone (their Algorithm 2).

    Parameters
    ----------
    fraction : float
        Share of the coordinates that is sent: above 0 to 1.
    scaled : bool
        Whether the values are scaled by d / k.
    seed : int, optional
        What the server's coordinates are drawn from.
    """

    fraction: Fraction = 0.1
    scaled: bool = False
    seed: Annotated[int | None, Internal] = None
    can_share_coordinates: ClassVar[bool] = True

    def for_round(self, seed: int) -> Self:
        """Return the compressor whose coordinates the server's ``seed`` stands for."""
        return replace(self, seed=seed)

    def coordinates(self, size: int) -> NDArray[np.int64] | None:
        """Return the k coordinates that the server chose, ascending; None if it did not."""
        return None if self.seed is None else self._drawn(size, self.seed)

    def scale(self, size: int) -> float:
        """Return d / k if ``scaled``."""
        return size / _count(self.fraction, size) if self.scaled else 1.0

    def as_plain(self, update: Tensor) -> Tensor:
        """Return ``update`` by k / d where the server chose the coordinates and scales by d / k."""
        if not self.scaled or self.seed is None:
            return update
        return update * (_count(self.fraction, len(update)) / len(update))

    def _drawn(self, size: int, seed: int) -> NDArray[np.int64]:
        """Return the k coordinates that a seed stands for, ascending."""
        k = _count(self.fraction, size)
        chosen = np.random.default_rng(seed).choice(size, k, replace=False, shuffle=False)
        chosen.sort()
        return chosen

    def encode(self, vector: Tensor, generator: torch.Generator | None = None) -> bytes:
        """Return the values, after the seed unless the server chose it."""
        seed, head = self.seed, b""
        if seed is None:
            seed = int(torch.randint(2**62, (1,), generator=generator))
            head = struct.pack("<Q", seed)
        values = vector[torch.from_numpy(self._drawn(len(vector), seed))]
        if self.scaled:
            values = values * self.scale(len(vector))
        return head + pack_floats(values)

    def decode(self, data: bytes, size: int) -> Tensor:
        """Return the values in their places, 0 elsewhere."""
        check_length(data, self.num_bytes(size), self.name)
        seed = struct.unpack_from("<Q", data)[0] if self.seed is None else self.seed
        values = unpack_floats(data[8 if self.seed is None else 0 :], _count(self.fraction, size))
        result = np.zeros(size, np.float32)
        result[self._drawn(size, seed)] = values
        return torch.from_numpy(result)

    def num_bytes(self, size: int) -> int:
        """Return 4 bytes a value and 8 for the seed."""
        return 4 * _count(self.fraction, size) + (8 if self.seed is None else 0)

    def delta(self, size: int) -> float:
        """Return k / d; scaled: ``2 - d / k``, 0 where that is negative."""
        share = _count(self.fraction, size) / size
        return max(0.0, 2 - 1 / share) if self.scaled else share


def _largest(sizes: NDArray[np.floating], count: int) -> NDArray[np.int64]:
    """Return where the ``count`` largest values are, ascending; of equal ones the first."""
    least = np.partition(sizes, len(sizes) - count)[len(sizes) - count]
    above = np.flatnonzero(sizes > least)
    if len(above) == count:
        return above
    equal = np.flatnonzero(sizes == least)[: count - len(above)]
    chosen = np.concatenate([above, equal])
    chosen.sort()
    return chosen


def _count(fraction: float, size: int) -> int:
    return min(size, max(1, round(fraction * size)))
