"""Pre-aggregators: they replace the rows by means of rows before a rule sees them."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fl_bgmd.shares import floor_share

from .coordinates import coordinate_median
from .rows import (
    DENSE_ROWS,
    Block,
    check_fraction,
    check_updates,
    dot,
    empty,
    in_range,
    measure_strips,
    native,
    on_cores,
    pairwise_squared_distances,
    result_dtype,
    sum_blocks,
)

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
class _Dense(Mixing):
    """Means of few rows: the matrix itself."""

    matrix: NDArray[np.float64]

    def apply(self, updates: Tensor, out: Tensor | None = None) -> Tensor:
        shape = (self.matrix.shape[0], updates.shape[1])
        out = empty(shape, updates, result_dtype(updates)) if out is None else out
        target, coefficients = native(out, updates), native(self.matrix, updates)

        def write(columns: slice, block: Block) -> float:
            target[:, columns] = dot(coefficients, block)
            return 0.0

        sum_blocks(write, updates)
        return out

    def average(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        return self.matrix @ values

    def spread(self, shares: NDArray[np.float64]) -> NDArray[np.float64]:
        return shares @ self.matrix


@dataclass(frozen=True)
class _Neighbors(Mixing):
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

        on_cores(mix_columns, d, few=updates.device.type != "cpu")
        return out

    def average(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.concatenate([mask @ values for _, mask in self._strips()]) / self.count

    def spread(self, shares: NDArray[np.float64]) -> NDArray[np.float64]:
        total = np.zeros(len(self.bits))
        for rows, mask in self._strips():
            total += shares[rows] @ mask
        return total / self.count


@dataclass(frozen=True)
class _Buckets(Mixing):
    """Means of disjoint buckets: which one each row is in, (n,), and their sizes, (m,)."""

    bucket: NDArray[np.int64]
    sizes: NDArray[np.int64]

    def apply(self, updates: Tensor, out: Tensor | None = None) -> Tensor:
        m = len(self.sizes)
        shape = (m, updates.shape[1])
        out = empty(shape, updates, result_dtype(updates)) if out is None else out
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
        return np.bincount(self.bucket, values, len(self.sizes)) / self.sizes

    def spread(self, shares: NDArray[np.float64]) -> NDArray[np.float64]:
        return (shares / self.sizes)[self.bucket]


def nearest_neighbor_mixing(updates: Tensor, *, byzantine_fraction: float = 0.25) -> Tensor:
    """Replace every row by the mean of the ``n - f`` rows nearest to it, itself included.

    NNM of Allouah et al. (AISTATS 2023, Algorithm 2), ``f = floor(byzantine_fraction * n)``.
    Rows of heterogeneous clients move towards each other, so the rule behind it faces less spread.
    More than 1,000 rows are compared strip by strip, without an n x n matrix of distances.

    Parameters
    ----------
    updates : Tensor
        (n, d), floating point.
    byzantine_fraction : float
        0 to below 1/2.

    Returns
    -------
    Tensor
        (n, d), in the dtype of the input but never less precise than float32.

    Raises
    ------
    TypeError, ValueError
        For input outside of the above; a row with a NaN or an infinity is named.
    """
    return nearest_neighbors(updates, byzantine_fraction=byzantine_fraction).apply(updates)


def nearest_neighbors(updates: Tensor, *, byzantine_fraction: float = 0.25) -> Mixing:
    """Return the means of :func:`nearest_neighbor_mixing`, not yet taken."""
    updates = check_updates(updates)
    check_fraction("byzantine_fraction", byzantine_fraction, below=0.5)
    n = updates.shape[0]
    count = n - floor_share(byzantine_fraction, n)
    if n <= DENSE_ROWS:
        nearest = np.argsort(pairwise_squared_distances(updates), axis=1, kind="stable")
        matrix = np.zeros((n, n))
        np.put_along_axis(matrix, nearest[:, :count], 1.0 / count, axis=1)
        return _Dense(matrix)
    bits = np.empty((n, (n + 7) // 8), np.uint8)

    def mark(rows: slice, squared: NDArray[np.float64]) -> None:
        bits[rows] = np.packbits(_nearest(squared, count), axis=1)

    safe, _ = in_range(updates)
    measure_strips(mark, safe, coordinate_median(safe).vector)
    return _Neighbors(bits, count)


def _nearest(squared: NDArray[np.float64], count: int) -> NDArray[np.bool_]:
    """Return which ``count`` entries of each row are the smallest, ties to the lower index."""
    limit = np.partition(squared, count - 1, axis=1)[:, count - 1 : count]
    nearest: NDArray[np.bool_] = squared <= limit
    excess = np.count_nonzero(nearest, axis=1) - count
    for i in np.flatnonzero(excess):
        tied = np.flatnonzero(squared[i] == limit[i])
        nearest[i, tied[len(tied) - excess[i] :]] = False
    return nearest


def bucketing(
    updates: Tensor, *, bucket_size: int = 2, generator: torch.Generator | None = None
) -> Tensor:
    """Shuffle the rows and replace each ``bucket_size`` of them by their mean.

    Karimireddy et al. (ICLR 2022), Algorithm 1. The last bucket may be smaller.

    Parameters
    ----------
    updates : Tensor
        (n, d), floating point.
    bucket_size : int
        1 or more. The hostile fraction may grow by this factor.
    generator : torch.Generator, optional
        CPU generator of the shuffle; torch's global one by default.

    Returns
    -------
    Tensor
        (ceil(n / bucket_size), d), never less precise than float32.

    Raises
    ------
    TypeError, ValueError
        For input outside of the above.
    """
    updates = check_updates(updates)
    return buckets(updates.shape[0], bucket_size, generator).apply(updates)


def buckets(n: int, bucket_size: int = 2, generator: torch.Generator | None = None) -> Mixing:
    """Return the means of :func:`bucketing`, not yet taken."""
    if bucket_size < 1:
        raise ValueError(f"bucket_size is {bucket_size}; allowed: 1 or more")
    order = torch.randperm(n, generator=generator).numpy()
    bucket = np.empty(n, np.int64)
    bucket[order] = np.arange(n) // bucket_size
    return _Buckets(bucket, np.bincount(bucket))
