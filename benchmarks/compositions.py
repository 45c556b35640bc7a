"""The gap filter before the block and its memory: what BGMD gains by it, in the same runs.

``benchmarks.compositions:filtered_bgmd`` is a strategy like any other.
"""

import torch
from torch import Tensor

from fl_bgmd.aggregators import (
    BlockGeometricMedian,
    BlockMemory,
    block_geometric_median,
    gap_filter,
    rule,
)
from fl_bgmd.aggregators.mixing import clipping
from fl_bgmd.options import Share


@rule("filtered-bgmd", draws="blocks")
def filtered_bgmd(
    updates: Tensor,
    memory: BlockMemory | None = None,
    *,
    byzantine_fraction: Share = 0.25,
    generator: torch.Generator | None = None,
) -> BlockGeometricMedian:
    """Take BGMD of the rows that the gap filter keeps, its mean in place of the others.

    Parameters
    ----------
    updates : Tensor
        (n, d), floating point.
    memory : BlockMemory, optional
        That of the round before.
    byzantine_fraction : float
        0 to below 1/2.
    generator : torch.Generator, optional
        Draws the block.
    """
    filtered = gap_filter(updates, byzantine_fraction=byzantine_fraction)
    assert filtered.weights is not None
    kept = filtered.weights > 0.5 / len(updates)
    rows = clipping(updates).apply(updates)
    rows = torch.where(kept.to(rows.device)[:, None], rows, filtered.vector)
    return block_geometric_median(rows, memory, generator=generator)
