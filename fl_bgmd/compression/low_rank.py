"""Layers as matrices of low rank."""

import math
from dataclasses import dataclass, replace
from typing import Annotated, Self

import numpy as np
import torch
from torch import Tensor

from fl_bgmd.options import Count

from .base import Compressor, Internal, Shapes, compressor
from .bits import check_length, pack_floats, unpack_floats


@compressor("low-rank")
@dataclass(frozen=True)
class LowRank(Compressor):
    """Each layer, as a matrix of its first dimension by the rest, projected on ``rank`` directions.

    k-PCA of Ghosh et al., Section 3, example 2: the top eigenvectors ``U`` of ``M M^T`` (of the
    smaller side), and ``U^T M``; a layer that would not get smaller goes as it is. Message: float32
    values.

    Parameters
    ----------
    rank : int
        Directions that are kept of a layer: 1 or more.
    shapes : tuple of tuple of int
        The layers' shapes, in order; without them the vector is one row. See :meth:`for_shapes`.
    """

    rank: Count = 2
    shapes: Annotated[Shapes, Internal] = ()

    def for_shapes(self, shapes: Shapes) -> Self:
        """Return the compressor of layers of these shapes."""
        return replace(self, shapes=shapes)

    def _layers(self, size: int) -> list[tuple[int, int, int]]:
        """Return ``(rows, columns, rank)`` of each layer, rank 0 for one that goes as it is."""
        layers = []
        for shape in self.shapes or ((size,),):
            rows = shape[0] if len(shape) > 1 else 1
            columns = math.prod(shape) // rows if rows else 0
            pays = self.rank * (rows + columns) < rows * columns
            layers.append((rows, columns, self.rank if pays else 0))
        if sum(rows * columns for rows, columns, _ in layers) != size:
            raise ValueError(f"shapes hold another number of values than {size}")
        return layers

    def encode(self, vector: Tensor, generator: torch.Generator | None = None) -> bytes:
        """Return directions and coefficients of every layer."""
        vector = vector.detach().to(torch.promote_types(vector.dtype, torch.float32))
        parts: list[Tensor] = []
        offset = 0
        for rows, columns, rank in self._layers(len(vector)):
            values = vector[offset : offset + rows * columns]
            offset += rows * columns
            if rank == 0:
                parts.append(values)
                continue
            matrix = values.view(rows, columns)
            matrix = matrix if rows <= columns else matrix.T
            scale = matrix.abs().max().clamp_min(torch.finfo(matrix.dtype).tiny)
            scaled = (matrix / scale).float()  # whose squares neither overflow nor vanish
            directions = torch.linalg.eigh(scaled @ scaled.T).eigenvectors[:, -rank:]
            coefficients = (directions.T @ scaled).to(scale.dtype) * scale
            parts += [directions.flatten(), coefficients.flatten()]
        return pack_floats(torch.cat([part.float() for part in parts]))

    def decode(self, data: bytes, size: int) -> Tensor:
        """Return the products of directions and coefficients."""
        check_length(data, self.num_bytes(size), self.name)
        values = torch.from_numpy(np.array(unpack_floats(data, len(data) // 4), dtype=np.float32))
        result = torch.empty(size)
        read = written = 0
        for rows, columns, rank in self._layers(size):
            part = result[written : written + rows * columns]
            written += rows * columns
            if rank == 0:
                part[:] = values[read : read + rows * columns]
                read += rows * columns
                continue
            small, large = sorted((rows, columns))
            directions = values[read : read + small * rank].view(small, rank)
            read += small * rank
            coefficients = values[read : read + rank * large].view(rank, large)
            read += rank * large
            matrix = directions @ coefficients
            part.view(rows, columns)[:] = matrix if rows <= columns else matrix.T
        if not bool(torch.isfinite(result).all()):
            raise ValueError("a product is NaN or infinite")
        return result

    def num_bytes(self, size: int) -> int:
        """Return 4 bytes for each value of directions and coefficients."""
        layers = self._layers(size)
        return 4 * sum(rank * (rows + cols) if rank else rows * cols for rows, cols, rank in layers)

    def delta(self, size: int) -> float:
        """Return the least ``rank / min(rows, columns)`` of the layers."""
        kept = [rank / min(rows, cols) for rows, cols, rank in self._layers(size) if rank]
        return min(kept, default=1.0)
