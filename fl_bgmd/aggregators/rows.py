"""Passes over the rows of an update matrix, a block of columns or a strip of rows at a time.

Every rule reads its (n, d) input through these functions. Arithmetic is done in float64 on blocks
that fit a core's cache, so no second n x d matrix ever exists and float32 input of any magnitude
neither overflows nor cancels. On the CPU each core works through columns (or rows) of its own, in
NumPy on one thread; on other devices torch does the same, one block after the other.

Few rows are best served by their n x n Gram matrix, which is cheap beside the rows themselves.
For many it would be the larger of the two: there the rules work in strips.
"""

import functools
import itertools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController
from torch import Tensor

from fl_bgmd import mapped
from fl_bgmd.shards import Sharded, over_shards, root_of_squares, side_by_side

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_BLOCK_ELEMENTS = 1 << 19  # of a block: 4 MiB in float64, the fastest of 2^15 to 2^21
_ON_DEVICE = 16  # times as many where there is no core's cache: a kernel costs more than its work
_PIECE, _STRIP = 512, 8  # columns and rows of a small product
_SMALL_ROWS = 100  # with more rows small products gain nothing
_FEW_ELEMENTS = 1 << 22  # fewer are passed over sooner than threads are started
SORTING = 16  # passes: as long as sorting each column takes
_WRITTEN_ELEMENTS = 1 << 20  # of rows that are written together
DENSE_ROWS = 1000  # up to here an n x n matrix is small

Result = TypeVar("Result")
# A block of columns: a NumPy array on the CPU, a tensor elsewhere.
Block = Any


def check_updates(updates: Tensor, name: str = "updates") -> Tensor:
    """Return ``updates`` without gradients.

    Raises ``TypeError`` or ``ValueError`` unless it is a floating-point (n, d) tensor with n and d
    at least 1.
    """
    if not isinstance(updates, Tensor | Sharded):
        raise TypeError(f"{name} must be a torch.Tensor, not {type(updates).__name__}")
    if updates.ndim != 2 or min(updates.shape) < 1:
        raise ValueError(
            f"{name} has shape {tuple(updates.shape)}; allowed: (n, d) with n >= 1 and d >= 1"
        )
    if updates.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"{name} has dtype {updates.dtype}; allowed: "
            + ", ".join(str(dtype) for dtype in FLOAT_DTYPES)
        )
    return updates.detach()


def check_weights(weights: Tensor | None, n: int) -> NDArray[np.float64]:
    """Return ``weights`` as float64 (n,), all ones for None, or raise ``ValueError``."""
    if weights is None:
        return np.ones(n)
    values: NDArray[np.float64] = torch.as_tensor(weights).detach().cpu().double().numpy().copy()
    if values.shape != (n,):
        raise ValueError(f"weights has shape {values.shape}; allowed: ({n},), one for each row")
    with np.errstate(over="ignore"):
        is_finite = np.isfinite(values.sum() ** 2)
    if not is_finite or (values < 0).any() or not (values > 0).any():
        raise ValueError(
            f"weights is {values.tolist()}; allowed: finite values of 0 or more, not all 0, with "
            "a sum below 1e154"
        )
    return values


def check_fraction(name: str, value: float, *, below: float, zero: bool = True) -> None:
    """Raise unless ``0 <= value < below`` (``0 < value`` when ``zero`` is false)."""
    if not (math.isfinite(value) and 0 <= value < below) or (value == 0 and not zero):
        raise ValueError(f"{name} is {value}; allowed: {0 if zero else 'above 0'} to below {below}")


def result_dtype(updates: Tensor) -> torch.dtype:
    """Return the dtype of a rule's vector: the input's, but never less than float32."""
    return torch.float64 if updates.dtype == torch.float64 else torch.float32


def on_cores(function: Callable[[slice], Result], size: int, *, elements: int) -> list[Result]:
    """Cut ``range(size)`` into one slice for each core, apply ``function`` to all at once.

    Returns the results in order. ``function`` runs in a thread and should work in NumPy, which
    then stays on that thread: many small steps on many threads each cost more than they save.
    ``elements`` are how many numbers it passes over, times the passes: if they are few it is one
    slice, on this thread.
    """

    def quietly(part: slice) -> Result:
        with np.errstate(all="ignore"):
            return function(part)

    workers = 1 if elements < _FEW_ELEMENTS else max(1, min(torch.get_num_threads(), size))
    edges = [size * i // workers for i in range(workers + 1)]
    parts = [slice(a, b) for a, b in itertools.pairwise(edges)]
    with blas_on_one_thread():
        if workers == 1:
            return [quietly(parts[0])]
        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(quietly, parts))


@contextmanager
def blas_on_one_thread() -> Iterator[None]:
    """Keep NumPy's linear algebra from starting threads of its own, also as a decorator.

    Beside threads of ours they are in the way, and after a small product they stay awake.
    """
    if getattr(_limited, "here", False):  # further out
        yield
        return
    # The limit is the process's own: overlapping calls would leave it behind.
    with _blas_lock, _blas_libraries().limit(limits=1, user_api="blas"):
        _limited.here = True
        try:
            yield
        finally:
            _limited.here = False


_blas_lock = threading.Lock()
_limited = threading.local()


@lru_cache(maxsize=1)
def _blas_libraries() -> ThreadpoolController:
    return ThreadpoolController()


def sum_blocks(
    function: Callable[[slice, Block], Any],
    updates: Tensor,
    offset: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    read_only: bool = False,
) -> Any:
    """Return the sum over blocks of columns of ``function(columns, block)``, as NumPy values.

    ``block``, (n, c), holds ``updates[:, columns] + offset[columns]`` in ``dtype`` (float32 or
    float64): a NumPy array on the CPU, a tensor elsewhere. It is a buffer that is used again and
    may be overwritten; with ``read_only`` it may be the rows themselves, where they are of that
    dtype. A function that writes into an array of its own (see :func:`native`) returns 0.
    """
    n, d = updates.shape
    width = width_of_blocks(_BLOCK_ELEMENTS, updates)
    if updates.device.type != "cpu":
        total: Any = 0.0
        for start in range(0, d, width):
            columns = slice(start, min(start + width, d))
            block = updates[:, columns].to(dtype, copy=True)
            if offset is not None:
                block += offset[columns]
            total = total + function(columns, block)
        return numbers(total)
    values = None if updates.dtype in (torch.float16, torch.bfloat16) else updates.detach().numpy()
    shift = None if offset is None else offset.detach().numpy()

    as_they_are = read_only and offset is None and updates.dtype == dtype

    def sum_range(part: slice) -> Any:
        size = 0 if as_they_are else part.stop - part.start
        buffer = np.empty(n * min(width, size), np.float64 if dtype == torch.float64 else "f4")
        total: Any = 0.0
        for start in range(part.start, part.stop, width):
            columns = slice(start, min(start + width, part.stop))
            if as_they_are and values is not None:
                total = total + function(columns, values[:, columns])
                continue
            block = buffer[: n * (columns.stop - start)].reshape(n, -1)
            # Cast once, not for every row.
            added = None if shift is None else shift[columns].astype(block.dtype, copy=False)
            if values is None:
                torch.from_numpy(block).copy_(updates[:, columns])
            elif added is None or values.dtype != block.dtype:
                block[:] = values[:, columns]
            else:  # in one step
                np.add(values[:, columns], added, out=block)
                added = None
            if added is not None:
                block += added
            total = total + function(columns, block)
        return total

    return sum(on_cores(sum_range, d, elements=n * d))


def width_of_blocks(elements: int, updates: Tensor, *, least: int = 64) -> int:
    """Return the columns of a block of about ``elements`` on a core of the CPU, more elsewhere."""
    times = 1 if updates.device.type == "cpu" else _ON_DEVICE
    return max(least, times * elements // updates.shape[0])


def native(values: NDArray[Any] | Tensor, updates: Tensor) -> Any:
    """Return ``values`` as what :func:`sum_blocks` computes with: sharing memory where it can."""
    if updates.device.type == "cpu":
        return values.detach().numpy() if isinstance(values, Tensor) else values
    return torch.as_tensor(values).to(updates.device)


def numbers(values: Any) -> Any:
    """Return what was computed on a block as NumPy values."""
    return values.cpu().numpy() if isinstance(values, Tensor) else values


def dot(a: Any, b: Any) -> Any:
    """Return the matrix product of two blocks."""
    # Not NumPy's @, which holds the interpreter's lock while it computes.
    return np.dot(a, b) if isinstance(b, np.ndarray) else a @ b


def empty(shape: int | tuple[int, ...], like: Tensor, dtype: torch.dtype) -> Tensor:
    """Return an uninitialized tensor on the device of ``like``; a matrix in a file if ``like`` is.

    On the CPU it lies in NumPy's memory: large arrays of NumPy's ask for huge pages, without
    which the first touch of fresh memory can cost more than the arithmetic.
    """
    if like.device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=like.device)
    beside = None
    if not isinstance(shape, int) and not isinstance(like, Sharded):
        beside = mapped.like(like, shape, dtype)
    if beside is not None:
        return beside
    return torch.from_numpy(np.empty(shape, np.float64 if dtype == torch.float64 else np.float32))


def written(
    function: Callable[[slice], Tensor], shape: tuple[int, int], like: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return a matrix whose ``rows`` are ``function(rows)``: without a second one on the way."""
    out = empty(shape, like, dtype)
    height = max(1, _WRITTEN_ELEMENTS // max(1, shape[1]))
    for start in range(0, shape[0], height):
        rows = slice(start, min(start + height, shape[0]))
        out[rows] = function(rows)
    return out


def stacked(rows: Sequence[Tensor], like: Tensor) -> Tensor:
    """Return rows (d,) as a matrix of the dtype of ``like``, and in a file if ``like`` is."""
    out = empty((len(rows), len(rows[0])), like, like.dtype)
    for target, row in zip(out, rows, strict=True):
        target.copy_(row)
    return out


def fill_zeros(vector: Tensor) -> Tensor:
    """Fill a vector with zeros, in place and on all cores; return it."""
    if vector.device.type != "cpu":
        return vector.zero_()
    target = vector.numpy()
    on_cores(lambda part: target[part].fill(0), len(target), elements=len(target))
    return vector


@over_shards(lambda parts: None)
def refuse_non_finite(updates: Tensor) -> None:
    """Raise ``ValueError`` naming the first row with a NaN or an infinity, if there is one."""
    for i, row in enumerate(updates):
        if not bool(torch.isfinite(row).all()):
            raise ValueError(f"updates: row {i} holds a NaN or an infinity; allowed: finite values")


def has_cheap_gram(n: int, d: int) -> bool:
    """Whether the (n, n) Gram matrix and n^3 steps cost less than passes over (n, d) rows.

    Measured: both take the same time at 230 rows of 1,000 values, at 900 rows of very many.
    """
    return n <= 128 or n * (1 + 13 * n / d) <= 900


def prefers_gram(rows: Tensor) -> bool:
    """Whether rows had better be worked on by their Gram matrix.

    Passes over shards are messages to others: they cost more.
    """
    return isinstance(rows, Sharded) or has_cheap_gram(*rows.shape)


@over_shards(sum)
def gram_matrix(updates: Tensor, offset: Tensor | None = None) -> NDArray[np.float64]:
    """Return ``K[i, j] = <x_i + offset, x_j + offset>`` of the rows, (n, n), in float64.

    Raises ``ValueError`` naming the row when ``updates`` holds a NaN or an infinity. Squares of
    float64 entries must not overflow: see :func:`in_range`.
    """
    gram = sum_blocks(lambda _, block: _products(block), updates, offset)
    result: NDArray[np.float64] = np.triu(gram) + np.triu(gram, 1).T
    if not np.isfinite(np.diagonal(result)).all():
        refuse_non_finite(updates)
    return result


def _products(block: Block) -> Any:
    """Return the inner products of the rows of a block, (n, n): those from the diagonal up count.

    BLAS has a kernel for small products that is up to twice as fast as its others, but NumPy takes
    a slow one for a matrix times its own transpose: hence short pieces of the rows, and strips of
    rows against the rows from there on, never against the strip alone.
    """
    n = block.shape[0]
    if not 1 < n <= _SMALL_ROWS or not isinstance(block, np.ndarray):
        return dot(block, block.T)
    pieces, rest = _in_pieces(block)
    gram = np.dot(rest, rest.T)
    pieces = pieces.swapaxes(0, 1)
    height = min(_STRIP, (n + 1) // 2)
    for top in range(0, n, height):
        first = top if n - top > height else top - 1
        strip, others = pieces[:, top : top + height], pieces[:, first:]
        gram[top : top + height, first:] += np.matmul(strip, others.swapaxes(1, 2)).sum(0)
    return gram


def _in_pieces(block: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return views of a block: its columns in pieces, (n, m, _PIECE), and those left over."""
    n, width = block.shape
    count = width // _PIECE
    return block[:, : count * _PIECE].reshape(n, count, _PIECE), block[:, count * _PIECE :]


def in_range(updates: Tensor) -> tuple[Tensor, NDArray[np.float64]]:
    """Return ``(rows, scales)`` with ``rows[i] = updates[i] / scales[i]`` safe to square.

    All scales are 1 and ``rows`` is ``updates`` itself unless it is float64 with entries whose
    squares leave the range of float64; narrower dtypes cannot hold such entries. Then all rows
    are scaled alike to bring the bulk near 1, and rows still beyond 1e150 are pulled in to that
    along their ray: seen from the bulk their direction is the same, and so is what a robust rule
    makes of them.
    """
    scales = np.ones(updates.shape[0])
    if updates.dtype != torch.float64:
        return updates, scales
    sizes = largest_entries(updates)
    if not np.isfinite(sizes).all():
        refuse_non_finite(updates)
    typical = float(np.sort(sizes)[len(sizes) // 2]) or float(sizes.max())
    is_ordinary = 1e-100 <= typical <= 1e100 or typical == 0.0
    if is_ordinary and sizes.max() <= 1e150:
        return updates, scales
    scales = np.maximum(1.0 if is_ordinary else typical, sizes / 1e150)
    return divided(updates, scales), scales


@over_shards(lambda parts: functools.reduce(np.maximum, parts))
def largest_entries(updates: Tensor) -> NDArray[np.float64]:
    """Return the largest absolute value of each row, (n,); NaN of a row with one."""
    low, high = torch.aminmax(updates, dim=1)
    sizes: NDArray[np.float64] = torch.maximum(low.abs(), high.abs()).cpu().double().numpy()
    return sizes


def divided(updates: Tensor, divisors: NDArray[np.float64]) -> Tensor:
    """Return a matrix with each row divided by one of the divisors (n,)."""
    if isinstance(updates, Sharded):
        return updates.made(divided, divisors, rows=len(updates), dtype=updates.dtype)
    by = torch.from_numpy(divisors).to(updates.device)[:, None]
    shape = (updates.shape[0], updates.shape[1])
    return written(lambda r: (updates[r] / by[r]).to(updates.dtype), shape, updates, updates.dtype)


def is_dense(rows: Tensor) -> bool:
    """Whether an n x n matrix is small, or is all that there is to work with."""
    return len(rows) <= DENSE_ROWS or isinstance(rows, Sharded)


def squared_distances(gram: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the squared distances between the rows behind ``gram``, (n, n), never negative."""
    diagonal = np.diagonal(gram)
    squared = np.maximum(diagonal[:, None] + diagonal[None, :] - 2.0 * gram, 0.0)
    np.fill_diagonal(squared, 0.0)
    return squared


def pairwise_squared_distances(updates: Tensor) -> NDArray[np.float64]:
    """Return the squared distances between all rows, (n, n) float64, free of cancellation.

    The rows are centered before their Gram matrix is used: on one of themselves in the middle of
    the bulk, and only if the bulk is further from the origin than ten times its spread.
    Rows beyond the range of squared float64 are pulled in first (:func:`in_range`).
    """
    rows, _ = in_range(updates)
    return squared_distances(center(rows, gram_matrix(rows)))


def majority_radius(distances: NDArray[np.float64], weights: NDArray[np.float64]) -> float:
    """Return the least distance within which more than half of the weight lies.

    No minority of far rows can inflate it.
    """
    order = np.argsort(distances, kind="stable")
    reached = np.cumsum(weights[order])
    return float(distances[order[int(np.searchsorted(reached, reached[-1] / 2, side="right"))]])


def center(
    rows: Tensor, gram: NDArray[np.float64], weights: NDArray[np.float64] | None = None
) -> NDArray[np.float64]:
    """Return the Gram matrix of the rows with their bulk moved to the origin, where it matters.

    ``||x_i||^2 + ||x_j||^2 - 2 <x_i, x_j>`` loses ``log10(||x||^2 / distance^2)`` digits. The
    medoid (the row of least summed distance) is a safe center: a majority of rows is near it
    wherever the rest is. A second pass over the data is spent only when digits are at stake.
    """
    weights = np.ones(gram.shape[0]) if weights is None else weights
    offset = _centering_offset(rows, gram, weights)
    return gram if offset is None else gram_matrix(rows, offset)


def _centering_offset(
    rows: Tensor, gram: NDArray[np.float64], weights: NDArray[np.float64]
) -> Tensor | None:
    """Return what to add to the rows to bring their bulk to the origin, None if it is there."""
    n = gram.shape[0]
    if n == 1:
        return None
    distances = np.sqrt(squared_distances(gram))
    medoid = int(np.argmin(np.where(weights > 0, distances @ weights, np.inf)))
    spread = majority_radius(distances[medoid], weights)
    if gram[medoid, medoid] <= 100 * spread**2:
        return None
    return rows[medoid].to(torch.float64, copy=True).neg_()


def bordered_gram(rows: Tensor, extra: Tensor) -> NDArray[np.float64]:
    """Return the Gram matrix of the rows and one more row, (n + 1, n + 1), bulk at the origin.

    Both are taken relative to the rows' medoid where digits are at stake (see :func:`center`).
    """
    n = rows.shape[0]
    gram = np.zeros((n + 1, n + 1))
    gram[:n, :n] = gram_matrix(rows)
    offset = _centering_offset(rows, gram[:n, :n], np.ones(n))
    if offset is not None:
        gram[:n, :n] = gram_matrix(rows, offset)
        extra = extra + offset
    if bool(extra.any()):  # of zeros nothing is to be read
        gram[:n, n] = products_with(rows, extra, offset)
        gram[n, :n] = gram[:n, n]
    gram[n, n] = float(extra @ extra)
    return gram


@over_shards(sum)
def products_with(
    rows: Tensor, vector: Tensor, offset: Tensor | None = None
) -> NDArray[np.float64]:
    """Return ``<x_i + offset, vector>`` of a vector (d,) float64, (n,)."""
    column = native(vector.to(rows.device), rows)
    result: NDArray[np.float64] = sum_blocks(
        lambda columns, block: dot(block, column[columns]), rows, offset
    )
    return result


def densest_row(squared: NDArray[np.float64], count: int) -> tuple[int, float]:
    """Return the row with ``count`` rows closest around it, and the distance of the last of them.

    Of squared distances (n, n), squared like them; the row itself is one of the ``count``.
    """
    radii = np.partition(squared, count - 1, axis=1)[:, count - 1]
    densest = int(np.argmin(radii))
    return densest, float(radii[densest])


def combine(weights: NDArray[np.float64], updates: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``sum_i weights[i] * updates[i]``, (d,), summed in float64, as ``dtype``.

    One row with weight 1 is returned as it is, to the bit.
    """
    used = np.flatnonzero(weights)
    if len(used) == 1 and weights[used[0]] == 1.0:
        return updates[int(used[0])].to(dtype, copy=True)
    if isinstance(updates, Sharded):
        return side_by_side(updates.each(_combined, weights, dtype))
    return _combined(updates, weights, dtype)


def _combined(updates: Tensor, weights: NDArray[np.float64], dtype: torch.dtype) -> Tensor:
    result = empty(updates.shape[1], updates, dtype)
    target, coefficients = native(result, updates), native(weights, updates)

    def write(columns: slice, block: Block) -> float:
        target[columns] = dot(coefficients, block)
        return 0.0

    sum_blocks(write, updates)
    return result


@over_shards(root_of_squares)
def row_norms(
    updates: Tensor, offset: Tensor | None = None, *, dtype: torch.dtype = torch.float64
) -> NDArray[np.float64]:
    """Return the Euclidean norms of the rows of ``updates + offset``, (n,), in float64.

    Squares of float64 entries must not overflow: see :func:`in_range`. With ``dtype`` float32 rows
    are added and squared in that: a relative error of 1e-6, and infinity where a square leaves its
    range. Raises ``ValueError`` naming the row when ``updates`` holds a NaN or an infinity.
    """
    squares = sum_blocks(lambda _, block: squared_sizes(block), updates, offset, dtype=dtype)
    result: NDArray[np.float64] = np.sqrt(squares)
    if not np.isfinite(result).all():
        refuse_non_finite(updates)
    return result


def vector_norm(vector: Tensor) -> float:
    """Return the Euclidean norm of a vector (d,), in float64; not finite where an entry is not."""
    squared = float(sum_blocks(lambda _, block: squared_sizes(block), vector[None])[0])
    largest = float(vector.abs().max()) if math.isinf(squared) else 0.0
    if 0 < largest < math.inf:  # squares beyond the range of float64
        return largest * vector_norm(vector / largest)
    return math.sqrt(squared)


def squared_sizes(block: Block) -> Any:
    """Return the squared norms of the rows of a block, (n,) float64."""
    if not isinstance(block, np.ndarray):
        return block.square().sum(1).double()
    if block.dtype == np.float64:
        return np.vecdot(block, block)
    # Float32 loses no more than the last digit in sums as short as these.
    pieces, rest = _in_pieces(block)
    return np.vecdot(pieces, pieces).sum(1, dtype=np.float64) + np.vecdot(rest, rest)
