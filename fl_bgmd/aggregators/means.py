"""The matrices that mixings multiply the rows by, held as compactly as they can be."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fl_bgmd.shards import Sharded

from .rows import Block, combine, dot, empty, native, on_cores, result_dtype, sum_blocks

_MASK_ELEMENTS = 1 << 20  # of a strip of neighbors: 8 MiB in float64


class Mixing(ABC):
    """m means of n rows: the (m, n) matrix that takes them, held as compactly as it can be."""

    @abstractmethod
    def apply(self, updates: Tensor, out: Tensor | None = None) -> Tensor:
        """Return the matrix times the rows, (m, d), summed in float64.

        ``out`` may be ``updates`` itself when m = n: mixing then needs no second n x d matrix.
        """

    @abstractmethod
    def average(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the matrix times one value for each row, (m,)."""

    @abstractmethod
    def spread(self, shares: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return what ``shares`` of the means, (m,), are of the rows, (n,): times the matrix."""


@dataclass(frozen=True)
class Dense(Mixing):
    """Means of few rows: the matrix itself."""

    matrix: NDArray[np.float64]

    def apply(self, updates: Tensor, out: Tensor | None = None) -> Tensor:
        """See :class:`Mixing`."""
        shape = (self.matrix.shape[0], updates.shape[1])
        out = empty(shape, updates, result_dtype(updates)) if out is None else out
        target, coefficients = native(out, updates), native(self.matrix, updates)

        def write(columns: slice, block: Block) -> float:
            target[:, columns] = dot(coefficients, block)
            return 0.0

        sum_blocks(write, updates)
        return out

    def average(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """See :class:`Mixing`."""
        return self.matrix @ values

    def spread(self, shares: NDArray[np.float64]) -> NDArray[np.float64]:
        """See :class:`Mixing`."""
        return shares @ self.matrix


@dataclass(frozen=True)
class Neighbors(Mixing):
    """Means of the ``count`` nearest of many rows: one bit for each pair, (n, n / 8) bytes."""

    bits: NDArray[np.uint8]
    count: int

    def _strips(self) -> Any:
        """Yield strips of rows with their part of the matrix, times ``count``."""
        n = len(self.bits)
        height = max(1, _MASK_ELEMENTS // n)
        for start in range(0, n, height):
            rows = slice(start, min(start + height, n))
            yield rows, np.unpackbits(self.bits[rows], axis=1, count=n).astype(np.float64)

    def apply(self, updates: Tensor, out: Tensor | None = None) -> Tensor:
        """See :class:`Mixing`."""
        out = empty(tuple(updates.shape), updates, result_dtype(updates)) if out is None else out
        d = updates.shape[1]
        target = native(out, updates)
        # Wide blocks: the bits are unpacked once for each.
        width = max(64, d // 8)

        def mix_columns(part: slice) -> None:
            for start in range(part.start, part.stop, width):
                columns = slice(start, min(start + width, part.stop))
                block = native(updates[:, columns].to(torch.float64, copy=True), updates)
                for rows, mask in self._strips():
                    target[rows, columns] = dot(native(mask, updates), block) / self.count

        on_cores(mix_columns, d, elements=len(out) ** 2 * d if updates.device.type == "cpu" else 0)
        return out

    def average(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """See :class:`Mixing`."""
        return np.concatenate([mask @ values for _, mask in self._strips()]) / self.count

    def spread(self, shares: NDArray[np.float64]) -> NDArray[np.float64]:
        """See :class:`Mixing`."""
        total = np.zeros(len(self.bits))
        for rows, mask in self._strips():
            total += shares[rows] @ mask
        return total / self.count


@dataclass(frozen=True)
class Buckets(Mixing):
    """Means of disjoint buckets: which one each row is in, (n,), and their sizes, (m,)."""

    bucket: NDArray[np.int64]
    sizes: NDArray[np.int64]

    def apply(self, updates: Tensor, out: Tensor | None = None) -> Tensor:
        """See :class:`Mixing`; into the first m rows of ``out``."""
        m = len(self.sizes)
        shape = (m, updates.shape[1])
        out = empty(shape, updates, result_dtype(updates)) if out is None else out[:m]
        target = native(out, updates)
        on_cpu = updates.device.type == "cpu"
        order, starts = np.argsort(self.bucket, kind="stable"), np.cumsum(self.sizes) - self.sizes
        bucket, sizes = native(self.bucket, updates), native(self.sizes[:, None], updates)

        def write(columns: slice, block: Block) -> float:
            if on_cpu:
                sums = np.add.reduceat(block[order], starts, axis=0)
            else:
                sums = block.new_zeros((m, block.shape[1])).index_add_(0, bucket, block)
            target[:, columns] = sums / sizes
            return 0.0

        sum_blocks(write, updates)
        return out

    def average(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """See :class:`Mixing`."""
        return np.bincount(self.bucket, values, len(self.sizes)) / self.sizes

    def spread(self, shares: NDArray[np.float64]) -> NDArray[np.float64]:
        """See :class:`Mixing`."""
        return (shares / self.sizes)[self.bucket]


@dataclass(frozen=True)
class Scaled(Mixing):
    """Each row by itself, brought closer to the origin: ``factors`` (n,), 0 to 1."""

    factors: NDArray[np.float64]

    def apply(self, updates: Tensor, out: Tensor | None = None) -> Tensor:
        """See :class:`Mixing`."""
        return _toward(self.factors, None, updates, out)

    def average(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the values: each row still stands for its client alone."""
        return values

    def spread(self, shares: NDArray[np.float64]) -> NDArray[np.float64]:
        """See :class:`Mixing`."""
        return shares * self.factors


@dataclass(frozen=True)
class Toward(Mixing):
    """Each row brought closer to a ``center`` (d,).

    It is ``weights`` (n,) of the rows, and computed from them where it is None; all 0 for one that
    is not made of the rows.
    """

    factors: NDArray[np.float64]
    weights: NDArray[np.float64]
    center: Tensor | None = None

    def apply(self, updates: Tensor, out: Tensor | None = None) -> Tensor:
        """See :class:`Mixing`."""
        center = self.center
        if center is None:
            center = combine(self.weights, updates, torch.float64)
        return _toward(self.factors, center, updates, out)

    def average(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the values: each row still stands for its client, above all."""
        return values

    def spread(self, shares: NDArray[np.float64]) -> NDArray[np.float64]:
        """See :class:`Mixing`."""
        return shares * self.factors + float(shares @ (1.0 - self.factors)) * self.weights


def _toward(
    factors: NDArray[np.float64], center: Tensor | None, updates: Tensor, out: Tensor | None
) -> Tensor:
    """Return ``center + factors_i (x_i - center)`` for each row, (n, d)."""
    out = empty(tuple(updates.shape), updates, result_dtype(updates)) if out is None else out
    target, scale = native(out, updates), native(factors[:, None], updates)
    middle = None if center is None else native(center.double(), updates)

    def write(columns: slice, block: Block) -> float:
        moved = block * scale
        if middle is not None:
            moved += (1.0 - scale) * middle[columns]
        target[:, columns] = moved
        return 0.0

    sum_blocks(write, updates)
    return out


@dataclass(frozen=True)
class Recentered(Mixing):
    """The rows as they are; mixings behind it take ``origin`` (d,) for zero."""

    origin: Tensor | None

    def apply(self, updates: Tensor, out: Tensor | None = None) -> Tensor:
        """Return the rows."""
        return updates

    def average(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the values."""
        return values

    def spread(self, shares: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the shares."""
        return shares


def mixed(mixing: Mixing, updates: Tensor, out: Tensor | None = None) -> Tensor:
    """Return what a mixing makes of rows, also of sharded ones: see :meth:`Mixing.apply`."""
    if not isinstance(updates, Sharded) or isinstance(mixing, Recentered):
        return mixing.apply(updates, out)
    rows, dtype = len(mixing.average(np.zeros(len(updates)))), result_dtype(updates)
    over = out is not None
    return updates.made(_mixed_shard, mixing, over, rows=rows, dtype=dtype, instead=over)


def _mixed_shard(updates: Tensor, mixing: Mixing, over: bool) -> Tensor:
    return mixing.apply(updates, updates if over else None)


def add_to_rows(rows: Tensor, shares: NDArray[np.float64], vector: Tensor) -> None:
    """Add ``shares[i] * vector`` to each row, in place."""
    target, factors = native(rows, rows), native(shares[:, None], rows)
    added = native(vector.double().to(rows.device), rows)

    def write(columns: slice, block: Block) -> float:
        block += factors * added[columns]
        target[:, columns] = block
        return 0.0

    sum_blocks(write, rows)
