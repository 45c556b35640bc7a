"""How long the updates of a round are and how far from the aggregate, in one pass over the rows.

The pass comes before the rule, which may overwrite the rows, and the distances are wanted after
it: so the pass keeps a sketch of each row (Charikar, Chen and Farach-Colton's CountSketch: sums of
columns with random signs), whose distances are those of the rows to a few percent.
"""

import math
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

WIDTH = 2048
"""Columns of a sketch: a distance is right to about 1 / sqrt(2048), 2 %."""

_FOLDS = 16
"""Blocks of :data:`WIDTH` columns that are read at a time."""

_MOST_NUMBERS = 2**23
"""Of all the rows' sketches: with more rows they are narrower, and distances less precise."""


@dataclass(frozen=True)
class Survey:
    """What one pass over the rows keeps.

    Attributes
    ----------
    norms : ndarray
        float64 (n,): Euclidean norms. Infinite only beyond the range of float64.
    sketch : Tensor
        float64 (n, width), on the CPU.
    seed : int
        What signs and places are drawn from.
    """

    norms: NDArray[np.float64]
    sketch: Tensor
    seed: int

    @classmethod
    def of(cls, rows: Tensor, seed: int) -> Self:
        """Read the rows (n, d) once, in blocks of columns; they stay as they are."""
        width = max(64, min(WIDTH, _MOST_NUMBERS // max(1, len(rows))))
        norms, sketch = _read(rows, width, seed)
        long = np.flatnonzero(~np.isfinite(norms))
        for row in long:  # its square is beyond float32
            norms[row] = _norm(rows[row])
        return cls(norms, sketch, seed)

    def distances(self, vector: Tensor) -> NDArray[np.float64]:
        """Return about how far each row is from ``vector`` (d,): float64 (n,)."""
        _, sketch = _read(vector[None], self.sketch.shape[1], self.seed)
        distances: NDArray[np.float64] = torch.linalg.vector_norm(self.sketch - sketch, dim=1).numpy()
        return distances


def _read(rows: Tensor, width: int, seed: int) -> tuple[NDArray[np.float64], Tensor]:
    """Return the rows' norms, float64 (n,), and their sketches, float64 (n, width)."""
    count, size = rows.shape
    dtype = torch.promote_types(rows.dtype, torch.float32)
    draw = torch.Generator().manual_seed(seed % 2**63)
    signs = torch.randint(0, 2, (_FOLDS, width), generator=draw).mul_(2).sub_(1)
    signs = signs.to(rows.device, dtype)
    squares = torch.zeros(count, dtype=torch.float64)
    sketch = torch.zeros(count, width, dtype=torch.float64)
    # Few rows at a time as well: a block should stay in the cache.
    strip = max(1, (1 << 20) // (_FOLDS * width))
    shifts = torch.randint(0, width, (-(-size // (_FOLDS * width)),), generator=draw).tolist()
    turns = torch.randint(0, 2, (len(shifts),), generator=draw).mul_(2).sub_(1).tolist()
    for number, (shift, turn) in enumerate(zip(shifts, turns, strict=True)):
        start = number * _FOLDS * width
        for first in range(0, count, strip):
            part = slice(first, first + strip)
            block = rows[part, start : start + _FOLDS * width].to(dtype)
            squares[part] += torch.linalg.vector_norm(block, dim=1).double().square().cpu()
            folds, rest = divmod(block.shape[1], width)
            whole = block[:, : folds * width].reshape(len(block), folds, width)
            folded = torch.einsum("nfw,fw->nw", whole, signs[:folds])
            if rest:
                folded[:, :rest] += block[:, folds * width :] * signs[folds, :rest]
            sketch[part] += folded.double().cpu().roll(shift, 1).mul_(turn)
    return squares.sqrt().numpy(), sketch


def _norm(row: Tensor) -> float:
    """Return the norm of a row that float32 cannot square."""
    norms = [float(torch.linalg.vector_norm(part.double())) for part in row.split(1 << 18)]
    return math.hypot(*norms)
