"""How long the updates of a round are and how far from the aggregate, in one pass over the rows.

The distances are wanted after the rule. Where mixings overwrite the rows before, a sketch of each
is kept (Charikar, Chen and Farach-Colton's CountSketch: sums of columns with random signs), whose
distances are those of the rows to a few percent. Rows no wider than a sketch are kept themselves.
"""

import math
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fl_bgmd.aggregators.norms import euclidean_norms
from fl_bgmd.aggregators.rows import (
    Block,
    native,
    numbers,
    on_cores,
    squared_sizes,
    sum_blocks,
    vector_norm,
)

WIDTH = 2048
"""Columns of a sketch: a distance is right to about 1 / sqrt(2048), 2 %."""

_FOLDS = 64
"""Times :data:`WIDTH`: how many columns of a row are read at a time."""

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


def _read(rows: Tensor, width: int, seed: int) -> tuple[NDArray[np.float64], Tensor]:
    """Return the rows' norms, float64 (n,), and their sketches, float64 (n, width)."""
    count, size = rows.shape
    dtype = torch.promote_types(rows.dtype, torch.float32)
    draw = torch.Generator().manual_seed(seed % 2**63)
    folds = min(_FOLDS, -(-size // width))
    signs = torch.randint(0, 2, (folds, width), generator=draw).mul_(2).sub_(1)
    signs = signs.to(rows.device, dtype)
    long = _FOLDS * width
    shifts = torch.randint(0, width, (-(-size // long),), generator=draw).tolist()
    turns = torch.randint(0, 2, (len(shifts),), generator=draw).mul_(2).sub_(1).tolist()

    def read(blocks: slice) -> tuple[Tensor, Tensor]:
        squares = torch.zeros(count, dtype=torch.float64)
        sketch = torch.zeros(count, width, dtype=torch.float64)
        for number in range(blocks.start, blocks.stop):
            for row in range(count):
                values = rows[row, number * long : (number + 1) * long].to(dtype)
                square, folded = _fold(values, signs)
                squares[row] += square
                sketch[row] += folded.double().cpu().roll(shifts[number]) * turns[number]
        return squares, sketch

    few = rows.device.type != "cpu" or rows.numel() < 2**16
    parts = on_cores(read, len(shifts), few=few)
    squares = torch.stack([squares for squares, _ in parts]).sum(0)
    norms: NDArray[np.float64] = squares.sqrt().numpy()
    return norms, torch.stack([sketch for _, sketch in parts]).sum(0)


def _fold(values: Tensor, signs: Tensor) -> tuple[float, Tensor]:
    """Return the square of a piece's norm, and its columns added up with signs (width,).

    In NumPy where it can be, which stays on its thread.
    """
    width = signs.shape[1]
    folds, rest = divmod(len(values), width)
    if values.device.type == "cpu":
        piece, own = values.numpy(), signs.numpy()
        folded = np.einsum("fw,fw->w", piece[: folds * width].reshape(folds, width), own[:folds])
        if rest:
            folded[:rest] += piece[folds * width :] * own[folds, :rest]
        return float(piece @ piece), torch.from_numpy(folded)
    total = (values[: folds * width].reshape(folds, width) * signs[:folds]).sum(0)
    if rest:
        total[:rest] += values[folds * width :] * signs[folds, :rest]
    return float(values @ values), total


def _distance(row: Tensor, vector: Tensor) -> float:
    """Return the distance of a row that float32 cannot square, in pieces."""
    pieces = zip(torch.split(row, 1 << 18), torch.split(vector, 1 << 18), strict=True)
    return math.hypot(*(vector_norm(part.double() - at.to(part.device)) for part, at in pieces))
