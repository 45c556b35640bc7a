"""The block coordinate geometric median of Acharya et al., its printed memories and a robust one.

What becomes of the coordinates outside the block: :mod:`fl_bgmd.aggregators.memory`.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fl_bgmd.options import Count, Fraction, Named, Positive
from fl_bgmd.shards import PerShard, Sharded, over_shards, side_by_side, within

from .geometric_median import Solver, geometric_median
from .location import robust_weights, sketch
from .memory import BlockMemory, after_round
from .norms import clip_factors
from .results import BlockGeometricMedian
from .rows import (
    Block,
    blas_on_one_thread,
    check_updates,
    combine,
    divided,
    dot,
    empty,
    fill_zeros,
    in_range,
    native,
    on_cores,
    result_dtype,
    row_norms,
    sum_blocks,
    written,
)
from .rule import rule
from .sampling import Selection, select_block

MIN_BLOCK_SIZE = 1000
"""Of so few coordinates there is no block worth sampling: what it saves is nothing."""


def _uses(options: Mapping[str, Any]) -> Collection[str]:
    """Return what is made use of under these options."""
    used = ["updates"]
    if options["selection"] != "top-k":  # the strongest coordinates can be foreseen
        used.append("generator")
    if options["memory_rule"] != "none":
        used += ["memory", "step_size"]
    if options["memory_rule"] == "per-client":
        used.append("nodes")
    return used


def _shardable(options: Mapping[str, Any]) -> bool:
    """Return whether the rows may be in shards: those of a memory of their own may not."""
    return bool(options["memory_rule"] != "per-client" and options["solver"] != "newton")


@rule("bgmd", weights_tell=True, uses=_uses, draws="blocks", sharded=_shardable)
@blas_on_one_thread()
def block_geometric_median(
    updates: Tensor,
    memory: BlockMemory | None = None,
    *,
    nodes: Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    step_size: float = 1.0,
    block_fraction: Fraction = 0.1,
    min_block_size: Count = MIN_BLOCK_SIZE,
    selection: Selection = "sample",
    score: Literal["clipped", "squared-norm", "norm"] = "clipped",
    memory_rule: Annotated[
        Literal["robust", "mean", "per-client", "none"], Named("memory")
    ] = "robust",
    solver: Solver = "gram",
    tol: Positive = 1e-6,
) -> BlockGeometricMedian:
    """Return the geometric median of a block of coordinates, zero elsewhere, and the next memory.

    One step of Algorithm 1 with Algorithm 2 of Acharya et al. (BGMD): of ``G_i = x_i + memory`` the
    ``k = round(block_fraction * d)`` chosen columns are aggregated, the others wait in the memory.

    Parameters
    ----------
    updates : Tensor
        (n, d), floating point.
    memory : BlockMemory, optional
        The previous result's ``memory``. Nothing waits by default.
    nodes : sequence of int, optional
        (n,): whose row each is. Under ``per-client`` a node then finds its own row of the memory
        again, whoever else replies.
    generator : torch.Generator, optional
        CPU generator of the block and the sketch; torch's global one by default.
    step_size : float
        By what the model will move along the result, 0 or more: ``gamma_t`` of Algorithm 1, where
        ``G_i = gamma_t x_i + memory``. The result is that of ``G / gamma_t``: what waits is a way
        to go, and counts for more as steps become shorter. A step of 0 leaves the memory as it is.
    block_fraction : float
        Share of the coordinates in a block, above 0 to 1.
    min_block_size : int
        The block has at least this many columns, all of fewer. 1 or more.
    selection : {"sample", "top-k", "uniform"}
        See :func:`~fl_bgmd.aggregators.sampling.select_block`. The paper samples; its code took
        the top k.
    score : {"clipped", "squared-norm", "norm"}
        What a column is worth: its squared norm or its norm (Algorithm 2), or its squared norm
        after each row was scaled down to at most the median row norm (for scoring only), so that
        no row owns the block.
    memory_rule : {"robust", "mean", "per-client", "none"}
        ``mean`` is the paper's Equation 8: the memory is added to every row, and is the mean of
        what the rows have outside the block. ``per-client`` keeps that for each row apart, as the
        paper's code did. Both diverge where clients train far in a round, and let attacks in.
        ``robust``, this project's own, adds a robust location of the rows outside the block
        (:func:`~fl_bgmd.aggregators.location.robust_weights`) to what waits there, and lets it fade
        as the measured curvature asks (:func:`~fl_bgmd.aggregators.memory.after_round`). The
        block's median is that of the rows alone; what has waited there goes beside it.
    solver, tol
        Of the geometric median of the block: see :func:`geometric_median`.

    Raises
    ------
    TypeError, ValueError
        For input outside of the above; a row with a NaN or an infinity is named.
    """
    updates = check_updates(updates)
    n, d = updates.shape
    given = memory
    if isinstance(memory, BlockMemory) and step_size > 0:
        memory = memory.at(step_size)
    before = memory
    if isinstance(memory, BlockMemory) and memory.nodes is not None and nodes is not None:
        memory = memory.of(nodes)
    largest = _check_memory(memory, memory_rule, n, d)

    dtype = result_dtype(updates)
    rows, scale, memory = _prepared(updates, memory, memory_rule, largest)
    offset = None if memory is None else memory.vector
    # Float32 is enough for what is only a probability or kept in float32, unless squares leave it.
    work = torch.float32 if dtype == torch.float32 else torch.float64
    # The block of rows and memory is rounded to float32 below: their norms need no more.
    rounded = offset is not None and work == torch.float32
    norms = row_norms(rows, offset, dtype=torch.float32 if rounded else torch.float64)
    size = float(np.median(norms)) if score == "clipped" else float(norms.max())
    if not (size > 1e-12 and float(norms.max()) < 1e15):
        work = torch.float64
        if rounded:
            norms = row_norms(rows, offset)
    k = min(d, max(min_block_size, round(block_fraction * d)))
    scores = _column_scores(rows, offset, norms, score, work)
    block = select_block(scores, k, selection=selection, generator=generator)
    # Fresh memory is dear: the vector's holds the block first, where that fits.
    vector = empty(d, updates, dtype) if n * k <= d else None
    chosen = empty((n, k), updates, dtype) if vector is None else vector[: n * k].view(n, k)
    is_robust = memory_rule == "robust"
    _gather(rows, None if is_robust else offset, block, chosen)
    median = geometric_median(chosen, tol=tol, solver=solver)
    waited = offset[block] if is_robust and offset is not None else None
    step = median.vector if waited is None else _finite(median.vector + waited)
    squared = norms**2
    left = squared - row_norms(chosen, waited) ** 2
    next_memory: BlockMemory | None = None
    if memory_rule == "per-client":
        left_over = written(lambda r: (rows[r] * scale).to(dtype), (n, d), updates, dtype)
        for row in left_over:
            row.index_fill_(0, block, 0.0)
        whose = None if nodes is None else tuple(nodes)
        next_memory = BlockMemory(left_over, nodes=whose).with_rows_of(before)
    elif memory_rule != "none" and k == d:
        next_memory = BlockMemory(fill_zeros(empty(d, updates, dtype)))
    elif memory_rule != "none":
        weights = np.full(n, 1.0 / n)
        if is_robust:
            weights = robust_weights(sketch(rows, block, generator, work))
        # The scores' tensor is used again, too.
        waits = scores if scores.dtype == dtype else empty(d, updates, dtype)
        _weighted_sum(weights, rows, offset, waits, work)
        if is_robust:
            said = combine(weights * _moderate(chosen), chosen, dtype)
            next_memory = after_round(memory, waits, block, said, waited, step)
        else:
            next_memory = BlockMemory(waits.index_fill_(0, block, 0.0))
        if scale != 1.0:
            next_memory = next_memory.scaled(scale)
            _finite(next_memory.vector)
    if step_size == 0:
        next_memory = given
    elif next_memory is not None:
        next_memory = replace(next_memory, step_size=step_size)
    del chosen
    vector = empty(d, updates, dtype) if vector is None else vector
    native(fill_zeros(vector), updates)[native(block, updates)] = native(step * scale, updates)
    total = float(squared.sum())
    return BlockGeometricMedian(
        vector=vector,
        weights=median.weights,
        gap=median.gap,
        iterations=median.iterations,
        objective=median.objective * scale,
        memory=next_memory,
        block=block,
        residual_ratio=float(left.clip(0.0).sum()) / total if total > 0 and k < d else 0.0,
    )


def _prepared(
    updates: Tensor, memory: BlockMemory | None, memory_rule: str, largest: float
) -> tuple[Tensor, float, BlockMemory | None]:
    """Return rows that are safe to square, what to multiply them by, and the memory beside them.

    A second n x d matrix is made only where each row has a memory of its own, which is added to it,
    or where squares leave the range of float64.
    """
    if memory is not None and (
        memory_rule == "per-client" or (memory_rule == "mean" and largest > 1e100)
    ):
        given, added = updates, memory.vector
        of_each = memory_rule == "per-client"
        updates = written(
            lambda r: _finite(given[r] + (added[r] if of_each else added)),
            (given.shape[0], given.shape[1]),
            given,
            torch.promote_types(given.dtype, added.dtype),
        )
        memory, largest = None, 0.0
    rows, scales = in_range(updates)
    scale = float(scales.min())
    if largest / scale > 1e100:
        rows, scale = divided(rows, np.full(len(rows), largest / scale)), largest
    return rows, scale, memory if memory is None or scale == 1.0 else memory.scaled(1 / scale)


def _moderate(chosen: Tensor) -> NDArray[np.float64]:
    """Return factors that keep rows of the block, (n, k), from being much longer than the others.

    The weights beside them come from the other columns, and do not know.
    """
    norms = row_norms(chosen)
    return clip_factors(norms, 3 * float(np.median(norms)))


def _column_scores(
    rows: Tensor,
    offset: Tensor | None,
    norms: NDArray[np.float64],
    score: str,
    work: torch.dtype,
) -> Tensor:
    """Return the scores of the columns of ``rows + offset``, (d,) float32, at most 1."""
    factors = np.ones_like(norms)
    if score == "clipped":
        factors = clip_factors(norms, float(np.median(norms)))
    total = float(((factors * norms) ** 2).sum())
    if total == 0.0:
        return fill_zeros(empty(rows.shape[1], rows, torch.float32))
    # Divided by the total before the sum: float32 holds the result whatever the rows' size.
    return _weighted_squares(rows, offset, factors**2 / total, score == "norm", work)


@over_shards(side_by_side)
def _weighted_squares(
    rows: Tensor,
    offset: Tensor | None,
    shares: NDArray[np.float64],
    root: bool,
    work: torch.dtype,
) -> Tensor:
    """Return ``sum_i shares_i (x_i + offset)^2``, or its root, (d,) float32."""
    scores = empty(rows.shape[1], rows, torch.float32)
    weights = native(torch.from_numpy(shares).to(work), rows)
    target = native(scores, rows)

    def write(columns: slice, block: Block) -> float:
        block *= block
        column = dot(weights, block)
        target[columns] = column**0.5 if root else column
        return 0.0

    sum_blocks(write, rows, offset, dtype=work)
    return scores


def _gather(rows: Tensor, offset: Tensor | None, block: Tensor, out: Tensor) -> None:
    """Write the columns ``block`` of ``rows + offset`` into ``out``, (n, k), in its range."""
    if isinstance(rows, Sharded):
        parts = rows.each(_gathered, offset, PerShard(lambda part: within(block, part)), out.dtype)
        torch.cat(parts, dim=1, out=out)
        return
    if rows.device.type != "cpu" or rows.dtype == torch.bfloat16:  # which NumPy has not
        out.copy_(rows[:, block])
        if offset is not None:
            _finite(out.add_(offset[block]))
        return
    source, target, indices = native(rows, rows), out.numpy(), block.numpy()
    shift = None if offset is None else native(offset, rows)
    limit = torch.finfo(out.dtype).max

    def gather(part: slice) -> None:
        added = None if shift is None else shift[indices[part]].astype(target.dtype)
        for row, values in zip(source, target[:, part], strict=True):
            if row.dtype == values.dtype:
                # The indices are in range: "clip" spares NumPy a buffer.
                np.take(row, indices[part], out=values, mode="clip")
            else:
                values[:] = row[indices[part]]
            if added is not None:
                values += added
                np.clip(values, -limit, limit, out=values)

    on_cores(gather, len(block), elements=out.numel())


def _gathered(rows: Tensor, offset: Tensor | None, block: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty((len(rows), len(block)), dtype=dtype)
    _gather(rows, offset, block, out)
    return out


def _weighted_sum(
    coefficients: NDArray[np.float64],
    rows: Tensor,
    offset: Tensor | None,
    out: Tensor,
    work: torch.dtype,
) -> None:
    """Write ``coefficients @ (rows + offset)`` into ``out``, kept in the range of its dtype."""
    if isinstance(rows, Sharded):
        torch.cat(rows.each(_weighted, coefficients, offset, out.dtype, work), out=out)
        return
    weights = native(torch.from_numpy(coefficients).to(work), rows)
    target = native(out, rows)
    shift = None if offset is None else native(offset, rows)
    total, limit = float(coefficients.sum()), torch.finfo(out.dtype).max

    def write(columns: slice, block: Block) -> float:
        column = dot(weights, block)
        if shift is not None:
            column = column + total * shift[columns]
        target[columns] = column.clip(-limit, limit)
        return 0.0

    sum_blocks(write, rows, dtype=work)


def _weighted(
    rows: Tensor,
    coefficients: NDArray[np.float64],
    offset: Tensor | None,
    dtype: torch.dtype,
    work: torch.dtype,
) -> Tensor:
    out = torch.empty(rows.shape[1], dtype=dtype)
    _weighted_sum(coefficients, rows, offset, out, work)
    return out


def _finite(values: Tensor) -> Tensor:
    """Bring sums that left the range of the dtype back to its ends, in place.

    A memory that holds rows as they came can be driven there by one client; the next round must
    find it usable.
    """
    limit = torch.finfo(values.dtype).max
    return values.clamp_(-limit, limit)


def _check_memory(memory: BlockMemory | None, memory_rule: str, n: int, d: int) -> float:
    """Raise unless ``memory`` suits the rule; return its vector's largest absolute value."""
    if memory is None:
        return 0.0
    if not isinstance(memory, BlockMemory):
        raise TypeError(
            f"memory is a {type(memory).__name__}; allowed: None, or the memory of a result"
        )
    if memory_rule == "none":
        raise ValueError("memory is given with memory_rule 'none'; allowed: None")
    shape = (n, d) if memory_rule == "per-client" else (d,)
    if tuple(memory.vector.shape) != shape:
        raise ValueError(
            f"memory has shape {tuple(memory.vector.shape)}; allowed under memory_rule "
            f"{memory_rule!r}: {shape}"
        )
    values = native(memory.vector, memory.vector)
    largest = max(abs(float(values.min())), abs(float(values.max())))
    if not math.isfinite(largest):
        raise ValueError("memory holds a NaN or an infinity; allowed: finite values")
    return largest
