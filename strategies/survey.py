"""How long the updates of a round are and how far from the aggregate, in one pass over the rows.

The distances are wanted after the rule. Where mixings overwrite the rows before, a sketch of each
is kept (Charikar, Chen and Farach-Colton's CountSketch: sums of columns with random signs), whose
distances are those of the rows to a few percent. Rows no wider than a sketch are kept themselves.
"""

import math
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fl_bgmd.aggregators.norms import euclidean_norms
from fl_bgmd.aggregators.rows import (
    Block,
    native,
    numbers,
    squared_sizes,
    sum_blocks,
    vector_norm,
)

WIDTH = 2048
"""Columns of a sketch: a distance is right to about 1 / sqrt(2048), 2 %."""

_FOLDS = 64
"""Times :data:`WIDTH`: how many columns of a row are read at a time."""

_READ = 2**20
"""Numbers that are read at a time: more do not fit a core's cache."""

_MOST_NUMBERS = 2**23
"""Of all the rows' sketches: with more rows they are narrower, and distances less precise."""

_CANCELS = 1e-2
"""Which part of the squares that it is the difference of the square of a distance must be."""

_TINY = 1e-30
"""Squares below lose digits in float32, whose range ends not far from there."""


@dataclass(frozen=True)
class Survey:
    """What is known of the rows of a round.

    Attributes
    ----------
    norms : ndarray
        float64 (n,): Euclidean norms. Infinite only beyond the range of float64.
    distances : ndarray or None
        float64 (n,): from the aggregate; None where they are not wanted, or there is none.
    """

    norms: NDArray[np.float64]
    distances: NDArray[np.float64] | None = None

    @classmethod
    def of(cls, rows: Tensor, vector: Tensor | None) -> Self:
        """Compare the rows (n, d) with the aggregate (d,), if there is one."""
        if vector is None:
            return cls(euclidean_norms(rows))
        squares, apart = _compared(rows, vector)
        norms, distances = np.sqrt(squares), np.sqrt(apart)
        for row in np.flatnonzero(~np.isfinite(apart)):
            norms[row] = vector_norm(rows[row])
            distances[row] = _distance(rows[row], vector)
        return cls(norms, distances)


@dataclass(frozen=True)
class Sketch:
    """What is kept of rows that are going to be overwritten.

    Attributes
    ----------
    norms : ndarray
        float64 (n,): Euclidean norms. Infinite only beyond the range of float64.
    values : Tensor or None
        float64 (n, width), on the CPU, or a copy of rows no wider than that; None where no
        distances are wanted.
    seed : int
        What signs and places are drawn from.
    """

    norms: NDArray[np.float64]
    values: Tensor | None
    seed: int

    @classmethod
    def of(cls, rows: Tensor, seed: int, *, distances: bool = True) -> Self:
        """Read the rows (n, d) once, in pieces; they stay as they are."""
        if not distances:
            return cls(euclidean_norms(rows), None, seed)
        width = max(64, min(WIDTH, _MOST_NUMBERS // max(1, len(rows))))
        if rows.shape[1] <= width:
            return cls(euclidean_norms(rows), rows.clone(), seed)
        norms, values = _read(rows, width, seed)
        for row in np.flatnonzero(~np.isfinite(norms)):  # its square is beyond float32
            norms[row] = vector_norm(rows[row])
        return cls(norms, values, seed)

    def survey(self, vector: Tensor | None) -> Survey:
        """Return about how far each row was from the aggregate (d,), if there is one."""
        if self.values is None or vector is None:
            return Survey(self.norms)
        if self.values.shape[1] == len(vector):
            return Survey.of(self.values, vector)
        _, sketch = _read(vector[None], self.values.shape[1], self.seed)
        far: NDArray[np.float64] = torch.linalg.vector_norm(self.values - sketch, dim=1).numpy()
        return Survey(self.norms, far)


def _compared(rows: Tensor, vector: Tensor) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the squares of the rows' norms and of their distances from a vector (d,), float64.

    From inner products, in the rows' dtype. Where those do not tell, since a square is beyond that
    dtype's range or a small difference of large ones has lost its digits, from the differences.
    """
    dtype = torch.promote_types(rows.dtype, torch.float32)
    vector = vector.to(rows.device, dtype)
    point = native(vector, rows)

    def compare(columns: slice, block: Block) -> NDArray[np.float64]:
        on_cpu = isinstance(block, np.ndarray)
        part = point[columns]
        products = np.vecdot(block, part) if on_cpu else numbers(block @ part)
        return np.stack([numbers(squared_sizes(block)), products], dtype=np.float64)

    squares, products = sum_blocks(compare, rows, dtype=dtype, read_only=True)
    length = vector_norm(vector)
    whole = squares + length * length  # a power that overflows would raise
    apart = whole - 2 * products
    doubtful = ~(apart > np.maximum(_CANCELS * whole, _TINY))
    if doubtful.any():
        squares[doubtful], apart[doubtful] = _subtracted(rows, vector, np.flatnonzero(doubtful))
    return squares, apart


def _subtracted(rows: Tensor, vector: Tensor, chosen: NDArray[np.intp]) -> NDArray[np.float64]:
    """Return what :func:`_compared` does, (2, m), of m chosen rows: by subtracting, in float64."""
    point, those = native(vector.double(), rows), native(torch.from_numpy(chosen), rows)

    def compare(columns: slice, block: Block) -> NDArray[np.float64]:
        near = block[those]
        squares = numbers(squared_sizes(near))
        near -= point[columns]
        return np.stack([squares, numbers(squared_sizes(near))])

    found: NDArray[np.float64] = sum_blocks(compare, rows)
    return found


@np.errstate(over="ignore")
def _read(rows: Tensor, width: int, seed: int) -> tuple[NDArray[np.float64], Tensor]:
    """Return the rows' norms, float64 (n,), and their sketches, float64 (n, width).

    A norm is infinite where a square is beyond the range of the rows' dtype.
    """
    count, size = rows.shape
    dtype = torch.promote_types(rows.dtype, torch.float32)
    draw = torch.Generator().manual_seed(seed % 2**63)
    folds = min(_FOLDS, -(-size // width))
    signs = torch.randint(0, 2, (folds, width), generator=draw).mul_(2).sub_(1)
    own = native(signs.to(rows.device, dtype), rows)
    long = _FOLDS * width
    shifts = torch.randint(0, width, (-(-size // long),), generator=draw).tolist()
    turns = torch.randint(0, 2, (len(shifts),), generator=draw).mul_(2).sub_(1).tolist()
    height = max(1, _READ // long)
    squares, sketch = np.zeros(count), torch.zeros(count, width, dtype=torch.float64)
    for start in range(0, count, height):
        some = slice(start, min(start + height, count))
        for number, (shift, turn) in enumerate(zip(shifts, turns, strict=True)):
            values = native(rows[some, number * long : (number + 1) * long].to(dtype), rows)
            squares[some] += numbers(squared_sizes(values))
            folded = torch.as_tensor(_folded(values, own)).double().cpu()
            sketch[some] += folded.roll(shift, 1) * turn
    return np.sqrt(squares), sketch


def _folded(values: Block, signs: Block) -> Block:
    """Return the columns of some rows (h, c) added up with signs, (h, width)."""
    width = signs.shape[1]
    folds, rest = divmod(values.shape[1], width)
    whole = values[:, : folds * width].reshape(-1, folds, width)
    einsum: Any = np.einsum if isinstance(values, np.ndarray) else torch.einsum
    total = einsum("hfw,fw->hw", whole, signs[:folds])
    if rest:
        total[:, :rest] += values[:, folds * width :] * signs[folds, :rest]
    return total


def _distance(row: Tensor, vector: Tensor) -> float:
    """Return the distance of a row that float32 cannot square, in pieces."""
    pieces = zip(torch.split(row, 1 << 18), torch.split(vector, 1 << 18), strict=True)
    return math.hypot(*(vector_norm(part.double() - at.to(part.device)) for part, at in pieces))
