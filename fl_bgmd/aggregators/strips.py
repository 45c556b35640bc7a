"""Passes over many rows, a strip of them at a time: no n x n matrix."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fl_bgmd.shards import Sharded

from .rows import (
    Block,
    dot,
    empty,
    fill_zeros,
    gram_matrix,
    native,
    numbers,
    on_cores,
    row_norms,
    squared_distances,
    sum_blocks,
)

_DISTANCE_ELEMENTS, _DISTANCE_WIDTH = 1 << 20, 128  # of a strip of distances; columns at a time

_STRIP_ELEMENTS = 1 << 17  # of a strip of rows: 1 MiB in float64
_LONG_ROW, _HIGH = 1 << 18, 64  # values that leave a core's cache; a strip then has ``_HIGH`` rows


def sum_strips(
    function: Callable[[slice, Block], Any], updates: Tensor, offset: Tensor | None = None
) -> Any:
    """Return the sum over strips of rows of ``function(rows, block)``, as NumPy values.

    ``block``, (m, d), holds ``updates[rows] + offset`` in float64, with all columns: one pass
    gives what depends on whole rows. Otherwise like :func:`.rows.sum_blocks`.
    """
    n, d = updates.shape
    height = max(1, _STRIP_ELEMENTS // d)
    on_cpu = updates.device.type == "cpu"
    shift = None if offset is None else native(offset, updates)

    def sum_range(part: slice) -> Any:
        total: Any = 0.0
        buffer = torch.empty(
            (min(height, part.stop - part.start), d), dtype=torch.float64, device=updates.device
        )
        for start in range(part.start, part.stop, height):
            rows = slice(start, min(start + height, part.stop))
            strip = buffer[: rows.stop - start]
            block: Block
            if on_cpu and updates.dtype in (torch.float32, torch.float64):
                block = strip.numpy()
                block[:] = updates[rows].numpy()
            else:
                strip.copy_(updates[rows])
                block = strip.numpy() if on_cpu else strip
            if shift is not None:
                block += shift
            total = total + function(rows, block)
        return numbers(total)

    if not on_cpu:
        return sum_range(slice(0, n))
    return sum(on_cores(sum_range, n, elements=n * d))


def sum_weighted(
    measures: Sequence[Callable[[slice, Block], Any]],
    weigh: Callable[[slice, NDArray[np.float64]], NDArray[np.float64]],
    updates: Tensor,
    offset: Tensor,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return what is measured of each row, and the sum of the rows weighted by it.

    One pass in strips; where rows are too long for that, each strip is read twice in blocks.

    Parameters
    ----------
    measures : sequence of callable
        ``measure(columns, block)``, (m,), of m rows of ``updates + offset``: adds up over columns.
    weigh : callable
        ``weigh(rows, values)``: the weights of some rows, (m,), from their measures (k, m).
    updates : Tensor
        (n, d).
    offset : Tensor
        (d,) float64.

    Returns
    -------
    values : (k, n)
        The measures.
    total : (d,)
        ``sum_i weights_i (x_i + offset)``.
    """
    n, d = updates.shape
    values = np.empty((len(measures), n))
    if d < _LONG_ROW:

        def take(rows: slice, block: Block) -> Any:
            for value, measure in zip(values, measures, strict=True):
                value[rows] = numbers(measure(slice(0, d), block))
            return dot(native(weigh(rows, values[:, rows]), updates), block)

        return values, sum_strips(take, updates, offset)
    offset, total = offset.to(updates.device), fill_zeros(empty(d, updates, torch.float64))
    target = native(total, updates)

    def measured(columns: slice, block: Block) -> NDArray[np.float64]:
        return np.stack([numbers(measure(columns, block)) for measure in measures])

    for start in range(0, n, _HIGH):
        rows = slice(start, min(start + _HIGH, n))
        values[:, rows] = sum_blocks(measured, updates[rows], offset)
        weights = native(weigh(rows, values[:, rows]), updates)

        def add(columns: slice, block: Block, weights: Any = weights) -> float:
            target[columns] += dot(weights, block)
            return 0.0

        sum_blocks(add, updates[rows], offset)
    return values, numbers(total)


def measure_strips(
    function: Callable[[slice, NDArray[np.float64]], None], updates: Tensor, middle: Tensor
) -> None:
    """Call ``function(rows, squared)`` for strips of rows that cover all of them.

    ``squared``, (m, n) float64, holds the squared distances from ``rows`` to every row, never
    negative, 0 from a row to itself; it may be overwritten. No more than a strip for each core is
    ever held. ``middle``, (d,), is taken for the origin: distances keep their digits where the
    bulk of the rows is near it. Squares must not overflow: see :func:`in_range`.
    """
    n, d = updates.shape
    if isinstance(updates, Sharded):  # one message for each shard, not one for each strip
        squared = squared_distances(gram_matrix(updates, -middle.double()))
        function(slice(0, n), squared)
        return
    offset = -middle.double()
    lengths = row_norms(updates, offset) ** 2
    height = max(1, _DISTANCE_ELEMENTS // n)
    width = _DISTANCE_WIDTH
    shift = native(offset, updates)

    def products(rows: slice) -> Any:
        total: Any = 0.0
        for start in range(0, d, width):
            columns = slice(start, min(start + width, d))
            others = native(updates[:, columns].to(torch.float64, copy=True), updates)
            others += shift[columns]
            total += dot(others[rows], others.T)
        return numbers(total)

    def measure(part: slice) -> None:
        for start in range(part.start, part.stop, height):
            rows = slice(start, min(start + height, part.stop))
            squared = products(rows)
            squared *= -2.0
            squared += lengths
            squared += lengths[rows, None]
            np.maximum(squared, 0.0, out=squared)
            squared[np.arange(rows.stop - start), np.arange(start, rows.stop)] = 0.0
            function(rows, squared)

    on_cores(measure, n, elements=n * n * d if updates.device.type == "cpu" else 0)
